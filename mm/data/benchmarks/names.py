"""Published class names and prompt templates, kept as data files that name their source."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.data.labels import LabelTask

ASSETS = Path(__file__).parents[2] / "assets" / "benchmarks"


@dataclass(frozen=True)
class Vocabulary:
    """Published names and prompts of a set's classes.

    Args:
        classes: Names in the order of their indices.
        templates: Prompts with ``{}`` in the place of the name.
        values: What stands for a class in the field ``cls``, where it is not the name.
        folders: Name of each class's folder on disk, where the set has one.
    """

    classes: tuple[str, ...]
    templates: tuple[str, ...]
    values: tuple[str, ...] | None = None
    folders: tuple[str, ...] | None = None

    def task(self) -> LabelTask:
        """The classification task."""
        return LabelTask("cls", self.classes, values=self.values)


def published(name: str) -> dict[str, Any]:
    """The data file of a set: ``source``, ``templates``, and ``classes`` where its copies do not hold them."""
    return json.loads((ASSETS / f"{name}.json").read_text(encoding="utf-8"))


def vocabulary(name: str, classes: Sequence[str] | None = None) -> Vocabulary:
    """Published class names (or the ``classes`` of the copy) and templates of a set."""
    data = published(name)
    folders = data.get("folders")
    return Vocabulary(tuple(classes or data["classes"]), tuple(data["templates"]), folders=tuple(folders) if folders else None)
