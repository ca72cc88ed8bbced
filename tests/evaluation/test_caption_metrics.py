"""Caption metrics: what pycocoevalcap 1.2 gives (run once, with its Java tokenizer), what the papers say, corner cases."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.errors import UserError
from mm.evaluation.caption_metrics import bleu, bleu_counts, cider_d, exact, meteor_exact, rouge_l, token_f1
from mm.evaluation.captioning import captioning, normalised
from mm.evaluation.words import PUNCTUATION, words

CAPTIONS = (
    "A brown dog runs across the wet grass.",
    "two men's bikes lean on a wall",
    "the the the the cat",
    "",
    'A red double-decker bus drives past the "old" church (left).',
    "a woman holding an umbrella in the rain",
)
REFERENCES = (
    (
        "A dog is running over a wet lawn.",
        "The brown dog runs through the grass, happily.",
        "A brown dog runs across grass.",
    ),
    ("Two bikes are leaning against a brick wall.", "Someone's bikes lean on the wall of a house."),
    ("The cat sits on the mat.", "There is a cat on the mat."),
    ("An empty street at night.",),
    (
        "A red double-decker bus passes an old church.",
        "A bus drives past the church.",
        "The red bus doesn't stop at the church.",
        "A double-decker on a street in the U.K.",
    ),
    ("a woman holding an umbrella in the rain", "A lady stands in the rain with her umbrella."),
)
PUBLISHED_BLEU = (0.7934262095536885, 0.6713121983858974, 0.5873996263506087, 0.5188149728342017)
PUBLISHED_ROUGE = (0.879808, 0.544643, 0.357771, 0.0, 0.709302, 1.0)
PUBLISHED_CIDER = (3.36931, 2.317251, 1.439605, 0.0, 1.640026, 5.985432)

Caption = list[str]


def split(captions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[list[Caption], list[list[Caption]]]:
    return [words(one) for one in captions], [[words(one) for one in known] for known in references]


def whole_bleu(captions: Sequence[Caption], references: Sequence[Sequence[Caption]], order: int = 4) -> float:
    return float(bleu(bleu_counts(captions, references), order)(np.ones((1, len(captions))))[0])


def test_figures_are_those_of_pycocoevalcap() -> None:
    captions, references = split(CAPTIONS, REFERENCES)
    assert [whole_bleu(captions, references, order) for order in (1, 2, 3, 4)] == pytest.approx(PUBLISHED_BLEU, abs=1e-12)
    assert rouge_l(captions, references) == pytest.approx(PUBLISHED_ROUGE, abs=1e-6)
    assert cider_d(captions, references) == pytest.approx(PUBLISHED_CIDER, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's dog isn't here, and he can't swim.", "a man 's dog is n't here and he ca n't swim"),
        ('"nice" (really) [yes] {no} <unk>!', "nice -lrb- really -rrb- -lsb- yes -rsb- -lcb- no -rcb- <unk>"),
        ("I cannot; gonna gotta gimme 'tis 'twas", "i can not gon na got ta gim me 't is 't was"),
        ("U.S. Mr. Smith at 3:30 p.m. pays $5.00, 10% of 1,000", "u.s. mr. smith at 3:30 p.m. pays $ 5.00 10 % of 1,000"),
        ("black-and-white t-shirt, X-ray's", "black-and-white t-shirt x-ray 's"),
        ("one... two .... three -- four - five", "one two three four five"),
        ("a/b and/or 1/2 cup & more &amp; AT&T", "a/b and/or 1/2 cup & more & at&t"),
        ("no. 5 and no.1, but no. he", "no. 5 and no. 1 but no he"),
        ("don’t “quote” the man’s — dash… ½", "do n't quote the man 's dash 1/2"),
        ("what?! wow!!! ok? end.", "what ?! wow !!! ok end"),
        (
            "o'clock ma'am jack-o'-lantern rock'n'roll O'Neil's y'all",
            "o'clock ma'am jack-o lantern rock 'n' roll o'neil 's y' all",
        ),
        ("cats' toys, dogs'.", "cats toys dogs"),
        ("smile :) #hash @user 90's '90s -5 5'10\" tall", "smile :-rrb- #hash @user 90 's '90s -5 5 10 tall"),
        ("a man.The end. White., court", "a man.the end white. court"),
        ("vitamin c. in St. Louis, ca. usa", "vitamin c. in st. louis ca usa"),
        ("hi,there red:blue a;b two(2)", "hi there red blue a b two -lrb- 2 -rrb-"),
        ("smile \U0001f600 emoji", "smile emoji"),
        ("naïve grinsendes Gesicht mit großen Augen", "naïve grinsendes gesicht mit großen augen"),
        ("широко улыбается दाँत दिखाता चेहरा", "широко улыбается दाँत दिखाता चेहरा"),
    ],
)
def test_words_are_those_of_the_stanford_tokenizer(text: str, expected: str) -> None:
    assert " ".join(words(text)) == expected


def test_chinese_and_japanese_are_split_into_characters() -> None:
    assert words("红色的心") == ["红", "色", "的", "心"]
    assert words("にっこり笑う") == list("にっこり笑う")
    assert words("3D 电影, OK") == ["3d", "电", "影", "ok"]


@given(st.text())
@settings(deadline=None)
def test_words_of_any_text_are_clean_and_stay_what_they_are_around_spaces(text: str) -> None:
    found = words(text)
    assert all(one and not PUNCTUATION.intersection([one]) and not any(map(str.isspace, one)) for one in found)
    assert words(f"  {text}\t") == found


@given(st.lists(st.from_regex(r"[a-z]{2,8}", fullmatch=True), max_size=8))
def test_plain_words_come_back_whatever_punctuation_stands_between_them(plain: list[str]) -> None:
    special = {"cannot", "gonna", "gotta", "wanna", "lemme", "gimme"}
    plain = [one for one in plain if one not in special]
    assert words(", ".join(plain).upper()) == plain
    assert words('" '.join(plain) + " ; ") == plain


def brute_bleu(captions: Sequence[Caption], references: Sequence[Sequence[Caption]], order: int) -> float:
    """Papineni et al., equations 1 to 3, written out, with the small numbers that the evaluation adds."""

    def grams(caption: Caption, size: int) -> list[tuple[str, ...]]:
        return [tuple(caption[start:][:size]) for start in range(len(caption) - size + 1)]

    logs = 0.0
    for size in range(1, order + 1):
        matched = possible = 0
        for caption, known in zip(captions, references, strict=True):
            own = grams(caption, size)
            possible += len(own)
            matched += sum(min(own.count(one), max(grams(other, size).count(one) for other in known)) for one in set(own))
        logs += math.log((matched + 1e-15) / (possible + 1e-9)) / order
    length = sum(map(len, captions))
    closest = 0
    for caption, known in zip(captions, references, strict=True):
        closest += sorted((abs(len(one) - len(caption)), len(one)) for one in known)[0][1]
    ratio = (length + 1e-15) / (closest + 1e-9)
    return math.exp(logs) * (1 if ratio > 1 else math.exp(1 - 1 / ratio))


def brute_rouge(caption: Caption, known: Sequence[Caption]) -> float:
    def common(first: Caption, second: Caption) -> int:
        if not first or not second:
            return 0
        if first[-1] == second[-1]:
            return 1 + common(first[:-1], second[:-1])
        return max(common(first[:-1], second), common(first, second[:-1]))

    lengths = [common(caption, one) for one in known]
    if not any(lengths):
        return 0.0
    precision = max(lengths) / len(caption)
    recall = max(length / len(one) for length, one in zip(lengths, known, strict=True) if one)
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision)


def brute_cider(captions: Sequence[Caption], references: Sequence[Sequence[Caption]]) -> list[float]:
    """Vedantam et al., equations 1 to 4, with dense vectors over all n-grams that occur."""
    scores = [0.0] * len(captions)
    for size in (1, 2, 3, 4):

        def count(caption: Caption, size: int = size) -> Counter[str]:
            return Counter(" ".join(caption[start : start + size]) for start in range(len(caption) - size + 1))

        vocabulary = sorted({gram for one in (*captions, *(r for known in references for r in known)) for gram in count(one)})
        frequency = [sum(any(gram in count(one) for one in known) for known in references) for gram in vocabulary]
        rarity = np.array([math.log(len(captions) / max(1, number)) for number in frequency])

        def vector(caption: Caption, count: Callable[[Caption], Counter[str]] = count) -> np.ndarray:
            return np.array([count(caption)[gram] for gram in vocabulary], float) * rarity  # noqa: B023

        for row, (caption, known) in enumerate(zip(captions, references, strict=True)):
            for one in known:
                own, theirs = vector(caption), vector(one)
                norm = np.linalg.norm(own) * np.linalg.norm(theirs)
                cosine = float(np.minimum(own, theirs) @ theirs / norm) if norm else 0.0
                difference = max(0, len(caption) - 1) - max(0, len(one) - 1)
                scores[row] += 10 / 4 / len(known) * cosine * math.exp(-(difference**2) / 72)
    return scores


def random_set(chance: random.Random) -> tuple[list[Caption], list[list[Caption]]]:
    def one(longest: int) -> Caption:
        return [chance.choice("abcdef") for _ in range(chance.randint(0, longest))]

    pictures = chance.randint(1, 6)
    return [one(8) for _ in range(pictures)], [[one(7) for _ in range(chance.randint(1, 4))] for _ in range(pictures)]


def test_fast_ways_give_what_the_formulas_say() -> None:
    chance = random.Random(0)
    for _ in range(60):
        captions, references = random_set(chance)
        for order in (1, 2, 3, 4):
            assert whole_bleu(captions, references, order) == pytest.approx(brute_bleu(captions, references, order), rel=1e-9)
        expected = [brute_rouge(caption, known) for caption, known in zip(captions, references, strict=True)]
        assert rouge_l(captions, references) == pytest.approx(expected)
        assert cider_d(captions, references) == pytest.approx(brute_cider(captions, references), abs=1e-9)


def test_values_by_hand() -> None:
    caption, reference = ["a", "b", "c", "d"], ["a", "x", "c", "d", "e"]
    assert token_f1([caption], [[reference, ["z"]]]) == pytest.approx([2 * 3 / 9])
    assert token_f1([["a", "a"]], [[["a", "b", "c"]]]) == pytest.approx([2 * 1 / 5])
    assert rouge_l([caption], [[reference]]) == pytest.approx([2.44 * 0.75 * 0.6 / (0.6 + 1.44 * 0.75)])
    assert whole_bleu([caption], [[reference]], 1) == pytest.approx(0.75 * math.exp(1 - 5 / 4))
    assert whole_bleu([caption], [[reference]], 2) == pytest.approx(math.sqrt(0.75 * 1 / 3) * math.exp(1 - 5 / 4))
    # of lengths 2 and 6 around 4 the shorter counts, so nothing is taken off
    assert whole_bleu([caption], [[["a", "b"], ["c"] * 6]], 1) == pytest.approx(3 / 4)
    # two pictures, one-word captions: the word is in one of two pictures, one order of four counts
    assert cider_d([["a"], ["b"]], [[["a"]], [["c"]]]) == pytest.approx([10 / 4, 0])


def brute_meteor(caption: Caption, reference: Caption) -> float:
    """Banerjee and Lavie, over every alignment there is."""
    found = []
    for chosen in itertools.product(*([None, *(p for p, other in enumerate(reference) if other == word)] for word in caption)):
        links = [(row, place) for row, place in enumerate(chosen) if place is not None]
        if len({place for _, place in links}) == len(links):
            crossings = sum((i - k) * (j - m) < 0 for (i, j), (k, m) in itertools.combinations(links, 2))
            found.append((-len(links), crossings, sum((row - 1, place - 1) not in links for row, place in links)))
    matches, _, chunks = min(found)
    if not matches:
        return 0.0
    precision, recall = -matches / len(caption), -matches / len(reference)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / -matches) ** 3)


def test_meteor_takes_the_best_of_all_alignments() -> None:
    chance = random.Random(1)
    for number in range(300):
        caption, one, other = ([chance.choice("abcd"[: 1 + number % 4]) for _ in range(chance.randint(0, 6))] for _ in range(3))
        expected = max(brute_meteor(caption, one), brute_meteor(caption, other))
        assert meteor_exact([caption], [[one, other]]) == pytest.approx([expected]), (caption, one, other)


def test_meteor_by_hand() -> None:
    """Six matches in two chunks, of seven words; all in one chunk; crossed; what babble costs."""
    caption = ["the", "president", "spoke", "to", "the", "audience"]
    reference = [*caption[:2], "then", *caption[2:]]
    expected = 10 * 6 / 7 / (6 / 7 + 9) * (1 - 0.5 * (2 / 6) ** 3)
    assert meteor_exact([caption], [[reference]]) == pytest.approx([expected])
    assert meteor_exact([caption], [[caption, ["x"]]]) == pytest.approx([1 - 0.5 / 6**3])
    assert meteor_exact([["a", "b"]], [[["b", "a"]]]) == pytest.approx([0.5])
    babble, plain = ["the", "dog"] * 40, ["the", "dog", "and", "the", "dog"]
    assert meteor_exact([babble], [[plain]])[0] < meteor_exact([["the", "dog"]], [[plain]])[0]


def test_corner_cases_are_numbers() -> None:
    same = [["a", "b", "c", "d", "e"]]
    assert cider_d(same, [same]) == pytest.approx([0])  # everything is in every picture
    assert cider_d(same * 2, [[["x"]], same])[0] == 0
    for captions, references in (([[]], [[["a"]]]), ([["a"]], [[[]]]), ([[]], [[[]]]), ([[], []], [[[]], [["a", "b"]]])):
        for score in (rouge_l, meteor_exact, cider_d, exact, token_f1):
            assert score(captions, references).tolist() == [0.0] * len(captions)
        assert 0 <= whole_bleu(captions, references) < 0.1 or references == [[[]]]
    repeated, plain = [["a"] * 9, ["z"]], [["a"], ["z"]]
    known = [[["a", "b"]], [["c", "d"]]]
    assert cider_d(repeated, known)[0] < cider_d(plain, known)[0]


def test_exact_match_is_of_words() -> None:
    captions, references = split(
        ["Red Heart!", "a red heart", "...", "红心"], [["red heart"], ["red heart"], ["..."], ["红 心"]]
    )
    assert exact(captions, references).tolist() == [1, 0, 0, 1]
    assert normalised("The  Man's hat.") == "the man 's hat"


def test_result_has_intervals_subsets_baselines_and_rates() -> None:
    copies = ["A brown dog runs across grass.", *CAPTIONS[1:]]
    result = captioning(
        copies,
        REFERENCES,
        baselines={"baseline": [known[0] for known in REFERENCES], "neighbour": CAPTIONS},
        rates={"subgroup": [1, 0, 1, 0, 0, 0]},
        subsets={"seen": [True, True, True, False, False, False], "novel": [False, False, False, True, True, True]},
        protocol={"decoding": "greedy"},
        resamples=200,
    )
    values = {name: interval.value for name, interval in result.metrics.items()}
    captions, references = split(copies, REFERENCES)
    cider = cider_d(captions, references)
    assert values["exact"] == pytest.approx(2 / 6)
    assert values["exact_seen"] == pytest.approx(1 / 3)
    assert values["baseline_exact"] == 1
    assert values["neighbour_exact_novel"] == pytest.approx(1 / 3)
    assert values["cider"] == pytest.approx(cider.mean())
    assert values["cider_novel"] == pytest.approx(cider[3:].mean())
    assert values["bleu4"] == pytest.approx(whole_bleu(captions, references))
    assert values["bleu4_seen"] == pytest.approx(whole_bleu(captions[:3], references[:3]))
    assert values["subgroup_seen"] == pytest.approx(2 / 3)
    assert result.metrics["cider"].unit == result.metrics["baseline_cider_novel"].unit == "number"
    assert result.metrics["exact"].unit == "rate"
    assert all(one.low <= one.high and math.isfinite(one.value) for one in result.metrics.values())
    assert result.metrics["bleu4"].low < values["bleu4"] < result.metrics["bleu4"].high
    assert result.protocol["captions_without_words"] == 1
    assert result.protocol["decoding"] == "greedy"
    assert "by characters" in result.protocol["words"]


def test_interval_of_bleu_resamples_what_is_added_up() -> None:
    captions, references = split(CAPTIONS, REFERENCES)
    chance = np.random.default_rng(0)
    counts = bleu_counts(captions, references)
    for _ in range(20):
        rows = chance.integers(0, len(captions), len(captions))
        weights = np.bincount(rows, minlength=len(captions))[None].astype(float)
        again = whole_bleu([captions[row] for row in rows], [references[row] for row in rows])
        assert bleu(counts, 4)(weights)[0] == pytest.approx(again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "no picture is left"),
        ((["a"], [["a"], ["b"]]), "2 pictures but 1 captions"),
        ((["a", "b"], [["a"], []]), "picture 1: has no reference"),
    ],
)
def test_faults_are_named(arguments: tuple[list[str], list[list[str]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        captioning(*arguments)


def test_rates_must_be_rates() -> None:
    for bad in (math.nan, 1.5, -0.1):
        with pytest.raises(UserError, match="subgroup: each picture needs a value from 0 to 1"):
            captioning(["a"], [["a"]], rates={"subgroup": [bad]})
