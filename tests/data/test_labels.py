"""Class labels: found where they are, whatever their surroundings."""

from collections.abc import Mapping
from typing import Any

import pytest

from mm.data.labels import label_of, label_task
from mm.errors import BadSample, UserError


class Fields:
    """A source of fields alone; None stands for a sample that cannot be read."""

    name, fingerprint = "fields", "0"

    def __init__(self, *rows: Mapping[str, Any] | None) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def fields(self, index: int) -> Mapping[str, Any]:
        row = self.rows[index]
        if row is None:
            raise BadSample("damaged json", str(index))
        return row


def test_the_label_is_found_behind_samples_that_have_none_or_cannot_be_read() -> None:
    task = label_task(Fields(None, {}, {"cls": "dog"}, {"cls": "cat"}))
    assert (task.label, task.classes) == ("cls", ("cat", "dog"))


def test_spaces_around_a_label_do_not_make_it_another() -> None:
    rows = ({"cls": "cat "}, {"cls": "dog"}, {"cls": " cat"})
    task = label_task(Fields(*rows))
    assert task.classes == ("cat", "dog")
    assert [label_of(row, task.label) for row in rows] == ["cat", "dog", "cat"]


def test_underscores_are_read_as_spaces_where_classes_stay_apart() -> None:
    task = label_task(Fields({"cls": "dog_face"}, {"cls": "pizza"}))
    assert (task.classes, task.index()) == (("dog face", "pizza"), {"dog_face": 0, "pizza": 1})
    assert label_task(Fields({"cls": "a_b"}, {"cls": "a b"})).classes == ("a b", "a_b")
    assert label_task(Fields({"cls": "dog_face"}), classes=["dog_face", "cat"]).classes == ("dog_face", "cat")


def test_without_labels_the_fields_are_named() -> None:
    with pytest.raises(UserError, match="samples have: title, url"):
        label_task(Fields({"title": "x"}, {"url": "y"}))
