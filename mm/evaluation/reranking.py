"""Two-stage retrieval: the nearest by a first score are put in a new order by a second one, the others stay behind them.

Protocol: ALBEF https://arxiv.org/abs/2107.07651, section 5.1. The first score compares vectors, the second reads each pair,
which is too dear for all of them.

Shapes: N pictures, M captions, D width, k candidates of a query.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mm.evaluation.retrieval import Ranks
from mm.evaluation.scores import BLOCK, checked, checked_index, exact_fp32, pad_rows

TILE = 3_000_000
"""Scores held at once while candidates are sought: 12 MiB of fp32, and some ten times as much to order them."""


class BothWays(NamedTuple):
    """Something about the candidates of each query: their indices, or their scores.

    Args:
        texts: Of each picture, ``(N, k)``.
        images: Of each caption, ``(M, k)``.
    """

    texts: Tensor
    images: Tensor


def candidates(image_vectors: Float[Tensor, "n d"], text_vectors: Float[Tensor, "m d"], k: int) -> BothWays:
    """Indices of the nearest of each query, int64 on the CPU, nearest first; ``k`` is cut to what there is.

    Raises:
        UserError: shapes that do not fit, NaN or infinity in a vector.
    """
    images, texts = checked(image_vectors, "image vectors"), checked(text_vectors, "text vectors", image_vectors.shape[-1])
    return BothWays(nearest(images, texts, min(k, len(texts))), nearest(texts, images, min(k, len(images))))


def nearest(queries: Float[Tensor, "q d"], items: Float[Tensor, "m d"], k: int) -> Int64[Tensor, "q k"]:
    """Indices of the ``k`` items of largest dot product, in that order; of equal ones the lowest index comes first."""
    columns, found = pad_rows(items), []
    rows_at_once = max(1, TILE // len(columns) // BLOCK) * BLOCK
    with exact_fp32(queries.device):
        for part in queries.split(rows_at_once):
            scores = (pad_rows(part) @ columns.T)[: len(part), : len(items)]
            found.append(_order(scores).topk(k, dim=1).indices.cpu())
    return torch.cat(found)


def _order(scores: Float[Tensor, "q m"]) -> Int64[Tensor, "q m"]:
    """Whole numbers, all different within a row, in the order of the scores and then of falling indices.

    The bits of a float, read as a whole number, are in its order; those of a negative one in the opposite order.
    """
    bits = (scores + 0.0).view(torch.int32)  # minus zero becomes zero
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) - torch.arange(scores.shape[1], device=scores.device)


def reranked(first: Ranks, found: BothWays, scores: BothWays, text_to_image: Int64[Tensor, " m"]) -> Ranks:
    """Ranks of the right answers after the second stage.

    An answer among the candidates has its place among them by the new scores, of equal ones the lowest index first. Any other
    stands where the first score puts it, behind all candidates.

    Args:
        first: Ranks by the first score.
        found: Indices of the candidates.
        scores: Their new scores.
        text_to_image: Index of each caption's picture.

    Raises:
        UserError: An index out of range, NaN or infinity in a score.
    """
    num_images, num_texts = len(found.texts), len(found.images)
    owner = checked_index(text_to_image, num_texts, num_images, "picture of each caption")
    right_texts = owner[found.texts] == torch.arange(num_images)[:, None]
    right_images = found.images == owner[:, None]
    return Ranks(
        _places(first.image_to_text, found.texts, checked(scores.texts, "scores"), right_texts),
        _places(first.text_to_image, found.images, checked(scores.images, "scores"), right_images),
    )


def _places(first: Tensor, items: Tensor, scores: Tensor, right: Tensor) -> Tensor:
    """Place of the best right item among the candidates, or the first one where none is right."""
    bar = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    last = torch.iinfo(items.dtype).max
    best = items.masked_fill(~(right & (scores == bar)), last).amin(1, keepdim=True)
    ahead = (scores > bar) | ((scores == bar) & (items < best))
    return torch.where(right.any(1), ahead.sum(1), first.clamp(min=items.shape[1]))
