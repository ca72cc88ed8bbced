"""What a labelled source asks: which field holds the class, what the candidates are, what to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.data.captions import look_up
from mm.errors import BadSample, UserError
from mm.types import Source

USUAL_LABELS = ("cls", "label", "class", "category")


@dataclass(frozen=True)
class LabelTask:
    """A classification task.

    Args:
        label: Dotted field that holds the class name of a sample.
        classes: Candidate names, in the order of their indices.
        subsets: Field whose values split the figures into reported subsets, or None.
        reference: Source of labelled pictures for a nearest-neighbour baseline, or None.
    """

    label: str
    classes: tuple[str, ...]
    subsets: str | None = None
    reference: str | None = None


def label_task(source: Source, *, label: str | None = None, classes: Sequence[str] | None = None) -> LabelTask:
    """The task that a source brings (its ``task`` attribute) or that its label field implies, changed by what is given.

    Raises:
        UserError: No label field can be found, the field is in no sample, or class names are empty or repeated.
    """
    own = getattr(source, "task", None)
    if own is not None and label in (None, own.label):
        return own if classes is None else replace(own, classes=_checked(classes, source))
    label = label or _usual_label(source)
    return LabelTask(label=label, classes=_checked(classes if classes is not None else _values(source, label), source))


def read_classes(path: Path) -> list[str]:
    """Class names from a text file, a name a line; empty lines do not count. Raises `UserError`."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: class names cannot be read: {error}; give a UTF-8 text file with a name a line") from None
    return [line.strip() for line in lines if line.strip()]


def label_of(fields: Mapping[str, Any], label: str) -> str | None:
    """The class name in a sample's fields, None where it has none."""
    value = look_up(fields, label)
    return None if value is None else str(value)


def _usual_label(source: Source) -> str:
    fields = source.fields(0) if len(source) else {}
    for name in USUAL_LABELS:
        if name in fields:
            return name
    have = ", ".join(sorted(fields)) or "no fields at all"
    raise UserError(f"{source.name}: no class labels found; name the field with --label (samples have: {have})")


def _values(source: Source, label: str) -> list[str]:
    """Sorted distinct values of a field. Samples that cannot be read have none."""
    found: set[str] = set()
    for index in range(len(source)):
        try:
            value = label_of(source.fields(index), label)
        except BadSample:
            continue
        if value is not None:
            found.add(value)
    if not found:
        raise UserError(f"{source.name}: no sample has a field '{label}'; choose another with --label")
    return sorted(found)


def _checked(classes: Sequence[str], source: Source) -> tuple[str, ...]:
    names = tuple(name.strip() for name in classes)
    if not names or not all(names):
        raise UserError(f"{source.name}: class names must not be empty")
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UserError(f"{source.name}: class '{repeated[0]}' is named twice; give each class its own name")
    return names
