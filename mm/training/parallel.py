"""Processes started by torchrun: who am I, equal weights, averaged gradients, agreement.

Gradients are averaged after the backward pass instead of by DistributedDataParallel's hooks, because exact accumulation runs
several backward passes a step in which a parameter may take part once, often or never; one rule then fits every system.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - documented, but not exported
from torch.distributed.rendezvous import rendezvous

from mm.placement import local
from mm.ranks import Peers, set_data_peers, single
from mm.training.config import ParallelConfig
from mm.training.devices import choose_device

BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class World:
    """This process among all processes of the training.

    Args:
        rank: Number of this process, 0 being the one that writes files.
        size: Number of processes.
        device: Where this process computes.
        control: Gloo group for messages that live on the CPU; None in a single process.
        model_size: Processes that share one copy of the network and see the same samples, neighbours by rank.
        store: Through which the processes met, if they met here.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    model_size: int = 1
    store: Store | None = None

    @property
    def data_rank(self) -> int:
        """Number of this process's samples among all parts of the global batch."""
        return self.rank // self.model_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def environment() -> tuple[int, int]:
    """Rank and number of processes that torchrun announced, (0, 1) without it. Known before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def open_world(device: str = "auto", parallel: ParallelConfig | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, or be alone; a process group that exists already is used and left alone.

    Raises:
        ConfigError: There is no such device, or so many processes cannot be shared out as ``parallel`` says.
    """
    parallel = parallel or ParallelConfig()
    existing = dist.is_available() and dist.is_initialized()
    rank, size = (dist.get_rank(), dist.get_world_size()) if existing else environment()
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else 0)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    parallel.data_size(size)
    if size == 1:
        yield World(0, 1, chosen)
        return
    store, patience = None, timedelta(seconds=parallel.timeout_seconds)
    if not existing:
        store, rank, size = next(rendezvous("env://", rank, size))
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    try:
        control = dist.new_group(backend="gloo", timeout=patience)
        assert isinstance(control, dist.ProcessGroup)  # this process is a member
        yield World(rank, size, chosen, control, parallel.model_size, store)
    finally:
        set_data_peers(None)
        if not existing:
            dist.destroy_process_group()


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[Tensor], world: World) -> None:
    """Give every process the first one's values, in place."""
    if world.size > 1:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.broadcast(flat, src=0)
            _unflatten(flat, bucket)


def broadcast_module(module: nn.Module, world: World) -> None:
    """Give every process the first one's parameters and buffers."""
    broadcast_tensors([*module.parameters(), *module.buffers()], world)


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor], world: World, peers: Peers, *, alike: bool = False) -> None:
    """Replace ``.grad`` by its mean over peers, added up in fp32; it stays None where no process has a gradient.

    Args:
        parameters: As many on all processes, each cut in the same way among peers.
        world: All processes.
        peers: Those to average over.
        alike: Whether all that have a gradient have the same one, and None says nothing, such as of what the layers of one
            stage alone use; else None counts as zero.
    """
    if peers.size == 1:
        return
    everyone = peers.size == world.size
    present = [parameter.grad is not None for parameter in parameters]
    counts = torch.tensor(present, dtype=torch.int32, device="cpu" if everyone else world.device)
    dist.all_reduce(counts, group=world.control if everyone else peers.group)
    gradients, missing = [], []
    for parameter, count in zip(parameters, counts.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(local(parameter.grad))
            if alike and count < peers.size:
                missing.append((gradients[-1], count))
    sent = []
    for bucket in _buckets(gradients):
        flat = single(torch.cat([gradient.reshape(-1) for gradient in bucket]))
        sent.append((bucket, flat, dist.all_reduce(flat, group=peers.group, async_op=True)))
    for bucket, flat, work in sent:
        if work is not None:
            work.wait()
        _unflatten(flat.div_(peers.size), bucket)
    for gradient, count in missing:
        gradient.mul_(peers.size / count)


def sum_over_ranks(values: Sequence[float], world: World) -> list[float]:
    """Sums over processes of a few numbers; every process gets the same ones."""
    if world.size == 1:
        return list(values)
    packed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(packed, group=world.control)
    return packed.tolist()


def sum_tensors(tensors: Sequence[Tensor], world: World) -> None:
    """Replace tensors on the CPU, of equal shapes everywhere, by their sums over processes; needs no second copy of them."""
    if world.size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=world.control)


def gather_bytes(data: bytes, world: World) -> list[bytes]:
    """Every process's ``data``, in rank order, on every process."""
    if world.size == 1:
        return [data]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world.size)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=world.control)
    longest = max(1, *(int(size) for size in sizes))
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
    received = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(received, padded, group=world.control)
    return [part[: int(size)].numpy().tobytes() for part, size in zip(received, sizes, strict=True)]


def gather_json(value: Any, world: World) -> list[Any]:
    """Every process's ``value``, which JSON can hold, in rank order, on every process."""
    return [json.loads(part) for part in gather_bytes(json.dumps(value).encode(), world)]


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Group tensors of one type and device into buckets that are worth one message."""
    filled: list[list[Tensor]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], int]] = {}
    for tensor in tensors:
        kind = (tensor.dtype, tensor.device)
        bucket, num_bytes = open_buckets.get(kind, ([], BUCKET_BYTES))
        if num_bytes >= BUCKET_BYTES:
            bucket, num_bytes = [], 0
            filled.append(bucket)
        bucket.append(tensor)
        open_buckets[kind] = (bucket, num_bytes + tensor.nbytes)
    return filled


def _unflatten(flat: Tensor, bucket: Sequence[Tensor]) -> None:
    for tensor, values in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
        tensor.copy_(values.view(tensor.shape))
