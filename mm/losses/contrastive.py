"""Contrastive losses of unit vectors: InfoNCE, SigLIP and supervised contrastive, with several positives a row, over all ranks.

InfoNCE: https://arxiv.org/abs/2103.00020. SigLIP: https://arxiv.org/abs/2303.15343. Several positives and the supervised
contrastive loss: a row's target is uniform over its positives (https://arxiv.org/abs/2004.11362, ``L_out``).

With a `Gather`, each rank gives its own rows and computes only these against the columns of all ranks. What it returns is its
share: the mean over ranks is the loss of the global batch, and gradients averaged over ranks are the gradients of that loss.
Columns of all ranks are gathered or, where the `Gather` says so, visit one after the other (`mm.losses.ring`; all but the
supervised loss): the same numbers in memory that does not grow with the number of ranks.
Everything is computed in fp32 (fp64 for fp64 input), under autocast too.

Shapes: B rows of this rank, K columns of all ranks, Q queued features, D width.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mm.losses.gather import Gather
from mm.losses.partition import Excluded, automatic_chunk_size, log_partitions
from mm.losses.queue import Queued
from mm.losses.ring import mean_over_ranks, ring_group_sums, ring_log_partitions, ring_softplus
from mm.losses.sigmoid import softplus_excess
from mm.nn.precision import full_precision


@full_precision
def info_nce(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " b"] | None = None,
    chunk_size: int | None = None,
    label_smoothing: float = 0.0,
    negatives: tuple[Queued, Queued] | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE: the mean of the cross-entropies of ``a`` over ``b`` and of ``b`` over ``a``.

    The cross-entropy of a row is its log-partition minus its mean positive logit. Only the former needs the matrix of logits.

    Args:
        a: Unit vectors of one modality.
        b: Unit vectors of the other; row i belongs to row i of ``a``.
        logit_scale: Multiplier of the cosines itself, not its logarithm.
        groups: Equal numbers mark positives of each other, over all ranks; None means that only ``(i, i)`` is positive.
        chunk_size: Rows of the matrix in memory at once; None chooses by size, 0 keeps all of it. The result is the same.
        label_smoothing: Share of the target that is spread evenly over the columns of the batch, in 0..1.
        negatives: Past features of ``a`` and of ``b``, extra columns for the rows of the other; those of a row's own group are
            left out, and they need ``groups`` of lasting meaning.
        gather: Ranks to compare with; None for this process alone.

    Raises:
        ValueError: ``a`` and ``b`` differ in shape, or there are ``negatives`` and no ``groups``.
    """
    a, b, scale = _prepare(a, b, logit_scale)
    ring = gather if gather is not None and gather.ring else None
    columns, own = _gathered(b, None if ring else gather)
    target = b
    if groups is not None:
        target = _group_means(columns, groups, own, gather)
    if label_smoothing:
        mean = columns.mean(0)
        target = target.lerp(mean_over_ranks(mean, ring) if ring else mean, label_smoothing)
    attraction = scale * torch.linalg.vecdot(a, target)
    if ring is not None:
        row, column = ring_log_partitions(a, b, scale, ring, chunk_size)
    else:
        row, column = log_partitions(a, columns, scale, chunk_size=chunk_size)
        column = (column if gather is None else gather(column[None]).logsumexp(0))[own]
    if negatives is not None:
        if groups is None:
            raise ValueError("queued negatives need groups, to leave out those that show the same thing")
        past_a, past_b = negatives
        row = row.logaddexp(_over_queue(a, past_b, scale, groups, chunk_size))
        column = column.logaddexp(_over_queue(b, past_a, scale, groups, chunk_size))
    return ((row + column) / 2 - attraction).mean()


