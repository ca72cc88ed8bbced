"""How well captions say what people said: BLEU, ROUGE-L and CIDEr-D as pycocoevalcap has them, METEOR of 2005 with
exact matches alone, exact match and word overlap.

Everything works on words (`mm.evaluation.words`): n hypotheses, one a picture, and at least one reference for each. Where the
published formulas and the evaluation that everybody's figures come from differ, the evaluation is followed and it is said here.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import chain
from typing import TypeAlias

import numpy as np

from mm.evaluation.metrics import Statistic

Words: TypeAlias = Sequence[str]

MAX_ORDER = 4
"""Longest n-grams of BLEU and CIDEr."""

BLEU_HIT, BLEU_TRIAL = 1e-15, 1e-9
"""Added to matches and to n-grams: with no match at all BLEU is very small instead of 0, and defined for empty captions."""

ROUGE_BETA = 1.2
"""Weight of recall in ROUGE-L."""

METEOR_ALIGNMENTS = 1000
"""Beginnings of alignments that are kept at each word; with no more than that the one that is found is the best."""

NOWHERE = -2
"""Place of a word that is aligned with none; no place is behind it."""

CIDER_SIGMA, CIDER_SCALE = 6.0, 10.0
"""Width of CIDEr-D's penalty on lengths, and what all is multiplied by."""


