"""Compositional figures: does a model tell a caption from one of nearly the same words? Winoground and SugarCrepe.

Shapes: E examples, I pictures and C captions an example, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Result, bootstrap, selections, share, subset_sizes
from mm.evaluation.scores import checked

Subsets = Mapping[str, Tensor | np.ndarray | Sequence[bool]]


def pair_scores(image_vectors: Float[Tensor, "e i d"], text_vectors: Float[Tensor, "e c d"]) -> Float[Tensor, "e i c"]:
    """Dot products of the pictures and captions of each example, added up in fp64 and rounded to fp32.

    Equal vectors get equal scores, whatever their place.

    Raises:
        UserError: Shapes that do not fit; NaN or infinity in a vector.
    """
    if image_vectors.ndim != 3 or text_vectors.ndim != 3 or len(image_vectors) != len(text_vectors):
        raise UserError(
            f"compositional: expected vectors of shape (examples, number, width) on both sides, "
            f"got {tuple(image_vectors.shape)} and {tuple(text_vectors.shape)}"
        )
    images = checked(image_vectors.flatten(0, 1), "image vectors").view(image_vectors.shape)
    texts = checked(text_vectors.flatten(0, 1), "text vectors", images.shape[-1]).view(text_vectors.shape)
    products = images.double().unsqueeze(2) * texts.to(images.device).double().unsqueeze(1)
    return products.sum(dim=-1).float()


def winoground(
    scores: Float[Tensor, "e 2 2"],
    *,
    subsets: Subsets | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Text, image and group score of two pictures and two captions each (https://arxiv.org/abs/2204.03162, section 3.2).

    Args:
        scores: ``scores[e, i, c]`` of picture i and caption c; picture 0 belongs to caption 0. An equal score is a failure.
        subsets: Masks over examples by name; each gives the figures with its name as a suffix.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``text_score`` (each picture prefers its caption), ``image_score`` (each caption prefers its picture), ``group_score``
        (both); chance is 1/4, 1/4 and 1/6.

    Raises:
        UserError: Another shape, no example, NaN or infinity, an empty subset.
    """
    values = _checked_scores(scores, (2, 2))
    text = (values[:, 0, 0] > values[:, 0, 1]) & (values[:, 1, 1] > values[:, 1, 0])
    image = (values[:, 0, 0] > values[:, 1, 0]) & (values[:, 1, 1] > values[:, 0, 1])
    hits = {"text_score": text, "image_score": image, "group_score": text & image}
    task = "Winoground, two pictures and two captions an example"
    return _result(hits, task, subsets or {}, protocol or {}, seed, resamples)


def sugarcrepe(
    scores: Float[Tensor, "e 2"],
    categories: Sequence[str],
    *,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Share of pictures that prefer the right caption, in all and by category (https://arxiv.org/abs/2306.14610).

    Args:
        scores: Of each picture with its right caption (first) and with the wrong one. An equal score is a failure.
        categories: Category of each example.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``accuracy`` over all examples, and ``accuracy_replace_obj`` etc., which is what is published; chance is 1/2.

    Raises:
        UserError: Another shape, no example, NaN or infinity, another number of categories than of examples.
    """
    values = _checked_scores(scores, (2,))
    if len(categories) != len(values):
        raise UserError(f"SugarCrepe: {len(values)} examples and {len(categories)} categories; give one an example")
    names = np.asarray(categories)
    subsets = {name: names == name for name in sorted(set(categories))}
    hits = {"accuracy": values[:, 0] > values[:, 1]}
    return _result(hits, "SugarCrepe, one picture and two captions an example", subsets, protocol or {}, seed, resamples)


def _checked_scores(scores: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    if tuple(scores.shape[1:]) != shape or len(scores) == 0:
        raise UserError(f"compositional scores: expected the shape (examples, {str(shape)[1:]}, got {tuple(scores.shape)}")
    if not bool(torch.isfinite(scores).all()):
        raise UserError("compositional scores: NaN or infinity; no figure can be trusted, check the weights and the precision")
    return scores.detach().float().cpu().numpy()


def _result(
    hits: Mapping[str, np.ndarray], task: str, subsets: Subsets, protocol: Mapping[str, Any], seed: int, resamples: int
) -> Result:
    """Shares of examples, in all and in subsets, each with its interval."""
    length = len(next(iter(hits.values())))
    metrics = {}
    for suffix, chosen in selections(subsets, length).items():
        statistics = {f"{name}{suffix}": share(hit[chosen]) for name, hit in hits.items()}
        metrics |= bootstrap(statistics, int(chosen.sum()), seed=seed, resamples=resamples)
    stamp = {
        "task": task,
        "examples": length,
        **subset_sizes(subsets),
        **protocol,
        "scores": "dot product in fp32, an equal score is a failure",
        "interval": f"95 % bootstrap over examples, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)
