"""Questions about emoji follow from the facts, are balanced, split as the pictures are, and depend on nothing else."""

import pickle
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data import emoji, questions, raster
from mm.data.emoji import ARTISTS, CONCEPT_SPLITS, TRAIN_ARTISTS, concepts
from mm.data.questions import (
    CATEGORIES,
    KINDS,
    EmojiQuestions,
    check_questions,
    open_emoji_questions,
    question_of,
    questions_of,
)
from mm.data.sources import open_source
from mm.errors import BadSample, UserError
from mm.media.image import decode_image
from mm.types import Sample

ASSETS = Path(emoji.__file__).parents[1] / "assets" / "emoji"


_NAMES = [name.removesuffix(".svg") for archive in emoji._ARCHIVES for name in raster.svg_names(ASSETS / archive)]


class Undrawn:
    """The emoji of a selection without their pictures: what questions are made from."""

    def __init__(self, spec: str) -> None:
        artists, keep = emoji._parse(spec)
        ordered = [name for artist in artists for name in sorted(_NAMES) if name.startswith(f"{artist}/")]
        self._kept = [(name, fields) for name in ordered if keep(fields := emoji._describe(name))]
        self.fingerprint = spec

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, index: int) -> str:
        return self._kept[index][0]

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._kept[index][1]

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), {"image": b""}, (), self.fields(index))


@pytest.fixture(scope="module")
def ask() -> Callable[[str], EmojiQuestions]:
    known: dict[str, EmojiQuestions] = {}

    def ask(spec: str) -> EmojiQuestions:
        if spec not in known:
            known[spec] = EmojiQuestions(spec, Undrawn(spec.replace("emoji-vqa:", "emoji:")))  # pyright: ignore[reportArgumentType]
        return known[spec]

    return ask


SELECTIONS = (
    "emoji-vqa:train",
    "emoji-vqa:validation",
    "emoji-vqa:test",
    "emoji-vqa:test/core",
    "emoji-vqa:test/novel",
    "emoji-vqa:train/noto",
)


def rows(source: EmojiQuestions) -> list[Mapping[str, Any]]:
    return [source.fields(index) for index in range(len(source))]


@pytest.mark.parametrize("spec", SELECTIONS)
def test_every_answer_is_what_the_facts_say(ask: Callable[[str], EmojiQuestions], spec: str) -> None:
    seen = Counter()
    for fields in rows(ask(spec)):
        kind, question, answers = fields["kind"], fields["question"], fields["answers"]
        seen[kind] += 1
        assert question == question.strip()
        assert question.endswith("?")
        if kind == "name":
            assert answers == [fields["name"]]
            assert len(fields["name"].split()) <= 2
            assert fields["core"]
        elif kind == "group":
            assert answers == [fields["group"].replace("-", " and ")]
        elif kind == "subgroup":
            assert answers == [fields["subgroup"].replace("-", " ")]
        elif kind == "colour":
            assert fields["name"].replace("large ", "").replace("small ", "").replace("hollow ", "").startswith(answers[0])
        elif kind == "check":
            own = re.search(rf"(?:show|this|can) {re.escape(fields['name'])}(?:\?| be seen)", question) is not None
            assert answers == ["yes" if own else "no"]
        else:
            category = next(c for c in CATEGORIES if re.search(rf"\b{c.noun}\?$", question))
            inside = any(re.fullmatch(pattern.replace("*", ".*"), fields["subgroup"]) for pattern in category.inside)
            assert answers == ["yes" if inside else "no"]
    assert set(seen) <= set(KINDS)
    assert seen["check"] > 0
    assert seen["category"] > 0


@pytest.mark.parametrize("spec", SELECTIONS)
def test_without_the_picture_yes_and_no_are_equally_right(ask: Callable[[str], EmojiQuestions], spec: str) -> None:
    counts = Counter((f["question"], f["answers"][0]) for f in rows(ask(spec)) if f["kind"] in ("check", "category"))
    assert counts
    for question, _ in list(counts):
        assert counts[question, "yes"] == counts[question, "no"], question


