"""Metadata fields of a whole source: the values that batches keep apart, and the names to tell a user who wrote a wrong one."""

import difflib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from mm.data.captions import look_up
from mm.data.order import Indices
from mm.errors import BadSample, UserError
from mm.types import Source


def field_codes(source: Source, field: str) -> Indices:
    """Number the different values of a field in order of appearance, ``(len(source),)``; equal numbers mean equal values.

    A sample whose fields cannot be read gets a number of its own.

    Raises:
        UserError: A sample lacks the field.
    """
    numbers: dict[Any, int] = {}
    codes = np.empty(len(source), np.int64)
    for index in range(len(source)):
        try:
            fields = source.fields(index)
        except BadSample:
            codes[index] = numbers.setdefault(("unreadable", index), len(numbers))
            continue
        value = look_up(fields, field)
        if value is None:
            raise UserError(
                f"{source.name}: sample '{source.key(index)}' has no field '{field}'; {nearest(field, list(fields))}"
            )
        hashable = value if isinstance(value, (str, int, float)) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        codes[index] = numbers.setdefault(hashable, len(numbers))
    return codes


def nearest(name: str, known: Sequence[str]) -> str:
    """Half a sentence that leads from a wrong name to the right one."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there are: {', '.join(known)}" if known else "there are none"
