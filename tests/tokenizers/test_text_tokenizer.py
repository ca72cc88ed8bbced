"""Text tokenizer: open_clip's ids, every text comes back, the same file from the same texts, the same ids in every process."""

import json
import pickle
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mm.errors import UserError
from mm.tokenizers.text import Cleaning, TextTokenizer

TEXTS = [
    f"{animal} with {thing} in the {place}"
    for animal in ("cat", "dog", "été")
    for thing in ("hat", "ball")
    for place in ("sun", "雨")
]
"""Short captions whose pairs repeat."""


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.train_bpe(TEXTS, 320)


@pytest.fixture(scope="module")
def clip() -> TextTokenizer:
    return TextTokenizer.clip_bpe()


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


VARIED = [
    "",
    " ",
    "a photo of a cat.",
    "A  Photo\tof\na CAT!!",
    "it's we're I'VE they'll o'clock 'S'T ''",
    "1234 5.6% v2 x²",
    "&amp;amp; &lt;b&gt; &#39;quoted&#39; &eacute;",
    "l&rsquo;Ã©tÃ© schÃ¶n",
    "“curly” ‘quotes’ ﬁne ﬂow ｆｕｌｌ",
    "你好，世界 こんにちは 안녕하세요",
    "İstanbul straße ΣΊΣΥΦΟΣ ǅ",
    "👨‍👩‍👧‍👦 😀😀 🏳️‍🌈 ©®™",
    "مرحبا بالعالم नमस्ते สวัสดี",
    "e\u0301 \u0345 a\u0345b \u200b\u00a0\u3000 \x00\x1c\x85 \x1b[0m",
    "<start> <|endoftext|> </w> a</w>b <end",
    "supercalifragilisticexpialidocious " * 12,
]


@pytest.mark.parametrize("text", VARIED)
def test_clip_ids_are_those_of_open_clip(clip: TextTokenizer, open_clip_tokenizer, text: str) -> None:
    expected = open_clip_tokenizer(text, context_length=77)
    batch = clip([text], 77)
    length = int(batch.lengths[0])
    assert torch.equal(batch.ids[0], expected[0, :length])
    assert not expected[0, length:].any()
    assert clip.decode(expected[0].tolist()) == open_clip_tokenizer.decode(clip.encode(text)[:75]).strip()


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=12) | st.text("'’stremvldSſ 1\n!&;#amp<>", max_size=12))
def test_clip_ids_are_those_of_open_clip_for_any_text(clip: TextTokenizer, open_clip_tokenizer, text: str) -> None:
    assert clip.encode(text) == open_clip_tokenizer.encode(text)


def test_clip_special_ids(clip: TextTokenizer, open_clip_tokenizer) -> None:
    theirs = open_clip_tokenizer
    assert (clip.vocab_size, clip.start, clip.end) == (theirs.vocab_size, theirs.sot_token_id, theirs.eot_token_id)


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_every_text_comes_back(trained: TextTokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == trained.cleaning(text).strip()
    assert trained.decode(trained([text], 500).ids[0].tolist()) == trained.cleaning(text).strip()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20))
def test_cleaning_is_idempotent(text: str) -> None:
    clean = Cleaning()
    assert clean(clean(text)) == clean(text)


def test_cleaning_joins_what_looks_the_same(trained: TextTokenizer) -> None:
    assert trained.encode("  ÉTÉ \n") == trained.encode(unicodedata.normalize("NFD", "été"))
    assert Cleaning(whitespace=False, lowercase=False, nfc=False)(" É\n") == " É\n"


def test_a_lone_surrogate_is_not_a_crash(trained: TextTokenizer) -> None:
    assert trained.decode(trained.encode("a \ud800 b")) == "a ? b"


@pytest.mark.parametrize("kind", ["trained", "clip"])
def test_special_tokens_cannot_be_written_in_a_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("<start>a<end><pad> <start_of_text> b <end_of_text>")
    assert not {tokenizer.start, tokenizer.end} & set(ids)


def test_a_batch_is_as_long_as_its_longest_text(trained: TextTokenizer) -> None:
    batch = trained(["cat", "cat with hat in the sun", ""], 32)
    assert batch.ids.shape[1] == int(batch.lengths.max())
    assert batch.lengths[2] == 2
    for row, length in zip(batch.ids, batch.lengths, strict=True):
        assert row[0] == trained.start
        assert row[length - 1] == trained.end
        assert (row[length:] == trained.pad).all()


def test_a_cut_text_keeps_its_end(trained: TextTokenizer) -> None:
    batch = trained(["cat " * 50], 8)
    assert batch.ids.shape == (1, 8)
    assert batch.ids[0, -1] == trained.end
    with pytest.raises(UserError, match="at least 3"):
        trained(["cat"], 2)


def test_no_texts_are_an_empty_batch(trained: TextTokenizer) -> None:
    assert len(trained([], 8)) == 0


def test_training_learns_words_and_bounds_the_vocabulary(trained: TextTokenizer) -> None:
    assert trained.vocab_size <= 320
    assert len(trained.encode("cat with hat")) == 3
    assert len(set(trained.encode("cat cat"))) == 1
    with pytest.raises(UserError, match="at least 259"):
        TextTokenizer.train_bpe(TEXTS, 258)


def test_training_is_deterministic_across_processes_and_order(trained: TextTokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "here.json")
    program = (
        "import sys, pathlib; from mm.tokenizers.text import TextTokenizer; "
        "TextTokenizer.train_bpe(sys.argv[2:], 320).save(pathlib.Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there.json"), *reversed(TEXTS)], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


