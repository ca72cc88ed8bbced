"""Word-patch alignment: the cost of moving the words of a text onto the patches of a picture, by optimal transport.

Sources: UNITER https://arxiv.org/abs/1909.11740 and ViLT https://arxiv.org/abs/2102.03334 (the loss), IPOT
https://arxiv.org/abs/1802.04307 (the inexact proximal point method, algorithm 1 with one inner step).

Shapes: B batch, T words, N patches, D width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mm.nn.precision import full_precision

BETA = 0.5
ITERATIONS = 50
"""ViLT's values. The plan tends to the exact one as the iterations grow; a smaller beta needs fewer of them."""


@full_precision
def word_patch_alignment(
    words: Float[Tensor, "b t d"],
    patches: Float[Tensor, "b n d"],
    word_mask: Bool[Tensor, "b t"],
    patch_mask: Bool[Tensor, "b n"],
    *,
    beta: float = BETA,
    iterations: int = ITERATIONS,
) -> Float[Tensor, " b"]:
    """Cost of each pair, in 0..2: cosine distances weighted by the transport plan, through which no gradient passes.

    Args:
        words: Features of the words.
        patches: Features of the patches.
        word_mask: True for words that take part; a text without any costs 0.
        patch_mask: True for patches that take part; a picture without any costs 0.
        beta: Step size of the proximal point method, larger is slower.
        iterations: Of the same.
    """
    cost = 1 - F.normalize(words.float(), dim=-1) @ F.normalize(patches.float(), dim=-1).mT
    return (transport_plan(cost, word_mask, patch_mask, beta=beta, iterations=iterations) * cost).sum((1, 2))


@torch.no_grad()
@full_precision
def transport_plan(
    cost: Float[Tensor, "b t n"],
    word_mask: Bool[Tensor, "b t"],
    patch_mask: Bool[Tensor, "b n"],
    *,
    beta: float = BETA,
    iterations: int = ITERATIONS,
) -> Float[Tensor, "b t n"]:
    """How much of each word goes to each patch at the least cost, where all words weigh the same and all patches, too.

    Args:
        cost: Of moving a word onto a patch, a few units of ``beta`` at most.
        word_mask: True for words that take part.
        patch_mask: True for patches that take part.
        beta: See `word_patch_alignment`.
        iterations: See `word_patch_alignment`.
    """
    row_mass, column_mass = _uniform(word_mask, cost), _uniform(patch_mask, cost)
    pairs = (word_mask[:, :, None] & patch_mask[:, None, :]).to(cost.dtype)
    kernel = pairs * torch.exp(-cost / beta)
    plan, column_scale = pairs, column_mass
    for _ in range(iterations):
        scaled = kernel * plan
        row_scale = _divide(row_mass, (scaled @ column_scale[..., None])[..., 0])
        column_scale = _divide(column_mass, (row_scale[:, None] @ scaled)[:, 0])
        plan = row_scale[..., None] * scaled * column_scale[:, None]
    return plan


def _uniform(mask: Tensor, like: Tensor) -> Tensor:
    """Mass one, spread evenly over what the mask lets take part."""
    return mask.to(like.dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def _divide(mass: Tensor, by: Tensor) -> Tensor:
    """The quotient; where there is nothing to divide by, no pair takes part and the result does not matter."""
    return mass / by.masked_fill(by == 0, 1)
