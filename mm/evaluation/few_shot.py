"""Few-shot naming: how often a picture is named right after examples in the prompt, by number of shots.

Protocol: Frozen https://arxiv.org/abs/2106.13884, section 4 (open-ended answers are right only letter by letter; the same
prompts with blank pictures are the blind baseline). Beside the open-ended answer the likelihoods of the names are compared.

Shapes: e episodes, A names to choose among.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Result, bootstrap, selections, share, subset_sizes


def chosen_right(likelihoods: Float[Tensor, "e a"], answers: Int64[Tensor, " e"]) -> Bool[Tensor, " e"]:
    """Whether the right name is the likeliest; of equal ones the first is chosen. Raises `UserError` for NaN."""
    if likelihoods.isnan().any():
        raise UserError("a likelihood is not a number; the model cannot be measured")
    best = likelihoods.sort(dim=1, descending=True, stable=True).indices[:, 0]
    return best == answers


def few_shot(
    right: Mapping[str, Sequence[bool] | Tensor],
    queries: Sequence[str],
    *,
    subsets: Mapping[str, Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Shares of right answers with intervals over the query pictures, of which each may be asked in several episodes.

    Args:
        right: Whether each episode was answered right, by name of the figure (``accuracy_4shot``).
        queries: Name of the query picture of each episode.
        subsets: Masks over episodes by name, which become suffixes.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Raises:
        UserError: No episode, or lists of different lengths.
    """
    length = len(queries)
    for name, values in right.items():
        if len(values) != length:
            raise UserError(f"{length} episodes but {len(values)} answers of {name}; give one an episode")
    if not length:
        raise UserError("nothing to evaluate: no episode is left; check the data and the pool")
    units = np.unique(np.asarray(queries), return_inverse=True)[1]
    metrics = {}
    for suffix, chosen in selections(subsets or {}, length).items():
        own = np.unique(units[chosen], return_inverse=True)[1]
        statistics = {}
        for name, values in right.items():
            hits = torch.as_tensor(values, dtype=torch.float64).numpy()[chosen]
            statistics[f"{name}{suffix}"] = share(np.bincount(own, hits), np.bincount(own))
        metrics |= bootstrap(statistics, int(own.max()) + 1, seed=seed, resamples=resamples)
    stamp = {
        "task": "few-shot naming",
        "episodes": length,
        "query_pictures": int(units.max()) + 1,
        **subset_sizes(subsets or {}),
        **(protocol or {}),
        "interval": f"95 % bootstrap over query pictures, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)
