"""Shards in object storage: the same samples as here, with a bounded cache, patience, and errors that name the shard."""

import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from mm.cli import app
from mm.data import remote
from mm.data.index import index_shards, sidecar_path
from mm.data.remote import Remote, find, local_copy, shard_cache
from mm.data.shards import ShardSource
from mm.data.sources import open_source
from mm.data.write import write_shards
from mm.errors import DataError, UserError
from mm.types import Sample

SHARDS, EACH = 4, 6


def samples() -> list[Sample]:
    random = np.random.default_rng(0)
    return [Sample(f"{i:03d}", {"image": b"\xff\xd8\xff" + random.bytes(900)}, (f"text {i}",)) for i in range(SHARDS * EACH)]


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shards and sidecars, with a cache of its own and no waiting."""
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    folder = tmp_path / "shards"
    for number in range(SHARDS):
        made = write_shards(samples()[number * EACH : (number + 1) * EACH], tmp_path / f"part{number}")[0]
        folder.mkdir(exist_ok=True)
        made.rename(folder / f"a-{number:03d}.tar")
    return folder


@pytest.fixture
def bucket(local: Path) -> Iterator[str]:
    """The shards, without sidecars, in the memory that fsspec offers as a storage."""
    fs = fsspec.filesystem("memory")
    for shard in local.glob("*.tar"):
        fs.pipe_file(f"/bucket/{shard.name}", shard.read_bytes())
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def content(source: Any) -> list[Sample]:
    return [source.read(i) for i in np.random.default_rng(1).permutation(len(source))]


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/a-{000..003}.tar"])
@pytest.mark.parametrize("cache_gb", ["1", "0.000001"])
def test_samples_are_those_of_local_shards(
    pattern: str, cache_gb: str, local: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched whole, or range by range where they do not fit the cache; the same training order, too."""
    monkeypatch.setenv("MM_SHARD_CACHE_GB", cache_gb)
    here, there = ShardSource(local), open_source(bucket + pattern)
    assert isinstance(there, ShardSource)
    assert content(there) == content(here)
    assert there.fingerprint == here.fingerprint
    assert there.read_media(3, "image") == here.read_media(3, "image")
    assert content(pickle.loads(pickle.dumps(there))) == content(here)  # noqa: S301 - what spawned loader workers do
    kept = list(shard_cache().glob("*.tar"))
    assert (
        len(kept) == SHARDS if cache_gb == "1" else len(kept) < SHARDS
    )  # beyond the limit, what was fetched last for its index


