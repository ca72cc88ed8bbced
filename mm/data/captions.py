"""Captions from templates: ``an emoji of {name}`` filled from a sample's texts and fields, chosen by weight.

A template is plain text with ``{text}`` (a random caption of the sample), ``{field}`` or ``{field.sub}``. A list gives a random
subset in random order joined by commas, a mapping gives one random value. Nothing else is interpreted: no attribute of a Python
object can be reached. ``{{`` and ``}}`` are literal braces.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from mm.config import StrictConfig
from mm.errors import BadSample
from mm.types import Sample

MAX_LIST_VALUES = 5
"""Most values of a list field that go into one caption."""

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_FIELD = re.compile(r"[^\s{}.]+(\.[^\s{}.]+)*")


class CaptionTemplate(StrictConfig):
    """One way to caption a sample.

    Args:
        template: Text with ``{text}``, ``{field}`` or ``{field.sub}``.
        weight: How often it is chosen relative to the other templates.
    """

    template: str
    weight: float = Field(default=1.0, gt=0)

    @field_validator("template")
    @classmethod
    def _parses(cls, template: str) -> str:
        parse_template(template)
        return template


def parse_template(template: str) -> list[tuple[str, str]]:
    """Split a template into ``("literal", text)`` and ``("field", dotted name)`` parts. Raises ValueError when malformed."""
    parts: list[tuple[str, str]] = []
    position = 0
    for match in _TOKEN.finditer(template):
        parts.append(("literal", template[position : match.start()]))
        position = match.end()
        token, name = match.group(0), match.group(1)
        if token in ("{{", "}}"):
            parts.append(("literal", token[0]))
        elif name is None:
            raise ValueError(f"single '{token}' in template '{template}'; write '{token * 2}' for the character itself")
        elif not _FIELD.fullmatch(name):
            raise ValueError(
                f"'{{{name}}}' in template '{template}' is not a field name; write {{text}}, {{field}} or {{field.sub}}"
            )
        else:
            parts.append(("field", name))
    parts.append(("literal", template[position:]))
    return [part for part in parts if part != ("literal", "")]


class Captioner:
    """Draws a caption for a sample. Picklable, and a pure function of the sample and of the generator's state.

    Args:
        templates: The weighted templates; a sample that cannot fill the chosen one gets one of the others.
    """

    def __init__(self, templates: Sequence[CaptionTemplate]) -> None:
        if not templates:
            raise ValueError("at least one caption template is needed")
        self._parts = [parse_template(template.template) for template in templates]
        self._weights = np.array([template.weight for template in templates], dtype=np.float64)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> str:
        """A random caption. Raises `BadSample` ("missing text") when no template can be filled from the sample."""
        remaining = list(range(len(self._parts)))
        while remaining:
            weights = self._weights[remaining]
            chosen = remaining[rng.choice(len(remaining), p=weights / weights.sum())] if len(remaining) > 1 else remaining[0]
            caption = _fill(self._parts[chosen], sample, rng)
            if caption:
                return caption
            remaining.remove(chosen)
        raise BadSample("missing text", sample.id)


def corpus(sample: Sample, templates: Sequence[CaptionTemplate]) -> Iterator[str]:
    """Every piece of text that the templates can put into a caption of the sample, to learn a vocabulary from."""
    for template in templates:
        for kind, content in parse_template(template.template):
            yield from (content,) if kind == "literal" else _all_values(content, sample)


def look_up(fields: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted field name, or None. A key that itself contains dots is found first."""
    if name in fields:
        return fields[name]
    value: Any = fields
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def _fill(parts: Sequence[tuple[str, str]], sample: Sample, rng: np.random.Generator) -> str:
    """The filled template, or an empty text when a value is missing."""
    filled = []
    for kind, content in parts:
        piece = content if kind == "literal" else _value(content, sample, rng)
        if not piece:
            return ""
        filled.append(piece)
    return "".join(filled).strip()


def _value(name: str, sample: Sample, rng: np.random.Generator) -> str:
    if name == "text":
        texts = [text for text in sample.texts if text.strip()]
        return texts[rng.integers(len(texts))].strip() if texts else ""
    value = look_up(sample.fields, name)
    if isinstance(value, Mapping):
        values = [text for key in sorted(value) if (text := _plain(value[key]))]
        return values[rng.integers(len(values))] if values else ""
    if isinstance(value, (list, tuple)):
        values = [text for item in value if (text := _plain(item))]
        if not values:
            return ""
        count = rng.integers(1, min(len(values), MAX_LIST_VALUES) + 1)
        return ", ".join(values[i] for i in rng.permutation(len(values))[:count])
    return _plain(value)


def _all_values(name: str, sample: Sample) -> Iterator[str]:
    value = sample.texts if name == "text" else look_up(sample.fields, name)
    if isinstance(value, Mapping):
        value = [value[key] for key in sorted(value)]
    for item in value if isinstance(value, (list, tuple)) else (value,):
        if text := _plain(item):
            yield text


def _plain(value: Any) -> str:
    """Text of a scalar; containers and null count as missing."""
    return str(value).strip() if isinstance(value, (str, int, float)) else ""
