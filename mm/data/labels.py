"""What a labelled source asks: which field holds the class, what the candidates are, what to compare with."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm.data.captions import look_up
from mm.errors import BadSample, UserError
from mm.types import Source

PROBED_SAMPLES = 50
USUAL_LABELS = ("cls", "label", "class", "category")


@dataclass(frozen=True)
class LabelTask:
    """A classification task.

    Args:
        label: Dotted field that holds the class of a sample.
        classes: Candidate names, in the order of their indices.
        subsets: Field whose values split the figures into reported subsets, or None.
        reference: Source of labelled pictures for a nearest-neighbour baseline, or None.
        values: What the label field says for each class, where it is not the name: names may then repeat (ImageNet has two
            classes called "missile").
    """

    label: str
    classes: tuple[str, ...]
    subsets: str | None = None
    reference: str | None = None
    values: tuple[str, ...] | None = None

    def index(self) -> dict[str, int]:
        """Position of a class by what the label field says of it."""
        return {value: position for position, value in enumerate(self.values or self.classes)}


def label_task(source: Source, *, label: str | None = None, classes: Sequence[str] | None = None) -> LabelTask:
    """The task that a source brings (its ``task`` attribute) or that its label field implies, changed by what is given.

    Where the source's labels are not names, ``classes`` are other names for its classes, in their order. Underscores of a label
    field's values are read as spaces.

    Raises:
        UserError: No label field can be found, the field is in no sample, class names are empty or repeated, or there are more
            or fewer of them than label values.
    """
    own = getattr(source, "task", None)
    if own is not None and label in (None, own.label):
        return own if classes is None else _renamed(own, classes, source)
    label = label or _usual_label(source)
    if classes is not None:
        return LabelTask(label=label, classes=_checked(classes, source))
    values = _values(source, label)
    names = [value.replace("_", " ").strip() for value in values]  # as folders are called: dog_face
    if names == values or len(set(names)) < len(names):
        return LabelTask(label=label, classes=_checked(values, source))
    return LabelTask(label=label, classes=_checked(names, source), values=tuple(values))


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
    return None if value is None else str(value).strip()


def _usual_label(source: Source) -> str:
    have: dict[str, None] = {}
    for index in range(min(len(source), PROBED_SAMPLES)):
        with suppress(BadSample):
            have |= dict.fromkeys(source.fields(index))
    for name in USUAL_LABELS:
        if name in have:
            return name
    raise UserError(
        f"{source.name}: no class labels found; name the field with --label "
        f"(samples have: {', '.join(sorted(have)) or 'no fields'})"
    )


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


def _renamed(task: LabelTask, classes: Sequence[str], source: Source) -> LabelTask:
    if task.values is None:
        return replace(task, classes=_checked(classes, source))
    names = _stripped(classes, source)
    if len(names) != len(task.values):
        raise UserError(f"{source.name}: {len(names)} class names for {len(task.values)} classes; give one a class, in order")
    return replace(task, classes=names)


def _stripped(classes: Sequence[str], source: Source) -> tuple[str, ...]:
    names = tuple(name.strip() for name in classes)
    if not names or not all(names):
        raise UserError(f"{source.name}: class names must not be empty")
    return names


def _checked(classes: Sequence[str], source: Source) -> tuple[str, ...]:
    names = _stripped(classes, source)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UserError(f"{source.name}: class '{repeated[0]}' is named twice; give each class its own name")
    return names
