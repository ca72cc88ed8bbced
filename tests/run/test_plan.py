"""`mm plan` on configurations as they stand: one-line errors, JSON, data that are not there, real steps."""

import json
from pathlib import Path

import pytest
import torch
import yaml

import mm
from mm.cli import app
from mm.errors import UserError
from mm.run.plan import plan, prepared, remembers, resized, run_config
from mm.show import planned
from mm.training.devices import choose_dtype
from mm.training.meter import Meter
from mm.training.parallel import World
from mm.training.simulate import simulate
from mm.training.step import Stepper

TINY = {
    "system": {
        "name": "clip",
        "image": {"backbone": "vit_tiny_patch16_224", "image_size": 32, "options": {"depth": 2}},
        "text": {"width": 16, "layers": 2, "heads": 2, "vocab_size": 262},
        "embed_dim": 8,
    },
    "data": {"train": "nowhere"},
    "train": {"batch_size": 16, "steps": 100, "precision": "fp32"},
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (32, 32), (number * 12, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder


def test_plan_of_data_that_are_not_there(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(config, processes=4, device="l4")
    assert found.parameters["total"] == found.parameters["trained"]
    assert found.recommended is not None
    assert found.backward_flops == pytest.approx(2 * found.forward_flops, rel=0.2)
    assert found.input.core_samples_per_second is None
    planned(found, tmp_path / "plan.json")
    told = json.loads((tmp_path / "plan.json").read_text())
    assert [one["layout"] for one in told["layouts"]][:3] == ["ddp", "fsdp", "hsdp 2"]
    assert told["layouts"][1]["parallel"] == {"data": "fsdp"}
    assert all(one["memory"]["total"] > 0 and one["dollars"] > 0 for one in told["layouts"])
    assert "stands in for the data" in capsys.readouterr().out


def test_plan_reads_the_data(config: Path, pictures: Path) -> None:
    found = plan(config, [f"data.train={pictures}"], processes=2, device="h100", price=10.0, mfu=0.5)
    assert found.notes == ()
    assert found.input.bytes_per_sample == pytest.approx(
        sum(path.stat().st_size for path in pictures.glob("*.png")) / 20, rel=0.01
    )
    assert found.cores is not None
    assert found.dollars(found.best) == pytest.approx(found.hours(found.best) * 20)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"device": "tpu"}, "device 'tpu'"),
        ({"processes": 0}, "--gpus 0"),
        ({"processes": 3}, "cannot be shared evenly"),
        ({"mfu": 1.5}, "--mfu 1.5"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(config: Path, options: dict[str, object], problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        plan(config, **options)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)


def test_a_missing_configuration_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.yaml"):
        plan(tmp_path / "nothing.yaml")


def test_a_start_that_is_not_here_is_replaced(config: Path) -> None:
    found = plan(config, ["init_from=runs/none"])
    assert any("runs/none" in note for note in found.notes)


def test_the_command_is_there() -> None:
    assert "plan" in {command.callback.__name__ for command in app.registered_commands if command.callback}


def test_large_batches_repeat_their_samples(config: Path) -> None:
    run, notes = run_config(config, [])
    batch = prepared(run, False, notes).batch
    larger = resized(batch, 40)
    assert len(larger) == len(set(larger.ids)) == 40
    assert larger.image is not None
    assert batch.image is not None
    assert torch.equal(larger.image[16:32], batch.image)
    assert len(resized(batch, 3)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "albef", "dalle", "flow", "captioner"])
def test_plan_is_within_a_tenth_of_a_real_step(name: str) -> None:
    """Peak memory and FLOPs of the shipped configurations; ``bench/plan_check.py`` compares with allocator and process, too."""
    config, notes = run_config(Path("configs") / f"{name}.yaml", ["data.workers=0"])
    ready = prepared(config, True, notes)
    dtype = choose_dtype(config.train.precision, torch.device("cpu"))
    found = simulate(ready.system, ready.batch, config.train, dtype, remembers=remembers(config))
    stepper = Stepper(ready.system, config.train, World(0, 1, torch.device("cpu")))
    ready.system.train()
    stepper.step(ready.batch, 0)
    stepper.optimizer.zero_grad(set_to_none=True)
    states = [
        value for state in stepper.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    averaged = [] if stepper.ema is None else list(stepper.ema.state_dict(ready.system).values())
    with Meter(ready.system, (*states, *averaged)) as meter:
        stepper.step(ready.batch, 1)
    assert found.peak == pytest.approx(meter.kept_bytes + meter.cost.peak(), rel=0.1)
    assert found.cost.flops() == pytest.approx(meter.cost.flops(), rel=0.1)


def test_a_run_ends_with_its_card(config: Path, pictures: Path, tmp_path: Path) -> None:
    """Throughput, FLOPs, memory and energy of all sessions; FLOPs are those of the plan."""
    run = tmp_path / "run"
    changes = [f"data.train={pictures}", f"data.validation={pictures}", "train.device=cpu", "train.tensorboard=false"]
    mm.train(config, [*changes, "train.steps=2", "train.log_every=1"], out=run, progress=False)
    first = json.loads((run / "card.json").read_text())
    mm.train(config, [*changes, "train.steps=4", "train.log_every=1"], out=run, progress=False)
    card = json.loads((run / "card.json").read_text())
    found, before = card["efficiency"], first["efficiency"]
    assert (found["samples"], before["samples"]) == (64, 32)
    assert found["flops_per_sample"] == before["flops_per_sample"] > 0
    assert found["energy_kwh"] > before["energy_kwh"] > 0
    assert found["co2_kg"] == pytest.approx(0.445 * found["energy_kwh"])
    assert 0 < found["mfu"] < 1
    assert found["peak_memory"] > 1e6
    page = (run / "card.md").read_text()
    for word in ("samples/s", "MFU", "kWh", "CO2", "peak memory", str(pictures), "Validation"):
        assert word in page
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert all(row["mfu"] > 0 and row["energy_kwh"] > 0 for row in rows if "loss" in row)
    wanted = plan(config, [*changes, "data.workers=0"], device="cpu")
    assert found["flops_per_sample"] == pytest.approx(wanted.forward_flops + wanted.backward_flops, rel=0.05)
    assert mm.load(run, device="cpu").card["training"]["samples"] == 64