def test_what_is_denied_shares_nothing_with_what_is_shown(ask: Callable[[str], EmojiQuestions]) -> None:
    names = {concept["name"]: concept for concept in concepts().values()}
    for fields in rows(ask("emoji-vqa:all")):
        if fields["kind"] == "check" and fields["answers"] == ["no"]:
            asked = re.sub(r"^(does the picture show|is this|can) | be seen here\?$|\?$", "", fields["question"])
            other = names[asked]
            assert other["group"] != fields["group"]
            words = set(" ".join([fields["name"], *fields["keywords"]]).lower().split())
            assert not set(asked.lower().split()) & words - {"with", "of", "and", "in", "on", "the", "a"}, (
                asked,
                fields["name"],
            )


@pytest.mark.parametrize(
    ("noun", "members", "others", "open_"),
    [
        ("an animal", ["dog", "T-Rex"], ["pizza", "hammer"], ["paw prints", "hot dog", "teddy bear", "grinning cat"]),
        ("food", ["pizza", "banana"], ["hammer", "airplane"], ["beer mug", "cow", "chopsticks"]),
        ("a heart", ["red heart", "broken heart"], ["hammer", "dog"], ["love letter", "anatomical heart", "heart suit"]),
        ("a face", ["grinning face", "angry face"], ["hammer", "telephone"], ["jack-o-lantern", "dog face", "man", "skull"]),
        ("a building", ["church", "castle"], ["dog", "pizza"], ["station", "Statue of Liberty", "office worker"]),
    ],
)
def test_categories_leave_open_what_the_facts_leave_open(
    noun: str, members: list[str], others: list[str], open_: list[str]
) -> None:
    place = [category.noun for category in CATEGORIES].index(noun)
    keys = {concept["name"]: key for key, concept in concepts().items()}
    found = [[questions._belongs(place, keys[name]) for name in names] for names in (members, others, open_)]
    assert found == [[True] * len(members), [False] * len(others), [None] * len(open_)]


@pytest.mark.parametrize("spec", SELECTIONS)
def test_a_picture_has_the_same_questions_in_every_selection(ask: Callable[[str], EmojiQuestions], spec: str) -> None:
    def asked(source: EmojiQuestions) -> dict[str, tuple[str, list[str]]]:
        return {source.key(i): (source.fields(i)["question"], source.fields(i)["answers"]) for i in range(len(source))}

    part, whole = asked(ask(spec)), asked(ask("emoji-vqa:all"))
    pictures = {key.partition("?")[0] for key in part}
    assert part == {key: value for key, value in whole.items() if key.partition("?")[0] in pictures}


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from(("core", *CONCEPT_SPLITS, *TRAIN_ARTISTS)), max_size=3, unique=True))
def test_training_never_sees_a_held_out_artist_or_concept(modifiers: list[str]) -> None:
    """Nor their names, in any question or answer."""
    seen_only = not set(modifiers) & {"compositional", "novel"}
    source = EmojiQuestions("x", Undrawn("/".join(["emoji:train", *modifiers])))  # pyright: ignore[reportArgumentType]
    assert {fields["artist"] for fields in rows(source)} <= set(TRAIN_ARTISTS)
    if seen_only:
        held_out = {c["name"] for c in concepts().values() if c["split"] != "seen"}
        assert {fields["split"] for fields in rows(source)} == {"seen"}
        said = {answer for fields in rows(source) for answer in fields["answers"]}
        shown = re.compile(r"(?:show|this|can) (.*?)(?: be seen here)?\?")
        asked = {name for fields in rows(source) if fields["kind"] == "check" for name in shown.findall(fields["question"])}
        assert asked
        assert not (said | asked) & held_out


def test_held_out_artists_meet_in_no_selection() -> None:
    assert not set(TRAIN_ARTISTS) & {"fxemoji", "emojione"}
    assert set(ARTISTS) == {*TRAIN_ARTISTS, "fxemoji", "emojione"}


