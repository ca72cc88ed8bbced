"""How well pictures fit their prompts, and whether they are copies of training pictures.

Everything works on vectors and pixels that the caller has: the networks that make features are chosen, and named, elsewhere.

Shapes: n generated pictures, m training pictures, h real held-out pictures, p prompts, D features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Interval, Result, Statistic, bootstrap, selections, share, subset_sizes
from mm.evaluation.scores import checked
from mm.evaluation.zero_shot import label_ranks

Convention = Literal["original", "torchmetrics"]

CLIP_SCORE_PREFIX: Mapping[Convention, str] = {"original": "A photo depicts ", "torchmetrics": ""}
"""What stands before each caption when it is embedded."""

CLIP_SCORE_WEIGHT = 2.5
"""Of the original CLIPScore, which brings usual values near 1."""

NEAR = 0.05
"""Share of the real pictures that count as near to a training picture."""

ROWS = 1024
"""Of pictures on either side, whose distances are held at once."""


@dataclass(frozen=True)
class Nearest:
    """The training picture that is nearest to each picture.

    Args:
        distances: Euclidean, ``(n,)`` float64; exactly 0 for a copy.
        indices: Which training picture, ``(n,)`` int64; of equally near ones the first.
    """

    distances: Float[Tensor, " n"]
    indices: Int64[Tensor, " n"]


def clip_score(
    image_vectors: Float[Tensor, "n d"],
    text_vectors: Float[Tensor, "n d"],
    *,
    convention: Convention = "original",
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """CLIPScore without references, https://arxiv.org/abs/2104.08718, of pictures and their captions.

    ``original`` is the paper's: 2.5 max(cosine, 0) of each pair, then the mean, captions with the prefix "A photo depicts ".
    ``torchmetrics`` is that library's: 100 times the mean cosine, then clamped at 0, captions as they are. Both depend on the
    CLIP that made the vectors, so the protocol should name it. The two never share a name.

    Args:
        image_vectors: One unit vector a picture.
        text_vectors: One unit vector a caption, embedded with its `CLIP_SCORE_PREFIX`.
        convention: Which of the two.
        protocol: Facts for the stamp that only the caller knows (the CLIP).
        seed: Seed of the interval.
        resamples: Number of bootstrap resamples.

    Returns:
        ``clipscore``, or ``clipscore_torchmetrics``, with the interval over resampled pairs.

    Raises:
        UserError: numbers of pictures and captions that differ, widths that differ, NaN or infinity.
    """
    if len(image_vectors) != len(text_vectors):
        raise UserError(f"CLIPScore compares pairs, got {len(image_vectors)} pictures and {len(text_vectors)} captions")
    images = checked(image_vectors, "image vectors").cpu().double()
    texts = checked(text_vectors, "text vectors", image_vectors.shape[1]).cpu().double()
    cosines = F.cosine_similarity(images, texts).numpy()
    if convention == "original":
        name, statistic, rule = "clipscore", share(CLIP_SCORE_WEIGHT * cosines.clip(min=0)), "2.5 max(cosine, 0) of each pair"
    else:
        name, statistic, rule = (
            "clipscore_torchmetrics",
            _at_least_0(share(100 * cosines)),
            "100 times the mean cosine, at least 0",
        )
    interval = bootstrap({name: statistic}, len(cosines), seed=seed, resamples=resamples)[name]
    prefix = CLIP_SCORE_PREFIX[convention]
    stamp = {
        "pairs": len(cosines),
        name: f"{rule}, captions " + (f"behind '{prefix}'" if prefix else "as they are"),
        **(protocol or {}),
        "interval": f"95 % bootstrap over pairs, {resamples} resamples, seed {seed}",
    }
    return Result({name: _number(interval)}, stamp)


def rank_of_prompt(
    image_vectors: Float[Tensor, "n d"],
    text_vectors: Float[Tensor, "p d"],
    labels: Int64[Tensor, " n"],
    *,
    k: int = 5,
    suffix: str = "",
    subsets: Mapping[str, Tensor | np.ndarray] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Share of pictures whose prompt is among the k texts that a judge finds nearest to them.

    Args:
        image_vectors: Unit vectors of the pictures by the judge, who must share nothing with what made or chose them.
        text_vectors: Unit vectors of all candidate texts.
        labels: The text that each picture was made of.
        k: How many places count.
        suffix: Of the figure's name; ``"_real"`` for real pictures of the same concepts.
        subsets: Masks over the pictures by name; each gives the figure with its name as a suffix, all texts staying candidates.
        protocol: Facts for the stamp that only the caller knows (judge, templates, sampling).
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``clip_rank5`` (for k = 5) and the same for each subset. The resampled units are prompts, with all their pictures.

    Raises:
        UserError: shapes that do not fit, labels or k out of range, NaN or infinity in a vector, an empty subset.
    """
    if not 1 <= k <= len(text_vectors):
        raise UserError(f"k is {k}, with {len(text_vectors)} texts it can be 1 to {len(text_vectors)}")
    hits = (label_ranks(image_vectors, text_vectors, labels) < k).numpy()
    prompts = labels.detach().cpu().numpy()
    metrics: dict[str, Interval] = {}
    for subset, chosen in selections(subsets or {}, len(hits)).items():
        name = f"clip_rank{k}{suffix}{subset}"
        units, owner = np.unique(prompts[chosen], return_inverse=True)
        statistic = share(np.bincount(owner, weights=hits[chosen]), np.bincount(owner))
        metrics |= bootstrap({name: statistic}, len(units), seed=seed, resamples=resamples)
    stamp = {
        f"clip_rank{k}{suffix}": f"{len(hits)} pictures of {len(np.unique(prompts))} prompts among {len(text_vectors)} texts",
        **subset_sizes(subsets or {}),
        **(protocol or {}),
        "scores": "dot product in fp32, of equal scores the lowest index wins",
        "interval": f"95 % bootstrap over prompts, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def nearest_train(pictures: Shaped[Tensor, "n ..."], train: Shaped[Tensor, "m ..."]) -> Nearest:
    """For each picture the nearest training picture, both given as features or both as pixels (any shape, flattened).

    Raises:
        UserError: nothing on one side, shapes that differ, NaN or infinity.
    """
    pictures, train = _flat(pictures, "pictures"), _flat(train, "training pictures")
    if pictures.shape[1] != train.shape[1]:
        raise UserError(f"pictures of {pictures.shape[1]} numbers, training pictures of {train.shape[1]}; prepare them alike")
    best = torch.full((len(pictures),), torch.inf, dtype=torch.float64)
    indices = torch.zeros(len(pictures), dtype=torch.int64)
    exact = torch.zeros(len(pictures), dtype=torch.float64)
    for start in range(0, len(pictures), ROWS):
        rows, here = pictures[start : start + ROWS].double(), slice(start, start + ROWS)
        for offset in range(0, len(train), ROWS):
            distances = torch.cdist(rows, train[offset : offset + ROWS].double())
            found = distances.argmin(1)
            value = distances.gather(1, found[:, None]).squeeze(1)
            closer = value < best[here]
            best[here] = torch.where(closer, value, best[here])
            indices[here] = torch.where(closer, found + offset, indices[here])
        exact[here] = (rows - train[indices[here]].double()).norm(dim=1)
    return Nearest(exact, indices)


def copying(
    made: Shaped[Tensor, "n ..."],
    held_out: Shaped[Tensor, "h ..."],
    train: Shaped[Tensor, "m ..."],
    *,
    features: str,
    retrieved: Shaped[Tensor, "r ..."] | None = None,
    mirrored: bool = False,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Distance to the nearest training picture, of generated pictures and of real ones that were not trained on.

    A generator that has learned is about as far from its training pictures as real pictures of the same kind are; one that
    copies is nearer. ``copies`` is the share of generated pictures that are as near to a training picture as only the nearest
    5 % of the real ones are: about 0.05 without copying, 1 where everything is copied. ``copies_retrieved`` is the control: the
    share that a generator would get that gives training pictures for its own. Where it is far below 1, ``copies`` cannot show.

    Args:
        made: Features or pixels of the generated pictures.
        held_out: The same of real pictures that were not trained on.
        train: The same of the training pictures.
        features: What the distances are between, for the protocol.
        retrieved: The same of training pictures that went the way of generated ones (through tokens, mirrored).
        mirrored: Training pictures count in their mirror images, too; all are pixels then, the last axis to the right.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``nearest_train`` and ``nearest_train_real``, mean Euclidean distances, and ``copies``, a share; where there are
        ``retrieved`` pictures ``nearest_train_retrieved`` and ``copies_retrieved``, the same of them.

    Raises:
        UserError: nothing on one side, shapes that differ, NaN or infinity.
    """
    known = torch.cat([train, train.flip(-1)]) if mirrored else train
    sides = {"": made, "_real": held_out} | ({} if retrieved is None else {"_retrieved": retrieved})
    distances = {suffix: nearest_train(side, known).distances.numpy() for suffix, side in sides.items()}
    bar = np.quantile(distances["_real"], NEAR, method="lower")
    metrics: dict[str, Interval] = {}
    for suffix, values in distances.items():
        statistics = {f"nearest_train{suffix}": share(values), f"copies{suffix}": share(values <= bar)}
        found = bootstrap(statistics, len(values), seed=seed, resamples=resamples)
        metrics[f"nearest_train{suffix}"] = _number(found[f"nearest_train{suffix}"])
        if suffix != "_real":  # 5 % by definition
            metrics[f"copies{suffix}"] = found[f"copies{suffix}"]
    counts = {"generated": len(made), "real": len(held_out), "training": len(train)}
    stamp = {
        "nearest_train": f"mean Euclidean distance between {features}" + (", training ones also mirrored" if mirrored else ""),
        "pictures_compared": counts if retrieved is None else {**counts, "retrieved": len(retrieved)},
        "copies": f"share within {bar:.4g}, as {NEAR:.0%} of the real pictures are",
        **(protocol or {}),
        "interval": f"95 % bootstrap over pictures, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def _flat(pictures: Tensor, what: str) -> Tensor:
    """One row a picture, on the CPU; bytes stay bytes."""
    if pictures.ndim < 2 or 0 in pictures.shape:
        raise UserError(f"{what}: expected features or pixels of at least one picture, got shape {tuple(pictures.shape)}")
    rows = pictures.detach().cpu().flatten(1)
    if rows.is_floating_point():
        checked(rows, what)
    return rows


def _at_least_0(statistic: Statistic) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weights: np.maximum(statistic(weights), 0)


def _number(interval: Interval) -> Interval:
    return Interval(interval.value, interval.low, interval.high, "number")
