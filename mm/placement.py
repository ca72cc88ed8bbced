"""Where the numbers of a tensor are, when processes share it: whole tensors to pieces and back, by what a parameter knows.

A parameter may be cut twice: over the processes that compute a layer together (its attribute ``sliced``, `mm.ranks.Split`), and
what is left over the processes with other samples (then it is a DTensor). On the meta device it belongs to another process,
the stage of a pipeline that its attribute ``stage`` names. Averages that optimizers keep lie where their parameter lies.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; that class is not imported for it, which takes a second."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part that lies here, in the same memory."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def here(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parts that lie here, without what belongs to another stage: for what is done to each number by itself."""
    return [local(tensor) for tensor in tensors if not tensor.is_meta]


def whole(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor from the pieces ``value``, which lie as those of ``like``; all processes that share it call this."""
    value = value.detach()
    if is_sharded(value):
        value = value.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
    split = getattr(like, "sliced", None)
    return value if split is None or value.is_meta or not value.ndim else split.whole(value)


def own(value: Tensor, like: Any) -> Tensor:
    """The piece of a whole tensor that lies here, as ``like`` does; on its device."""
    if like.is_meta:
        return torch.empty_like(like, dtype=value.dtype)
    value = value.to(like.device)
    split = getattr(like, "sliced", None)
    if split is not None:
        value = split.own(value)
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def whole_shape(like: Tensor) -> torch.Size:
    """Shape of the whole tensor."""
    split, shape = getattr(like, "sliced", None), list(like.shape)
    if split is not None:
        shape[split.dim] *= split.peers.size
    return torch.Size(shape)


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a network, in order: what is in a list called ``blocks``, or something that ends like this."""
    for name, part in network.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and name.endswith("blocks"):
            yield from (block for block in part if next(block.parameters(), None) is not None)
