"""The index of one tar shard: for each sample its key and where its members lie, kept in a sidecar file beside the shard.

Sidecar ``NAME.tar.idx.json``, two lines: a JSON header (format, version, the shard's size and modification time, sha256 of the
second line) and the JSON columns. It is rebuilt when the shard's size or time differ, and when it does not match its own
digest.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

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
MAX_SIDECAR_BYTES = 1 << 30
_CHUNK = 1 << 20

Damaged = Literal["refuse", "skip"]


@dataclass(frozen=True, eq=False)
class Column:
    """Where the members of one extension lie, a row a sample; offset -1 where a sample has none."""

    offset: np.ndarray  # (n,) int64
    size: np.ndarray  # (n,) int64
    crc32: np.ndarray  # (n,) uint32


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """What is in one shard.

    Args:
        path: The tar file.
        keys: Key of each sample: the member's path up to the first dot of its file name.
        columns: Members by extension.
        ignored: Regular members that are not read: unknown extensions, files without one.
        other: Entries that are not regular files.
        damage: Places that were skipped, as text; only with ``damaged="skip"``.
        digest: sha256 of the columns: equal for equal content wherever the shard lies.
        attributes: What the shard says of all its samples (`mm.data.features.Encoding`).
    """

    path: Path
    keys: tuple[str, ...]
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
    return shard.with_name(shard.name + ".idx.json")


def index_shard(path: str | Path, damaged: Damaged = "refuse", rebuild: bool = False) -> ShardIndex:
    """The index of a tar shard, from its sidecar if that still fits, else by reading the shard once and writing the sidecar.

    Args:
        path: A plain ``.tar`` file.
        damaged: ``refuse`` raises at the first damage; ``skip`` goes on behind it and lists it in ``damage``.
        rebuild: Ignore the sidecar.

    Raises:
        DataError: No such file, or damage; the message names the shard and the byte offset.
    """
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


def _from_body(shard: Path, body: dict[str, Any], line: bytes) -> ShardIndex:
    columns = {
        name: Column(np.array(offset, np.int64), np.array(size, np.int64), np.array(crc, np.uint32))
        for name, (offset, size, crc) in body["columns"].items()
    }
    return ShardIndex(
        path=shard,
        keys=tuple(body["keys"]),
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
        head, _, line = sidecar.read_bytes().partition(b"\n")
        header = json.loads(head)
        wanted = {"format": FORMAT, "version": VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if {name: header.get(name) for name in wanted} != wanted or header.get("sha256") != hashlib.sha256(line).hexdigest():
            return None
        index = _from_body(shard, json.loads(line), line)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None
    fits = all(
        len(column.offset) == len(column.size) == len(column.crc32) == len(index.keys)
        and bool(((column.offset + column.size) <= stat.st_size).all())
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
    with tempfile.NamedTemporaryFile(dir=shard.parent, prefix=f".{shard.name}.", suffix=".part", delete=False) as part:
        try:
            part.write(json.dumps(header).encode() + b"\n" + line)
            part.close()
            os.chmod(part.name, 0o644)
            os.replace(part.name, sidecar_path(shard))
        except BaseException:
            os.unlink(part.name)
            raise