def test_a_sample_is_one_request(local: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_SHARD_CACHE_GB", "0")
    source = ShardSource(bucket)
    requests = counted(monkeypatch)
    source.read(3)
    assert len(requests) == 1


def test_an_index_beside_the_shards_saves_reading_them(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mm data index` puts it there; another machine then opens the source without any shard, and the next time without it."""
    shown = CliRunner().invoke(app, ["data", "index", bucket])
    assert shown.exit_code == 0, shown.output
    assert f"{SHARDS} shards, {SHARDS * EACH} samples indexed" in shown.output
    monkeypatch.setenv("MM_CACHE", str(shard_cache() / "another machine"))
    requests = counted(monkeypatch)
    source = ShardSource(bucket)
    assert len(source) == SHARDS * EACH
    assert all(path.endswith(".idx.json") for path in requests)
    assert not list(shard_cache().glob("*.tar"))
    requests.clear()
    ShardSource(bucket)
    assert requests == []


def test_a_replaced_shard_is_another_one(local: Path, bucket: str) -> None:
    before = ShardSource(bucket)
    before.read(0)
    fsspec.filesystem("memory").pipe_file("/bucket/a-000.tar", (local / "a-003.tar").read_bytes())
    after = ShardSource(bucket)
    assert after.fingerprint != before.fingerprint
    assert after.read(0).texts == ("text 18",)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are read from the storage from now on."""
    requests: list[str] = []
    original = MemoryFileSystem.cat_file

    def cat_file(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
        requests.append(path)
        return original(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)
    return requests


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """The n-th reading from the storage fails where ``fails(n)``."""
    original, count = MemoryFileSystem.cat_file, iter(range(1 << 30))

    def cat_file(self: MemoryFileSystem, path: str, **options: Any) -> bytes:
        if fails(next(count)):
            raise ConnectionResetError("the line went dead")
        return original(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", cat_file)


def test_what_passes_is_waited_for(local: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda count: count % 5 != 4)
    monkeypatch.setattr(remote, "REQUESTS", 1)
    monkeypatch.setattr("mm.data.index.REQUESTS", 1)
    assert content(ShardSource(bucket)) == content(ShardSource(local))


def test_the_last_failure_names_the_shard(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ShardSource(bucket)
    for file in shard_cache().glob("*.tar"):
        file.unlink()
    failing(monkeypatch, lambda _: True)
    with pytest.raises(DataError, match=r"a-002\.tar: cannot be read after 5 tries: the line went dead; try again later$"):
        source.read(2 * EACH)
    assert not list(shard_cache().glob("*.part"))


def test_damage_names_the_shard(local: Path, bucket: str) -> None:
    data = bytearray((local / "a-001.tar").read_bytes())
    data[700] ^= 255  # within a member: found when it is read
    source = ShardSource(bucket)
    fsspec.filesystem("memory").pipe_file("/bucket/a-001.tar", bytes(data[:2000]))
    with pytest.raises(DataError, match=r"memory://.*a-001\.tar: .*at byte"):
        ShardSource(bucket)
    assert len(source) == SHARDS * EACH


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("memory://bucket/none-{000..001}.tar", "none-000.tar: not there"),
        ("memory://bucket/*.zip.tar", "no tar shards there"),
        ("simplecache::memory://bucket/a-000.tar", "shards are read from"),
        ("github://owner:repo@main/a.tar", "shards are read from"),
        ("pipe:cat a.tar", "data.stream"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(spec: str, message: str, bucket: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


def test_a_storage_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("no s3fs")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(UserError, match="needs the package s3fs"):
        find(["s3://bucket/a.tar"])


def test_the_cache_stays_within_its_bound(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was used longest ago goes."""
    remotes = find([bucket])
    monkeypatch.setenv("MM_SHARD_CACHE_GB", str(2.5 * remotes[0].size / 1e9))
    for number in (0, 1, 0, 2):
        local_copy(remotes[number])
        time.sleep(0.05)  # times of use are those of the file system's clock
    kept = {file.name.partition("-")[2] for file in shard_cache().glob("*.tar")}
    assert kept == {"a-000.tar", "a-002.tar"}
    monkeypatch.setenv("MM_SHARD_CACHE_GB", "much")
    with pytest.raises(UserError, match="MM_SHARD_CACHE_GB is 'much'"):
        find([bucket])


def fetch_often(remotes: list[Remote], seed: int) -> None:
    for number in np.random.default_rng(seed).integers(len(remotes), size=40):
        chosen = remotes[number]
        data = ShardSource(chosen.url).read(0)
        assert data.texts == (f"text {int(chosen.url[-7:-4]) * EACH}",)


def test_processes_share_a_cache_that_is_too_small(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each gets whole files, although they push out each other's."""
    remotes = find([f"file://{local}"])
    monkeypatch.setenv("MM_SHARD_CACHE_GB", str(1.5 * remotes[0].size / 1e9))
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fetch_often, args=(remotes, seed)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert not list(shard_cache().glob(".*.part"))


def test_an_index_made_by_several_processes_is_the_same(local: Path) -> None:
    paths = sorted(local.glob("*.tar"))
    alone = index_shards([*paths], rebuild=True)
    written = [sidecar_path(path).read_bytes() for path in paths]
    progress: list[tuple[int, int | None]] = []
    together = index_shards([*paths], rebuild=True, jobs=2, progress=lambda *done: progress.append(done))
    assert [index.digest for index in together] == [index.digest for index in alone]
    assert [list(index.keys) for index in together] == [list(index.keys) for index in alone]
    assert [sidecar_path(path).read_bytes() for path in paths] == written
    assert progress == [(i + 1, SHARDS) for i in range(SHARDS)]
    paths[2].write_bytes(paths[2].read_bytes()[:1000])
    with pytest.raises(DataError, match=r"a-002\.tar"):
        index_shards([*paths], rebuild=True, jobs=2)
