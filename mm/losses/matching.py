"""Image-text matching: which text belongs to a picture, told from others of the same batch.

Sources: ViLT https://arxiv.org/abs/2102.03334 (half of the pairs mismatched; fine-tuning against random texts), ALBEF
https://arxiv.org/abs/2107.07651 (hard negatives drawn by contrastive similarity).

Shapes: B batch, n negatives of a row. Pairs of equal group show the same thing and are never negatives of each other.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.draws import Draws
from mm.losses.gather import Gather, average_count


class Pairing(NamedTuple):
    """The row that each row is paired with, and whether the two match."""

    partner: Int[Tensor, " b"]
    matched: Bool[Tensor, " b"]


def derangement(groups: Int[Tensor, " b"]) -> Pairing:
    """A random permutation that pairs as many rows as possible with one of another group; draws from torch's global generator.

    As a permutation it uses each row once, so that a text alone does not tell whether it is a negative. All rows get a negative
    unless more than half of them are of one group; those that get none are ``matched``.
    """
    size, device = len(groups), groups.device
    order = torch.randperm(size, device=device)
    same = groups[order, None] == groups[order]
    order = order[same.byte().argmax(1).argsort(stable=True)]  # groups side by side, in random order and randomly inside
    largest = same.sum(1).amax()
    room = (size - 2 * largest).clamp(min=0) + 1  # a shift of largest to size - largest leaves every group
    shift = largest + (torch.rand((), device=device) * room).long()
    partner = torch.empty_like(order)
    partner[order] = order[(torch.arange(size, device=device) + shift) % size]
    return Pairing(partner, groups == groups[partner])


def half_mismatched(groups: Int[Tensor, " b"]) -> Pairing:
    """Pair a random half of the rows with one of another group, as far as there is one, the rest with themselves."""
    size, device = len(groups), groups.device
    partner, matched = derangement(groups)
    matched = matched | (torch.randperm(size, device=device) < (size + 1) // 2)
    return Pairing(torch.where(matched, torch.arange(size, device=device), partner), matched)


class Negatives(NamedTuple):
    """A column of another group for each row, and False where there is none (the row given then means nothing)."""

    rows: Int[Tensor, " b"]
    valid: Bool[Tensor, " b"]


@torch.no_grad()
def draw_negatives(
    logits: Float[Tensor, "b k"],
    groups: Int[Tensor, " b"],
    columns: Int[Tensor, " k"] | None = None,
    draws: Draws | None = None,
) -> Negatives:
    """For each row one column of another group, drawn by the softmax of its logits.

    The largest sum of a logit and a Gumbel variable is such a draw: no probability is formed, so none underflows and no row is
    too empty to draw from.

    Args:
        logits: Similarities of queries (rows) with items (columns), the larger the harder; equal ones give random negatives.
        groups: Of the queries.
        columns: Groups of the items; those of the queries, in their order, if None.
        draws: Random numbers; None draws from torch's generators.
    """
    draws = draws or Draws(None, len(groups), logits.device)
    other = groups[:, None] != (groups if columns is None else columns)
    gumbel = -(-draws.uniform(logits.shape[1]).log()).log()
    rows = (logits.float() + gumbel).masked_fill(~other, -torch.inf).argmax(1)
    return Negatives(rows, other.any(1))


def matching_loss(logits: Float[Tensor, " p"], matched: Bool[Tensor, " p"], gather: Gather | None = None) -> Float[Tensor, ""]:
    """Mean binary cross-entropy of "these two match" over the pairs of all ranks, in nats."""
    total = F.binary_cross_entropy_with_logits(logits.float(), matched.float(), reduction="sum")
    return total / average_count(len(logits), gather, total.device)


class Candidates(NamedTuple):
    """For each row itself, then others; False for those that are of its own group and do not count."""

    rows: Int[Tensor, "b c"]
    valid: Bool[Tensor, "b c"]


def random_candidates(groups: Int[Tensor, " b"], num_negatives: int) -> Candidates:
    """Each row with ``num_negatives`` different rows of other groups, fewer where the batch has no more."""
    size, device = len(groups), groups.device
    other = groups[:, None] != groups
    preference = (
        torch.rand(size, size, device=device).masked_fill(~other, -1.0).fill_diagonal_(2.0)
    )  # itself, others, its group
    rows = preference.topk(min(1 + num_negatives, size)).indices
    return Candidates(rows, other.gather(1, rows) | (rows == rows[:, :1]))


def ranking_loss(logits: Float[Tensor, "b c"], valid: Bool[Tensor, "b c"]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the first of each row's candidates against its valid ones, in nats."""
    logits = logits.float().masked_fill(~valid, -torch.inf)
    return (logits.logsumexp(1) - logits[:, 0]).mean()
