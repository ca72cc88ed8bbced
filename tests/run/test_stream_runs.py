"""Trainings that read shards as a stream: from files and commands, resumed, with commands that fail and streams of nothing."""

import json
from pathlib import Path

import pytest
import yaml

import mm
from mm.data.write import write_shards
from mm.errors import DataError, UserError
from mm.types import Sample

SHARDS, EACH = 4, 12
TINY = {
    "system": {
        "name": "clip",
        "image": {"backbone": "vit_tiny_patch16_224", "image_size": 32, "options": {"depth": 1}},
        "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": 262},
        "embed_dim": 8,
    },
    "data": {"stream": {"buffer": 8, "head": 20}},
    "train": {
        "batch_size": 8,
        "steps": 6,
        "log_every": 1,
        "checkpoint_every_steps": 2,
        "precision": "fp32",
        "device": "cpu",
        "tensorboard": False,
    },
}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def shards(tmp_path: Path, png: bytes) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        made = [Sample(f"{shard}-{i:02d}", {"image": png}, (f"picture {shard} {i}",), {}) for i in range(EACH)]
        write_shards(made, tmp_path / str(shard))[0].rename(folder / f"{shard}.tar")
    return folder


@pytest.fixture
def png(tmp_path: Path) -> bytes:
    from PIL import Image

    Image.new("RGB", (32, 32), (200, 30, 90)).save(tmp_path / "one.png")
    return (tmp_path / "one.png").read_bytes()


def ids(run: Path) -> list[str]:
    return [name for line in (run / "ids.jsonl").read_text().splitlines() for name in json.loads(line)["ids"]]


@pytest.mark.parametrize("kind", ["files", "command"])
def test_a_stream_trains_and_goes_on(
    kind: str, config: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    given = [f"data.train={shards}"]
    if kind == "command":
        given = [f"data.train=pipe:cat {shards}/{{0..3}}.tar", "data.stream.commands=true"]
    mm.train(config, [*given, "train.steps=3"], out=run, progress=False)
    first = ids(run)
    mm.train(config, given, out=run, progress=False)
    told = capsys.readouterr().err
    assert told.count("inexact by declaration") == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert ids(run)[: len(first)] == first
    assert len(ids(run)) == 48
    card = json.loads((run / "card.json").read_text())
    assert card["exact"] is False
    counts = card["samples"]["this_epoch"]
    assert counts["indexed"] == counts["delivered"] == 48
    assert "read as a stream: not exact; 48 samples learned from" in (run / "card.md").read_text()


def test_exact_reading_does_not_go_on_from_a_stream(config: Path, shards: Path, tmp_path: Path) -> None:
    given = [f"data.train={shards}", "train.steps=2"]
    mm.train(config, given, out=tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"reading a stream, which has no position; keep data\.stream"):
        mm.train(config, [*given, "data.stream=null", "train.steps=3"], out=tmp_path / "run", progress=False)
    mm.train(config, [*given, "data.stream=null"], out=tmp_path / "exact", progress=False)
    with pytest.raises(UserError, match=r"exact reading; leave data\.stream out"):
        mm.train(config, [*given, "train.steps=3"], out=tmp_path / "exact", progress=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_that_fails_midway_stops_the_run_in_one_line_and_loses_no_checkpoint(
    workers: int, config: Path, shards: Path, tmp_path: Path
) -> None:
    """The first shards are good; what was saved before stays, and a run with the command mended goes on."""
    broken = tmp_path / "get.sh"
    broken.write_text(f"test -e {tmp_path}/broken && test $1 = 3 && exit 7\ncat {shards}/$1.tar\n")
    given = [f"data.train=pipe:sh {broken} {{0..3}}", "data.stream.commands=true", f"data.workers={workers}"]
    run = tmp_path / "run"
    mm.train(config, [*given, "train.steps=2"], out=run, progress=False)
    (tmp_path / "broken").touch()
    with pytest.raises(DataError, match=r"get\.sh 3: the command ended with exit code 7") as caught:
        mm.train(config, [*given, "train.steps=40"], out=run, progress=False)
    assert "\n" not in str(caught.value)
    (tmp_path / "broken").unlink()
    assert mm.train(config, [*given, "train.steps=8"], out=run, progress=False).step == 8


@pytest.mark.parametrize("content", [b"", bytes(10240)])
def test_a_stream_of_nothing_is_said_in_one_line(content: bytes, config: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"nothing\.tar") as caught:
        mm.train(config, [f"data.train={tmp_path}/nothing.tar"], out=tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tar shards there"):
        mm.train(config, [f"data.train={tmp_path}/empty"], out=tmp_path / "run", progress=False)
