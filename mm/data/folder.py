"""A folder of pictures as a source: sub-folders are classes, and ``name.txt`` beside ``name.jpg`` holds its captions."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm.data.files import IMAGE_SUFFIXES, is_picture, read_captions, read_file, revision_of
from mm.errors import UserError
from mm.types import Sample

SPLIT_NAMES = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})


class FolderSource:
    """Pictures below a folder, a `mm.types.Source`.

    Ids are paths relative to the folder, in sorted order. With two or more sub-folders, the first part of the path is the
    class: field ``cls``, and also the caption (``_`` and ``-`` read as spaces) of pictures that have no text file. Hidden files
    are left out.

    Args:
        folder: Where the pictures are, at any depth.
        name: What messages call it; default: the folder.

    Raises:
        UserError: No pictures there, or the sub-folders are splits and one of them must be chosen.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.name = name if name is not None else str(folder)
        self._folder = Path(folder)
        files = sorted(_walk(self._folder))
        self._texts = {path for path in files if path.endswith(".txt")}
        self._paths = [path for path in files if is_picture(path)]
        if not self._paths:
            kinds = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            raise UserError(f"{folder}: no pictures in this folder or below it (looked for {kinds})")
        classes = {path.split("/", 1)[0] for path in self._paths if "/" in path}
        if len(classes) > 1 and {name.lower() for name in classes} <= SPLIT_NAMES:
            raise UserError(
                f"{folder}: holds the splits {', '.join(sorted(classes))}; choose one, such as {folder}/{min(classes)}"
            )
        self._has_classes = len(classes) > 1
        self.fingerprint = hashlib.sha256("\n".join(["folder", *self._paths]).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def revision(self) -> str:
        """Hex digest that changes with any picture or caption file; looks at every file."""
        files = (self._folder / path for path in [*self._paths, *sorted(self._texts)])
        return hashlib.sha256(f"{self.fingerprint} {revision_of(files)}".encode()).hexdigest()

    def key(self, index: int) -> str:
        return self._paths[index]

    def fields(self, index: int) -> Mapping[str, Any]:
        label, separator, _ = self._paths[index].partition("/")
        return {"cls": label} if self._has_classes and separator else {}

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `BadSample` when a file has gone or its text is not UTF-8."""
        path, fields = self._paths[index], self.fields(index)
        data = read_file(self._folder / path)
        texts: tuple[str, ...] = ()
        caption_file = os.path.splitext(path)[0] + ".txt"
        if caption_file in self._texts:
            texts = read_captions(self._folder / caption_file)
        elif "cls" in fields:
            texts = (fields["cls"].replace("_", " ").replace("-", " ").strip(),)
        return Sample(path, {"image": data}, texts, fields)


def _walk(root: Path) -> Iterator[str]:
    """Relative paths of all pictures and text files below a folder. Links to folders are followed once each."""
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
            if not name.startswith(".") and (is_picture(name) or name.endswith(".txt")):
                yield prefix + name
