"""Questions about pictures: what a question is in any source, and the embedded set made from what is known of each emoji.

``emoji-vqa:SELECTION`` takes the selections of ``emoji:`` (`mm.data.emoji.open_emoji`), so artists and concepts are split the
same. Every question and answer follows from a concept's name, keywords, group and subgroup; what these leave open is not asked.

=========  ====================================================  ==================================================
kind       asks                                                  of which pictures
=========  ====================================================  ==================================================
name       what is in the picture                                names of one or two words, core concepts
check      whether it shows NAME, yes or no                      core concepts; NAME is its own or, as often, another's
category   whether it is an animal, food, a heart ..., yes or no members, and as many others, of `CATEGORIES`
group      which of the 8 groups it belongs to                   all
subgroup   which of the some 90 subgroups it belongs to          all
colour     which colour it has                                   names that begin with a colour of the whole thing
=========  ====================================================  ==================================================

Within the pictures of one artist, one concept split, core or not (which a selection takes or leaves as a whole), each wording
of a yes/no question is answered "yes" exactly as often as "no", so that without the picture nobody does better than half. A
picture has the same questions in every selection, because they depend on nothing else.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as memoize
from typing import Any

from mm.data.emoji import EmojiSource, concepts, open_emoji
from mm.data.write import Progress
from mm.errors import BadSample, UserError
from mm.types import Sample, Source

SCHEME = "emoji-vqa"
KINDS = ("name", "check", "category", "group", "subgroup", "colour")
MAX_NAME_WORDS = 2
PROBED_SAMPLES = 50

_LAYOUT = 1  # raise when the questions change for the same pictures

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Args:
        text: The question.
        answers: What people answered, or what is accepted; see `mm.evaluation.vqa.accuracy`.
        kind: What sort of question it is; empty where a source does not say.
        picture: Name of the picture, shared by all questions about it.
    """

    text: str
    answers: tuple[str, ...]
    kind: str = ""
    picture: str = ""


def question_of(fields: Fields, where: str) -> Question:
    """The question in the fields ``question``, ``answers`` or ``answer``, ``kind`` and ``picture`` of a sample.

    Answers are a text, a list of texts, or a list of objects with an ``answer`` each, as VQA v2 is distributed.

    Raises:
        BadSample: Cause ``missing question`` or ``missing answer``.
    """
    text = fields.get("question")
    if not isinstance(text, str) or not text.strip():
        raise BadSample("missing question", where)
    given = fields.get("answers", fields.get("answer"))
    cells = given if isinstance(given, list | tuple) else [given]
    cells = [cell.get("answer") if isinstance(cell, Mapping) else cell for cell in cells]
    answers = tuple(str(cell).strip() for cell in cells if isinstance(cell, str | int | float) and str(cell).strip())
    if not answers:
        raise BadSample("missing answer", where)
    return Question(text.strip(), answers, str(fields.get("kind") or ""), str(fields.get("picture") or where))


def check_questions(source: Source) -> None:
    """See that a source asks questions. Raises `UserError` where none of its first samples holds one with an answer."""
    problem = "no samples in it"
    for index in range(min(len(source), PROBED_SAMPLES)):
        known: Fields = {}
        try:
            known = source.fields(index)
            question_of(known, source.key(index))
            return
        except BadSample as error:
            wanted = "answers" if error.cause == "missing answer" else "question"
            fields = ", ".join(name for name in known if name not in ("cls", "picture"))
            problem = f"samples have no field '{wanted}' (they have: {fields or 'none'})"
    raise UserError(f"{source.name}: {problem}; a set of questions has the columns 'question' and 'answer' or 'answers'")


def questions_of(source: Source) -> Iterator[Question]:
    """All questions of a source in order, without reading pictures; samples without one are left out."""
    for index in range(len(source)):
        try:
            yield question_of(source.fields(index), source.key(index))
        except BadSample:
            continue


