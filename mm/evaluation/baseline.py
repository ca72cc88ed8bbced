"""The baseline that needs no learning: the label of the nearest picture in pixels; and the nearest of given vectors.

Each picture is cut to its content, laid on black, brought to 16 x 16 pixels, and compared by Euclidean distance. Distances are
computed exactly (whole numbers in fp64), so equal pictures tie and the lowest index wins.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, selections, share, subset_sizes
from mm.evaluation.scores import checked, exact_fp32, pad_rows
from mm.media.geometry import ImageSpec, fit_image

SIDE = 16
CONTENT = ImageSpec(size=4 * SIDE, fit="content", interpolation="bilinear", background=(0, 0, 0))
"""On black the outline of what is drawn counts as much as its colours; on white the baseline is weaker."""

THUMBNAIL = ImageSpec(size=SIDE, fit="squash")
"""A step of its own: sixteen pixels are too few to centre the content to the nearest one."""

CHUNK = 512
"""Queries compared at once: bounds the memory at CHUNK x index fp64 distances."""


def thumbnails(images: Iterable[UInt8[Tensor, "c h w"]]) -> UInt8[Tensor, "n 3 16 16"]:
    """Content of each decoded picture, ``(3, H, W)`` or ``(4, H, W)`` RGBA of any size, at 16 x 16 pixels."""
    small = [fit_image(fit_image(image, CONTENT), THUMBNAIL) for image in images]
    if not small:
        raise UserError("pixel baseline: there is no picture")
    return torch.stack(small)


def nearest(index: UInt8[Tensor, "m 3 16 16"], queries: UInt8[Tensor, "n 3 16 16"]) -> Int64[Tensor, " n"]:
    """Index of the picture with the smallest Euclidean distance to each query; of equal distances the lowest index."""
    known, asked = index.flatten(1).double(), queries.flatten(1).double()
    norms, place = (known * known).sum(1), torch.arange(len(known))
    found = []
    for chunk in asked.split(CHUNK):
        # |q - k|^2 without |q|^2, which is the same for all k; sums of whole numbers below 2**53 are exact in any order
        distances = norms - 2 * (chunk @ known.T)
        found.append(_first(distances == distances.amin(dim=1, keepdim=True), place))
    return torch.cat(found)


def nearest_vectors(index: Float[Tensor, "m d"], queries: Float[Tensor, "n d"]) -> Int64[Tensor, " n"]:
    """Index of the unit vector with the largest dot product with each query; of equal products the lowest index.

    Raises:
        UserError: Widths differ, NaN or infinity in a vector.
    """
    known, asked = checked(index, "vectors of the index"), checked(queries, "vectors of the queries", index.shape[-1])
    columns, place = pad_rows(known).T, torch.arange(len(known))
    found = []
    with exact_fp32(known.device):
        for chunk in asked.split(CHUNK):
            products = (pad_rows(chunk) @ columns)[: len(chunk), : len(known)]
            found.append(_first(products == products.amax(dim=1, keepdim=True), place))
    return torch.cat(found)


def _first(hits: Bool[Tensor, "n m"], place: Int64[Tensor, " m"]) -> Int64[Tensor, " n"]:
    """The lowest index in each row that hits."""
    return torch.where(hits, place, len(place)).amin(dim=1)


def pixel_baseline(
    index: UInt8[Tensor, "m 3 16 16"],
    index_labels: Sequence[Hashable],
    queries: UInt8[Tensor, "n 3 16 16"],
    query_labels: Sequence[Hashable],
    *,
    subsets: Mapping[str, Tensor | np.ndarray | Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Share of queries whose nearest picture in pixels has the same label.

    Args:
        index: `thumbnails` of the pictures to search, here those of the train artists with the held-out concepts.
        index_labels: Their labels, compared by equality.
        queries: `thumbnails` of the pictures to classify.
        query_labels: Their labels.
        subsets: Masks over queries by name; each gives the figure with its name as a suffix.
        protocol: Facts for the stamp that only the caller knows.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``baseline_top1`` and the same for each subset.

    Raises:
        UserError: numbers of labels and pictures differ; an empty index or subset.
    """
    for name, pictures, labels in (("index", index, index_labels), ("queries", queries, query_labels)):
        if len(pictures) != len(labels) or not len(pictures):
            raise UserError(
                f"pixel baseline: {name}: {len(pictures)} pictures and {len(labels)} labels; give one label a picture"
            )
    pairs = zip(nearest(index, queries).tolist(), query_labels, strict=True)
    hits = np.array([index_labels[found] == label for found, label in pairs])
    metrics: dict[str, Interval] = {}
    for suffix, chosen in selections(subsets or {}, len(hits)).items():
        statistics = {f"baseline_top1{suffix}": share(hits[chosen])}
        metrics |= bootstrap(statistics, int(chosen.sum()), seed=seed, resamples=resamples)
    stamp = {
        "baseline": f"nearest of {len(index)} pictures in pixels, content at {SIDE} x {SIDE} on black",
        "pictures": len(hits),
        **subset_sizes(subsets or {}),
        **(protocol or {}),
        "interval": f"95 % bootstrap over pictures, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)
