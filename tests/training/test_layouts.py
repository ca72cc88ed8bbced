"""Several processes train like one, however they share samples, weights and layers: losses, weights, checkpoints."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_systems import global_batch, share, tiny
from torch import Tensor

from mm.nn.parallel import divide
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.layout import Layout
from mm.training.parallel import open_world
from mm.training.step import Stepper

STEPS = 6
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "ddp": {},
    "fsdp": {"data": "fsdp"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "microbatches": 2},
}


def config(**changes: Any) -> TrainConfig:
    """Steps small enough that rounding does not grow: AdamW would turn gradients that are zero but for rounding into steps."""
    values = {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "eps": 1e-3, "warmup_steps": 0, "device": "cpu", "precision": "fp32"}
    return TrainConfig.model_validate(values | changes)


def trained(name: str, parallel: ParallelConfig, **changes: Any) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    """Losses of some steps, and all tensors of the checkpoint after them."""
    with open_world("cpu", parallel) as world:
        layout = Layout(world, parallel, divide)
        stepper = Stepper(tiny(name), config(**changes), world, layout)
        stepper.system.train()
        curve = []
        for step in range(STEPS):
            batch = share(global_batch(step), world.data_rank, layout.data.size)
            report = stepper.step(batch, step)
            curve.append({"loss": report.loss, "grad_norm": report.grad_norm, **report.parts})
        files = stepper.tensors()
    return curve, {f"{stem}/{key}": value.clone().contiguous() for stem, named in files.items() for key, value in named.items()}


def worker(rank: int, size: int, folder: Path, cases: list[tuple[str, str, dict[str, Any]]]) -> None:
    """One process of several, each case in turn."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    for name, layout, changes in cases:
        curve, tensors = trained(name, ParallelConfig.model_validate(LAYOUTS[layout]), **changes)
        if rank == 0:
            (folder / f"{name}-{layout}.json").write_text(json.dumps(curve))
            save_file(tensors, folder / f"{name}-{layout}.safetensors")
    dist.destroy_process_group()


def run_together(folder: Path, cases: list[tuple[str, str, dict[str, Any]]], size: int = 2) -> None:
    torch.multiprocessing.spawn(worker, (size, folder, cases), nprocs=size)


def largest_difference(name: str, layout: str, folder: Path, **changes: Any) -> tuple[float, float]:
    """Of the losses, relative to one process's, and of the weights and averages."""
    alone, tensors = trained(name, ParallelConfig(), **changes)
    curve, found = (
        json.loads((folder / f"{name}-{layout}.json").read_text()),
        load_file(folder / f"{name}-{layout}.safetensors"),
    )
    assert found.keys() == tensors.keys()
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in tensors.items()}
    losses = max(abs(a[key] - b[key]) / max(1, abs(a[key])) for a, b in zip(alone, curve, strict=True) for key in a)
    weights = max((found[key].double() - tensors[key].double()).abs().max().item() for key in tensors)
    return losses, weights
