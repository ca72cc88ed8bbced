"""Exact fp32 scores in tiles, and the one tie rule of all evaluations: of equal scores the lowest index wins.

The kernels of a matrix product add up the odd rows at its edges in another order, so that equal vectors get scores that differ
in the last bit and chance decides the tie. Here both sides are padded to whole blocks, in which all entries are added up alike.

Shapes: Q queries, M items, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import UserError

BLOCK = 96
"""Rows are padded to a multiple of this: whole register blocks of 6, 8, 12, 16, 24, 32 or 48 rows, as fp32 kernels have."""

MAX_ENTRY = 1e15
"""Products of larger entries could leave the range of fp32."""


@contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Without gradients, autocast and reduced-precision products (TF32, bf16), whatever the caller has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def checked(vectors: Tensor, what: str, width: int | None = None) -> Tensor:
    """Vectors ``(n, D)`` as fp32, or a `UserError` naming ``what``: wrong shape, empty, not finite, too large to multiply."""
    if vectors.ndim != 2 or 0 in vectors.shape:
        raise UserError(f"{what}: expected vectors of shape (number, width), got {tuple(vectors.shape)}")
    if width is not None and vectors.shape[1] != width:
        raise UserError(
            f"{what}: width {vectors.shape[1]} does not fit width {width} of the other side; use one model for both"
        )
    vectors = vectors.detach().float().contiguous()
    largest = torch.linalg.vector_norm(vectors, ord=torch.inf, dim=1)  # one pass; NaN and infinity come through
    bad = (~largest.isfinite()).nonzero().flatten()
    if len(bad):
        raise UserError(
            f"{what}: {len(bad)} of {len(vectors)} vectors hold NaN or infinity (first at index {int(bad[0])}); "
            "no figure can be trusted, check the weights and the precision of the model"
        )
    if float(largest.max()) > MAX_ENTRY:
        raise UserError(f"{what}: entries above {MAX_ENTRY:g} would overflow the scores; the vectors should have unit length")
    return vectors


def checked_index(index: Tensor, length: int, size: int, what: str) -> Tensor:
    """Integers ``(length,)`` in ``[0, size)`` as int64 on the CPU, or a `UserError` naming ``what``."""
    if index.shape != (length,) or index.is_floating_point():
        raise UserError(f"{what}: expected {length} integers, got {tuple(index.shape)} of {index.dtype}")
    index = index.detach().cpu().long()
    if length and (int(index.min()) < 0 or int(index.max()) >= size):
        raise UserError(f"{what}: values go from {int(index.min())} to {int(index.max())}, allowed are 0 to {size - 1}")
    return index


def whole_blocks(rows: int) -> int:
    """The number of rows rounded up to whole blocks."""
    return -(-rows // BLOCK) * BLOCK


def pad_rows(vectors: Tensor) -> Tensor:
    """Zero rows appended up to a whole number of blocks."""
    return F.pad(vectors, (0, 0, 0, whole_blocks(len(vectors)) - len(vectors)))


def count_ahead(scores: Tensor, bar: Tensor, position: Tensor, bar_position: Tensor, dim: int, room: Tensor) -> Tensor:
    """How many items stand before each bar: those with a greater score, or with an equal score and a lower position.

    Args:
        scores: Tile ``(Q, M)``.
        bar: Score to be beaten, one for each entry of the other dimension.
        position: Index of each item along ``dim``.
        bar_position: Index of the item that the bar belongs to.
        dim: Dimension of the items.
        room: fp32 numbers to be overwritten, at least as many as the tile has: fresh memory would cost more than the counting.

    Returns:
        int64 counts, as long as ``bar``.
    """
    bar, items = bar.unsqueeze(dim), position.unsqueeze(1 - dim)
    # Written as 0.0 and 1.0, comparisons add up several times faster than booleans; exact below 2**24 items a tile.
    beaten = room[: scores.numel()].view(scores.shape)
    if int(position.max()) < int(bar_position.min()):
        return torch.ge(scores, bar, out=beaten).sum(dim).long()
    counts = torch.gt(scores, bar, out=beaten).sum(dim).long()
    if int(position.min()) < int(bar_position.max()):
        counts += ((scores == bar) & (items < bar_position.unsqueeze(dim))).sum(dim)
    return counts
