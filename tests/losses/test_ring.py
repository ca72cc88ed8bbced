"""Contrastive losses whose features go around the ranks: the same as of all features at once, in memory that does not grow."""

import functools
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_cases import NUM_ROWS, loss_and_gradients, losses, ranks
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.utils._python_dispatch import TorchDispatchMode

from mm.losses.gather import GATHER_LIMIT, Gather

RING_SIZES = (1, 2, 4)
ROWS_OF_A_RANK, WIDE = 512, 256  # where memory is measured


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to be while it is active and are still there, and keeps the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name in self._known:
            return
        self._known.add(name)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, name, size)

    def _forget(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.now -= size


def ring_worker(rank: int, size: int, folder: Path) -> None:
    with ranks(rank, size, folder):
        rows = slice(rank * NUM_ROWS // size, (rank + 1) * NUM_ROWS // size)
        results: dict[str, Any] = {
            f"{name} {chunk_size}": loss_and_gradients(loss, rows, Gather(ring=True))
            for chunk_size in (0, 3)
            for name, loss in losses(chunk_size).items()
        }
        for ring in (True, False):
            results[f"peaks {ring}"] = peaks(Gather(ring=ring))
        torch.save(results, folder / f"ring-{size}-{rank}.pt")


def peaks(gather: Gather) -> dict[str, int]:
    """Most bytes that forward and backward passes hold beside features and parameters, at the same batch on each rank."""
    found = {}
    for name in ("one positive", "siglip", "supervised"):
        generator = torch.Generator().manual_seed(gather.rank)
        a, b = nn.functional.normalize(torch.randn(2, ROWS_OF_A_RANK, WIDE, generator=generator), dim=2)
        a, b = a.requires_grad_(), b.clone().requires_grad_()
        groups = torch.arange(ROWS_OF_A_RANK) // 2 + gather.rank * ROWS_OF_A_RANK
        scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        with LiveBytes() as live:
            losses(64)[name](a, b, scale, bias, groups, gather).backward()
        found[name] = live.peak
    return found


@pytest.fixture(scope="module")
def by_ring(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("rings")
    for size in RING_SIZES:
        spawn(functools.partial(ring_worker, size=size, folder=folder), nprocs=size)
    return {size: [torch.load(folder / f"ring-{size}-{rank}.pt") for rank in range(size)] for size in RING_SIZES}


@pytest.mark.parametrize("size", RING_SIZES)
@pytest.mark.parametrize("chunk_size", [0, 3])
@pytest.mark.parametrize("name", list(losses(0)))
def test_average_over_a_ring_is_the_global_batch(
    name: str, chunk_size: int, size: int, by_ring: dict[int, list[dict[str, Any]]]
) -> None:
    alone = loss_and_gradients(losses(0)[name], slice(None), None)
    averages = (
        sum(parts) / size for parts in zip(*(results[f"{name} {chunk_size}"] for results in by_ring[size]), strict=True)
    )
    for average, expected in zip(averages, alone, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["one positive", "siglip", "supervised"])
def test_memory_of_a_ring_does_not_grow_with_the_ranks(name: str, by_ring: dict[int, list[dict[str, Any]]]) -> None:
    one_rank = ROWS_OF_A_RANK * WIDE * 4
    ring, gathered = (
        {size: max(r[f"peaks {way}"][name] for r in by_ring[size]) for size in RING_SIZES} for way in (True, False)
    )
    assert ring[4] <= ring[2] + 1.1 * one_rank  # with two ranks there is no block that is neither held at home nor on its way
    assert gathered[4] >= gathered[2] + 4 * one_rank


def test_many_features_go_around_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gather, "world_size", 64)
    few, many = torch.empty(GATHER_LIMIT // 256, dtype=torch.uint8), torch.empty(GATHER_LIMIT // 32, dtype=torch.uint8)
    assert not Gather().by_ring(few)
    assert Gather().by_ring(many)
    assert Gather(ring=True).by_ring(few)