@dataclass(frozen=True)
class Category:
    """Something that a picture shows or does not.

    Args:
        noun: With its article.
        inside: Subgroups whose concepts are members; an ending ``*`` stands for anything.
        unsure: Subgroups whose concepts are neither asked as members nor as others.
        word: What a member's name has to contain.
        neither: Names that are not asked either: they lie in ``inside`` and are no members beyond doubt.
    """

    noun: str
    inside: tuple[str, ...]
    unsure: tuple[str, ...] = ()
    word: str = ""
    neither: tuple[str, ...] = ()


_HUMAN = ("person*", "family", "hand*", "body-parts", "face-*", "monkey-face", "cat-face")
_LIKENESSES = ("event", "game", "arts-crafts", "place-building", "money", "other-object", "transport-sign", "warning")
"""Subgroups of dolls, masks, statues, banknotes and signs, in which people and animals may be depicted."""

CATEGORIES = (
    Category(
        "an animal",
        ("animal-*",),
        ("cat-face", "monkey-face", "zodiac", "face-costume", "person-fantasy", *_LIKENESSES),
        neither=("paw prints", "feather", "wing", "spider web", "microbe", "spiral shell", "coral", "pig nose", "phoenix"),
    ),
    Category("a bird", ("animal-bird",), ("animal-*", *_LIKENESSES), neither=("feather", "wing", "phoenix")),
    Category(
        "food",
        ("food-*",),
        ("drink", "dishware", "animal-*", "plant-*", "event"),
        neither=("honey pot", "cooking", "takeout box"),
    ),
    Category("a fruit", ("food-fruit",), ("food-vegetable", "food-sweet", "plant-*", "drink", "event")),
    Category("a flower", ("plant-flower",), ("plant-other", "food-*", "event"), neither=("rosette", "white flower")),
    Category("a person", ("person", "person-gesture", "person-role", "person-sport"), (*_HUMAN, *_LIKENESSES)),
    Category(
        "a face",
        ("face-smiling", "face-affection", "face-tongue", "face-concerned", "face-negative"),
        (*_HUMAN, "animal-*", "time", "sky-weather", *_LIKENESSES),
        neither=("skull", "skull and crossbones"),
    ),
    Category("a heart", ("heart",), ("face-affection", "emotion", "cat-face", "hand*", "place-building"), word="heart"),
    Category(
        "an arrow",
        ("arrow",),
        ("av-symbol", "mail", "office", "currency", "other-symbol", "zodiac", "gender", "game", "transport-sign"),
        word="arrow",
    ),
    Category("a musical instrument", ("musical-instrument",), ("music", "sound", "person*")),
    Category(
        "a building",
        ("place-building", "place-religious"),
        ("place-*", "hotel", "transport-ground", "religion"),
        neither=(
            *("building construction", "brick", "rock", "wood", "wedding"),
            *("Statue of Liberty", "kaaba", "shinto shrine"),
        ),
    ),
)

_COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "pink", "grey")
_SIZES = ("large", "small", "medium", "medium-small", "hollow")
_COLOURED = {"heart", "circle", "square", "book", "apple", "diamond", "triangle", "lantern", "envelope", "cat", "bird"}

_VAGUE = ("geometric", "punctuation", "math", "alphanum", "keycap", "av-symbol", "body-parts", "hand*", "heart", "emotion")
"""Subgroups whose things may be found as parts of many pictures."""

_ASKED_OF: Mapping[str, tuple[str, ...]] = {
    "people-body": ("symbols", "animals-nature", "travel-places"),
    "smileys-emotion": ("symbols", "animals-nature", "travel-places", "food-drink", "activities"),
    "animals-nature": ("symbols", "travel-places", "objects", "activities"),
}
"""Groups of the things that pictures of a group surely do not show; of the groups that are not here, all others."""

_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "name": ("what is in the picture?", "what is this?", "what does the picture show?", "what can be seen here?"),
    "check": ("does the picture show {}?", "is this {}?", "can {} be seen here?"),
    "category": ("is it {}?", "is this {}?", "does the picture show {}?"),
    "group": ("which group does it belong to?", "what group is it in?", "to which group of things does this belong?"),
    "subgroup": ("which subgroup does it belong to?", "what subgroup is it in?", "more exactly, what sort of thing is it?"),
    "colour": ("what colour is it?", "which colour does it have?", "what is its colour?"),
}