def bleu_counts(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """What BLEU adds up over pictures, ``(n, 2 + 2 * MAX_ORDER)``, https://aclanthology.org/P02-1040.

    Columns: words of the caption, words of the reference whose length is closest (of equally close ones the shorter), then for
    each order the number of n-grams, then those that match, each counted at most as often as in the reference that has it most.
    """
    number = len(hypotheses)
    lengths = np.array([len(caption) for caption in hypotheses], np.int64)
    closest = [
        min((len(one) for one in accepted), key=lambda size: (abs(size - length), size))
        for length, accepted in zip(lengths, references, strict=True)
    ]
    trials, matches = [], []
    for order, grams in enumerate(_ngrams(hypotheses, references), start=1):
        trials.append(np.maximum(0, lengths + 1 - order))
        keys, place = np.unique(grams.keys[grams.of_reference], return_inverse=True)
        most = np.zeros(len(keys))
        np.maximum.at(most, place, grams.counts[grams.of_reference])
        found, where = _find(keys, grams.keys[~grams.of_reference])
        clipped = np.minimum(grams.counts[~grams.of_reference][found], most[where])
        matches.append(np.bincount(grams.captions[~grams.of_reference][found], clipped, minlength=number))
    return np.stack([lengths, closest, *trials, *matches], axis=1).astype(np.float64)


def bleu(counts: np.ndarray, order: int) -> Statistic:
    """BLEU of a whole set with n-grams up to ``order``, 0 to 1, from `bleu_counts`."""

    def statistic(weights: np.ndarray) -> np.ndarray:
        total = weights @ counts
        trials, matches = total[:, 2 : 2 + order], total[:, 2 + MAX_ORDER : 2 + MAX_ORDER + order]
        precision = np.exp(np.log((matches + BLEU_HIT) / (trials + BLEU_TRIAL)).mean(axis=1))
        ratio = (total[:, 0] + BLEU_HIT) / (total[:, 1] + BLEU_TRIAL)
        return precision * np.exp(np.minimum(0, 1 - 1 / ratio))

    return statistic


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """ROUGE-L of each caption, ``(n,)`` in 0..1, https://aclanthology.org/W04-1013.

    Precision and recall of the longest common subsequence are each the best over the references, not of one and the same; the
    weight of recall is `ROUGE_BETA`.
    """
    scores = np.zeros(len(hypotheses))
    for row, (caption, accepted) in enumerate(zip(hypotheses, references, strict=True)):
        common = [(_common(caption, one), len(one)) for one in accepted]
        longest = max(length for length, _ in common)
        if longest:
            precision = longest / len(caption)
            recall = max(length / size for length, size in common if size)
            scores[row] = (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)
    return scores


def _common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence; a row of its table is the bits of one number (Hyyro, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    whole = row = (1 << len(first)) - 1
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & whole
    return len(first) - row.bit_count()


def meteor_exact(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """METEOR of 2005 with its exact-match module alone, of each caption, ``(n,)`` in 0..1, https://aclanthology.org/W05-0909.

    This is not METEOR 1.5, which captions are usually published with: words match only where they are the same, not by their
    stem, as synonyms or in a paraphrase, and no weight is tuned. A caption is aligned with each reference, each word with at
    most one: with the most matches, of these with the fewest crossings, of these with the fewest chunks, which are matches that
    stand one behind the other on both sides. Of m matches precision P and recall R give ``10 P R / (R + 9 P)``, of which
    ``0.5 (chunks / m) ** 3`` is taken off as a share; the best reference counts.
    """
    pairs = zip(hypotheses, references, strict=True)
    return np.array([max(_meteor(caption, one) for one in known) for caption, known in pairs])


def _meteor(caption: Words, reference: Words) -> float:
    shared = Counter(caption) & Counter(reference)
    matches = shared.total()
    if not matches:
        return 0.0
    precision, recall = matches / len(caption), matches / len(reference)
    _, chunks = _aligned(caption, reference, shared)
    return 10 * precision * recall / (recall + 9 * precision) * (1 - 0.5 * (chunks / matches) ** 3)


def _aligned(caption: Words, reference: Words, shared: Mapping[str, int]) -> tuple[int, int]:
    """Crossings and chunks of the best of the largest alignments, which match words as often as both sides share them.

    Occurrences of a word never cross each other in an alignment with the fewest crossings, since exchanging two that do takes
    crossings away. So each is aligned behind those before it, and where there are as many on both sides there is no choice.
    """
    places = {word: [place for place, other in enumerate(reference) if other == word] for word in shared}
    bits = {word: sum(1 << place for place in known) for word, known in places.items()}
    left = Counter(caption)
    best = {(0, NOWHERE): (0, 0)}  # by the places of the reference that are taken, and that of the word before
    for word in caption:
        ways = []
        for (taken, last), (crossings, chunks) in best.items():
            own = taken & bits.get(word, 0)
            missing = shared.get(word, 0) - own.bit_count()
            if left[word] > missing:
                ways.append(((taken, NOWHERE), (crossings, chunks)))
            if missing:
                for place in places[word][: len(places[word]) - missing + 1]:
                    if not own >> place:
                        crossed = crossings + (taken >> place).bit_count()
                        ways.append(((taken | 1 << place, place), (crossed, chunks + (place != last + 1))))
        left[word] -= 1
        best = _least(ways)
    return min(best.values())


def _least(ways: Sequence[tuple[tuple[int, int], tuple[int, int]]]) -> dict[tuple[int, int], tuple[int, int]]:
    """The least cost of each beginning of an alignment, of no more than `METEOR_ALIGNMENTS` beginnings."""
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for state, cost in ways:
        if state not in best or cost < best[state]:
            best[state] = cost
    if len(best) > METEOR_ALIGNMENTS:
        best = dict(nsmallest(METEOR_ALIGNMENTS, best.items(), key=lambda way: way[1]))
    return best


def cider_d(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """CIDEr-D of each caption, ``(n,)`` in 0..10, https://arxiv.org/abs/1411.5726; the set's is their mean.

    How much an n-gram tells depends on how few pictures of this very set have it in a reference: figures of sets of different
    sizes do not compare, and a set of one picture scores 0. As in the evaluation, a caption's length, for the penalty on
    another length than the reference's, is its number of two-word sequences.
    """
    number, picture_of = len(hypotheses), _pictures(references)
    cosines = np.zeros(number + len(picture_of))  # summed over orders; the first n, of the captions themselves, stay 0
    for grams in _ngrams(hypotheses, references):
        pictures = np.bincount(np.unique(grams.keys[grams.of_reference]) % grams.distinct, minlength=grams.distinct)
        rarity = np.log(number) - np.log(np.maximum(1, pictures))
        weights = grams.counts * rarity[grams.keys % grams.distinct]
        norms = np.sqrt(np.bincount(grams.captions, weights**2, minlength=len(cosines)))
        found, where = _find(grams.keys[~grams.of_reference], grams.keys[grams.of_reference])
        own, theirs = weights[~grams.of_reference][where], weights[grams.of_reference][found]
        products = np.bincount(
            grams.captions[grams.of_reference][found], np.minimum(own, theirs) * theirs, minlength=len(cosines)
        )
        scale = norms[np.concatenate([np.arange(number), picture_of])] * norms
        cosines += np.divide(products, scale, out=np.zeros(len(scale)), where=scale > 0)
    lengths = np.array([max(0, len(caption) - 1) for caption in (*hypotheses, *chain.from_iterable(references))])
    penalty = np.exp(-((lengths[picture_of] - lengths[number:]) ** 2) / (2 * CIDER_SIGMA**2))
    total = np.bincount(picture_of, cosines[number:] * penalty, minlength=number)
    return CIDER_SCALE / MAX_ORDER * total / np.bincount(picture_of, minlength=number)


@dataclass(frozen=True)
class _Ngrams:
    """The different n-grams of one order in each of n captions and their r references, behind them.

    Args:
        captions: Number of the caption that has it, ``(m,)``; references are ``n`` to ``n + r - 1``.
        counts: How often it has it, ``(m,)``.
        keys: Picture times ``distinct`` plus the number of the n-gram, ``(m,)``; those of the hypotheses ascend.
        of_reference: Whether the caption is a reference, ``(m,)``.
        distinct: Number of different n-grams in all.
    """

    captions: np.ndarray
    counts: np.ndarray
    keys: np.ndarray
    of_reference: np.ndarray
    distinct: int


def _ngrams(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> Iterator[_Ngrams]:
    """Of 1, 2 ... `MAX_ORDER` words. An n-gram is numbered by the number of its beginning and its last word."""
    captions = [*hypotheses, *chain.from_iterable(references)]
    picture_of = np.concatenate([np.arange(len(hypotheses)), _pictures(references)])
    numbers: dict[str, int] = {}
    words = np.array([numbers.setdefault(word, len(numbers)) for caption in captions for word in caption], np.int64)
    owners = np.repeat(np.arange(len(captions)), [len(caption) for caption in captions])
    starts, grams = np.arange(len(words)), words
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            ends = starts + order - 1
            whole = ends < len(words)
            whole[whole] = owners[ends[whole]] == owners[starts[whole]]
            starts, grams = starts[whole], grams[whole] * len(numbers) + words[ends[whole]]
        _, grams = np.unique(grams, return_inverse=True)
        distinct = int(grams.max(initial=0)) + 1
        pairs, counts = np.unique(owners[starts] * distinct + grams, return_counts=True)
        owner = pairs // distinct
        yield _Ngrams(owner, counts, picture_of[owner] * distinct + pairs % distinct, owner >= len(hypotheses), distinct)


def _pictures(references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Number of each reference's picture."""
    return np.repeat(np.arange(len(references)), [len(accepted) for accepted in references])


def _find(ascending: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the wanted keys are among the ascending ones, as a mask, and the places of those."""
    places = np.searchsorted(ascending, wanted)
    found = places < len(ascending)
    found[found] = ascending[places[found]] == wanted[found]
    return found, places[found]


def exact(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Whether each caption has the very words of one of its references, ``(n,)`` of 0 and 1; one without words never has."""
    pairs = zip(hypotheses, references, strict=True)
    return np.array([float(bool(caption) and any(list(caption) == list(one) for one in known)) for caption, known in pairs])


def token_f1(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
    """Overlap of each caption's words with those of its likest reference, whatever their order, ``(n,)`` in 0..1.

    The harmonic mean of the share of the caption's words that the reference has and of the reference's that the caption has, as
    SQuAD's evaluation has it (https://arxiv.org/abs/1606.05250), except that articles are words.
    """
    pairs = zip(hypotheses, references, strict=True)
    return np.array([max(_overlap(caption, one) for one in known) for caption, known in pairs])


def _overlap(first: Words, second: Words) -> float:
    shared = (Counter(first) & Counter(second)).total()
    return 2 * shared / (len(first) + len(second)) if shared else 0.0
