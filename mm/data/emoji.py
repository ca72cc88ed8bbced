"""The embedded data: emoji by independent artists, drawn once from their SVG files into tar shards in a cache folder.

Artists are the split: train = noto, twemoji, fluent-flat, openmoji; validation = fxemoji; test = emojione. Concepts are split
too: ``compositional`` and ``novel`` ones are never trained on. Credits and licences: ATTRIBUTION.md.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as memoize
from pathlib import Path
from typing import Any

from mm.data.captions import look_up
from mm.data.labels import LabelTask
from mm.data.raster import draw, rasterize, svg_names
from mm.data.shards import ShardSource
from mm.data.write import Progress, write_shards
from mm.errors import DataError, UserError
from mm.paths import cache_folder
from mm.types import Sample

TRAIN_ARTISTS = ("noto", "twemoji", "fluent-flat", "openmoji")
VALIDATION_ARTISTS = ("fxemoji",)
TEST_ARTISTS = ("emojione",)
ARTISTS = TRAIN_ARTISTS + VALIDATION_ARTISTS + TEST_ARTISTS
SPLITS = {"train": TRAIN_ARTISTS, "validation": VALIDATION_ARTISTS, "test": TEST_ARTISTS, "all": ARTISTS}
CONCEPT_SPLITS = ("seen", "compositional", "novel")
MIN_SIZE, MAX_SIZE = 32, 224

_ASSETS = Path(__file__).parents[1] / "assets" / "emoji"
_ARCHIVES = ("emoji-svg.tar.xz", "emoji-svg-openmoji-by-sa.tar.xz")
_LAYOUT = 1  # raise when the shards' content changes for the same art


class EmojiSource:
    """Emoji pictures of one selection, a `mm.types.Source`.

    Ids are ``artist/key~variant``, the media RGBA PNG, the only text the English name; fields are ``key emoji name keywords
    group subgroup split core names`` of the concept with ``artist`` and ``variant``.
    """

    def __init__(self, name: str, size: int, shards: ShardSource, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        self.name = name
        self.size = size
        self._shards = shards
        described = [(index, _describe(shards.key(index))) for index in range(len(shards))]
        kept = [(index, fields) for index, fields in described if keep(fields)]
        self._rows = [index for index, _ in kept]
        self._fields = [fields for _, fields in kept]
        ids = "\n".join(shards.key(index) for index in self._rows)
        # Pixels are left out on purpose: another version of the renderer must not change the training order.
        self.fingerprint = hashlib.sha256(f"emoji {_LAYOUT} {size}\n{ids}".encode()).hexdigest()

    @property
    def task(self) -> LabelTask:
        """Tell the full name among all core names, beside nearest neighbour on the train artists' pictures of all concepts."""
        names = tuple(concept["name"] for concept in concepts().values() if concept["core"])
        return LabelTask(label="name", classes=names, subsets="split", reference="emoji:train/all-concepts")

    def named(self, field: str) -> dict[str, frozenset[str]]:
        """Subgroups of all core concepts by what a field says of them (``name``, ``names.zh``), which several may share."""
        found: dict[str, frozenset[str]] = {}
        for concept in concepts().values():
            name = look_up(concept, field)
            if concept["core"] and isinstance(name, str):
                found[name] = found.get(name, frozenset()) | {concept["subgroup"]}
        return found

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return self._shards.key(self._rows[index])

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._fields[index]

    def read(self, index: int) -> Sample:
        data = self._shards.read_media(self._rows[index], "image")
        assert data is not None, "every emoji has a picture"
        fields = self._fields[index]
        return Sample(self.key(index), {"image": data}, (fields["name"],), fields)


def open_emoji(spec: str, size: int = 64, progress: Progress | None = None) -> EmojiSource:
    """Open a selection of the embedded emoji, drawing them first if this size is not in the cache.

    Args:
        spec: ``emoji:train`` (train artists, seen concepts), ``emoji:validation``, ``emoji:test`` or ``emoji:all`` (these
            three with all concepts), followed by any of ``/core`` (no families, no gender variants), ``/all-concepts`` (lifts
            the limit of ``train``), ``/seen``, ``/compositional``, ``/novel`` (several of them add up) and artists' names.
        size: Side of the pictures in pixels, 32 to 224.
        progress: Called with (pictures drawn, pictures in all) while drawing.

    Raises:
        UserError: An unknown selection or a size out of range.
    """
    artists, keep = _parse(spec)
    root = build(size, progress=progress)
    try:
        shards = ShardSource([root / artist for artist in artists], name=spec)
    except DataError:  # only a disk or a hand can have damaged what was renamed into place when complete
        root = build(size, progress=progress, rebuild=True)
        shards = ShardSource([root / artist for artist in artists], name=spec)
    return EmojiSource(spec, size, shards, keep)


