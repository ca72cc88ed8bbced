"""Streaming: all samples of a pass come, from files, storage and commands; what it cannot promise it does not claim."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mm.config import ConfigError, validate
from mm.data.config import DataConfig
from mm.data.sources import open_training_source
from mm.data.stream import StreamConfig, StreamLoader, read_stream
from mm.data.write import write_shards
from mm.errors import BadSample, DataError, UserError
from mm.types import Batch, Sample

SHARDS, EACH = 4, 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = [Sample(f"{i:03d}", {"image": bytes([255, 216, 255, i])}, (f"text {i}",), {"n": i}) for i in range(SHARDS * EACH)]
    (tmp_path / "shards").mkdir()
    for number in range(SHARDS):
        part = write_shards(made[number * EACH : (number + 1) * EACH], tmp_path / str(number))[0]
        part.rename(tmp_path / "shards" / f"{number}.tar")
    return tmp_path / "shards"


def prepare(sample: Sample, visit: int) -> str:
    if sample.id == "013":
        raise BadSample("unlucky", sample.id)
    return sample.id


def collate(items: list[Any], visit: int) -> Batch:
    return Batch(tuple(items))


def loader(spec: str, **options: Any) -> StreamLoader:
    config = StreamConfig(buffer=options.pop("buffer", 8), commands=options.pop("commands", False))
    return StreamLoader(spec, config, prepare, collate, **{"batch_size": 3, "seed": 0} | options)


def ids(stream: StreamLoader, batches: int) -> list[str]:
    return [one for batch in itertools.islice(stream, batches) for one in batch.ids]


@pytest.mark.parametrize("kind", ["files", "storage", "command"])
def test_every_sample_comes_and_the_unusable_is_counted(kind: str, folder: Path) -> None:
    if kind == "storage":
        fs = fsspec.filesystem("memory")
        for shard in folder.glob("*.tar"):
            fs.pipe_file(f"/streamed/{shard.name}", shard.read_bytes())
    spec = {"files": str(folder), "storage": "memory://streamed", "command": f"pipe:cat {folder}/{{0..3}}.tar"}[kind]
    stream = loader(spec, commands=True)
    found = Counter(ids(stream, 52))  # 156 samples of passes of 39
    assert set(found) == {f"{i:03d}" for i in range(40)} - {"013"}
    assert max(found.values()) - min(found.values()) <= 2
    assert list(found) != sorted(found)
    assert stream.accounting.causes.keys() == {"unlucky"}
    assert stream.accounting.delivered == 156


def test_ranks_divide_the_shards_and_few_shards_their_samples(folder: Path) -> None:
    for spec, size, batches in ((str(folder), 2, 18), (str(folder / "0.tar"), 3, 60)):
        options = {"world_size": size, "batch_size": size, "buffer": 1}
        parts = [set(ids(loader(spec, rank=rank, **options), batches)) for rank in range(size)]
        assert not parts[0] & parts[1]
        assert len(set().union(*parts)) == (36 if size == 2 else 10)


def test_workers_give_all_samples(folder: Path) -> None:
    assert set(ids(loader(str(folder), workers=2), 60)) == set(ids(loader(str(folder)), 60))


def test_a_resumed_stream_says_that_it_is_not_exact(folder: Path) -> None:
    stream = loader(str(folder))
    first = ids(stream, 5)
    state = stream.state()
    assert state["inexact"]
    assert state["taken"] == 5
    resumed = loader(str(folder))
    resumed.restore(state)
    again = ids(resumed, 5)
    assert again != first
    assert resumed.accounting.delivered == 30
    with pytest.raises(UserError, match="leave data"):
        loader(str(folder)).restore({"epoch": 0})


def test_a_command_runs_only_where_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for open_it in (
        loader,
        lambda spec: open_training_source(validate(DataConfig, {"train": spec, "stream": {}}, "test")),
        lambda spec: open_training_source(validate(DataConfig, {"train": spec}, "test")),
    ):
        with pytest.raises(UserError, match=r"data\.stream"):
            open_it(f"pipe:touch {canary}")
    assert not canary.exists()
    with pytest.raises(DataError, match="exit code 3"):
        ids(loader("pipe:exit 3", commands=True), 1)


def test_damage_names_the_shard(folder: Path) -> None:
    shard = folder / "1.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"1\.tar: .* at byte"):
        list(read_stream(str(shard)))


def test_what_needs_positions_is_refused(folder: Path) -> None:
    for given in ({"keep": 0.5}, {"sampling": {"policy": "distinct", "field": "n"}}, {"text_field": "n"}):
        with pytest.raises(ConfigError, match="leave one of the two out"):
            validate(DataConfig, {"train": str(folder), "stream": {}, **given}, "test")


def test_the_first_samples_teach_the_vocabulary(folder: Path) -> None:
    source = open_training_source(validate(DataConfig, {"train": str(folder), "stream": {"head": 12}}, "test"))
    assert len(source) == 12
    assert source.read(11).texts == ("text 11",)
    assert source.fields(3) == {"n": 3}
