"""A folder of pictures, recordings or both as a source: sub-folders are classes, ``name.txt`` beside a file is its captions."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.data.files import (
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    is_picture,
    is_recording,
    read_captions,
    read_file,
    revision_of,
)
from mm.errors import UserError
from mm.types import Sample

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


class FolderSource:
    """Pictures and recordings below a folder, a `mm.types.Source`.

    A picture and a recording that differ in their endings alone (``rex.jpg``, ``rex.wav``) are one sample with both media; all
    others are samples of their own. Ids are paths relative to the folder, of the picture where a sample has one, in sorted
    order. With two or more sub-folders, the first part of the path is the class: field ``cls``, and also the caption (``_`` and
    ``-`` read as spaces) of samples that have no text file. Hidden files are left out.

    Args:
        folder: Where the files are, at any depth.
        name: What messages call it; default: the folder.

    Raises:
        UserError: Neither pictures nor recordings there, or the sub-folders are splits and one of them must be chosen.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.name = name if name is not None else str(folder)
        self._folder = Path(folder)
        files = sorted(_walk(self._folder))
        self._texts = {path for path in files if path.endswith(".txt")}
        seen = {os.path.splitext(path)[0] for path in files if is_picture(path)}
        heard = {os.path.splitext(path)[0]: path for path in reversed(files) if is_recording(path)}
        self._sounds = {stem: path for stem, path in heard.items() if stem in seen}
        beside = set(self._sounds.values())
        self._paths = [path for path in files if not path.endswith(".txt") and path not in beside]
        if not self._paths:
            kinds = ", ".join(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES | AUDIO_SUFFIXES))
            raise UserError(f"{folder}: no pictures and no recordings in this folder or below it (looked for {kinds})")
        classes = {path.split("/", 1)[0] for path in self._paths if "/" in path}
        if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
            raise UserError(
                f"{folder}: holds the splits {', '.join(sorted(classes))}; choose one, such as {folder}/{min(classes)}"
            )
        self._has_classes = len(classes) > 1
        names = "\n".join(["folder", *self._paths, *sorted(self._sounds.values())])
        self.fingerprint = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def revision(self) -> str:
        """Hex digest that changes with any picture, recording or caption file; looks at every file."""
        files = (self._folder / path for path in [*self._paths, *sorted(self._sounds.values()), *sorted(self._texts)])
        return hashlib.sha256(f"{self.fingerprint} {revision_of(files)}".encode()).hexdigest()

    def key(self, index: int) -> str:
        return self._paths[index]

    def fields(self, index: int) -> Mapping[str, Any]:
        label, separator, _ = self._paths[index].partition("/")
        return {"cls": label} if self._has_classes and separator else {}

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `BadSample` when a file has gone or its text is not UTF-8."""
        path, fields = self._paths[index], self.fields(index)
        stem = os.path.splitext(path)[0]
        media = {"image" if is_picture(path) else "audio": read_file(self._folder / path)}
        if is_picture(path) and stem in self._sounds:
            media["audio"] = read_file(self._folder / self._sounds[stem])
        texts: tuple[str, ...] = ()
        caption_file = f"{stem}.txt"
        if caption_file in self._texts:
            texts = read_captions(self._folder / caption_file)
        elif "cls" in fields:
            texts = (fields["cls"].replace("_", " ").replace("-", " ").strip(),)
        return Sample(path, media, texts, fields)


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all pictures, recordings and text files below a folder. Links to folders are followed once each."""
    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name != "__MACOSX")
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        for name in files:
            if not name.startswith(".") and (is_picture(name) or is_recording(name) or name.endswith(".txt")):
                yield prefix + name
