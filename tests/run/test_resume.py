"""A resumed run keeps the preparation that its weights know, whatever became of the data."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_training import lines, newest, weights

import mm
from mm.errors import ConfigError
from mm.run.generation import generate
from mm.training.tracking import Event
from mm.types import Sampling

TINY = [
    "system.image.backbone=resnet18",
    "system.image.options={channels: [8, 8, 8, 8]}",
    "system.image.image_size=32",
    "system.text={width: 16, layers: 1, heads: 2, vocab_size: 262}",
    "system.embed_dim=8",
    "train.batch_size=4",
    "train.tensorboard=false",
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    from PIL import Image

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (number * 30, 0, 0)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("abab abab")
    return folder


def test_the_vocabulary_stays_when_captions_change(pictures: Path, tmp_path: Path) -> None:
    source = f"data.train={pictures}"
    first = mm.train("configs/own.yaml", [*TINY, source, "train.steps=2"], out=tmp_path / "run")
    assert first.checkpoint is not None
    kept = tmp_path / "tokenizer.json"
    shutil.copy(first.checkpoint / "tokenizer.json", kept)
    for file in pictures.glob("*.txt"):
        file.write_text("xyxy xyxy")
    second = mm.train("configs/own.yaml", [*TINY, source, "train.steps=4"], out=tmp_path / "run")
    assert second.checkpoint is not None
    assert (second.checkpoint / "tokenizer.json").read_text() == kept.read_text()
    fresh = mm.train("configs/own.yaml", [*TINY, source, "train.steps=2"], out=tmp_path / "fresh")
    assert fresh.checkpoint is not None
    assert (fresh.checkpoint / "tokenizer.json").read_text() != kept.read_text()


def test_another_preparation_needs_another_run(pictures: Path, tmp_path: Path) -> None:
    source = f"data.train={pictures}"
    mm.train("configs/own.yaml", [*TINY, source, "train.steps=2"], out=tmp_path / "run")
    with pytest.raises(ConfigError, match="another 'processor' section"):
        mm.train("configs/own.yaml", [*TINY, source, "train.steps=4", "processor.fit=squash"], out=tmp_path / "run")


def test_validation_data_that_cannot_be_used_stops_before_training(pictures: Path, tmp_path: Path) -> None:
    from mm.errors import UserError

    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(pictures / "0.png", bare / "0.png")
    with pytest.raises(UserError, match="neither captions nor labels"):
        mm.train("configs/own.yaml", [*TINY, f"data.train={pictures}", f"data.validation={bare}"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_validation_uses_the_same_columns_as_training(pictures: Path, tmp_path: Path) -> None:
    from mm.config import load_config
    from mm.run.config import RunConfig
    from mm.run.training import assemble

    table = tmp_path / "rows.csv"
    rows = "\n".join(f"{pictures / f'{n}.png'},right {n},wrong" for n in range(8))
    table.write_text(f"src,alt,title\n{rows}\n")
    columns = [f"data.train={table}", f"data.validation={table}", "data.image_field=src", "data.text_field=alt"]
    run = assemble(load_config(RunConfig, Path("configs/own.yaml"), [*TINY, *columns]))
    assert run.validator is not None
    held = run.validator._held
    assert held is not None
    assert held.captions[3] == ("right 3",)


def test_a_batch_that_processes_cannot_share_evenly_is_refused(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm.config import load_config
    from mm.run.config import RunConfig
    from mm.run.training import assemble

    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="not a multiple of the 3 processes"):
        assemble(load_config(RunConfig, Path("configs/own.yaml"), [*TINY, f"data.train={pictures}"]))


ALBEF: dict[str, Any] = {
    "system": {
        "name": "albef",
        "image": {"backbone": "resnet18", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}},
        "feature_map": True,
        "width": 16,
        "heads": 2,
        "text_layers": 1,
        "fusion_layers": 1,
        "embed_dim": 8,
        "vocab_size": 262,
        "context_length": 12,
        "dropout": 0.1,
        "queue_size": 6,  # of batches of 4: it has been filled and written over where the run is killed
        "momentum": 0.9,
        "distillation_ramp_steps": 4,
        "whole_words": True,
    },
}
FLOW: dict[str, Any] = {
    "system": {
        "name": "flow",
        "latents": {"image_size": 32},
        "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 12, "vocab_size": 262},
        "denoiser": {"width": 16, "layers": 2, "heads": 2, "patch": 8, "dropout": 0.1},
        "align": {"model": "emoji-clip", "layer": 1, "width": 8},
        "caption_dropout": 0.5,
        "remember_latents": 5,
    },
}
TRAIN = {"steps": 6, "batch_size": 4, "lr": 0.01, "warmup_steps": 2, "ema_decay": 0.9, "checkpoint_every_steps": 2}
TRAIN |= {"log_every": 1, "tensorboard": False, "precision": "fp32", "device": "cpu"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("values", [ALBEF, FLOW], ids=["albef", "flow"])
def test_a_killed_run_ends_in_the_same_bits(values: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    """Momentum copies, queues, hidden words, drawn negatives, moments and noise included; it dies between two checkpoints."""
    for number, file in enumerate(sorted(pictures.glob("*.txt"))):
        file.write_text(f"picture of unpredictable things, number {number}")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values | {"data": {"train": str(pictures), "workers": 0}, "train": TRAIN}))

    def kill(event: Event) -> None:
        if event.kind == "log" and event.step == 5:
            raise Killed

    mm.train(config, out=tmp_path / "straight", progress=False)
    with pytest.raises(Killed):
        mm.train(config, out=tmp_path / "killed", progress=False, on_event=kill)
    assert newest(tmp_path / "killed").name == "step-00000004"
    mm.train(config, out=tmp_path / "killed", progress=False)
    expected, found = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert expected.keys() == found.keys() == {"model", "optimizer", "ema"}
    for file, tensors in expected.items():
        assert tensors.keys() == found[file].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found[file][name]), (file, name)
    if values is ALBEF:
        assert int(expected["model"]["momentum.num_updates"]) == 6
        assert int(expected["model"]["queues.image.num_pushed"]) == 24
    first, second = (lines(tmp_path / run / "metrics.jsonl") for run in ("straight", "killed"))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in first] == [row[name] for row in second]
    loaded = mm.load(tmp_path / "killed", device="cpu")
    assert not [name for name in loaded.system.state_dict() if name.startswith(loaded.system.only_for_training)]
    if values is FLOW:
        made = [
            generate(tmp_path / run, ["a picture"], count=3, device="cpu", sampling=Sampling(steps=4))
            for run in ("straight", "killed")
        ]
        assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(*made, strict=True))
