"""Which processes of a training hold samples of their own, told to all that add up over samples.

By default all processes do. Where several share one copy of the network, by tensor or pipeline parallelism, they hold the same
samples, and each is in one group with those that have the same part of the network and other samples.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Peers:
    """Some processes that this one belongs to.

    Args:
        rank: Of this process among them.
        size: How many they are.
        group: Their process group; None where this process is alone, or for the default group.
        ring: Whether contrastive losses pass features around among them instead of gathering those of all;
            None leaves it to their size.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    ring: bool | None = None


_data: Peers | None = None


def data_peers() -> Peers:
    """The processes that hold other samples of the global batch, this one included."""
    if not (dist.is_available() and dist.is_initialized()):
        return Peers()
    return _data or Peers(dist.get_rank(), dist.get_world_size())


def set_data_peers(peers: Peers | None) -> None:
    """Tell that only these hold samples of their own; None tells that all processes do."""
    global _data  # noqa: PLW0603 - as much a fact of the process as torch's default process group
    _data = peers


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is told that it holds all samples, for what it computes without the others: they do not answer."""
    before = _data
    set_data_peers(Peers())
    try:
        yield
    finally:
        set_data_peers(before)


def single(tensor: Tensor) -> Tensor:
    """In fp32 at least, which is what sums over processes are taken in: backends add in the type that is sent."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A new tensor without a graph, the sum over processes; numbers of 16 bits are added in fp32 and rounded once."""
    wide = single(tensor.detach())
    total = wide.clone(memory_format=torch.contiguous_format) if wide.dtype == tensor.dtype else wide.contiguous()
    dist.all_reduce(total, group=group)
    return total.to(tensor.dtype)


@dataclass(frozen=True)
class Split:
    """How a parameter is shared by processes that compute a layer together; a parameter carries it as its attribute ``sliced``.

    Args:
        dim: Dimension that is cut.
        parts: Number of equal parts of that dimension that are cut each by itself, such as keys and values in one matrix.
        peers: The processes that hold a piece each.
    """

    dim: int
    parts: int
    peers: Peers

    def own(self, whole: Tensor) -> Tensor:
        """This process's piece of a whole tensor."""
        pieces = [part.chunk(self.peers.size, self.dim)[self.peers.rank] for part in whole.chunk(self.parts, self.dim)]
        return torch.cat(pieces, self.dim)

    def whole(self, own: Tensor) -> Tensor:
        """The whole tensor from everyone's pieces; all of them take part."""
        pieces = [torch.empty_like(own) for _ in range(self.peers.size)]
        dist.all_gather(pieces, own.contiguous(), group=self.peers.group)
        cut = [piece.chunk(self.parts, self.dim) for piece in pieces]
        return torch.cat([cut[rank][part] for part in range(self.parts) for rank in range(self.peers.size)], self.dim)
