"""Features of all ranks, differentiable so that gradients averaged over ranks are the single-process ones of the global batch.

Every rank owns a loss ``L_r``; the global loss is their mean. The backward pass of the gather sums over ranks what each rank's
loss says about a feature, so its owner receives ``W`` times the global gradient, and averaging the parameters' gradients over
the ``W`` ranks divides by ``W`` again. Parameters that enter each rank's loss directly, such as ``logit_scale``, come out right
by the averaging alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.ranks import data_peers


@dataclass(frozen=True)
class Gather:
    """Concatenates tensors of equal shape over the ranks of a process group, differentiably.

    Args:
        group: The process group, None being the default one.
        ring: Whether losses that can are to pass features around (`mm.losses.ring`) instead of gathering those of all.
    """

    group: dist.ProcessGroup | None = None
    ring: bool = False

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def own(self, num_rows: int) -> slice:
        """Where this rank's ``num_rows`` rows lie in a gathered tensor."""
        return slice(self.rank * num_rows, (self.rank + 1) * num_rows)

    def __call__(self, local: Tensor) -> Tensor:
        """``(n, ...)`` of each rank to ``(W * n, ...)`` in rank order. The number of rows is the same on all ranks."""
        return _GatherRows.apply(local, self)  # pyright: ignore[reportReturnType]

    def longest(self, local: Tensor) -> int:
        """The largest second dimension that any rank has."""
        length = torch.tensor(local.shape[1], device=local.device)
        dist.all_reduce(length, op=dist.ReduceOp.MAX, group=self.group)
        return int(length)

    def rows(self, local: Tensor, wanted: Tensor) -> Tensor:
        """Some rows ``(m, ...)`` of what calling this would give, differentiably; only these are sent.

        Args:
            local: ``(n, ...)``, of one shape on all ranks.
            wanted: Places in the gathered tensor, ``(m,)`` int64; m is the same on all ranks.
        """
        order = wanted.argsort(stable=True)  # by owner, as they arrive
        requests = self(wanted[order]).view(self.world_size, -1)
        owners = requests.div(len(local), rounding_mode="floor")
        asked = requests[owners == self.rank] - self.rank * len(local)
        sent = (owners == self.rank).sum(1).tolist()
        received = torch.bincount(owners[self.rank], minlength=self.world_size).tolist()
        return _Exchange.apply(local[asked], sent, received, self.group)[order.argsort()]  # pyright: ignore[reportIndexIssue]


def current_gather() -> Gather | None:
    """The gather over the processes that hold other samples, or None where this process holds all."""
    peers = data_peers()
    return Gather(peers.group, peers.ring) if peers.size > 1 else None


def average_count(count: int, gather: Gather | None, device: torch.device) -> float | Tensor:
    """What to divide a rank's sum by so that the mean over ranks is the mean over everything that all ranks count, at least 1.

    Args:
        count: What this rank sums over.
        gather: Ranks whose gradients are averaged; None for this process alone.
        device: That the ranks talk from.
    """
    if gather is None:
        return max(1, count)
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total, group=gather.group)
    return total.clamp_(min=1).div_(gather.world_size)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        local = local.contiguous()
        everything = local.new_empty(gather.world_size * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(everything, local, group=gather.group)
        return everything

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gather: Gather = ctx.gather
        gradient = gradients[0].contiguous()
        num_rows = len(gradient) // gather.world_size
        if dist.get_backend(gather.group) == "nccl":
            local = gradient.new_empty(num_rows, *gradient.shape[1:])
            dist.reduce_scatter_tensor(local, gradient, group=gather.group)
            return local, None
        total = gradient.clone()  # gloo has no reduce-scatter; autograd may still use the incoming tensor elsewhere
        dist.all_reduce(total, group=gather.group)
        return total[gather.own(num_rows)], None


class _Exchange(torch.autograd.Function):
    """Sends ``sent[r]`` rows to each rank r and returns those received; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].contiguous()
        returned = gradient.new_empty(sum(ctx.sent), *gradient.shape[1:])
        dist.all_to_all_single(returned, gradient, ctx.sent, ctx.received, group=ctx.group)
        return returned, None, None, None
