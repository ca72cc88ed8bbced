"""Log-partition functions of all rows and all columns of a similarity matrix that need not exist in memory.

For logits ``s_ij = scale * a_i . b_j`` (M, K) every contrastive loss needs ``row_i = log sum_j exp(s_ij)`` and
``column_j = log sum_i exp(s_ij)``. The dense form keeps the (M, K) matrix for autograd. The chunked form walks over tiles of a
few rows, once forward (both sums come from the same tile) and once backward (the tile is computed again; with ``r`` and ``c``
the gradients of ``row`` and ``column`` it becomes ``G = r * exp(s - row) + c * exp(s - column)``, which serves each feature in
one product). Its memory is that of the features and two tiles. Both forms are exact: same values, same gradients.

Shapes: M rows, K columns, D width, C rows of a tile.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.nn.precision import full_precision

DENSE_LIMIT = 1 << 21
"""Largest number of logits that the automatic choice keeps whole (8 MiB in fp32); from here on tiles are not slower."""

TILE_LIMIT = 1 << 24
"""Largest number of logits of a tile of the automatic choice (64 MiB in fp32)."""

MIN_TILE_ROWS, MAX_TILE_ROWS = 128, 1024
"""Below, products are memory-bound, however many columns there are; above, more rows gain nothing (measured at D = 512)."""

LOWEST, HIGHEST = -40.0, 80.0
"""While all row and column values lie this close to one common shift, ``exp(s - shift)`` serves rows and columns alike: it
cannot overflow fp32 (``exp(88)``), and what it flushes to zero (below ``exp(-87)``) is less than ``exp(-47)`` of any sum."""


class Excluded(NamedTuple):
    """Pairs that take no part: row i and column j with ``row_ids[i] == column_ids[j]``."""

    row_ids: Int[Tensor, " m"]
    column_ids: Int[Tensor, " k"]


@full_precision
def log_partitions(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "k d"],
    scale: Float[Tensor, ""],
    *,
    excluded: Excluded | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " m"], Float[Tensor, " k"]]:
    """Log-sum-exp of every row and of every column of ``scale * a @ b.T``.

    Args:
        a: Row features, fp32 or fp64.
        b: Column features, of the same type.
        scale: Multiplier of the inner products.
        excluded: Pairs to leave out; a row or column without any pair left gives minus infinity.
        chunk_size: Rows of a tile; 0 keeps the whole matrix for autograd, None chooses by size.

    Returns:
        The row and the column values, differentiable once with respect to ``a``, ``b`` and ``scale``.
    """
    if chunk_size is None:
        chunk_size = automatic_chunk_size(len(a), len(b))
    if chunk_size and len(a) and len(b):
        return _ChunkedLogPartitions.apply(a, b, scale, excluded, chunk_size)  # pyright: ignore[reportReturnType]
    logits = scale * a @ b.T
    if excluded is not None:
        logits = logits.masked_fill(excluded.row_ids[:, None] == excluded.column_ids, -torch.inf)
    return logits.logsumexp(1), logits.logsumexp(0)


def automatic_chunk_size(num_rows: int, num_columns: int) -> int:
    """Rows of a tile for a matrix of this size, 0 where keeping all of it costs little."""
    if num_rows * num_columns <= DENSE_LIMIT:
        return 0
    return min(MAX_TILE_ROWS, max(MIN_TILE_ROWS, TILE_LIMIT // num_columns))


class Tiles:
    """Walks over row tiles of the logits, all of which use the same two buffers."""

    def __init__(self, a: Tensor, b: Tensor, scale: Tensor, excluded: Excluded | None, chunk_size: int) -> None:
        self.a, self.scale, self.excluded = a, scale, excluded
        self.num_rows, self.num_columns = len(a), len(b)
        self.chunk_size = min(chunk_size, len(a))
        self.b_columns = b.T.contiguous()  # (D, K): the product that reads it is measurably faster than with b.T
        self._logits = a.new_empty(self.chunk_size, len(b))
        self._scratch = a.new_empty(self.chunk_size, len(b))

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Slice of the rows, their logits (C, K) and a scratch tensor of that shape; the next step overwrites both."""
        for start in range(0, self.num_rows, self.chunk_size):
            rows = slice(start, min(start + self.chunk_size, self.num_rows))
            size = rows.stop - rows.start
            logits = torch.mm(self.a[rows] * self.scale, self.b_columns, out=self._logits[:size])
            if self.excluded is not None:
                logits.masked_fill_(self.excluded.row_ids[rows, None] == self.excluded.column_ids, -torch.inf)
            yield rows, logits, self._scratch[:size]


