"""Several processes train like one, however they share samples, weights and layers: losses, weights, checkpoints."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from several import join, run_together
from tiny_systems import OF_LIBRARIES, ROWS, SYSTEMS, TinyStream, global_batch, share, tiny
from torch import Tensor
from toy_training import newest
from toy_training import weights as checkpoint

from mm.losses.gather import current_gather
from mm.nn.parallel import divide
from mm.systems.albef import Albef
from mm.training import muon, offload
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.layout import Layout
from mm.training.loop import TrainResult
from mm.training.loop import train as train_loop
from mm.training.parallel import open_world
from mm.training.step import Stepper, compile_parts
from mm.types import Decoding, System

STEPS = 6
COMPILE = torch.compile
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "ddp": {},
    "fsdp": {"data": "fsdp"},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "microbatches": 3},
    "1f1b": {"pipeline": 2, "microbatches": 3, "schedule": "1f1b"},
}
HELD = {"ddp": (1.0, 1.0), "fsdp": (0.5, 0.6), "tensor": (0.5, 0.95), "pipeline": (0.5, 0.95), "1f1b": (0.5, 0.95)}
"""Least and largest share of the trained numbers that one of two processes holds; embeddings and heads are whole with the last
two."""


class Case(NamedTuple):
    """A training to be compared with that of one process."""

    system: str
    parallel: Mapping[str, Any]
    train: Mapping[str, Any] = {}


def case_name(case: Case) -> str:
    options = {**case.parallel, **case.train}
    return "-".join([case.system, *(f"{key}={value}" for key, value in options.items())])


def config(**changes: Any) -> TrainConfig:
    """A large eps: AdamW would make whole steps of gradients that are zero but for rounding."""
    values = {"steps": STEPS, "batch_size": 8, "lr": 1e-3, "eps": 1e-3, "warmup_steps": 0, "device": "cpu", "precision": "fp32"}
    return TrainConfig.model_validate(values | changes)


def trained(case: Case, parallel: ParallelConfig) -> tuple[list[dict[str, float]], dict[str, Tensor], int]:
    """Losses of some steps, all tensors of the checkpoint after them, and the trained numbers that this process holds."""
    exactly(case)
    with open_world("cpu", parallel) as world:
        layout = Layout(world, parallel, divide)
        stepper = Stepper(tiny(case.system), config(**case.train), world, layout)
        if world.size > 1 and case.train.get("compile"):
            compile_parts(stepper.system, by_block=True)
        stepper.system.train()
        curve = []
        for step in range(STEPS):
            report = stepper.step(share(global_batch(step), world.data_rank, layout.data.size), step)
            assert report.num_samples == ROWS
            curve.append({"loss": report.loss, "grad_norm": report.grad_norm, **report.parts})
        held = [p for p in stepper.system.parameters() if p.requires_grad and not p.is_meta]
        files = stepper.tensors()
    tensors = {f"{stem}/{key}": value.clone().contiguous() for stem, named in files.items() for key, value in named.items()}
    return curve, tensors, sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in held)


def exactly(case: Case) -> None:
    """Muon's products are in bf16 where the processor has it, which rounding decides about. Compiled code is left to PyTorch to
    run, parts of the optimizer's state are small enough for several."""
    if case.train.get("compile"):
        torch._dynamo.reset()
        torch.compile = functools.partial(COMPILE, backend="aot_eager")
    offload.PART_BYTES = 4096
    if case.train.get("optimizer") == "muon":
        muon.choose_dtype = lambda *_: torch.float32


def worker(rank: int, size: int, folder: Path, cases: Sequence[Case]) -> None:
    """One process of several; each case in turn."""
    join(rank, size, folder)
    for case in cases:
        curve, tensors, held = trained(case, ParallelConfig.model_validate(case.parallel))
        if rank == 0:
            (folder / f"{case_name(case)}.json").write_text(json.dumps({"curve": curve, "held": held}))
            save_file(tensors, folder / f"{case_name(case)}.safetensors")
    dist.destroy_process_group()


def compare(case: Case, folder: Path) -> tuple[float, float, float]:
    """Largest difference to one process of the losses and norms, relative to those above 1, and of weights and averages; and
    the share of the numbers that the first process held."""
    alone, tensors, whole = trained(case, ParallelConfig())
    told, found = (
        json.loads((folder / f"{case_name(case)}.json").read_text()),
        load_file(folder / f"{case_name(case)}.safetensors"),
    )
    assert {name: value.shape for name, value in found.items()} == {name: value.shape for name, value in tensors.items()}
    assert len({step["loss"] for step in alone}) == STEPS, "nothing was learned"
    pairs = [(a[key], b[key]) for a, b in zip(alone, told["curve"], strict=True) for key in a]
    losses = max(abs(a - b) / max(1.0, abs(a)) for a, b in pairs)
    weights = max((found[name].double() - tensors[name].double()).abs().max().item() for name in tensors)
    return losses, weights, told["held"] / whole


def check(cases: Sequence[Case], folder: Path, size: int = 2) -> None:
    run_together(worker, folder, cases, size=size)
    for case in cases:
        losses, weights, held = compare(case, folder)
        print(f"{case_name(case):60} losses {losses:.1e}, weights {weights:.1e}, held by one process {held:.2f}")
        assert losses < 1e-5, case
        assert weights < 1e-5, case
        layout = next((name for name, parallel in LAYOUTS.items() if parallel == case.parallel), None)
        if layout is not None:
            least, most = HELD[layout]
            assert least <= held <= most, case


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """One system of each kind in one layout of each kind; the others are slow tests."""
    pairs = zip(("albef", "clip", "dalle", "flow", "albef"), LAYOUTS.values(), strict=True)
    cases = [Case(system, parallel) for system, parallel in pairs]
    muon = [Case("clip", LAYOUTS[layout], {"optimizer": "muon"}) for layout in ("fsdp", "tensor")]  # needs whole matrices
    check([*cases, *muon], tmp_path)


