"""The loop: exact resume, honest logs, no influence of what only watches."""

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from toy_training import ToyClip, ToyRegression, ToyStream, assert_same_run, lines, make, newest, toy_config, weights

from mm.errors import CheckpointError, ConfigError, DataError, UserError
from mm.training.loop import TrainResult, train
from mm.training.tracking import Event
from mm.types import Batch, Losses, System


def run_toy(run: Path, kind: type[System] = ToyClip, stream: ToyStream | None = None, **options: Any) -> TrainResult:
    names = ("validate", "extra_files", "on_event", "console")
    passed = {name: options.pop(name) for name in names if name in options}
    progress = "console" in passed
    return train(make(kind), stream or ToyStream(), toy_config(**options), run, progress=progress, **passed)


@pytest.mark.fault(13)
@pytest.mark.parametrize(("kind", "accumulate"), [(ToyClip, 1), (ToyClip, 3), (ToyRegression, 1), (ToyRegression, 2)])
def test_resume_is_exact(tmp_path: Path, kind: type[System], accumulate: int) -> None:
    """Stopped after a checkpoint that falls between two lines of the log, with dropout and batch normalisation."""

    class EnoughError(Exception):
        pass

    class Stopping(ToyStream):
        def batch(self, k: int) -> Batch:
            if k == 13:
                raise EnoughError
            return super().batch(k)

    run_toy(tmp_path / "whole", kind, accumulate=accumulate)
    with pytest.raises(EnoughError):
        run_toy(tmp_path / "stopped", kind, Stopping(), accumulate=accumulate)
    assert newest(tmp_path / "stopped").name == "step-00000010"
    assert len(lines(tmp_path / "stopped" / "ids.jsonl")) > 10, "the log should have run ahead of the checkpoint"
    result = run_toy(tmp_path / "stopped", kind, accumulate=accumulate)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert result.accounting == {"delivered": 160}


