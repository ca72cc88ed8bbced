"""Error rates of recognition against a recursive edit distance and torchmetrics."""

import functools
import random

import pytest
from torchmetrics.functional.text import char_error_rate, word_error_rate

from mm.errors import UserError
from mm.evaluation.recognition import edit_distance, recognition, spoken
from mm.tokenizers.text import TextTokenizer


@functools.cache
def slow_distance(a: str, b: str) -> int:
    if not a or not b:
        return len(a) + len(b)
    kept = slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    return min(kept, slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1)


def test_edit_distance_is_the_recursive_one() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b = ("".join(draw.choices("abc", k=draw.randrange(7))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b)


def test_rates_are_torchmetrics() -> None:
    draw = random.Random(1)
    texts = [
        [" ".join(draw.choices(["red", "green", "tea", "a"], k=draw.randrange(1, 6))) for _ in range(40)] for _ in range(2)
    ]
    result = recognition(*texts)
    assert result.metrics["wer"].value == pytest.approx(float(word_error_rate(*texts)), abs=1e-6)
    assert result.metrics["cer"].value == pytest.approx(float(char_error_rate(*texts)), abs=1e-6)
    wer = result.metrics["wer"]
    assert wer.low < wer.value < wer.high


def test_figures_of_subsets_are_those_of_their_recordings_alone() -> None:
    said, written = ["a b", "c", "d e f", "g"], ["a", "c", "d x f y", ""]
    whole = recognition(written, said, subsets={"new": [False, False, True, True]})
    alone = recognition(written[2:], said[2:])
    assert whole.metrics["wer_new"] == alone.metrics["wer"]
    assert whole.metrics["wer"].value == pytest.approx(4 / 7)
    assert whole.metrics["exact"].value == 0.25


def test_texts_are_compared_as_they_are_heard_and_learned() -> None:
    texts = ["Man\u2019s  Shoe: \u201cT-Rex\u201d & 1!", "#", "pi\u00f1ata\u2014x", "\u00c9t\u00e9", "\u014d_"]
    assert [spoken(text) for text in texts] == ["mans shoe t rex 1", "", "pi\u00f1ata x", "\u00e9t\u00e9", "\u014d"]
    tokenizer = TextTokenizer.train_characters(texts)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == [spoken(text) for text in texts]
    result = recognition(["MANS SHOE t rex 1", "noise"], texts[:2])
    assert result.metrics["wer"].value == 0
    assert result.protocol["recordings"].startswith("1, beside 1")


def test_what_cannot_be_measured_is_told() -> None:
    with pytest.raises(UserError, match="no recording"):
        recognition([], [])
    with pytest.raises(UserError, match="2 recordings but 1 texts"):
        recognition(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no reference has a word"):
        recognition(["a"], ["#"])
