"""Features of all ranks, differentiable so that gradients averaged over ranks are the single-process ones of the global batch.

Every rank owns a loss ``L_r``; the global loss is their mean. The backward pass of the gather sums over ranks what each rank's
loss says about a feature, so its owner receives ``W`` times the global gradient, and averaging the parameters' gradients over
the ``W`` ranks divides by ``W`` again. Parameters that enter each rank's loss directly, such as ``logit_scale``, come out right
by the averaging alone. Sums over ranks are taken in fp32, whatever the type of what is summed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm.ranks import data_peers, single, sum_over

GATHER_LIMIT = 32 << 20
"""Most bytes of gathered features that the automatic choice holds; losses of more pass blocks around (`mm.losses.ring`)."""


@dataclass(frozen=True)
class Gather:
    """Concatenates tensors of equal shape over the ranks of a process group, differentiably, or passes them around.

    Args:
        group: The process group, None being the default one.
        ring: Whether contrastive losses pass the ranks' features around instead of holding all of them: the result is the same,
            the memory that of one rank's features whatever the number of ranks. None chooses by size.
    """

    group: dist.ProcessGroup | None = None
    ring: bool | None = None

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return dist.get_world_size(self.group)

    def own(self, num_rows: int) -> slice:
        """Where this rank's ``num_rows`` rows lie in a gathered tensor."""
        return slice(self.rank * num_rows, (self.rank + 1) * num_rows)

    def by_ring(self, local: Tensor) -> bool:
        """Whether features of which each rank has as many as ``local`` are passed around."""
        return self.world_size * local.nbytes > GATHER_LIMIT if self.ring is None else self.ring

    def pass_on(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Begin to send tensors to the next rank; what is returned waits and gives those of the previous rank.

        All ranks pass tensors of the same shapes in the same order. What is sent must not be changed before the wait.
        """
        if self.world_size == 1:
            return lambda: tensors
        group = self.group if self.group is not None else dist.group.WORLD
        assert group is not None
        following, previous = (dist.get_global_rank(group, (self.rank + step) % self.world_size) for step in (1, -1))
        received = tuple(torch.empty_like(tensor) for tensor in tensors)
        operations = [dist.P2POp(dist.isend, tensor, following, group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, previous, group) for tensor in received]
        works = dist.batch_isend_irecv(operations)

        def wait() -> tuple[Tensor, ...]:
            for work in works:
                work.wait()
            return received

        return wait

    def sum(self, local: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, differentiable."""
        return _SumOverRanks.apply(local, self)  # pyright: ignore[reportReturnType]

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
            gradient = single(gradient)
            local = gradient.new_empty(num_rows, *gradient.shape[1:])
            dist.reduce_scatter_tensor(local, gradient, group=gather.group)
            return local.to(gradients[0].dtype), None
        return sum_over(gradient, gather.group)[gather.own(num_rows)], None  # gloo has no reduce-scatter


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


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return sum_over(local, gather.group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradients[0], ctx.gather.group), None