class _ChunkedLogPartitions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, excluded: Excluded | None, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        row, column, ctx.shift = tile_sums(Tiles(a, b, scale, excluded, chunk_size))
        ctx.save_for_backward(a, b, scale, row, column)
        ctx.excluded, ctx.chunk_size = excluded, chunk_size
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, scale, row, column = ctx.saved_tensors
        needs_a, needs_b, needs_scale = ctx.needs_input_grad[:3]
        tiles = Tiles(a, b, scale, ctx.excluded, ctx.chunk_size)
        wanted = needs_a or (needs_scale and not needs_b), needs_b
        a_product, b_product = tile_products(tiles, (row, column), gradients, ctx.shift, *wanted)
        scale_gradient = None
        if needs_scale:  # sum_ij G_ij a_i . b_j, from the products that exist already
            factors = (a, a_product) if a_product is not None else (b, b_product)
            scale_gradient = torch.linalg.vecdot(*factors).sum()
        for product in (a_product, b_product):
            if product is not None:
                product.mul_(scale)
        return a_product if needs_a else None, b_product, scale_gradient, None, None


def tile_sums(tiles: Tiles) -> tuple[Tensor, Tensor, float | None]:
    """Row values, column values and the shift that serves all logits; None where no single one is exact."""
    common = _sums_with_common_shift(tiles)
    return (*_sums_with_own_shifts(tiles), None) if common is None else common


def tile_products(
    tiles: Tiles,
    values: Sequence[Tensor],
    gradients: Sequence[Tensor],
    shift: float | None,
    needs_a: bool = True,
    needs_b: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """``G @ b`` and ``G.T @ a``, each None unless needed, for row and column ``values`` and their ``gradients``."""
    row, column = values
    row_gradient, column_gradient = gradients
    magnitude = torch.maximum(row_gradient.abs().max(), column_gradient.abs().max()).clamp_min(torch.finfo(row.dtype).tiny)
    r, c = row_gradient / magnitude, column_gradient / magnitude  # about 1, so that exp(-HIGHEST) * r stays a normal number
    a_product = torch.empty_like(tiles.a) if needs_a else None
    b_product = tiles.a.new_zeros(tiles.num_columns, tiles.a.shape[1]) if needs_b else None
    for rows, logits, scratch in tiles:
        weights = _weights(logits, scratch, row[rows, None], column, r[rows, None], c, shift)
        if a_product is not None:
            torch.mm(weights, tiles.b_columns.T, out=a_product[rows])
        if b_product is not None:
            b_product.addmm_(weights.T, tiles.a[rows])
    for product in (a_product, b_product):
        if product is not None:
            product.mul_(magnitude)
    return a_product, b_product


def common_shift(row: Tensor, column: Tensor) -> float | None:
    """A shift that is exact for logits with these row and column values, None where there is none."""
    shift = max(0.0, float(torch.maximum(row.max(), column.max())) - HIGHEST * 0.75)
    return shift if _within_range(row - shift) and _within_range(column - shift) else None


def _sums_with_common_shift(tiles: Tiles) -> tuple[Tensor, Tensor, float] | None:
    """Row values, column values and the shift of all logits; None where no single shift is exact. One exponential per logit."""
    row, column, shift = tiles.a.new_empty(tiles.num_rows), tiles.a.new_zeros(tiles.num_columns), 0.0
    for rows, logits, _ in tiles:
        if rows.start == 0:
            shift = max(0.0, float(logits.max()) - HIGHEST * 0.75)  # the largest logit of other tiles may be larger
        exponentials = (logits.sub_(shift) if shift else logits).exp_()
        torch.sum(exponentials, 1, out=row[rows])
        if not _within_range(row[rows].log_()):
            return None
        column += exponentials.sum(0)
    return (row.add_(shift), column.add_(shift), shift) if _within_range(column.log_()) else None


def _within_range(values: Tensor) -> bool:
    """Whether shifted row or column values lie where the common shift is exact; False for NaN."""
    return bool(((values >= LOWEST) & (values <= HIGHEST)).all())


def _sums_with_own_shifts(tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Row and column values for logits of any range: rows are shifted by their maximum, columns by the maximum so far."""
    floor = torch.finfo(tiles.a.dtype).min  # stands for the maximum of nothing: exp(-inf - floor) is 0, not NaN
    row = tiles.a.new_empty(tiles.num_rows)
    column, column_peak = tiles.a.new_zeros(tiles.num_columns), tiles.a.new_full((tiles.num_columns,), floor)
    for rows, logits, scratch in tiles:
        row_peak = logits.amax(1).clamp_min_(floor)
        row[rows] = torch.sub(logits, row_peak[:, None], out=scratch).exp_().sum(1).log_().add_(row_peak)
        previous, column_peak = column_peak, torch.maximum(column_peak, logits.amax(0))
        column.mul_(previous.sub_(column_peak).exp_()).add_(logits.sub_(column_peak).exp_().sum(0))
    return row, column.log_().add_(column_peak)


def _weights(logits: Tensor, scratch: Tensor, row: Tensor, column: Tensor, r: Tensor, c: Tensor, shift: float | None) -> Tensor:
    """``G = r * exp(s - row) + c * exp(s - column)`` of a tile, overwriting both buffers."""
    if shift is None:
        floor = torch.finfo(logits.dtype).min
        torch.sub(logits, row.clamp_min(floor), out=scratch).exp_()
        return logits.sub_(column.clamp_min(floor)).exp_().mul_(c).addcmul_(scratch, r)
    torch.add(r * (shift - row).exp_(), c * (shift - column).exp_(), out=scratch)
    return (logits.sub_(shift) if shift else logits).exp_().mul_(scratch)
