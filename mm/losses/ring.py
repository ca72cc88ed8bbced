"""Contrastive sums over the features of all ranks, of which a rank never holds more than its own and those of one other.

Blocks of features go around the ranks as in a ring, W hops until each is home again. A rank meets every block with its own
rows; what concerns a block, its column sums forward and its gradient backward, travels with it. Features are sent on while they
are computed with. Memory does not depend on the number of ranks; results are those of gathered features, which the losses of
`mm.losses.contrastive` use while they are few. Rings for contrastive losses: SigLIP (https://arxiv.org/abs/2303.15343, section
3.3), Inf-CL (https://arxiv.org/abs/2410.17243).

Gradients are those of the sum of all ranks' losses, as everywhere (`mm.losses.gather`).

Shapes: B rows of each rank, D width, W ranks.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.losses.gather import Gather
from mm.losses.partition import Excluded, Tiles, automatic_chunk_size, common_shift, tile_products, tile_sums
from mm.losses.sigmoid import walk
from mm.nn.precision import full_precision


@full_precision
def ring_log_partitions(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    gather: Gather,
    *,
    others_only: bool = False,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log-sum-exp of the logits of this rank's ``a`` over all ranks' ``b``, and of its ``b`` over all ``a``.

    Args:
        a: Row features of this rank, fp32 or fp64.
        b: Its column features.
        scale: Multiplier of the inner products.
        gather: The ranks.
        others_only: Leave out the pairs of row i and column i of one rank.
        chunk_size: Rows of a tile; see `mm.losses.partition.log_partitions`.
    """
    return _RingLogPartitions.apply(a, b, scale, gather, others_only, _tile_rows(a, chunk_size))  # pyright: ignore[reportReturnType]


@full_precision
def ring_group_sums(x: Float[Tensor, "b d"], groups: Int[Tensor, " b"], gather: Gather) -> Float[Tensor, "b d"]:
    """For each own row the sum of all ranks' rows of its group."""
    return _RingGroupSums.apply(x, groups, gather)  # pyright: ignore[reportReturnType]


@full_precision
def ring_softplus_excess(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    attraction: Float[Tensor, " b"],
    gather: Gather,
    *,
    chunk_size: int | None = None,
) -> Float[Tensor, ""]:
    """`mm.losses.sigmoid.softplus_excess` of this rank's ``a`` over all ranks' ``b``."""
    tile_rows = _tile_rows(a, chunk_size)
    return _RingSoftplusExcess.apply(a, b, scale, bias, attraction, gather, tile_rows)  # pyright: ignore[reportReturnType]


def _tile_rows(a: Tensor, chunk_size: int | None) -> int:
    return (automatic_chunk_size(len(a), len(a)) if chunk_size is None else chunk_size) or len(a)


def _hops(gather: Gather, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """This rank's tensors, then those of the rank before it, and so on, W in all."""
    held = tuple(tensor.contiguous() for tensor in tensors)
    for hop in range(gather.world_size):
        wait = gather.pass_on(*held) if hop + 1 < gather.world_size else None
        yield held
        if wait is not None:
            held = wait()


class _RingLogPartitions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, gather: Gather, others_only: bool, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        row, column = a.new_full((len(a),), -torch.inf), b.new_full((len(b),), -torch.inf)
        excluded = _diagonal(a) if others_only else None
        for hop, (block,) in enumerate(_hops(gather, b)):
            block_row, block_column, _ = tile_sums(Tiles(a, block, scale, None if hop else excluded, chunk_size))
            row = row.logaddexp(block_row)
            (column,) = gather.pass_on(column.logaddexp(block_column))()
        ctx.save_for_backward(a, b, scale, row, column)
        ctx.gather, ctx.excluded, ctx.chunk_size = gather, excluded, chunk_size
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, scale, row, column = ctx.saved_tensors
        row_gradient, column_gradient = gradients
        a_product, b_product = torch.zeros_like(a), torch.zeros_like(b)
        for hop, (block, values, told) in enumerate(_hops(ctx.gather, b, column, column_gradient)):
            tiles = Tiles(a, block, scale, None if hop else ctx.excluded, ctx.chunk_size)
            mine, theirs = tile_products(tiles, (row, values), (row_gradient, told), common_shift(row, values))
            assert mine is not None
            assert theirs is not None
            a_product += mine
            (b_product,) = ctx.gather.pass_on(theirs.add_(b_product))()
        scale_gradient = torch.linalg.vecdot(a, a_product).sum()
        return a_product.mul_(scale), b_product.mul_(scale), scale_gradient, None, None, None


class _RingGroupSums(torch.autograd.Function):
    """A product with the symmetric matrix of which rows are of one group, so that it is its own backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: Tensor, gather: Gather) -> Tensor:
        ctx.groups, ctx.gather = groups, gather
        return _sums_of_groups(x, groups, gather)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _sums_of_groups(gradients[0], ctx.groups, ctx.gather), None, None


def _sums_of_groups(x: Tensor, groups: Tensor, gather: Gather) -> Tensor:
    known, index = groups.unique(return_inverse=True)
    sums = x.new_zeros(len(known), x.shape[1])
    for block, block_groups in _hops(gather, x, groups):
        place = torch.searchsorted(known, block_groups).clamp_max(len(known) - 1)
        sums.index_add_(0, place, block * (known[place] == block_groups)[:, None])
    return sums[index]


def _diagonal(a: Tensor) -> Excluded:
    index = torch.arange(len(a), device=a.device)
    return Excluded(index, index)


class _RingSoftplusExcess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, attraction: Tensor, gather: Gather, chunk_size: int
    ) -> Tensor:
        ctx.save_for_backward(a, b, scale, bias)
        ctx.gather, ctx.chunk_size = gather, chunk_size
        row = -attraction
        for (block,) in _hops(gather, b):
            row += walk(a, block, scale, bias, chunk_size, needs_a=False, needs_b=False).row
        return row.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, scale, bias = ctx.saved_tensors
        (gradient,) = gradients
        a_product, b_product, total = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(bias)
        for (block,) in _hops(ctx.gather, b):
            found = walk(a, block, scale, bias, ctx.chunk_size, needs_a=True, needs_b=True)
            assert found.a_product is not None
            assert found.b_product is not None
            a_product += found.a_product
            total += found.total
            (b_product,) = ctx.gather.pass_on(found.b_product.mul_(gradient).add_(b_product))()
        a_product *= gradient
        scale_gradient = torch.linalg.vecdot(a, a_product).sum()
        return a_product * scale, b_product * scale, scale_gradient, total * gradient, -gradient.expand(len(a)), None, None
