"""Every system that learns, its network shared by two processes in every way, computes what it does in one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_tuned_systems import SYSTEMS, batch, small

from mm.nn.parallel import divide
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.layout import Layout
from mm.training.parallel import open_world
from mm.training.step import Stepper

SAMPLES_APART: Mapping[str, Mapping[str, Any]] = {"ddp": {}, "fsdp": {"data": "fsdp"}}
NETWORK_APART: Mapping[str, Mapping[str, Any]] = {
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "microbatches": 2},
    "1f1b": {"pipeline": 2, "microbatches": 2, "schedule": "1f1b"},
}

Outcome = tuple[list[float], dict[str, torch.Tensor]]


def trained(name: str, parallel: ParallelConfig) -> Outcome:
    """Losses of three steps and the weights behind them."""
    options = {"steps": 3, "batch_size": 6, "warmup_steps": 0, "eps": 1e-3, "device": "cpu", "precision": "fp32"}
    with open_world("cpu", parallel) as world:
        layout = Layout(world, parallel, divide)
        stepper = Stepper(small(name)[1], TrainConfig.model_validate(options), world, layout)
        stepper.system.train()
        share = slice(6 * world.data_rank // layout.data.size, 6 * (world.data_rank + 1) // layout.data.size)
        losses = [stepper.step(batch(step)[share], step).loss for step in range(3)]
        return losses, {key: value.clone() for key, value in stepper.tensors()["model"].items()}


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    for kind, values in {**SAMPLES_APART, **NETWORK_APART}.items():
        for name in SYSTEMS:
            outcome = trained(name, ParallelConfig.model_validate(values))
            if rank == 0:
                torch.save(outcome, folder / f"{name}-{kind}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    torch.multiprocessing.spawn(worker, (folder,), nprocs=2)
    return folder


def assert_alike(found: Outcome, expected: Outcome) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=2e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_shared_weights_change_nothing(name: str, outcomes: Path) -> None:
    """Beside two processes that hold all weights each: some systems draw numbers process by process."""
    assert_alike(torch.load(outcomes / f"{name}-fsdp.pt"), torch.load(outcomes / f"{name}-ddp.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", NETWORK_APART)
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_shared_network_changes_nothing(name: str, kind: str, outcomes: Path) -> None:
    assert_alike(torch.load(outcomes / f"{name}-{kind}.pt"), trained(name, ParallelConfig()))
