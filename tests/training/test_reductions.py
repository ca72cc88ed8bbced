"""Gradients, losses' features and norms of 16 bits are added over processes in fp32.

Three processes have 256, 1 and 1, each number by another process: 258 has a place in bf16, 257 has none, so that a sum in bf16
stays at 256 where 256 comes first or second.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from several import join, run_together
from torch import Tensor, nn

from mm.losses.gather import current_gather
from mm.placement import local
from mm.training.config import ParallelConfig
from mm.training.layout import Layout
from mm.training.parallel import open_world
from mm.types import Batch, Losses, System

SIZE, ROWS, COLUMNS = 3, 6, 4


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Weighted(System):
    """Its gradient is what the process has."""

    def __init__(self, gradient: Tensor) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Product(), Product()])
        self.gradient = gradient

    def loss(self, batch: Batch, step: int) -> Losses:
        return Losses(sum((block(self.gradient).sum() for block in self.blocks), torch.zeros(())), {})


def numbers(rank: int, shape: tuple[int, int]) -> Tensor:
    """One of 256, 1, 1 for each place."""
    index = torch.arange(shape[0] * shape[1]).view(shape)
    return torch.where(index % SIZE == rank, 256.0, 1.0).bfloat16()


def worker(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    naive = numbers(rank, (ROWS, COLUMNS))
    dist.all_reduce(naive)
    assert (naive != 258).any(), "these numbers prove nothing"
    for data in ("ddp", "fsdp"):
        parallel = ParallelConfig.model_validate({"data": data})
        with open_world("cpu", parallel) as world:
            layout = Layout(world, parallel)
            system = Weighted(numbers(rank, (ROWS, COLUMNS)))
            layout.begin(system)
            system(Batch(("a",)), 0).total.backward()
            parameters = list(system.parameters())
            layout.synchronise(parameters)
            for parameter in parameters:
                assert parameter.grad is not None
                assert parameter.grad.dtype == torch.bfloat16
                assert (local(parameter.grad) == 258 / SIZE).all(), (data, parameter.grad)
            norm = layout.clip(parameters, 0.0)
            assert norm.item() == pytest.approx(258 / SIZE * (2 * ROWS * COLUMNS) ** 0.5, rel=1e-6)
    gather = current_gather()
    assert gather is not None
    features = torch.zeros(ROWS // SIZE, COLUMNS, dtype=torch.bfloat16, requires_grad=True)
    gather(features).backward(numbers(rank, (ROWS, COLUMNS)))
    assert features.grad is not None
    assert (features.grad == 258).all()
    value = numbers(rank, (ROWS, COLUMNS)).requires_grad_()
    total = gather.sum(value)
    assert (total == 258).all()
    total.backward(numbers(rank, (ROWS, COLUMNS)))
    assert value.grad is not None
    assert (value.grad == 258).all()
    dist.destroy_process_group()


def test_sums_over_processes_are_in_fp32(tmp_path: Path) -> None:
    run_together(worker, tmp_path, size=SIZE)
