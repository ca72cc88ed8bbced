"""Speech recognition: errors of what was written against what was said, over words and over characters, with intervals.

Source of the rates: Levenshtein, Binary codes capable of correcting deletions, insertions, and reversals, 1966.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, selections, share, subset_sizes

APOSTROPHES = str.maketrans("", "", "'\u2019")
RULES = (
    "wer, cer: insertions, deletions and substitutions over the words, or characters with spaces, of all references; exact: no "
    "error at all; both texts in lower case, apostrophes deleted, all but letters and digits replaced by a space"
)


def recognition(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    subsets: Mapping[str, Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Error rates of n texts, in all and in subsets. Rates may be above 1: more can be written than was said.

    Args:
        hypotheses: What was written of each recording.
        references: What is said in it.
        subsets: Masks over recordings by name; each gives figures with its name as a suffix (``wer_novel``).
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``wer``, ``cer`` and ``exact``, the share of recordings without an error.

    Raises:
        UserError: No recording, lists of different lengths, no word in any reference, an empty subset.
    """
    if not references:
        raise UserError("nothing to evaluate: no recording is left; check the data")
    if len(hypotheses) != len(references):
        raise UserError(f"{len(references)} recordings but {len(hypotheses)} texts; give one a recording")
    pairs = [(spoken(written), spoken(said)) for written, said in zip(hypotheses, references, strict=True)]
    heard = np.array([bool(said) for _, said in pairs])
    words = np.array([(edit_distance(w.split(), s.split()), len(s.split())) for w, s in pairs])
    letters = np.array([(edit_distance(w, s), len(s)) for w, s in pairs])
    right = np.array([written == said for written, said in pairs])
    metrics: dict[str, Interval] = {}
    for suffix, chosen in selections(subsets or {}, len(pairs)).items():
        rows = chosen & heard
        if not rows.any():
            raise UserError("no reference has a word; name the field with what is said by --text-field")
        rates = {"wer": share(*words[rows].T), "cer": share(*letters[rows].T), "exact": share(right[rows])}
        named = {f"{name}{suffix}": rate for name, rate in rates.items()}
        metrics |= bootstrap(named, int(rows.sum()), seed=seed, resamples=resamples)
    stamp = {
        "task": "recognition",
        "recordings": f"{heard.sum()}, beside {(~heard).sum()} whose text has no word, which are left out",
        "words": int(words[:, 1].sum()),
        **subset_sizes(subsets or {}),
        "figures": RULES,
        **(protocol or {}),
        "interval": f"95 % bootstrap over recordings, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def spoken(text: str) -> str:
    """A text as it is compared: what can be heard of it, words with a space between."""
    text = unicodedata.normalize("NFC", text.translate(APOSTROPHES).lower())
    return " ".join("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split())


def edit_distance(first: Sequence[str], second: Sequence[str]) -> int:
    """Fewest insertions, deletions and substitutions that make the second of the first."""
    names = {item: number for number, item in enumerate(dict.fromkeys([*first, *second]))}
    columns = np.array([names[item] for item in second], dtype=np.int64)
    places = np.arange(len(second) + 1)
    row = places
    for count, item in enumerate(first, start=1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (columns != names[item]))])
        row = np.minimum.accumulate(best - places) + places  # insertions, from the left
    return int(row[-1])