@full_precision
def siglip(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    logit_bias: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " b"] | None = None,
    chunk_size: int | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Pairwise sigmoid loss: every pair is its own two-way classification, summed over columns and averaged over rows.

    Args are those of `info_nce`, and ``logit_bias`` is added to every logit. Raises ValueError as `info_nce`.
    """
    a, b, scale = _prepare(a, b, logit_scale)
    bias = logit_bias.to(a.dtype)
    if gather is not None and gather.ring:
        sums, sizes = (b, b.new_ones(len(b))) if groups is None else ring_group_sums(b, groups, gather)
        attraction = scale * torch.linalg.vecdot(a, sums) + bias * sizes
        return ring_softplus(a, b, scale, bias, attraction, gather, chunk_size) / len(a)
    columns, own = _gathered(b, gather)
    if chunk_size is None:
        chunk_size = automatic_chunk_size(len(a), len(columns))
    everyone = torch.arange(len(columns), device=a.device) if groups is None else _gathered(groups, gather)[0]
    if chunk_size:
        sums, sizes = _group_sums(columns, everyone, own)
        attraction = scale * torch.linalg.vecdot(a, sums) + bias * sizes[own]
        return softplus_excess(a, columns, scale, bias, attraction, chunk_size) / len(a)
    positive = everyone[own, None] == everyone
    logits = scale * a @ columns.T + bias
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / len(a)


@full_precision
def supervised_contrastive(
    a: Float[Tensor, "b d"],
    logit_scale: Float[Tensor, ""],
    groups: Int[Tensor, " b"],
    *,
    chunk_size: int | None = None,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of each row over all other rows of the same modality, its positives being the others of its group.

    Averaged over the rows that have a positive; 0 where none has. Args are those of `info_nce`.
    """
    a, _, scale = _prepare(a, a, logit_scale)
    columns, own = _gathered(a, gather)
    everyone, _ = _gathered(groups, gather)
    index = torch.arange(len(columns), device=a.device)
    row, _ = log_partitions(a, columns, scale, excluded=Excluded(index[own], index), chunk_size=chunk_size)
    sums, sizes = _group_sums(columns, everyone, own)
    attraction = scale * torch.linalg.vecdot(a, (sums - a) / (sizes[own, None] - 1).clamp_min(1))
    losses = torch.where(sizes[own] > 1, row - attraction, 0.0)
    return losses.sum() / (sizes > 1).sum().clamp_min(1) * (len(columns) / len(a))


def _prepare(a: Tensor, b: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in at least fp32."""
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"features of shape {tuple(a.shape)} and {tuple(b.shape)}: both must be (B, D)")
    precise = torch.promote_types(a.dtype, torch.float32)
    return a.to(precise), b.to(precise), logit_scale.to(precise)


def _gathered(local: Tensor, gather: Gather | None) -> tuple[Tensor, slice]:
    """The rows of all ranks and where this rank's are among them."""
    if gather is None:
        return local, slice(0, len(local))
    return gather(local), gather.own(len(local))


def _group_means(columns: Tensor, groups: Tensor, own: slice, gather: Gather | None) -> Tensor:
    """The mean over each own row's group, of all ranks, ``(B, D)``."""
    if gather is not None and gather.ring:
        sums, sizes = ring_group_sums(columns, groups, gather)
        return sums / sizes[:, None]
    sums, sizes = _group_sums(columns, _gathered(groups, gather)[0], own)
    return sums / sizes[own, None]


def _group_sums(columns: Tensor, groups: Tensor, own: slice) -> tuple[Tensor, Tensor]:
    """The sum over each own row's group ``(B, D)`` and the size of each column's group ``(K,)``."""
    _, index, sizes = groups.unique(return_inverse=True, return_counts=True)
    sums = columns.new_zeros(len(sizes), columns.shape[1]).index_add(0, index, columns)
    return sums[index[own]], sizes[index]


def _over_queue(a: Tensor, past: Queued, scale: Tensor, groups: Tensor, chunk_size: int | None) -> Tensor:
    """Log-partition of each row over queued features of other groups, ``(B,)``."""
    return log_partitions(a, past.features.to(a.dtype), scale, excluded=Excluded(groups, past.ids), chunk_size=chunk_size)[0]
