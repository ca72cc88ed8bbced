"""State that waits on the CPU changes no bit of a training, and is on the accelerator for the step of its part alone.

Accelerators are played by torch's tensors without data, which know their device; one test needs a real one.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from toy_training import ToyClip, ToyStream, assert_same_run, make, toy_config

from mm.placement import local
from mm.training import offload
from mm.training.config import ParallelConfig
from mm.training.loop import train

NUM_MATRICES = 4


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of 32 x 32 is a part."""
    monkeypatch.setattr(offload, "PART_BYTES", 4 * 32 * 32)


@pytest.fixture
def two_pretended_processes() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def run_to(step: int, run: Path, optimizer: str, *, offloads: bool) -> None:
    config = toy_config(optimizer=optimizer, steps=step, schedule="constant")
    train(make(ToyClip), ToyStream(), config, run, parallel=ParallelConfig(offload=offloads), progress=False)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_training_ends_in_the_same_bits(
    tmp_path: Path, optimizer: str, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With it, without it, and when it is switched on and off between two sessions of a run."""
    steps = []
    whole_step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: (steps.append(1), whole_step(*args)))
    monkeypatch.setattr(offload, "PART_BYTES", 256)
    run_to(12, tmp_path / "without", optimizer, offloads=False)
    assert len(steps) == 12
    run_to(12, tmp_path / "with", optimizer, offloads=True)
    assert len(steps) > 4 * 12, "one part only"
    for session, offloads in enumerate((False, True, False), start=1):
        run_to(4 * session, tmp_path / "changing", optimizer, offloads=offloads)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert_same_run(tmp_path / "changing", tmp_path / "without")


def places(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> list[str]:
    """Where AdamW's averages of each parameter are."""
    kinds = [{local(value).device.type for value in optimizer.state[p].values() if value.ndim} for p in parameters]
    assert all(len(kind) == 1 for kind in kinds)
    return [kind.pop() for kind in kinds]


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "shared out"])
def test_an_accelerator_holds_the_state_of_one_part(sharded: bool, small_parts: None, two_pretended_processes: None) -> None:
    mesh = init_device_mesh("cuda", (2,))
    with FakeTensorMode():
        tensors = [torch.zeros(32, 32, device="cuda") for _ in range(NUM_MATRICES)]
        if sharded:
            tensors = [DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False) for tensor in tensors]
        parameters = [nn.Parameter(tensor) for tensor in tensors]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        seen: list[list[str]] = []
        for step in range(2):
            gradients: list[Any] = [torch.zeros_like(parameter) for parameter in parameters]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

            def look(*_: Any, step: int = step) -> None:
                if step:  # the first one makes the state
                    seen.append(places(optimizer, parameters))

            hook = optimizer.register_step_pre_hook(look)
            offload.step_by_parts(optimizer)
            hook.remove()
            assert places(optimizer, parameters) == ["cpu"] * NUM_MATRICES
            assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
        assert seen == [["cuda" if i == part else "cpu" for i in range(NUM_MATRICES)] for part in range(NUM_MATRICES)]


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gpu_gets_its_memory_back(tmp_path: Path, optimizer: str) -> None:
    for name, offloads in (("without", False), ("with", True)):
        for steps in (4, 8):  # the second session loads the state
            config = toy_config(optimizer=optimizer, steps=steps, schedule="constant", device="cuda")
            parallel = ParallelConfig(offload=offloads)
            train(make(ToyClip), ToyStream(), config, tmp_path / name, parallel=parallel, progress=False)
    assert_same_run(tmp_path / "with", tmp_path / "without")
    matrix = nn.Parameter(torch.zeros(4096, 4096, device="cuda"))
    averages = torch.optim.AdamW([matrix], fused=True)
    matrix.grad = torch.ones_like(matrix)
    before = torch.cuda.memory_allocated()
    offload.step_by_parts(averages)
    assert torch.cuda.memory_allocated() - before < matrix.nbytes / 100
