"""Contrastive losses of unit vectors: InfoNCE, SigLIP and supervised contrastive, with several positives a row, over all ranks.

InfoNCE: https://arxiv.org/abs/2103.00020. SigLIP: https://arxiv.org/abs/2303.15343. Several positives and the supervised
contrastive loss: a row's target is uniform over its positives (https://arxiv.org/abs/2004.11362, ``L_out``).

With a `Gather`, each rank gives its own rows and computes only these against the columns of all ranks, which it holds while
they are few and otherwise meets one rank at a time (`mm.losses.ring`), in memory that does not grow with the ranks. What it
returns is its share: the mean over ranks is the loss of the global batch, and gradients averaged over ranks are the gradients
of that loss.
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
from mm.losses.ring import ring_group_sums, ring_log_partitions, ring_softplus_excess
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
    target = b
    if groups is not None:
        sums, sizes = _group_sums(b, groups, gather)
        target = sums / sizes[:, None]
    if label_smoothing:
        target = target.lerp(_mean(b, gather), label_smoothing)
    attraction = scale * torch.linalg.vecdot(a, target)
    row, column = _log_partitions(a, b, scale, gather, chunk_size)
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
    ring = gather if gather is not None and gather.by_ring(b) else None
    columns, own = (b, slice(None)) if ring is not None else _gathered(b, gather)
    if chunk_size is None:
        chunk_size = automatic_chunk_size(len(a), len(columns))
    if chunk_size or ring is not None:
        sums, sizes = (b, torch.ones_like(b[:, 0])) if groups is None else _group_sums(b, groups, gather)
        attraction = scale * torch.linalg.vecdot(a, sums) + bias * sizes
        if ring is not None:
            return ring_softplus_excess(a, b, scale, bias, attraction, ring, chunk_size=chunk_size) / len(a)
        return softplus_excess(a, columns, scale, bias, attraction, chunk_size) / len(a)
    everyone = torch.arange(len(columns), device=a.device) if groups is None else _gathered(groups, gather)[0]
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
    row, _ = _log_partitions(a, a, scale, gather, chunk_size, others_only=True)
    sums, sizes = _group_sums(a, groups, gather)
    attraction = scale * torch.linalg.vecdot(a, (sums - a) / (sizes[:, None] - 1).clamp_min(1))
    losses = torch.where(sizes > 1, row - attraction, 0.0)
    num_rows = len(a) if gather is None else gather.world_size * len(a)
    return losses.mean() / _mean((sizes > 1).to(a.dtype), gather).clamp_min(1 / num_rows)


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


def _mean(rows: Tensor, gather: Gather | None) -> Tensor:
    """The mean over the rows of all ranks."""
    mean = rows.mean(0)
    return mean if gather is None else gather.sum(mean) / gather.world_size


def _log_partitions(
    a: Tensor, b: Tensor, scale: Tensor, gather: Gather | None, chunk_size: int | None, others_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-partitions ``(B,)`` of own rows over the columns of all ranks, and of own columns over their rows."""
    if gather is not None and gather.by_ring(b):
        return ring_log_partitions(a, b, scale, gather, others_only=others_only, chunk_size=chunk_size)
    columns, own = _gathered(b, gather)
    index = torch.arange(len(columns), device=a.device)
    excluded = Excluded(index[own], index) if others_only else None
    row, column = log_partitions(a, columns, scale, excluded=excluded, chunk_size=chunk_size)
    if gather is not None:
        column = gather(column[None]).logsumexp(0)
    return row, column[own]


def _group_sums(rows: Tensor, groups: Tensor, gather: Gather | None) -> tuple[Tensor, Tensor]:
    """The sum over each own row's group on all ranks ``(B, D)`` and the size of the group ``(B,)``."""
    if gather is not None and gather.by_ring(rows):
        sums = ring_group_sums(torch.cat([rows, torch.ones_like(rows[:, :1])], 1), groups, gather)
        return sums[:, :-1], sums[:, -1].detach()
    columns, own = _gathered(rows, gather)
    _, index, sizes = _gathered(groups, gather)[0].unique(return_inverse=True, return_counts=True)
    sums = columns.new_zeros(len(sizes), columns.shape[1]).index_add(0, index, columns)
    return sums[index[own]], sizes[index[own]]


def _over_queue(a: Tensor, past: Queued, scale: Tensor, groups: Tensor, chunk_size: int | None) -> Tensor:
    """Log-partition of each row over queued features of other groups, ``(B,)``."""
    return log_partitions(a, past.features.to(a.dtype), scale, excluded=Excluded(groups, past.ids), chunk_size=chunk_size)[0]
