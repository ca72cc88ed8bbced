"""Tar shards as a random-access source of samples: open by pattern, read by position, every byte checked against its crc32.

A shard is a plain tar file in the layout of webdataset and img2dataset: consecutive members ``KEY.EXTENSION`` are one sample,
with pictures or sound, ``.txt`` (caption), ``.json`` (fields, and captions under ``texts``, ``text`` or ``caption``) and
``.cls`` (class).
"""

import bisect
import contextlib
import glob
import hashlib
import itertools
import json
import os
import re
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.features import MEDIA, common_attributes
from mm.data.index import MODALITY, Damaged, ShardIndex, index_shards
from mm.data.remote import Remote, find, is_remote, local_copy
from mm.errors import BadSample, DataError
from mm.types import Sample

MAX_TEXT_BYTES = 1 << 20
MAX_MEDIA_BYTES = 1 << 30
MAX_FEATURES_BYTES = 64 << 20
MAX_BRACE_EXPANSION = 1_000_000
MAX_OPEN_FILES = 64
MAX_SPAN_BYTES = 64 << 20
TEXT_KEYS = ("texts", "text", "caption", "captions")

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class ShardSource:
    """Samples of tar shards, a `mm.types.Source`.

    Ids are the samples' keys; where a key occurs again, in the same shard or another, the later ones get ``#2``, ``#3`` ...
    Opening reads the sidecar indexes, and makes the ones that are missing or stale. Reading is one ``pread`` a member; the
    object may be pickled, forked and used by several threads.

    Args:
        pattern: A tar file, a folder of tar files, a glob, a brace range ``a-{000..010}.tar``, or a list of these; here or in
            object storage (`mm.data.remote`).
        name: What messages call it; default: the pattern.
        damaged: ``refuse`` or ``skip``, see `mm.data.index.index_shard`.
        progress: Called with (shards indexed, shards in all).

    Raises:
        DataError: No shard matches, one is damaged, or they were encoded by different models.
    """

    def __init__(
        self,
        pattern: str | Path | Sequence[str | Path],
        *,
        name: str | None = None,
        damaged: Damaged = "refuse",
        progress: Callable[[int, int | None], None] | None = None,
    ) -> None:
        paths = expand(pattern)
        self.name = name if name is not None else str(pattern) if isinstance(pattern, str | Path) else f"{len(paths)} shards"
        self.shards = index_shards(paths, damaged, progress=progress)
        self._starts = list(itertools.accumulate((len(shard) for shard in self.shards), initial=0))
        self._renamed = _repeated_keys(self.shards)
        self.attributes = common_attributes([shard.attributes for shard in self.shards], self.name)
        self._files = _Files()
        digest = hashlib.sha256("\n".join(shard.digest for shard in self.shards).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def duplicates(self) -> int:
        """How many samples have a key that an earlier sample already has."""
        return len(self._renamed)

    def key(self, index: int) -> str:
        """Id of a sample, without reading the shard."""
        shard, row = self._locate(index)
        return self._renamed.get(index) or shard.keys[row]

    def fields(self, index: int) -> Mapping[str, Any]:
        """Fields of the ``.json`` and ``.cls`` members. Raises `BadSample` as `read` does."""
        shard, row = self._locate(index)
        return self._describe(shard, row)[1]

    def read(self, index: int) -> Sample:
        """The sample with its bytes.

        Raises:
            BadSample: Cause ``checksum``, ``truncated``, ``too many bytes``, ``bad json``, ``bad text`` or ``unreadable``.
        """
        shard, row = self._locate(index)
        media: dict[str, bytes] = {}
        for extension in shard.columns:
            modality = MODALITY.get(extension)
            if modality is not None and modality not in media:
                limit = MAX_FEATURES_BYTES if modality == MEDIA else MAX_MEDIA_BYTES
                data = self._member(shard, row, extension, limit)
                if data is not None:
                    media[modality] = data
        texts, fields = self._describe(shard, row)
        return Sample(self._renamed.get(index) or shard.keys[row], media, texts, fields)

    def read_media(self, index: int, modality: str) -> bytes | None:
        """The bytes of one modality alone, None where the sample has none. Raises `BadSample` as `read` does."""
        shard, row = self._locate(index)
        for extension in shard.columns:
            if MODALITY.get(extension) == modality:
                data = self._member(shard, row, extension, MAX_MEDIA_BYTES)
                if data is not None:
                    return data
        return None

    def _locate(self, index: int) -> tuple[ShardIndex, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return self.shards[shard], index - self._starts[shard]

    def _member(self, shard: ShardIndex, row: int, extension: str, max_bytes: int) -> bytes | None:
        column = shard.columns.get(extension)
        if column is None:
            return None
        offset = int(column.offset[row])
        if offset < 0:
            return None
        size = int(column.size[row])
        if size > max_bytes:
            raise BadSample("too many bytes", _place(shard, row, extension))
        try:
            if isinstance(shard.path, Remote) and not shard.path.whole:
                data = self._files.read_within(shard.path, _span(shard, row), offset, size)
            else:
                data = self._files.read_at(shard.path, offset, size)
        except OSError as error:
            raise BadSample("unreadable", f"{_place(shard, row, extension)}: {error.strerror}") from None
        if len(data) != size:
            raise BadSample("truncated", _place(shard, row, extension))
        if zlib.crc32(data) != column.crc32[row]:
            raise BadSample("checksum", _place(shard, row, extension))
        return data

    def _describe(self, shard: ShardIndex, row: int) -> tuple[tuple[str, ...], dict[str, Any]]:
        return described(
            lambda extension: self._member(shard, row, extension, MAX_TEXT_BYTES),
            lambda extension: _place(shard, row, extension),
        )


def described(read: Callable[[str], bytes | None], place: Callable[[str], str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Captions and fields of a sample.

    Args:
        read: The bytes of its member with an extension, if it has one.
        place: Where that member is, for messages.

    Raises:
        BadSample: ``bad json`` or ``bad text``.
    """
    fields: dict[str, Any] = {}
    raw = read("json")
    if raw is not None:
        fields = _parse_json(raw, place("json"))
    label = read("cls")
    if label is not None:
        value = _parse_text(label, place("cls"))
        fields["cls"] = int(value) if re.fullmatch(r"-?\d{1,18}", value) else value
    caption = read("txt")
    texts = (_parse_text(caption, place("txt")),) if caption is not None else _texts_of(fields)
    fields.pop("texts", None)
    return tuple(text for text in texts if text), fields


class _Files:
    """A bounded set of open files, read by position. Handles are per process and do not travel with a pickle."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[Path | Remote, int] = OrderedDict()
        self._last = threading.local()
        self._lock = threading.Lock()

    def read_within(self, remote: Remote, span: tuple[int, int], offset: int, count: int) -> bytes:
        """Bytes of one sample in object storage, all of which is asked for at once: its members lie beside each other."""
        start, end = span
        if end - start > MAX_SPAN_BYTES:
            return remote.read_at(offset, count)
        name, data = getattr(self._last, "sample", (None, b""))
        if name != (remote, start):
            data = remote.read_at(start, end - start)
            self._last.sample = (remote, start), data
        return data[offset - start : offset - start + count]

    def read_at(self, path: Path | Remote, offset: int, count: int) -> bytes:
        if self._process != os.getpid():  # forked: another thread may have held the lock at that moment
            self.__init__()
        with self._lock:
            descriptor = self._open.get(path)
            if descriptor is None:
                descriptor = self._open[path] = _open_shard(path)
                if len(self._open) > MAX_OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            return os.pread(descriptor, count, offset)

    def __reduce__(self) -> tuple[type["_Files"], tuple[()]]:
        return _Files, ()

    def __del__(self) -> None:
        if os is not None:  # at the end of the interpreter modules go first, and descriptors with the process
            while self._open:
                os.close(self._open.popitem()[1])


def _open_shard(path: Path | Remote) -> int:
    """A descriptor of a shard. One that leaves the cache between being found and opened, to make room, is fetched again."""
    if isinstance(path, Path):
        return os.open(path, os.O_RDONLY)
    while True:
        with contextlib.suppress(FileNotFoundError):
            return os.open(local_copy(path), os.O_RDONLY)


def _span(shard: ShardIndex, row: int) -> tuple[int, int]:
    """From the first to behind the last byte of the members of a sample that are read."""
    places = [(int(column.offset[row]), int(column.size[row])) for column in shard.columns.values()]
    return min(o for o, _ in places if o >= 0), max(o + s for o, s in places if o >= 0)


def expand(pattern: str | Path | Sequence[str | Path]) -> list[Path | Remote]:
    """The shards that a pattern means, sorted within each pattern. Raises `DataError` when there are none."""
    if not isinstance(pattern, str | Path):
        return [path for part in pattern for path in expand(part)]
    if isinstance(pattern, str) and is_remote(pattern):
        found = find(expand_ranges(pattern))
        if not found:
            raise DataError(f"{pattern}: no tar shards there; give a folder of .tar files, or a range: a-{{000..010}}.tar")
        return [*found]
    if Path(pattern).is_dir():
        paths = sorted(path for path in Path(pattern).glob("*.tar") if not path.name.startswith("."))
    elif Path(pattern).is_file():
        paths = [Path(pattern)]
    else:
        paths = [Path(name) for part in expand_ranges(str(pattern)) for name in _globbed(part)]
    if not paths:
        raise DataError(f"{pattern}: no tar shards there; give a folder of .tar files, a glob, or a range: a-{{000..010}}.tar")
    return [*paths]


def _globbed(part: str) -> list[str]:
    return sorted(glob.glob(part)) if glob.has_magic(part) else [part]


def expand_ranges(pattern: str) -> list[str]:
    """Expand every ``{000..010}``, keeping leading zeros."""
    found = _RANGE.search(pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < MAX_BRACE_EXPANSION:
        raise DataError(f"{pattern}: the range {found.group()} is empty or too long")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    tails = expand_ranges(pattern[found.end() :])
    return [f"{pattern[: found.start()]}{i:0{width}d}{tail}" for i in range(int(first), int(last) + 1) for tail in tails]


def _repeated_keys(shards: Sequence[ShardIndex]) -> dict[int, str]:
    """New ids for samples whose key occurred before, by position."""
    hashes = np.fromiter((hash(key) for shard in shards for key in shard.keys), np.int64)
    if len(np.unique(hashes)) == len(hashes):  # nearly always; the keys themselves would take ten times the memory
        return {}
    keys = [key for shard in shards for key in shard.keys]
    taken = set(keys)
    seen: dict[str, int] = {}
    renamed: dict[int, str] = {}
    for index, key in enumerate(keys):
        count = seen[key] = seen.get(key, 0) + 1
        if count > 1:
            while f"{key}#{count}" in taken:
                count = seen[key] = count + 1
            taken.add(f"{key}#{count}")
            renamed[index] = f"{key}#{count}"
    return renamed


def _place(shard: ShardIndex, row: int, extension: str) -> str:
    return f"{shard.path}: {shard.keys[row]}.{extension} at byte {shard.columns[extension].offset[row]}"


def _parse_text(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise BadSample("bad text", place) from None


def _parse_json(raw: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadSample("bad json", place) from None
    if not isinstance(value, dict):
        raise BadSample("bad json", place)
    return value


def _texts_of(fields: Mapping[str, Any]) -> tuple[str, ...]:
    for name in TEXT_KEYS:
        value = fields.get(name)
        if isinstance(value, str):
            return (value.strip(),)
        if isinstance(value, list):
            return tuple(text.strip() for text in value if isinstance(text, str))
    return ()