def open_emoji_questions(spec: str, size: int = 64, progress: Progress | None = None) -> "EmojiQuestions":
    """Open ``emoji-vqa:SELECTION``; arguments and errors as `mm.data.emoji.open_emoji`."""
    selection = spec.partition(":")[2]
    try:
        pictures = open_emoji(f"emoji:{selection}", size, progress)
    except UserError as error:
        raise UserError(str(error).replace("emoji:", f"{SCHEME}:")) from None
    return EmojiQuestions(spec, pictures)


class EmojiQuestions:
    """Questions about a selection of the embedded emoji, a `mm.types.Source`.

    Ids are ``PICTURE?KIND`` with a number where a kind asks several; the only text is the question; fields are those of the
    picture and ``question answers kind picture``. They come in an order without pattern, the same one always, so that the
    first thousand are a fair sample.

    Args:
        name: What messages call it.
        pictures: What is asked about.

    Attributes:
        reference: Source of the questions whose answers a guess without the picture goes by.
        subsets: Field whose values split the figures.
    """

    reference = f"{SCHEME}:train"
    subsets = "split"

    def __init__(self, name: str, pictures: EmojiSource) -> None:
        self.name, self._pictures = name, pictures
        asked = [(_hash(id), id, row, question) for id, row, question in _ask(pictures)]
        self._asked = [(id, row, question) for _, id, row, question in sorted(asked, key=lambda entry: entry[:2])]
        digest = hashlib.sha256(f"emoji-vqa {_LAYOUT} {pictures.fingerprint}\n".encode())
        for id, _, question in self._asked:
            digest.update(f"{id}\t{question.text}\t{question.answers}\n".encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._asked)

    def key(self, index: int) -> str:
        return self._asked[index][0]

    def fields(self, index: int) -> Fields:
        _, row, question = self._asked[index]
        own = {"question": question.text, "answers": list(question.answers), "kind": question.kind, "picture": question.picture}
        return {**self._pictures.fields(row), **own}

    def read(self, index: int) -> Sample:
        id, row, question = self._asked[index]
        return Sample(id, self._pictures.read(row).media, (question.text,), self.fields(index))


def _ask(pictures: EmojiSource) -> Iterator[tuple[str, int, Question]]:
    """Id, picture and question, for all pictures."""
    cells: dict[tuple[str, str, bool], list[int]] = {}
    for row in range(len(pictures)):
        fields = pictures.fields(row)
        cells.setdefault((fields["artist"], fields["split"], fields["core"]), []).append(row)
        for kind, answers in _plain_questions(fields):
            picture = pictures.key(row)
            yield f"{picture}?{kind}", row, Question(_wording(kind, picture), answers, kind, picture)
    for cell, rows in cells.items():
        ordered = sorted(rows, key=lambda row: _hash(pictures.key(row)))
        if cell[2]:
            yield from _checks(pictures, ordered)
        for category in CATEGORIES:
            yield from _category_questions(pictures, rows, category)


def _plain_questions(fields: Fields) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Kinds and answers of the questions that a picture's own facts answer."""
    name, colour = str(fields["name"]), _colours(str(fields["name"]))
    if fields["core"] and len(name.split()) <= MAX_NAME_WORDS:
        yield "name", (name,)
    yield "group", (fields["group"].replace("-", " and "),)
    yield "subgroup", (fields["subgroup"].replace("-", " "),)
    if colour:
        yield "colour", colour


def _colours(name: str) -> tuple[str, ...]:
    """What the colour of a thing may be called whose name says it: "light blue heart" is light blue, and blue."""
    words = [word for word in name.split() if word not in _SIZES]
    shade = words[0] == "light"
    words = words[1:] if shade else words
    if len(words) < 2 or words[0] not in _COLOURS or not _COLOURED & set(words) or "button" in words:
        return ()
    return (f"light {words[0]}", words[0]) if shade else (words[0],)


