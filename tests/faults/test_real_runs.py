"""Faults of runs on real files: damage is counted, workers change nothing, resuming is exact wherever the run was killed."""

import json
import os
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from real_training import WITH_BATCH_NORM, assembled, draw_pictures, write_uneven_shards
from toy_training import assert_same_run, lines, newest, toy_config

from mm.cli import main
from mm.data.loader import Loader
from mm.data.sources import open_source
from mm.errors import DataError
from mm.systems.clip import Clip
from mm.training.loop import train
from mm.training.tracking import Event
from mm.types import Batch, Sample

EPOCH = 4  # steps
SIZES = (1, 20, 11)


@pytest.mark.fault(4)
def test_workers_change_neither_batches_nor_pictures(tmp_path: Path) -> None:
    """Through two epochs with random changes, and two damaged pictures whose place others take."""
    pictures = draw_pictures(tmp_path / "pictures")
    plain, *others = ([*islice(assembled(pictures, workers=workers).stream, 11)] for workers in (0, 1, 2))
    for batches in others:
        for batch, expected in zip(batches, plain, strict=True):
            assert batch.ids == expected.ids
            assert torch.equal(batch.image, expected.image)
            assert torch.equal(batch.text.ids, expected.text.ids)
    once, again = (
        {name: image for batch in half for name, image in zip(batch.ids, batch.image, strict=True)}
        for half in (plain[:5], plain[5:10])
    )
    both = once.keys() & again.keys()
    assert sum(torch.equal(once[name], again[name]) for name in both) < len(both) / 2, "pictures were not changed at random"


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["mm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


@pytest.mark.fault(5)
def test_a_command_counts_damaged_pictures_and_fails_beyond_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 40, damaged=(7,))
    (pictures / "20.png").write_bytes(b"<html><body>404 Not Found</body></html>")
    (pictures / "30.png").write_bytes(b"")
    values = {
        "system": {
            "name": "clip",
            "image": WITH_BATCH_NORM,
            "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": 300},
            "embed_dim": 8,
        },
        "data": {"train": str(pictures)},
        "train": toy_config(steps=5).model_dump(mode="json"),
    }
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    assert run_cli(monkeypatch, "train", str(config), "--out", str(tmp_path / "run")) in (0, None)
    counts = json.loads((newest(tmp_path / "run") / "state.json").read_text())["stream"]["accounting"]
    assert counts["causes"] == {"truncated": 1, "unknown format": 1, "empty": 1}
    assert counts["delivered"] + counts["skipped"] == counts["indexed"] == 40
    few = ["train", str(config), "data.max_bad_fraction=0.05", "--out", str(tmp_path / "few")]
    assert run_cli(monkeypatch, *few) == 2
    assert "too many samples cannot be used" in capsys.readouterr().err


def prepare(sample: Sample, visit: int) -> str:
    return sample.id


def collate(items: list[Any], epoch: int) -> Batch:
    return Batch(tuple(items))


def headers(shard: Path) -> list[int]:
    with tarfile.open(shard) as archive:
        return [member.offset for member in archive]


def flip_header(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[headers(shard)[6] + 3] ^= 1
    shard.write_bytes(content)


def rename_member(shard: Path, old: str, new: str) -> None:
    renamed = shard.with_suffix(".new")
    with tarfile.open(shard) as source, tarfile.open(renamed, "w") as target:
        for member in source:
            content = source.extractfile(member)
            member.name = new if member.name == old else member.name
            target.addfile(member, content)
    renamed.replace(shard)


TAR_FAULTS: dict[str, tuple[Callable[[Path], object], bool]] = {
    "flipped bit in a header": (flip_header, True),
    "cut in a header": (lambda shard: os.truncate(shard, headers(shard)[6] + 100), True),
    "cut between samples": (lambda shard: os.truncate(shard, headers(shard)[6]), True),
    "cut within a sample": (lambda shard: os.truncate(shard, headers(shard)[7]), True),
    "cut in the data": (lambda shard: os.truncate(shard, headers(shard)[6] + 600), True),
    "empty": (lambda shard: os.truncate(shard, 0), True),
    "repeated key": (lambda shard: rename_member(shard, "05.txt", "04.txt"), False),
    "missing picture": (lambda shard: rename_member(shard, "05.png", "05.other"), False),
}


@pytest.mark.fault(6)
@pytest.mark.parametrize("fault", TAR_FAULTS)
def test_a_damaged_shard_is_refused_with_its_place_or_accounted_for(tmp_path: Path, fault: str) -> None:
    shards = write_uneven_shards(tmp_path, SIZES)
    damage, refused = TAR_FAULTS[fault]
    damage(shards / "1.tar")
    if refused:
        with pytest.raises(DataError, match=r"1\.tar: .* at byte \d+"):
            open_source(str(shards))
        return
    stream = Loader(open_source(str(shards)), prepare, collate, batch_size=8, seed=0, tail="short")
    delivered = [name for batch in stream.one_epoch() for name in batch.ids]
    assert stream.accounting.balanced
    assert len(set(delivered)) == len(delivered) == stream.accounting.indexed >= sum(SIZES)


class KilledError(BaseException):
    pass


def run_pictures(data: Path, run: Path, on_event: Callable[[Event], None] | None = None, die_in_call: int = 0) -> int:
    """Train on whole pictures in micro-batches; returns how often the picture tower was called."""
    made = assembled(data, workers=2)
    calls = [0]

    def count(*_: object) -> None:
        calls[0] += 1
        if calls[0] == die_in_call:
            raise KilledError

    cast(Clip, made.system).towers.encoders["image"].register_forward_pre_hook(count)
    config = toy_config(steps=2 * EPOCH + 1, accumulate=2, checkpoint_every_steps=1, log_every=1)
    train(made.system, made.stream, config, run, on_event=on_event, extra_files=made.write_files, progress=False)
    return calls[0]


@pytest.mark.slow
@pytest.mark.fault(13)
def test_killed_at_the_edge_of_an_epoch_or_within_a_step(tmp_path: Path) -> None:
    """Right after the last step of an epoch, the one before and the one after; and between two micro-batches of a step."""
    shards = write_uneven_shards(tmp_path, SIZES)
    calls = run_pictures(shards, tmp_path / "whole")
    per_step = calls // (2 * EPOCH + 1)
    assert per_step >= 2, "no micro-batches"
    ids = [record["ids"] for record in lines(tmp_path / "whole" / "ids.jsonl")]
    for epoch in (ids[:EPOCH], ids[EPOCH : 2 * EPOCH]):
        assert set(Counter(name for step in epoch for name in step).values()) == {1}
        assert sum(map(len, epoch)) == sum(SIZES)

    def dying(run: Path) -> Callable[[Event], None]:
        steps = iter((EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH))
        waited = [next(steps)]

        def on_event(event: Event) -> None:
            if event.kind == "checkpoint" and event.step == waited[0]:
                waited[0] = next(steps, -1)
                raise KilledError

        return on_event

    on_event = dying(tmp_path / "edge")
    for _ in range(4):
        with pytest.raises(KilledError):
            run_pictures(shards, tmp_path / "edge", on_event)
    run_pictures(shards, tmp_path / "edge", on_event)
    assert_same_run(tmp_path / "whole", tmp_path / "edge")

    with pytest.raises(KilledError):
        run_pictures(shards, tmp_path / "within", die_in_call=EPOCH * per_step + 2)
    assert newest(tmp_path / "within").name == f"step-{EPOCH:08d}"
    run_pictures(shards, tmp_path / "within")
    assert_same_run(tmp_path / "whole", tmp_path / "within")
