"""The index of one tar shard: for each sample its key and where its members lie, kept in a sidecar file beside the shard.

Sidecar ``NAME.tar.idx.json``, two lines: a JSON header (format, version, the shard's size and modification time, sha256 of the
second line) and the JSON columns. It is rebuilt when the shard's size or time differ, and when it does not match its own
digest. The sidecar of a shard in object storage is looked for in the cache, then beside the shard; if there is none, the shard
is fetched once.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from mm.data.remote import REQUESTS, Remote, local_copy, put, small_file
from mm.data.tar import Listing, Member, TarError, list_members
from mm.errors import DataError

_MEDIA = {
    "image": ("jpg", "jpeg", "png", "webp", "gif", "bmp"),
    "audio": ("wav", "flac", "ogg", "mp3", "opus"),
    "features": ("features.safetensors",),
}
MODALITY = {extension: modality for modality, extensions in _MEDIA.items() for extension in extensions}
"""Media extensions and their modality, preferred first where a sample has several."""

EXTENSIONS = (*MODALITY, "txt", "json", "cls")
"""Members with another extension are counted and never read. Columns are kept in this order."""

FORMAT, VERSION = "mm-shard-index", 1
SIDECAR_SUFFIX = ".idx.json"
MAX_SIDECAR_BYTES = 1 << 30
_CHUNK = 1 << 20

Damaged = Literal["refuse", "skip"]


@dataclass(frozen=True, eq=False)
class Column:
    """Where the members of one extension lie, a row a sample; offset -1 where a sample has none."""

    offset: np.ndarray  # (n,) int64
    size: np.ndarray  # (n,) int64
    crc32: np.ndarray  # (n,) uint32


class Keys(Sequence[str]):
    """Many short texts in one piece of memory: a fifth of what as many Python strings take.

    Args:
        keys: The texts.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        encoded = [key.encode(errors="surrogatepass") for key in keys]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode(errors="surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self._bytes[start:end].decode(errors="surrogatepass") for start, end in pairwise(self._ends.tolist()))


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard.

    Args:
        path: The tar file, here or in object storage.
        keys: Key of each sample: the member's path up to the first dot of its file name.
        columns: Members by extension.
        ignored: Regular members that are not read: unknown extensions, files without one.
        other: Entries that are not regular files.
        damage: Places that were skipped, as text; only with ``damaged="skip"``.
        digest: sha256 of the columns: equal for equal content wherever the shard lies.
        attributes: What the shard says of all its samples (`mm.data.features.Encoding`).
    """

    path: Path | Remote
    keys: Keys
    columns: dict[str, Column]
    ignored: int
    other: int
    damage: tuple[str, ...]
    digest: str
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)


def sidecar_path(shard: Path) -> Path:
    """Where the index of a shard is kept."""
    return shard.with_name(shard.name + SIDECAR_SUFFIX)


def index_shards(
    paths: Sequence[Path | Remote],
    damaged: Damaged = "refuse",
    *,
    rebuild: bool = False,
    jobs: int = 1,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[ShardIndex]:
    """The indexes of many shards, in their order; see `index_shard`.

    Args:
        paths: The shards; those in object storage are asked for many at once.
        damaged: See `index_shard`.
        rebuild: See `index_shard`.
        jobs: Processes that read shards.
        progress: Called with (shards indexed, shards in all).

    Raises:
        DataError: As `index_shard`, for the first shard in order.
    """
    read = partial(index_shard, damaged=damaged, rebuild=rebuild)
    indexes = []
    with _pool(paths, jobs) as pool:
        found = map(read, paths) if pool is None else pool.map(read, paths, chunksize=max(1, min(16, len(paths) // (4 * jobs))))
        for index in found:
            indexes.append(index)
            if progress is not None:
                progress(len(indexes), len(paths))
    return indexes


def _pool(paths: Sequence[Path | Remote], jobs: int) -> Executor | nullcontext[None]:
    if jobs > 1:
        return ProcessPoolExecutor(min(jobs, len(paths)), mp_context=get_context("spawn"))
    return ThreadPoolExecutor(REQUESTS) if any(isinstance(path, Remote) for path in paths) else nullcontext()


def publish_sidecar(remote: Remote) -> None:
    """Put the index of a shard in object storage beside it, for others. Raises `DataError` as `mm.data.remote.tried`."""
    put(f"{remote}{SIDECAR_SUFFIX}", sidecar_path(remote.cached).read_bytes())


def _index_remote(remote: Remote, damaged: Damaged, rebuild: bool) -> ShardIndex:
    """The index of a shard in object storage; the version in the name of what the cache has stands for the shard's time."""
    own = sidecar_path(remote.cached)
    if not rebuild:
        with suppress(OSError):
            index = _parse_sidecar(own.read_bytes(), remote, remote.size, None, damaged)
            if index is not None:
                return index
        raw = small_file(f"{remote}{SIDECAR_SUFFIX}", MAX_SIDECAR_BYTES)
        index = None if raw is None else _parse_sidecar(raw, remote, remote.size, None, damaged)
        if raw is not None and index is not None:
            with suppress(OSError):
                own.parent.mkdir(parents=True, exist_ok=True)
                _write_whole(own, raw)
            return index
    while True:
        copy = local_copy(remote)
        try:
            return replace(index_shard(copy, damaged, rebuild=True), path=remote)
        except DataError as error:
            if isinstance(error.__context__, FileNotFoundError):  # left the cache meanwhile, to make room for another one
                continue
            raise DataError(str(error).replace(str(copy), remote.url)) from None


def index_shard(path: str | Path | Remote, damaged: Damaged = "refuse", rebuild: bool = False) -> ShardIndex:
    """The index of a tar shard, from its sidecar if that still fits, else by reading the shard once and writing the sidecar.

    Args:
        path: A plain ``.tar`` file, here or in object storage.
        damaged: ``refuse`` raises at the first damage; ``skip`` goes on behind it and lists it in ``damage``.
        rebuild: Ignore the sidecar.

    Raises:
        DataError: No such file, or damage; the message names the shard and the byte offset.
    """
    if isinstance(path, Remote):
        return _index_remote(path, damaged, rebuild)
    shard = Path(path)
    try:
        stat = shard.stat()
        if not rebuild:
            index = _load_sidecar(shard, stat, damaged)
            if index is not None:
                return index
        body = _scan(shard, damaged)
    except TarError as damage:
        raise DataError(f"{shard}: {damage}; restore the shard from its source, or take it out of the folder") from None
    except FileNotFoundError:
        raise DataError(f"{shard}: no such shard") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from None
    line = json.dumps(body, separators=(",", ":")).encode()
    with suppress(OSError):  # a read-only folder only costs the scan again
        _write_sidecar(shard, stat, line)
    return _from_body(shard, body, line)


def split_name(name: str) -> tuple[str, str]:
    """``"a/b.seg.png"`` to (``"a/b"``, ``"seg.png"``), the convention of webdataset; the extension in lower case."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _scan(shard: Path, damaged: Damaged) -> dict[str, Any]:
    """Read a whole shard once; the JSON columns of its index."""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        length = os.fstat(descriptor).st_size
        listing = Listing()

        def read_at(offset: int, count: int) -> bytes:
            return os.pread(descriptor, count, offset)

        members = list_members(read_at, length, listing, skip_damage=damaged == "skip")
        return _collect(members, lambda member: _crc32(read_at, member), listing)
    finally:
        os.close(descriptor)


def _crc32(read_at: Callable[[int, int], bytes], member: Member) -> int:
    crc, done = 0, 0
    while done < member.size:
        chunk = read_at(member.offset + done, min(_CHUNK, member.size - done))
        if not chunk:
            raise TarError(member.offset + done, "file that became shorter while it was read")
        crc, done = zlib.crc32(chunk, crc), done + len(chunk)
    return crc


def _collect(members: Iterable[Member], crc32: Callable[[Member], int], listing: Listing) -> dict[str, Any]:
    """Group consecutive members of one key; a key with an extension that it already has starts a new sample."""
    keys: list[str] = []
    rows: list[dict[str, tuple[int, int, int]]] = []
    ignored = 0
    for member in members:
        key, extension = split_name(member.name)
        if extension not in EXTENSIONS or not key or key.rpartition("/")[2].startswith("._"):
            ignored += 1
            continue
        if not keys or key != keys[-1] or extension in rows[-1]:
            keys.append(key)
            rows.append({})
        rows[-1][extension] = (member.offset, member.size, crc32(member))
    missing = (-1, 0, 0)
    present = {extension for row in rows for extension in row}
    found = [extension for extension in EXTENSIONS if extension in present]
    return {
        "keys": keys,
        "columns": {name: list(zip(*(row.get(name, missing) for row in rows), strict=True)) for name in found},
        "ignored": ignored,
        "other": listing.other,
        "damage": [str(damage) for damage in listing.damage],
    } | ({"attributes": listing.attributes} if listing.attributes else {})


def _from_body(shard: Path | Remote, body: dict[str, Any], line: bytes) -> ShardIndex:
    columns = {
        name: Column(np.array(offset, np.int64), np.array(size, np.int64), np.array(crc, np.uint32))
        for name, (offset, size, crc) in body["columns"].items()
    }
    return ShardIndex(
        path=shard,
        keys=Keys(body["keys"]),
        columns=columns,
        ignored=body["ignored"],
        other=body["other"],
        damage=tuple(body["damage"]),
        digest=hashlib.sha256(line).hexdigest(),
        attributes=dict(body.get("attributes", {})),
    )


def _load_sidecar(shard: Path, stat: os.stat_result, damaged: Damaged) -> ShardIndex | None:
    """The index in the sidecar, or None when it is absent, stale, damaged, or made by skipping what is now refused."""
    sidecar = sidecar_path(shard)
    try:
        if sidecar.stat().st_size > MAX_SIDECAR_BYTES:
            return None
        raw = sidecar.read_bytes()
    except OSError:
        return None
    return _parse_sidecar(raw, shard, stat.st_size, stat.st_mtime_ns, damaged)


def _parse_sidecar(raw: bytes, shard: Path | Remote, size: int, mtime_ns: int | None, damaged: Damaged) -> ShardIndex | None:
    """The index in a sidecar's bytes, or None where they do not fit a shard of this size and, where it is told, time."""
    try:
        head, _, line = raw.partition(b"\n")
        header = json.loads(head)
        wanted = {"format": FORMAT, "version": VERSION, "size": size}
        if mtime_ns is not None:
            wanted["mtime_ns"] = mtime_ns
        if {name: header.get(name) for name in wanted} != wanted or header.get("sha256") != hashlib.sha256(line).hexdigest():
            return None
        index = _from_body(shard, json.loads(line), line)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    fits = all(
        len(column.offset) == len(column.size) == len(column.crc32) == len(index.keys)
        and bool(((column.offset + column.size) <= size).all())
        and bool((column.size >= 0).all())
        for column in index.columns.values()
    )
    return index if fits and set(index.columns) <= set(EXTENSIONS) and (damaged == "skip" or not index.damage) else None


def _write_sidecar(shard: Path, stat: os.stat_result, line: bytes) -> None:
    """Temporary file, then rename: a reader never sees half a sidecar. Times are compared again at the next opening."""
    header = {
        "format": FORMAT,
        "version": VERSION,
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "sha256": hashlib.sha256(line).hexdigest(),
    }
    _write_whole(sidecar_path(shard), json.dumps(header).encode() + b"\n" + line)


def _write_whole(path: Path, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as part:
        try:
            part.write(content)
            part.close()
            os.chmod(part.name, 0o644)
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