def test_two_processes_hide_and_count_frames_like_one(tmp_path: Path) -> None:
    """Recordings have different numbers of hidden frames, so that a mean of each process's mean would be another; bands and
    words are hidden, too."""
    check([Case("wav2vec2", {}), Case("clap", {})], tmp_path)


@pytest.mark.slow
def test_every_system_in_every_layout(tmp_path: Path) -> None:
    own = [system for system in SYSTEMS if system not in OF_LIBRARIES]
    check([Case(system, parallel) for parallel in LAYOUTS.values() for system in own], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "train",
    [{"optimizer": "muon"}, {"accumulate": 2}, {"clip_norm": 0.05}, {"ema_decay": 0.0}],
    ids=["muon", "accumulate", "clipped", "without average"],
)
def test_what_a_step_is_made_of(tmp_path: Path, train: dict[str, Any]) -> None:
    check([Case("clip", parallel, train) for parallel in LAYOUTS.values()], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again(tmp_path: Path, recompute: str) -> None:
    """Gradients come from the same numbers in one process as well."""
    check([Case("albef", {**parallel, "recompute": recompute}) for parallel in LAYOUTS.values()], tmp_path)


@pytest.mark.slow
def test_blocks_are_compiled_in_every_layout(tmp_path: Path) -> None:
    """Two processes with compiled blocks beside one without."""
    layouts = [*LAYOUTS.values(), {"data": "fsdp", "recompute": "selective"}]
    check([Case("dalle", parallel, {"compile": "blocks"}) for parallel in layouts], tmp_path)


@pytest.mark.slow
def test_state_that_waits_on_the_cpu(tmp_path: Path) -> None:
    cases = [Case("clip", {**parallel, "offload": True}, {"optimizer": "muon"}) for parallel in LAYOUTS.values()]
    check(cases, tmp_path)


@pytest.mark.slow
def test_four_processes_in_two_dimensions(tmp_path: Path) -> None:
    layouts = [
        {"data": "fsdp", "replicas": 2},
        {"data": "fsdp", "tensor": 2},
        {"tensor": 2, "pipeline": 2},
        {"pipeline": 2, "microbatches": 2, "schedule": "1f1b"},
    ]
    cases = [Case(system, parallel) for parallel in layouts for system in ("clip", "albef")]
    muon = Case("clip", {"data": "fsdp", "tensor": 2}, {"optimizer": "muon"})  # matrices that are cut twice
    check([*cases, muon, Case("clip", {"contrastive": "ring"})], tmp_path, size=4)


def run_to(step: int, run: Path, parallel: ParallelConfig, rank: int = 0, size: int = 1) -> TrainResult:
    """Train ALBEF up to a step, from wherever the run stands."""
    stream = TinyStream(rank // parallel.model_size, parallel.data_size(size))
    options = {"steps": step, "schedule": "constant", "log_every": 1, "checkpoint_every_minutes": 0, "tensorboard": False}
    train = functools.partial(train_loop, validate=figures, merge_states=added, progress=False)
    return train(tiny("albef"), stream, config(**options), run, parallel=parallel, divide=divide)


def figures(system: System) -> dict[str, float]:
    """Asks the network for what training never does; the other processes only wait, so nobody may be talked to."""
    assert current_gather() is None
    assert isinstance(system, Albef)
    assert not system.training
    batch = global_batch(1000)
    assert batch.image is not None
    assert batch.text is not None
    image, text = system.encode_image(batch.image), system.encode_text(batch.text)
    written = system.caption(batch.image[:2], batch.text[:2], Decoding(max_tokens=3), [0, 1])
    return {"match": system.match(image, text).mean().item(), "written": sum(one.log_likelihood for one in written)}


def added(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    delivered = sum(state["accounting"]["delivered"] for state in states)
    return {**states[0], "accounting": {"delivered": delivered}}


def run_part(rank: int, size: int, folder: Path, step: int, run: Path, parallel: ParallelConfig) -> None:
    join(rank, size, folder)
    run_to(step, run, parallel, rank, size)
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Two processes that share weights, one, two with the halves of each layer, two with half the layers each."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = run_to(8, whole, ParallelConfig())
    for step, parallel in ((2, {"data": "fsdp"}), (4, None), (6, {"tensor": 2}), (8, {"pipeline": 2})):
        if parallel is None:
            run_to(step, run, ParallelConfig())
        else:
            run_together(run_part, tmp_path / "processes", step, run, ParallelConfig.model_validate(parallel))
    assert (run / "ids.jsonl").read_bytes() == (whole / "ids.jsonl").read_bytes()
    for stem, tensors in checkpoint(whole).items():
        found = checkpoint(run)[stem]
        assert list(found) == list(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=name)
    state = json.loads((newest(run) / "state.json").read_text())
    assert state["metrics"] == pytest.approx(result.metrics, abs=1e-4)
    assert state["stream"]["accounting"] == {"delivered": 64} == result.accounting
    assert state["parameters"] == json.loads((newest(whole) / "state.json").read_text())["parameters"]