def build(size: int, cache: str | Path | None = None, progress: Progress | None = None, rebuild: bool = False) -> Path:
    """Draw all emoji at one size into tar shards, a folder an artist, and return their common folder.

    Done once a size: later calls return at once. Safe when several processes call it together (one draws, the others wait) and
    when one is killed midway (the folder appears under its name only when complete; the rest is cleared away by the next one).

    Args:
        size: Side in pixels, 32 to 224.
        cache: Folder for caches; default: `mm.paths.cache_folder`.
        progress: Called with (pictures drawn, pictures in all).
        rebuild: Draw again even if the folder is there.

    Raises:
        UserError: A size out of range, or a cache folder that cannot be written.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise UserError(f"emoji are drawn at {MIN_SIZE} to {MAX_SIZE} pixels, not {size}")
    return built_once(f"emoji-{size}-{_digest()}", lambda folder: _draw_all(folder, size, progress), cache, rebuild=rebuild)


def built_once(name: str, write: Callable[[Path], None], cache: str | Path | None = None, *, rebuild: bool = False) -> Path:
    """A folder of the cache that ``write`` fills at the first call; see `build` for what it withstands.

    Args:
        name: Of the folder; says what is in it, its version included.
        write: Makes the folder that it is given.
        cache: Folder for caches; default: `mm.paths.cache_folder`.
        rebuild: Make it again even if it is there.

    Raises:
        UserError: A cache folder that cannot be written.
    """
    root = Path(cache) if cache is not None else cache_folder()
    target = root / name
    if target.is_dir() and not rebuild:
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock"):
            for leftover in root.glob(f".{name}.part-*"):
                shutil.rmtree(leftover)
            if rebuild and target.is_dir():
                shutil.rmtree(target)
            if not target.is_dir():
                part = root / f".{name}.part-{os.getpid()}"
                try:
                    write(part)
                    os.replace(part, target)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{root}: {name} cannot be built there: {error}; set MM_CACHE to a writable folder") from None
    return target


def draw_concepts(artist: str, keys: Sequence[str], size: int) -> dict[str, bytes]:
    """PNG of a few concepts by key, drawn at once and not kept: for examples, where building all would take too long.

    Args:
        artist: One of `ARTISTS`; concepts that this artist did not draw are left out.
        keys: Of `concepts`.
        size: Side in pixels.
    """
    wanted = {f"{artist}/{key}~0.svg": key for key in keys}
    found = [draw(_ASSETS / name, wanted.keys(), size) for name in _ARCHIVES]
    return {wanted[name]: png for drawn in found for name, png in drawn.items()}


def concepts() -> Mapping[str, Mapping[str, Any]]:
    """All 1,644 concepts by key: ``key emoji name keywords group subgroup split core names``."""
    return _concepts()


@memoize
def _concepts() -> dict[str, dict[str, Any]]:
    lines = (_ASSETS / "concepts.jsonl").read_text(encoding="utf-8").splitlines()
    return {concept["key"]: concept for concept in map(json.loads, lines)}


@memoize
def _digest() -> str:
    """Names the art and the layout, so that a new version of either never meets an old cache."""
    digest = hashlib.sha256(str(_LAYOUT).encode())
    for name in (*_ARCHIVES, "concepts.jsonl"):
        digest.update((_ASSETS / name).read_bytes())
    return digest.hexdigest()[:12]


def _describe(sample_id: str) -> dict[str, Any]:
    artist, _, rest = sample_id.partition("/")
    key, _, variant = rest.partition("~")
    return {**_concepts()[key], "artist": artist, "variant": int(variant)}


def _parse(spec: str) -> tuple[Sequence[str], Callable[[Mapping[str, Any]], bool]]:
    """Artists of a selection, in their fixed order, and the predicate of its concepts."""
    scheme, _, rest = spec.partition(":")
    split, *modifiers = rest.split("/")
    known = ("core", "all-concepts", *CONCEPT_SPLITS, *ARTISTS)
    if scheme != "emoji" or split not in SPLITS:
        raise UserError(f"'{spec}': write emoji:train, emoji:validation, emoji:test or emoji:all")
    for modifier in modifiers:
        if modifier not in known:
            raise UserError(f"'{spec}': unknown modifier '{modifier}'; there are {', '.join(known)}")
    named = [artist for artist in ARTISTS if artist in modifiers]
    artists = [artist for artist in SPLITS[split] if not named or artist in named]
    if not artists:
        raise UserError(f"'{spec}': {', '.join(named)} is not among the artists of '{split}': {', '.join(SPLITS[split])}")
    wanted = {name for name in CONCEPT_SPLITS if name in modifiers}
    if not wanted:
        wanted = {"seen"} if split == "train" and "all-concepts" not in modifiers else set(CONCEPT_SPLITS)
    only_core = "core" in modifiers
    return artists, lambda fields: fields["split"] in wanted and (fields["core"] or not only_core)


def _draw_all(folder: Path, size: int, progress: Progress | None) -> None:
    archives = [_ASSETS / name for name in _ARCHIVES]
    names = [svg_names(archive) for archive in archives]
    total = sum(map(len, names))
    done = 0
    processes = max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1))
    for archive, inside in zip(archives, names, strict=True):
        drawn: dict[str, list[Sample]] = {}
        for name, png in zip(inside, rasterize(archive, size, processes), strict=True):
            sample_id = name.removesuffix(".svg")
            fields = _describe(sample_id)
            drawn.setdefault(fields["artist"], []).append(Sample(sample_id, {"image": png}, (fields["name"],), fields))
            done += 1
            if progress is not None:
                progress(done, total)
        for artist, samples in drawn.items():
            write_shards(samples, folder / artist)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive file lock; the system releases it when the holder dies."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