@pytest.mark.parametrize("kind", ["trained", "clip"])
def test_saved_and_pickled_tokenizers_are_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "tokenizer.json")
    for other in (TextTokenizer.load(tmp_path / "tokenizer.json"), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301
        texts = [*VARIED, "<start>a<end>", "<end_of_text>"]
        assert torch.equal(other(texts, 40).ids, tokenizer(texts, 40).ids)
        assert other.cleaning == tokenizer.cleaning
        assert (other.start, other.end, other.pad) == (tokenizer.start, tokenizer.end, tokenizer.pad)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "{",
        lambda content: "[]",
        lambda content: json.dumps({**content, "format": "other"}),
        lambda content: json.dumps({**content, "end": 1 << 40}),
        lambda content: json.dumps({**content, "cleaning": {"unknown": True}}),
        lambda content: json.dumps({**content, "tokenizer": {}}),
    ],
)
def test_a_damaged_file_is_named(damage, trained: TextTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    trained.save(path)
    path.write_text(damage(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TextTokenizer.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json"):
        TextTokenizer.load(tmp_path / "none.json")


@pytest.mark.parametrize("kind", ["trained", "clip"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A cat, with  (hat)", ["a", "cat", "with", "hat"]),
        ("man: red hair", ["man", "red", "hair"]),
        ("jack-o-lantern o'clock!", ["jack-o-lantern", "o'clock"]),
        ("雨 ❤ हिन्दी", ["雨", "❤", "हिन्दी"]),
        ("... - ¿?", []),
        ("", []),
    ],
)
def test_words_are_what_whitespace_separates_without_punctuation_around(
    kind: str, text: str, expected: list[str], request: pytest.FixtureRequest
) -> None:
    assert [word for word, _ in request.getfixturevalue(kind).words(text, 77)] == expected


@settings(max_examples=100, deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=20) | st.text("ab.-é雨 ", max_size=20), st.integers(3, 30)
)
def test_words_have_the_pieces_that_spell_them(trained: TextTokenizer, text: str, room: int) -> None:
    """Every word that fits whole is within what its pieces decode to; no piece is the start or the end of the row."""
    batch = trained([text], room)
    row, inner = batch.ids[0].tolist(), range(1, int(batch.lengths[0]) - 1)
    cleaned = trained.cleaning(text)
    for word, places in trained.words(text, room):
        assert places
        assert set(places) <= set(inner)
        assert list(places) == list(range(places[0], places[-1] + 1))
        assert word in cleaned
        if places[-1] + 1 < room - 1:
            assert word in trained.decode([row[place] for place in places])
    whole = trained.words(text, 500)
    assert len(trained.words(text, room)) <= len(whole)
    assert "".join(word for word, _ in whole) == "".join(word for word in (_stripped(word) for word in cleaned.split()) if word)


def _stripped(word: str) -> str:
    """Without punctuation at its ends."""
    inside = [place for place, character in enumerate(word) if not unicodedata.category(character).startswith("P")]
    return word[inside[0] : inside[-1] + 1] if inside else ""


@pytest.mark.parametrize("name", ["trained", "clip"])
def test_tokens_of_a_word_have_its_number(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: TextTokenizer = request.getfixturevalue(name)
    texts = [*VARIED, "cat with xylophones in the place", "incomprehensibilities", "un deux, trois-quatre"]
    plain, marked = tokenizer(texts, 40), tokenizer(texts, 40, words=True)
    assert plain.words is None
    assert marked.words is not None
    assert torch.equal(plain.ids, marked.ids)
    assert torch.equal(plain.lengths, marked.lengths)
    found = []
    for ids, length, numbers in zip(marked.ids.tolist(), marked.lengths.tolist(), marked.words.tolist(), strict=True):
        inside = list(zip(ids[1 : length - 1], numbers[1 : length - 1], strict=True))
        order = [number for _, number in inside]
        assert order == sorted(order), "words stand side by side"
        assert set(order) == set(range(len(set(order)))), "and are counted without gaps, from 0"
        found.append([tokenizer.decode(i for i, number in inside if number == one) for one in sorted(set(order))])
    assert found[-3:] == [
        ["cat", "with", "xylophones", "in", "the", "place"],
        ["incomprehensibilities"],
        ["un", "deux", ",", "trois", "-", "quatre"],
    ]
    assert marked.lengths[-2] > 3, "a word of several tokens"


def test_word_pieces_make_words_and_names_of_special_tokens_are_ordinary() -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "##tle", "[", "]", "cls", "new"]
    library = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.normalizer = normalizers.BertNormalizer()
    library.add_special_tokens(["[CLS]", "[SEP]"])
    library.add_tokens(["new"])
    tokenizer = TextTokenizer(library, cleaning=Cleaning(), start=2, end=3, pad=0)
    text = tokenizer(["a cattles cats", "new [CLS] cats", ""], 16, words=True)
    assert text.words is not None
    assert [row[1 : length - 1] for row, length in zip(text.words.tolist(), text.lengths.tolist(), strict=True)] == [
        [0, 1, 1, 1, 2, 2],
        [0, 1, 2, 3, 4, 4],
        [],
    ]


def test_nothing_is_put_before_a_text_where_pictures_stand_there() -> None:
    tokenizer = TextTokenizer.train_bpe(["red heart"] * 4, 300)
    bare = tokenizer.without_start()
    whole, rest = tokenizer(["red heart"], 16), bare(["red heart"], 16)
    assert whole.ids[0, 1:].tolist() == rest.ids[0].tolist()
    assert bare.decode(rest.ids[0].tolist()) == "red heart"
    assert (bare.start, bare.end, bare.vocab_size) == (None, tokenizer.end, tokenizer.vocab_size)
    assert tokenizer.start == 1
