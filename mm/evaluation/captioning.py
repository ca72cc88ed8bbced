"""Captioning: what a set of captions scores against what people said, with intervals over pictures, beside baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm.errors import UserError
from mm.evaluation.caption_metrics import MAX_ORDER, Words, bleu, bleu_counts, cider_d, exact, meteor_exact, rouge_l, token_f1
from mm.evaluation.metrics import RESAMPLES, Interval, Result, Statistic, bootstrap, selections, share, subset_sizes
from mm.evaluation.words import TOKENIZER, words

OF_SUBSETS = ("exact", "token_f1", "bleu4", "rouge_l", "meteor_exact", "cider")
OF_BASELINES = ("exact", "token_f1", "cider")
"""Figures that subsets and baselines get; the whole set has BLEU of all orders, too."""

RULES = (
    "exact: same words as a reference; token_f1: likest reference; bleu1 to 4: of the set, closest length; rouge_l: beta 1.2; "
    "meteor_exact: METEOR of 2005 with exact matches alone, not METEOR 1.5: no stems, synonyms, paraphrases or tuned weights; "
    "cider: CIDEr-D, 0 to 10, rarity by the references of all pictures evaluated, also in subsets and intervals"
)


def captioning(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    baselines: Mapping[str, Sequence[str]] | None = None,
    rates: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    subsets: Mapping[str, Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Figures of n captions, one a picture, in all and in subsets, see `mm.evaluation.caption_metrics`.

    Args:
        hypotheses: The captions.
        references: Of each picture at least one.
        baselines: Captions by other means, by name: ``{"baseline": ...}`` adds ``baseline_exact`` and so on.
        rates: Further figures by name, each a value in 0..1 of every picture, whose mean is taken (``subgroup``).
        subsets: Masks over pictures by name; each gives figures with its name as a suffix (``cider_novel``).
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``exact``, ``token_f1``, ``bleu1`` to ``bleu4``, ``rouge_l``, ``meteor_exact``, ``cider``, the rates, those of
        `OF_SUBSETS` for each subset, and those of `OF_BASELINES` for each baseline.

    Raises:
        UserError: No picture, one without a reference, lists of different lengths, a rate that is not in 0..1, an empty subset.
    """
    length = len(references)
    given = {"": hypotheses} | {f"{name}_": captions for name, captions in (baselines or {}).items()}
    _check(given, references, rates or {})
    accepted = [[words(one) for one in known] for known in references]
    split = {prefix: [words(caption) for caption in captions] for prefix, captions in given.items()}
    values = {f"{prefix}{name}": value for prefix, mine in split.items() for name, value in _values(mine, accepted).items()}
    values |= {name: np.asarray(value, dtype=np.float64) for name, value in (rates or {}).items()}
    counts = bleu_counts(split[""], accepted)
    metrics: dict[str, Interval] = {}
    for suffix, chosen in selections(subsets or {}, length).items():
        statistics: dict[str, Statistic] = {name: share(value[chosen]) for name, value in values.items()}
        statistics |= {f"bleu{order}": bleu(counts[chosen], order) for order in range(1, MAX_ORDER + 1)}
        named = {name: statistics[name] for name in _order(given, rates or {}, subset=bool(suffix))}
        found = bootstrap(named, int(chosen.sum()), seed=seed, resamples=resamples)
        metrics |= {f"{name}{suffix}": _in_its_unit(name, interval) for name, interval in found.items()}
    stamp = {
        "task": "captioning",
        "pictures": length,
        "references": f"{sum(map(len, references))}, {min(map(len, references))} to {max(map(len, references))} a picture",
        **subset_sizes(subsets or {}),
        "words": TOKENIZER,
        "figures": RULES,
        **_without_words(split[""]),
        **(protocol or {}),
        "interval": f"95 % bootstrap over pictures, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def normalised(caption: str) -> str:
    """A caption as it is compared for `exact`: its words, with a space between."""
    return " ".join(words(caption))


def _values(captions: Sequence[Words], accepted: Sequence[Sequence[Words]]) -> dict[str, np.ndarray]:
    """The figures that are means over pictures, of each picture."""
    scores = {"exact": exact, "token_f1": token_f1, "rouge_l": rouge_l, "meteor_exact": meteor_exact, "cider": cider_d}
    return {name: score(captions, accepted) for name, score in scores.items()}


def _order(given: Mapping[str, Any], rates: Mapping[str, Any], *, subset: bool) -> list[str]:
    """Names of the figures as they are shown: the captions' own with their rates, then each baseline's with its."""
    whole = ("exact", "token_f1", *(f"bleu{order}" for order in range(1, MAX_ORDER + 1)), "rouge_l", "meteor_exact", "cider")
    own = OF_SUBSETS if subset else whole
    names = []
    for prefix in given:
        names += [f"{prefix}{name}" for name in (OF_BASELINES if prefix else own)]
        names += [name for name in rates if _owner(name, given) == prefix]
    return names


def _owner(rate: str, given: Mapping[str, Any]) -> str:
    """The baseline, by its prefix, that a rate is of; none for those of the captions themselves."""
    return next((prefix for prefix in given if prefix and rate.startswith(prefix)), "")


def _in_its_unit(name: str, found: Interval) -> Interval:
    """CIDEr is no fraction."""
    return Interval(found.value, found.low, found.high, "number") if name.endswith("cider") else found


def _without_words(captions: Sequence[Words]) -> dict[str, int]:
    count = sum(not caption for caption in captions)
    return {"captions_without_words": count} if count else {}


def _check(given: Mapping[str, Sequence[str]], references: Sequence[Sequence[str]], rates: Mapping[str, Any]) -> None:
    if not references:
        raise UserError("nothing to evaluate: no picture is left; check the data")
    for name, values in (*given.items(), *rates.items()):
        if len(values) != len(references):
            raise UserError(f"{len(references)} pictures but {len(values)} {name.strip('_') or 'captions'}; give one a picture")
    bare = next((row for row, known in enumerate(references) if not known), None)
    if bare is not None:
        raise UserError(f"picture {bare}: has no reference; leave it out")
    for name, values in rates.items():
        if not all(0 <= value <= 1 for value in values):  # NaN is not either
            raise UserError(f"{name}: each picture needs a value from 0 to 1")