def test_dropout_really_depends_on_the_seed(tmp_path: Path) -> None:
    run_toy(tmp_path / "a", seed=0)
    run_toy(tmp_path / "b", seed=1)
    assert not torch.equal(weights(tmp_path / "a")["model"]["left.0.weight"], weights(tmp_path / "b")["model"]["left.0.weight"])


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Validation that draws random numbers and switches modes, saving by time and other habits leave the same bits."""
    seen: list[tuple[bool, bool]] = []

    def validate(system: System) -> dict[str, float]:
        torch.manual_seed(5)
        seen.append((any(module.training for module in system.modules()), torch.is_grad_enabled()))
        return {"image_to_text_r1": torch.rand(()).item()}

    run_toy(tmp_path / "plain")
    result = run_toy(
        tmp_path / "watched",
        validate=validate,
        validate_every=3,
        checkpoint_every_minutes=1e-6,
        checkpoint_every_steps=0,
        tensorboard=True,
        keep_last=1,
    )
    assert seen == [(False, False)] * 7
    for stem, tensors in weights(tmp_path / "plain").items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, weights(tmp_path / "watched")[stem][name]), (stem, name)
    assert result.metrics.keys() == {"image_to_text_r1"}
    assert list((tmp_path / "watched" / "tensorboard").iterdir())
    assert [path.name for path in (tmp_path / "watched" / "checkpoints").glob("step-*")] == ["step-00000020"]


def test_frozen_modes_survive_validation(tmp_path: Path) -> None:
    class Locked(ToyRegression):
        def train(self, mode: bool = True) -> "Locked":
            super().train(mode)
            self.net[1].eval()
            return self

    system = make(Locked)
    train(system, ToyStream(), toy_config(validate_every=5), tmp_path, validate=lambda system: {"x": 1.0}, progress=False)
    assert not system.net[1].training
    assert system.net[0].training
    assert int(system.net[1].num_batches_tracked) == 0


def test_validation_sees_the_average(tmp_path: Path) -> None:
    held: dict[str, torch.Tensor] = {}

    def validate(system: System) -> dict[str, float]:
        held.update({name: tensor.clone() for name, tensor in system.state_dict().items()})
        return {}

    run_toy(tmp_path, validate=validate)
    saved = weights(tmp_path)
    assert all(torch.equal(held[name], tensor) for name, tensor in saved["ema"].items())
    assert not torch.equal(held["left.0.weight"], saved["model"]["left.0.weight"])


def test_finished_run_returns_what_it_had(tmp_path: Path) -> None:
    first = run_toy(tmp_path, validate=lambda system: {"r1": 0.25})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    second = run_toy(tmp_path, validate=pytest.fail)
    assert (second.step, second.metrics, second.accounting) == (first.step, first.metrics, first.accounting)
    assert second.checkpoint == first.checkpoint == newest(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_without_average(tmp_path: Path) -> None:
    run_toy(tmp_path, ema_decay=0, validate=lambda system: {"r1": 1.0})
    assert weights(tmp_path).keys() == {"model", "optimizer"}
    run_toy(tmp_path, steps=24, ema_decay=0.9)  # switched on later: it starts from the weights
    assert weights(tmp_path).keys() == {"model", "optimizer", "ema"}


def test_metrics_say_what_happened(tmp_path: Path) -> None:
    events: list[Event] = []
    run_toy(tmp_path, on_event=events.append, validate=lambda system: {"r1": 0.5}, warmup_steps=10, schedule="constant")
    records = lines(tmp_path / "metrics.jsonl")
    training = [record for record in records if "loss" in record]
    assert [record["step"] for record in training] == [4, 8, 12, 16, 20]
    told = {"step", "loss", "parts", "lr", "grad_norm", "samples_per_second", "seconds"}
    assert training[0].keys() == told | {"mfu", "peak_memory", "energy_kwh"}
    assert training[0]["lr"] == pytest.approx(0.4 * 1e-2)
    assert training[-1]["lr"] == 1e-2
    assert training[0]["parts"]["contrastive"] == pytest.approx(training[0]["loss"])
    assert training[-1]["loss"] < training[0]["loss"]
    assert records[-1] == {"step": 20, "validation": {"r1": 0.5}}
    assert [event.step for event in events if event.kind == "checkpoint"] == [5, 10, 15, 20]
    assert [event.values for event in events if event.kind == "validate"] == [{"r1": 0.5}]


def test_extra_files_are_part_of_the_checkpoint(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "processor").mkdir()
        (folder / "processor" / "tokenizer.json").write_text("{}")

    run_toy(tmp_path, extra_files=write)
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert "processor/tokenizer.json" in manifest["files"]
    (newest(tmp_path) / "processor" / "tokenizer.json").write_text("[]")
    warnings: list[Event] = []
    run_toy(tmp_path, extra_files=write, on_event=warnings.append)
    assert any("tokenizer.json: its sha256 differs" in event.message for event in warnings)


@pytest.mark.fault(11)
@pytest.mark.parametrize(("kind", "accumulate"), [(ToyClip, 1), (ToyClip, 2), (ToyRegression, 1), (ToyRegression, 2)])
def test_non_finite_steps_are_skipped_and_counted(tmp_path: Path, kind: type[System], accumulate: int) -> None:
    """Weights, optimizer, average and running statistics are those before the bad steps."""
    run_toy(tmp_path / "clean", kind, steps=5, accumulate=accumulate, schedule="constant")
    stream = ToyStream(poison=frozenset({5, 6}))
    result = run_toy(tmp_path / "poisoned", kind, stream, steps=7, accumulate=accumulate, schedule="constant")
    assert result.skipped_steps == 2
    short, long = weights(tmp_path / "clean"), weights(tmp_path / "poisoned")
    for stem, tensors in short.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, long[stem][name]), (stem, name)
    records = lines(tmp_path / "poisoned" / "nonfinite.jsonl")
    assert [record["step"] for record in records] == [6, 7]
    assert records[0]["ids"] == [f"5-{row}" for row in range(8)]
    assert lines(tmp_path / "poisoned" / "metrics.jsonl")[-1]["loss"] is not None


@pytest.mark.fault(11)
def test_too_many_non_finite_steps_stop(tmp_path: Path) -> None:
    stream = ToyStream(poison=frozenset({2, 4, 5, 6}))
    with pytest.raises(UserError, match=r"step 7: 3 steps in a row.*nonfinite\.jsonl"):
        run_toy(tmp_path, stream=stream, max_nonfinite=3)
    assert len(lines(tmp_path / "nonfinite.jsonl")) == 4
    assert [record["step"] for record in lines(tmp_path / "ids.jsonl")] == list(range(1, 8)), "the last ids were not written"


class Guessing(ToyClip):
    """Contrastive, but blind: every sample looks the same, so the loss stays at ln(B)."""

    def loss_from(self, representations: Mapping[str, torch.Tensor], batch: Batch, step: int) -> Losses:
        same = {name: value * 0 + 1 for name, value in representations.items()}
        return super().loss_from(same, batch, step)


def test_flat_loss_is_told_once_with_its_remedy(tmp_path: Path) -> None:
    told: list[Event] = []
    run_toy(tmp_path / "flat", Guessing, on_event=told.append, steps=160, warmup_steps=20)
    warnings = [event for event in told if event.kind == "warning"]
    assert [event.step for event in warnings] == [120]
    assert "2.079" in warnings[0].message
    assert "among 8 candidates" in warnings[0].message
    assert "train.lr" in warnings[0].message
    told.clear()
    run_toy(tmp_path / "learning", on_event=told.append, steps=160, warmup_steps=20)
    assert not [event for event in told if event.kind == "warning"]


def test_state_of_another_version_is_refused(tmp_path: Path) -> None:
    run_toy(tmp_path, steps=2)
    folder = newest(tmp_path)
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "manifest.json"))
    data = json.dumps(state | {"format": 99}).encode()
    (folder / "state.json").write_bytes(data)
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="another version"):
        run_toy(tmp_path)


def test_changed_settings_are_told(tmp_path: Path) -> None:
    run_toy(tmp_path, steps=5)
    told: list[Event] = []
    run_toy(tmp_path, steps=8, lr=2e-2, log_every=2, on_event=told.append)
    [warning] = [event for event in told if event.kind == "warning"]
    assert "steps 5 -> 8" in warning.message
    assert "lr 0.01 -> 0.02" in warning.message
    assert "log_every" not in warning.message


def test_plain_lines_without_a_terminal_and_a_bar_with_one(tmp_path: Path) -> None:
    plain = io.StringIO()
    run_toy(tmp_path / "plain", console=Console(file=plain, width=200))
    assert "step 20/20" in plain.getvalue()
    assert "samples/s" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()
    bar = io.StringIO()
    console = Console(file=bar, force_terminal=True, width=200)
    run_toy(tmp_path / "bar", console=console, validate=lambda system: {"image_to_text_r1": 0.125})
    assert "20/20" in bar.getvalue()
    assert "R@1 0.125" in bar.getvalue()
    assert "ETA" in bar.getvalue()


def test_finite_stream_is_an_error(tmp_path: Path) -> None:
    class Finite(ToyStream):
        def __iter__(self) -> Any:
            return iter([self.batch(0), self.batch(1)])

    with pytest.raises(DataError, match="ended before the last training step"):
        run_toy(tmp_path, stream=Finite())


def test_ids_can_be_left_out(tmp_path: Path) -> None:
    run_toy(tmp_path, log_ids=False)
    assert not (tmp_path / "ids.jsonl").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # the compiler's own imports
def test_compiled_training_learns_the_same(tmp_path: Path) -> None:
    run_toy(tmp_path / "eager", steps=5)
    run_toy(tmp_path / "compiled", steps=5, compile=True)
    for name, tensor in weights(tmp_path / "eager")["model"].items():
        assert torch.allclose(tensor, weights(tmp_path / "compiled")["model"][name], rtol=1e-3, atol=1e-4), name


def test_what_has_no_blocks_is_not_compiled_by_block(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: this system has no blocks"):
        run_toy(tmp_path, compile="blocks")


def test_a_validation_that_fails_costs_a_warning_not_the_run(tmp_path: Path) -> None:
    def broken(system: System) -> dict[str, float]:
        raise UserError("the validation data went away")

    told: list[Event] = []
    result = run_toy(tmp_path / "run", validate=broken, on_event=told.append, steps=5)
    assert result.checkpoint is not None
    assert ["went away" in event.message for event in told if event.kind == "warning"] == [True]
