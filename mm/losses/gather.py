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


@dataclass(frozen=True)
class Gather:
    """Concatenates tensors of equal shape over the ranks of a process group, differentiably.

    Args:
        group: The process group, None being the default one.
    """

    group: dist.ProcessGroup | None = None

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


def current_gather() -> Gather | None:
    """The gather over the default process group, or None in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return Gather()
    return None


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