def _checks(pictures: EmojiSource, rows: Sequence[int]) -> Iterator[tuple[str, int, Question]]:
    """Of each picture whether it shows what it shows; of another one, in the same words, whether it shows that."""
    free = {row: pictures.fields(row) for row in rows}
    for row in rows:
        asked = pictures.fields(row)
        if _within(asked["subgroup"], _VAGUE):
            continue
        other = next((candidate for candidate, shown in free.items() if _tell_apart(asked, shown)), None)
        if other is None:
            continue
        del free[other]
        text = _wording("check", pictures.key(row)).format(asked["name"])
        for number, (shown, answer) in enumerate(((row, "yes"), (other, "no"))):
            picture = pictures.key(shown)
            yield f"{picture}?check{number}", shown, Question(text, (answer,), "check", picture)


def _tell_apart(asked: Fields, shown: Fields) -> bool:
    """Whether a picture surely does not show what another is named: nothing like it, no part of it, no word in common."""
    possible = _ASKED_OF.get(shown["group"])
    apart = asked["group"] != shown["group"] if possible is None else asked["group"] in possible
    return apart and not _words(asked["name"]) & _all_words(shown["key"])


def _category_questions(pictures: EmojiSource, rows: Sequence[int], category: Category) -> Iterator[tuple[str, int, Question]]:
    """As many members as others, taken in an order without pattern; a member and another share their wording."""
    place = CATEGORIES.index(category)
    ordered = sorted(rows, key=lambda row: _hash(f"{category.noun} {pictures.key(row)}"))
    sides = [[row for row in ordered if _belongs(place, pictures.fields(row)["key"]) is wanted] for wanted in (True, False)]
    for number, pair in enumerate(zip(*sides, strict=False)):
        wordings = _WORDINGS["category"]
        text = wordings[number % len(wordings)].format(category.noun)
        for row, answer in zip(pair, ("yes", "no"), strict=True):
            picture = pictures.key(row)
            yield f"{picture}?category{place}", row, Question(text, (answer,), "category", picture)


def _belongs(place: int, key: str) -> bool | None:
    """Whether a concept is a member of a category; None where its facts leave it open."""
    return _memberships(place)[key]


@memoize
def _memberships(place: int) -> Mapping[str, bool | None]:
    category, known = CATEGORIES[place], concepts()
    members = {key for key, fields in known.items() if _is_member(fields, category)}
    groups: dict[str, set[str]] = {}
    for fields in known.values():
        for word in _words(fields["name"]):
            groups.setdefault(word, set()).add(fields["group"])
    # Words of members' names that no more than two groups use are theirs; a stranger that shares one may well show a member.
    telling = {word for key in members for word in _words(known[key]["name"]) if len(groups[word]) <= 2}
    telling |= _words(category.noun) | _words(category.noun + "s")
    found: dict[str, bool | None] = {}
    for key, fields in known.items():
        doubtful = _within(fields["subgroup"], (*category.inside, *category.unsure)) or bool(telling & _all_words(key))
        found[key] = True if key in members else None if doubtful else False
    return found


def _is_member(fields: Fields, category: Category) -> bool:
    named = category.word in fields["name"] and fields["name"] not in category.neither
    return named and _within(fields["subgroup"], category.inside)


def _within(subgroup: str, patterns: Sequence[str]) -> bool:
    return any(subgroup.startswith(p[:-1]) if p.endswith("*") else subgroup == p for p in patterns)


@memoize
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower())) - {"a", "an", "the", "of", "with", "and", "in", "on"}


@memoize
def _all_words(key: str) -> frozenset[str]:
    """Words of a concept's name and of its keywords, with and without a plural's ending."""
    fields = concepts()[key]
    words = _words(" ".join((fields["name"], *fields["keywords"])))
    return words | {word.removesuffix("s") for word in words}


def _wording(kind: str, seed: str) -> str:
    wordings = _WORDINGS[kind]
    return wordings[int(_hash(f"{kind} {seed}"), 16) % len(wordings)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
