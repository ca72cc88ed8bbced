"""Visual question answering: the accuracy of VQA v2, over all questions and by kind, beside guesses that see no picture.

Protocol: https://arxiv.org/abs/1505.00468 and the evaluation script of https://visualqa.org/evaluation.html, all of whose rules
are kept, its quirks too: figures are comparable only so. Shapes: q questions, n pictures.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Result, Statistic, bootstrap, selections, share, subset_sizes

CONSENSUS = 10
"""Answers from which on a list is what so many people said; a shorter one lists what is accepted."""

AGREEING = 3
"""Other people that have to say the same for an answer to be right beyond doubt."""

MAX_PERIODS = 32
"""Periods that are deleted from one answer: the script hands a flag to where the regular expression takes this number."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}

_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've "
    "he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've "
    "o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've "
    "there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've "
    "wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've "
)


def _misspelled(word: str) -> list[str]:
    """A word with each one of its apostrophes left out."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {wrong: word for word in _CONTRACTED.split() for wrong in _misspelled(word)} | {"somebody'd": "somebodyd"}
"""Spellings with one apostrophe missing, and the one entry of the script that takes it away. What else the script lists changes
nothing: "Im" and the like, which no word equals as all are in lower case by then, and words that stay as they are."""


def normalise(answer: str) -> str:
    """An answer as it is compared: lower case, no articles, digits for number words up to ten, apostrophes, no punctuation.

    A mark of punctuation is deleted where the answer has a space beside one like it, or a comma between digits anywhere; else
    it becomes a space. Periods go, except before digits. Apostrophes and colons stay.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    grouped = _GROUPED_DIGITS.search(text) is not None
    bare = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        bare = bare.replace(mark, "" if beside_space or grouped else " ")
    bare = _PERIOD.sub("", bare, count=MAX_PERIODS)
    words = [_NUMBERS.get(word, word) for word in bare.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(predicted: str, answers: Sequence[str]) -> float:
    """How right an answer is, 0 to 1.

    Of ten or more answers, which are people's: what min(others who said so / 3, 1) is on average when each person in turn is
    left out. Where all of them wrote the very same, the script compares letter by letter, nothing being normalised. Of fewer
    answers, which are those that are accepted: 1 for any of them, normalised.
    """
    if len(answers) < CONSENSUS:
        return float(normalise(predicted) in map(normalise, answers))
    said = [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    guess = predicted.replace("\n", " ").replace("\t", " ").strip()
    if len(set(said)) > 1:
        said, guess = [normalise(answer) for answer in said], normalise(guess)
    agreeing = said.count(guess)
    others = agreeing * min((agreeing - 1) / AGREEING, 1) + (len(said) - agreeing) * min(agreeing / AGREEING, 1)
    return others / len(said)


def accepted(answers: Sequence[str]) -> dict[str, float]:
    """Normalised answers with their `accuracy`, in the order of their first mention: what a network learns to give."""
    alike = [normalise(answer) for answer in answers]
    scored = {answer: accuracy(answer, alike) for answer in alike if answer}
    return {answer: score for answer, score in scored.items() if score > 0}


def frequent_answers(questions: Iterable[Sequence[str]], count: int) -> tuple[str, ...]:
    """The ``count`` answers, normalised, that are most often right for questions with these answers; of equals the first in the
    alphabet."""
    totals: Counter[str] = Counter()
    for answers in questions:
        totals.update(accepted(answers))  # pyright: ignore[reportArgumentType] - a Counter holds any numbers
    return tuple(sorted(totals, key=lambda answer: (-totals[answer], answer))[:count])


class BlindGuess:
    """Answers without looking: what was most often right for a question of the same words, else for any question.

    Args:
        training: Questions and their answers.
    """

    def __init__(self, training: Iterable[tuple[str, Sequence[str]]]) -> None:
        by_question: dict[str, list[Sequence[str]]] = {}
        for question, answers in training:
            by_question.setdefault(normalise(question), []).append(answers)
        self._best = {question: self._first(several) for question, several in by_question.items()}
        self.majority = self._first([answers for several in by_question.values() for answers in several])

    def __call__(self, question: str) -> str:
        return self._best.get(normalise(question), self.majority)

    @staticmethod
    def _first(questions: Sequence[Sequence[str]]) -> str:
        return next(iter(frequent_answers(questions, 1)), "")


def vqa(
    predicted: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    kinds: Sequence[str] | None = None,
    pictures: Sequence[str] | None = None,
    guesses: Mapping[str, Sequence[str]] | None = None,
    subsets: Mapping[str, Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Mean accuracy of q answers, in all, by kind and in subsets, with intervals over pictures.

    Args:
        predicted: One answer a question.
        answers: What people answered, or what is accepted, see `accuracy`.
        kinds: Kind of each question; empty for none.
        pictures: Name of each question's picture: questions about one picture are resampled together. Default: all different.
        guesses: Answers of baselines by name: ``{"blind": ...}`` adds ``blind_accuracy``, by kind and subset too.
        subsets: Masks over questions by name.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``accuracy``, ``accuracy_KIND``, ``accuracy_SUBSET``, and the same of each baseline with its name in front.

    Raises:
        UserError: No question, or lists of different lengths.
    """
    length = len(answers)
    given = {"": predicted} | {f"{name}_": guess for name, guess in (guesses or {}).items()}
    for name, values in (*given.items(), ("kinds", kinds), ("pictures", pictures)):
        if values is not None and len(values) != length:
            raise UserError(f"{length} questions but {len(values)} {name.strip('_') or 'answers'}; give one a question")
    if not length:
        raise UserError("nothing to evaluate: no question is left; check the data")
    right = {name: np.array([accuracy(p, a) for p, a in zip(guess, answers, strict=True)]) for name, guess in given.items()}
    named = sorted({kind for kind in kinds or () if kind})
    parts = {kind: [one == kind for one in kinds or ()] for kind in named} | dict(subsets or {})
    units = np.unique(np.arange(length) if pictures is None else np.asarray(pictures), return_inverse=True)[1]
    metrics = {}
    for suffix, chosen in selections(parts, length).items():
        own = np.unique(units[chosen], return_inverse=True)[1]
        statistics = {f"{name}accuracy{suffix}": _mean(values[chosen], own) for name, values in right.items()}
        metrics |= bootstrap(statistics, int(own.max()) + 1, seed=seed, resamples=resamples)
    stamp = {
        "task": "visual question answering, accuracy of VQA v2",
        "questions": length,
        "pictures": int(units.max()) + 1,
        **subset_sizes(parts),
        **(protocol or {}),
        "interval": f"95 % bootstrap over pictures, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def _mean(values: np.ndarray, units: np.ndarray) -> Statistic:
    """Mean of ``values (q,)``, value j drawn with picture ``units[j]``."""
    return share(np.bincount(units, values), np.bincount(units))
