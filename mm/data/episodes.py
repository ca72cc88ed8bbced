"""Episodes: a few examples of each of several concepts, by made-up names, and then a picture to be named.

The task of Frozen (https://arxiv.org/abs/2106.13884, section 4.2, "fast concept binding": ways are the concepts, shots the
examples of each, and the words are ones like "dax", which say nothing before the examples do).

An episode is a pure function of a source, a query and a random generator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from pydantic import Field, model_validator

from mm.config import StrictConfig
from mm.data.captions import look_up
from mm.errors import BadSample, UserError
from mm.types import Source

NAMES = (
    *("bik", "bol", "bub", "dem", "des", "fal", "fem", "fer", "fil", "ges", "gib", "gor", "kam", "kik", "kip", "kuk", "kup"),
    *("lun", "mel", "mik", "mir", "nar", "pap", "pol", "pom", "pul", "rel", "rom", "ros", "sab", "sig", "sil", "sos", "tam"),
    *("tok", "tul", "tur", "vir", "vor", "vul"),
)
"""Syllables that mean nothing, short enough to be one token of most vocabularies, so that a network can learn to copy them from
its context. Each episode gives them to its concepts anew, so that none of them can be remembered."""


class EpisodeConfig(StrictConfig):
    """How training episodes are drawn; each sample of the source is the query of one.

    Args:
        concept: Dotted field that says what a picture shows.
        apart: Dotted field in which examples differ from the query, such as the artist; None for no such field.
        ways: Smallest and largest number of concepts.
        shots: Smallest and largest number of examples of each; where a concept has fewer pictures, some come again.
        again: Draw each example anew, so that a picture may come twice, the query too: what is equal is looked up first, and
            from there what is only alike.
        captions: Share of the samples that are a picture with its caption instead, so that the network learns real names, too.
        template: Text behind a picture, ``{}`` being the name.
        remember: Number of decoded pictures that are kept in memory, in each process that loads data.
    """

    concept: str = "cls"
    apart: str | None = None
    ways: tuple[int, int] = (2, 5)
    shots: tuple[int, int] = (1, 4)
    again: bool = False
    captions: float = Field(default=0.2, ge=0, le=1)
    template: str = "{}"
    remember: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not 2 <= self.ways[0] <= self.ways[1] <= len(NAMES):
            raise ValueError(f"ways are the smallest and largest number of concepts, 2 to {len(NAMES)}: write [2, 5]")
        if not 1 <= self.shots[0] <= self.shots[1]:
            raise ValueError("shots are the smallest and largest number of examples of a concept, at least 1: write [1, 4]")
        check_template(self.template)
        return self


def check_template(template: str) -> None:
    """Raises ValueError where a template has not exactly one place for the name."""
    if template.count("{}") != 1:
        raise ValueError(f"template '{template}': write {{}} once, where the name stands")


@dataclass(frozen=True)
class Episode:
    """Examples and a query.

    Args:
        support: Index of each example in the pool, and its way, in the order in which they are shown.
        names: Of each way.
        answer: The way of the query.
    """

    support: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    answer: int

    def first(self, shots: int) -> "Episode":
        """The same with the first so many examples of each way only."""
        left = dict.fromkeys(range(len(self.names)), shots)
        kept = []
        for index, way in self.support:
            if left[way]:
                left[way] -= 1
                kept.append((index, way))
        return Episode(tuple(kept), self.names, self.answer)


class Pool:
    """Pictures of a source by what they show.

    Args:
        source: Where examples come from.
        concept: Field that says what a picture shows.
        apart: Field in which examples differ from the query, or None.
        within: Field in which all concepts of an episode agree, such as the split, or None.
        min_pictures: Concepts with fewer are left out.

    Raises:
        UserError: The source has no such field, or fewer than two concepts.
    """

    def __init__(
        self,
        source: Source,
        concept: str,
        *,
        apart: str | None = None,
        within: str | None = None,
        min_pictures: int = 1,
    ) -> None:
        self.source, self._concept, self._apart, self._within = source, concept, apart, within
        found: dict[str, list[int]] = {}
        self._parts: list[Any] = []
        self._rooms: dict[str, Any] = {}
        for index in range(len(source)):
            fields = source.fields(index)
            value = look_up(fields, concept)
            self._parts.append(look_up(fields, apart) if apart else None)
            if value is not None:
                found.setdefault(str(value), []).append(index)
                self._rooms[str(value)] = look_up(fields, within) if within else None
        if not found:
            known = ", ".join(source.fields(0)) if len(source) else "none"
            raise UserError(f"{source.name}: samples have no field '{concept}' to make episodes of (they have: {known})")
        self._pictures = {value: tuple(rows) for value, rows in found.items() if len(rows) >= min_pictures}
        if len(self._pictures) < 2:
            raise UserError(f"{source.name}: episodes need two concepts with at least {min_pictures} pictures each")
        self._by_room: dict[Any, tuple[str, ...]] = {}
        for value in self._pictures:
            room = self._rooms[value]
            self._by_room[room] = (*self._by_room.get(room, ()), value)

    def has(self, fields: Mapping[str, Any]) -> bool:
        """Whether there are examples of what a picture with these fields shows."""
        return str(look_up(fields, self._concept)) in self._pictures

    def ways(self, fields: Mapping[str, Any]) -> int:
        """How many concepts there are for an episode about a picture with these fields."""
        return len(self._by_room.get(self._rooms.get(str(look_up(fields, self._concept))), ()))

    def draw(
        self,
        random: np.random.Generator,
        query: Mapping[str, Any],
        *,
        ways: int,
        shots: int,
        query_id: str | None = None,
        label: str | None = None,
        again: bool = False,
    ) -> Episode:
        """An episode about a picture.

        Args:
            random: Draws everything.
            query: Fields of the picture.
            ways: Number of concepts.
            shots: Examples of each.
            query_id: Of the picture, which is no example of itself where it is in the pool, too.
            label: Field with the names of the concepts; default: names are made up.
            again: See `EpisodeConfig`.

        Raises:
            BadSample: Cause ``missing concept``, ``too few concepts``, or ``no example left`` of a concept beside the query, or
                by others than its own.
        """
        own = str(look_up(query, self._concept))
        if own not in self._pictures:
            raise BadSample("missing concept", str(query.get("key", own)))
        others = [value for value in self._by_room[self._rooms[own]] if value != own]
        if len(others) < ways - 1:
            raise BadSample("too few concepts", own)
        chosen = [own, *(others[place] for place in random.choice(len(others), ways - 1, replace=False))]
        chosen = [chosen[place] for place in random.permutation(ways)]
        apart = look_up(query, self._apart) if self._apart else None
        examples = [self._examples(random, value, shots, None if again else query_id, apart, again) for value in chosen]
        support = [(row, way) for way, rows in enumerate(examples) for row in rows]
        support = [support[place] for place in random.permutation(len(support))]
        names = made_up_names(random, ways) if label is None else tuple(self._name(value, label) for value in chosen)
        return Episode(tuple(support), names, chosen.index(own))

    def _examples(
        self, random: np.random.Generator, value: str, shots: int, query_id: str | None, apart: Any, again: bool
    ) -> Sequence[int]:
        """Pictures of a concept, which come again where there are too few; the query itself is none."""
        rows = [row for row in self._pictures[value] if self.source.key(row) != query_id]
        if apart is not None:
            rows = [row for row in rows if self._parts[row] != apart]
        if not rows:
            raise BadSample("no example left", value)
        if again:
            return [rows[place] for place in random.integers(len(rows), size=shots)]
        order = [rows[place] for place in random.permutation(len(rows))]
        return [order[place % len(order)] for place in range(shots)]

    def _name(self, value: str, label: str) -> str:
        return str(look_up(self.source.fields(self._pictures[value][0]), label))


def made_up_names(random: np.random.Generator, count: int) -> tuple[str, ...]:
    """Different ones of `NAMES`. Raises `UserError` where there are not so many."""
    if count > len(NAMES):
        raise UserError(f"{count} ways: there are {len(NAMES)} made-up names; take fewer ways, or the concepts' own names")
    return tuple(NAMES[place] for place in random.choice(len(NAMES), count, replace=False))
