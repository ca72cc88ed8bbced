"""A user's copy of an evaluation set on disk: finding its parts, reading its lists, and saying what is missing."""

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm.data.files import is_picture, read_file
from mm.errors import BadSample, DataError, UserError
from mm.types import Source

MAX_METADATA_BYTES = 1 << 30
"""Largest annotation file; Karpathy's of COCO has 144 MB."""

Evaluation = Literal["zero-shot", "retrieval", "winoground", "sugarcrepe", "transcription", "vqa"]


@dataclass(frozen=True)
class Copy:
    """A user's copy of a set.

    Args:
        spec: What the user wrote, for messages and protocol stamps.
        name: The set.
        split: Which part of it.
        folder: Where the copy is.
        layout: What should be in the folder, for messages.
        evaluation: What figures of the set are published for.
    """

    spec: str
    name: str
    split: str
    folder: Path
    layout: str
    evaluation: Evaluation

    def find(self, *places: str) -> Path:
        """The first of these relative paths that exists. Raises `UserError` naming the first."""
        for place in places:
            if (self.folder / place).exists():
                return self.folder / place
        raise self.error(f"no {places[0]} in {self.folder}")

    def error(self, problem: str) -> UserError:
        """One line: what is wrong with the copy, and what the layout should be."""
        return UserError(f"{self.spec}: {problem}; the layout is {self.layout}")

    def text(self, path: Path) -> str:
        """A text file of the copy, UTF-8. Raises `DataError`."""
        try:
            return read_file(path, MAX_METADATA_BYTES).decode("utf-8-sig")
        except (BadSample, UnicodeDecodeError) as error:
            raise DataError(f"{self.spec}: {path} cannot be read: {error}; the layout is {self.layout}") from None

    def lines(self, path: Path) -> list[str]:
        """Lines of a text file that are not empty. Raises `DataError`."""
        return [line.strip() for line in self.text(path).split("\n") if line.strip()]

    def rows(self, path: Path, *columns: str, delimiter: str = ",") -> list[dict[str, str]]:
        """Rows of a CSV table by column. Raises `UserError` where it lacks one of ``columns``."""
        reader = csv.DictReader(io.StringIO(self.text(path), newline=""), delimiter=delimiter, skipinitialspace=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise self.error(f"{path} is not valid CSV: {error}") from None
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise self.error(f"{path} lacks the column '{missing[0]}'")
        if any(row[column] is None for row in rows for column in columns):
            raise self.error(f"{path} has a line that is too short")
        return rows

    def json(self, path: Path) -> Any:
        """A JSON file of the copy. Raises `DataError`."""
        return self.parse(self.text(path), str(path))

    def parse(self, text: str, where: str) -> Any:
        """The value of a JSON text. Raises `DataError` naming ``where``."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self.spec}: {where} is not valid JSON: {error}; the layout is {self.layout}") from None


@dataclass(frozen=True)
class Benchmark:
    """A set that can be read.

    Args:
        open: Reads a copy.
        layout: What should be in the folder.
        splits: Parts that can be asked for, the one that figures are published for first.
        evaluation: What figures are published for.
    """

    open: Callable[[Copy], Source]
    layout: str
    splits: tuple[str, ...] = ("test",)
    evaluation: Evaluation = "zero-shot"


def files_below(folder: Path, suffixes: frozenset[str] | None = None) -> list[str]:
    """Sorted names of the files of a folder that end like pictures, or in one of ``suffixes``; hidden ones are left out."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return [name for name in names if (is_picture(name) if suffixes is None else Path(name).suffix.lower() in suffixes)]


def class_folders(
    copy: Copy, root: Path, index: Mapping[str, int], suffixes: frozenset[str] | None = None
) -> tuple[list[str], list[int]]:
    """Paths relative to ``root`` and classes of the files in its class folders, in the order of the folders' names.

    Args:
        copy: For messages.
        root: Holds a folder a class; not all need be there.
        index: Class of each folder name.
        suffixes: Endings of the files; default: of pictures.

    Raises:
        UserError: A folder is no class of the set, or none is there.
    """
    paths: list[str] = []
    labels: list[int] = []
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if folder.name not in index:
            raise copy.error(f"{folder} is no class of {copy.name}")
        names = files_below(folder, suffixes)
        paths += [f"{folder.name}/{name}" for name in names]
        labels += [index[folder.name]] * len(names)
    if not paths:
        raise copy.error(f"no class folder with files in {root}")
    return paths, labels