def test_order_and_questions_are_the_same_every_time(ask: Callable[[str], EmojiQuestions]) -> None:
    first = ask("emoji-vqa:test")
    again = EmojiQuestions("emoji-vqa:test", Undrawn("emoji:test"))  # pyright: ignore[reportArgumentType]
    copy = pickle.loads(pickle.dumps(first))  # noqa: S301 - what loader workers do
    keys = [first.key(i) for i in range(len(first))]
    assert keys == [again.key(i) for i in range(len(again))] == [copy.key(i) for i in range(len(copy))]
    assert len(set(keys)) == len(keys)
    assert first.fingerprint == again.fingerprint == copy.fingerprint != ask("emoji-vqa:validation").fingerprint
    assert first.read(5).texts == (first.fields(5)["question"],)
    kinds = Counter(first.fields(i)["kind"] for i in range(len(first)))
    for kind, count in Counter(first.fields(i)["kind"] for i in range(1000)).items():
        assert count / 1000 == pytest.approx(kinds[kind] / len(first), abs=0.05), "the first thousand are a fair sample"


def test_the_source_gives_pictures_with_their_questions() -> None:
    source = open_source("emoji-vqa:validation/novel", image_size=48)
    sample = source.read(0)
    assert decode_image(sample.media["image"]).shape[1:] == (48, 48)
    assert sample.id.startswith("fxemoji/")
    assert sample.fields["picture"] == sample.id.partition("?")[0]
    assert sample.fields["split"] == "novel"
    question = question_of(sample.fields, sample.id)
    assert (question.text, question.answers) == (sample.texts[0], tuple(sample.fields["answers"]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji-vqa", "emoji-vqa: choose emoji-vqa:train"),
        ("emoji-vqa:tset", "'emoji-vqa:tset': write emoji-vqa:train"),
        ("emoji-vqa:test/cor", "unknown modifier 'cor'"),
    ],
)
def test_unknown_selections_are_told(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_answers_come_in_every_usual_form() -> None:
    forms = [
        {"answer": "a dog"},
        {"answers": "a dog"},
        {"answers": ["a dog"]},
        {"answers": [{"answer": "a dog", "answer_id": 1}]},
        {"answers": ["a dog", "", None], "answer": "ignored"},
    ]
    for form in forms:
        assert question_of({"question": " what? ", **form}, "x").answers == ("a dog",)
    assert question_of({"question": "how many?", "answer": 3}, "x") == questions.Question("how many?", ("3",), "", "x")
    for fields, cause in (({"answer": "x"}, "missing question"), ({"question": "x?", "answers": []}, "missing answer")):
        with pytest.raises(BadSample, match=cause):
            question_of(fields, "x")


def test_a_table_may_ask_several_questions_of_a_picture(tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    table.write_text("image,question,answer,kind\na.png,what?,dog,object\na.png,how many?,2,number\nb.png,what?,cat,object\n")
    source = open_source(str(table))
    assert [question.answers for question in questions_of(source)] == [("dog",), ("2",), ("cat",)]
    assert [question.picture for question in questions_of(source)] == ["a.png", "a.png", "b.png"]
    assert len({source.key(i) for i in range(3)}) == 3
    check_questions(source)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("image,caption", "a.png,x", r"no field 'question' \(they have: image, caption\)"),
        ("image,questions,answer", "a.png,x,y", r"no field 'question' \(they have: image, questions, answer\)"),
        ("image,question,anser", "a.png,x?,y", r"no field 'answers' \(they have: image, question, anser\)"),
        ("image,question,answer", "a.png,x?,", "no field 'answers'"),
    ],
)
def test_sources_that_ask_nothing_are_told_what_is_missing(tmp_path: Path, header: str, row: str, message: str) -> None:
    table = tmp_path / "rows.csv"
    table.write_text(f"{header}\n{row}\n")
    with pytest.raises(UserError, match=message) as error:
        check_questions(open_source(str(table)))
    assert "\n" not in str(error.value)


def test_a_selection_is_opened_at_the_asked_size(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    monkeypatch.setattr(questions, "open_emoji", lambda spec, size, progress: opened.append((spec, size)) or Undrawn(spec))
    assert len(open_emoji_questions("emoji-vqa:test/novel", 96)) > 100
    assert opened == [("emoji:test/novel", 96)]
