"""Contrastive losses over all ranks in the memory of one: features of other ranks visit one after the other.

Each rank's columns travel once around all ranks, and with them what is summed up over the rows that they meet; the backward
pass sends them round again, with their gradients. A rank holds its own features and one other's, however many there are; the
products are those of the gathered form, one more of three for each pair, since a tile is computed again.

Idea: ring attention https://arxiv.org/abs/2310.01889; Inf-CL https://arxiv.org/abs/2410.17243. Gradients follow the rule of
`mm.losses.gather`: averaged over ranks they are those of the global batch.

Shapes: B rows of this rank, as many columns of each rank, D width.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.losses.gather import Gather
from mm.losses.partition import automatic_chunk_size, log_partitions
from mm.losses.sigmoid import softplus_excess

ROWS_AT_ONCE = 1024
"""Rows of a tile of groups."""


def ring_log_partitions(
    a: Float[Tensor, "b d"], b: Float[Tensor, "b d"], scale: Float[Tensor, ""], gather: Gather, chunk_size: int | None
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Log-sum-exp of own rows over the columns of all ranks, and of own columns over the rows of all ranks; see
    `mm.losses.partition.log_partitions`."""
    return _Partitions.apply(a, b, scale, gather, chunk_size)  # pyright: ignore[reportReturnType]


def ring_softplus(
    a: Float[Tensor, "b d"],
    b: Float[Tensor, "b d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    attraction: Float[Tensor, " b"],
    gather: Gather,
    chunk_size: int | None,
) -> Float[Tensor, ""]:
    """`mm.losses.sigmoid.softplus_excess` of own rows over the columns of all ranks."""
    return _Softplus.apply(a, b, scale, bias, attraction, gather, chunk_size)  # pyright: ignore[reportReturnType]


def ring_group_sums(
    b: Float[Tensor, "b d"], groups: Int[Tensor, " b"], gather: Gather
) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
    """Sum and number of the columns of all ranks that are of each own row's group."""
    return _GroupSums.apply(b, groups, gather)  # pyright: ignore[reportReturnType]


def mean_over_ranks(value: Tensor, gather: Gather) -> Tensor:
    """Of tensors of one shape, differentiably."""
    return _Mean.apply(value, gather)  # pyright: ignore[reportReturnType]


class _Partitions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scale: Tensor, gather: Gather, chunk_size: int | None) -> tuple[Tensor, Tensor]:
        row, column = (a.new_full((len(a),), -torch.inf) for _ in range(2))
        visiting = (b, column)
        for _ in range(gather.world_size):
            rows, columns = log_partitions(a, visiting[0], scale, chunk_size=chunk_size)
            row = row.logaddexp(rows)
            visiting = _passed_on((visiting[0], visiting[1].logaddexp(columns)), gather)
        column = visiting[1]
        ctx.save_for_backward(a, b, scale, row, column)
        ctx.gather, ctx.chunk_size = gather, chunk_size
        return row, column

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_row, of_column = gradients
        a, b, scale, row, column = ctx.saved_tensors
        own = _leaves(a, scale)
        totals = [torch.zeros_like(value) for value in own]
        visiting = (b, column, of_column.contiguous(), torch.zeros_like(b))
        for _ in range(ctx.gather.world_size):
            [columns] = _leaves(visiting[0])
            with torch.enable_grad():
                values = log_partitions(own[0], columns, own[1], chunk_size=ctx.chunk_size)
            # a part's share of a sum of exponentials is its share of the gradient
            shares = of_row * (values[0].detach() - row).exp(), visiting[2] * (values[1].detach() - visiting[1]).exp()
            *of_own, of_columns = torch.autograd.grad(values, (*own, columns), shares)
            torch._foreach_add_(totals, of_own)  # pyright: ignore[reportPrivateImportUsage]
            visiting = _passed_on((*visiting[:3], visiting[3] + of_columns), ctx.gather)
        return totals[0], visiting[3], totals[1], None, None


class _Softplus(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        scale: Tensor,
        bias: Tensor,
        attraction: Tensor,
        gather: Gather,
        chunk_size: int | None,
    ) -> Tensor:
        chunk_size = chunk_size or automatic_chunk_size(len(a), len(b)) or len(a)
        total, (visiting,) = torch.zeros_like(scale), (b,)
        for part in _attractions(attraction, gather):
            total = total + softplus_excess(a, visiting, scale, bias, part, chunk_size)
            (visiting,) = _passed_on((visiting,), gather)
        ctx.save_for_backward(a, b, scale, bias, attraction)
        ctx.gather, ctx.chunk_size = gather, chunk_size
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, scale, bias, attraction = ctx.saved_tensors
        own = _leaves(a, scale, bias)
        totals = [torch.zeros_like(value) for value in own]
        visiting = (b, torch.zeros_like(b))
        for part in _attractions(attraction, ctx.gather):
            [columns] = _leaves(visiting[0])
            with torch.enable_grad():
                value = softplus_excess(own[0], columns, own[1], own[2], part, ctx.chunk_size)
            *of_own, of_columns = torch.autograd.grad(value, (*own, columns), gradients[0])
            torch._foreach_add_(totals, of_own)  # pyright: ignore[reportPrivateImportUsage]
            visiting = _passed_on((visiting[0], visiting[1] + of_columns), ctx.gather)
        of_a, of_scale, of_bias = totals
        return of_a, visiting[1], of_scale, of_bias, -gradients[0].expand_as(attraction), None, None


class _GroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, groups: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
        sums, sizes, visiting = torch.zeros_like(b), b.new_zeros(len(b)), (b, groups)
        for _ in range(gather.world_size):
            for rows, same in _same_group(groups, visiting[1], b.dtype):
                sums[rows] += same @ visiting[0]
                sizes[rows] += same.sum(1)
            visiting = _passed_on(visiting, gather)
        ctx.save_for_backward(groups)
        ctx.gather = gather
        ctx.mark_non_differentiable(sizes)
        return sums, sizes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        [groups] = ctx.saved_tensors
        of_sums = gradients[0]
        visiting = (groups, torch.zeros_like(of_sums))
        for _ in range(ctx.gather.world_size):
            total = visiting[1].clone()
            for rows, same in _same_group(groups, visiting[0], of_sums.dtype):
                total.addmm_(same.T, of_sums[rows])
            visiting = _passed_on((visiting[0], total), ctx.gather)
        return visiting[1], None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        return _averaged(value, gather)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _averaged(gradients[0], ctx.gather), None


def _averaged(value: Tensor, gather: Gather) -> Tensor:
    total = value.clone()
    dist.all_reduce(total, group=gather.group)
    return total.div_(gather.world_size)


def _passed_on(tensors: tuple[Tensor, ...], gather: Gather) -> tuple[Tensor, ...]:
    """What the rank before has, while the next one gets these; after as many times as there are ranks all are home."""
    rank, size = gather.rank, gather.world_size
    sent, arrived = [tensor.contiguous() for tensor in tensors], [torch.empty_like(tensor) for tensor in tensors]
    operations = [
        dist.P2POp(operation, tensor, group=gather.group, group_peer=peer % size, tag=tag)
        for tag, pair in enumerate(zip(sent, arrived, strict=True))
        for operation, tensor, peer in ((dist.isend, pair[0], rank + 1), (dist.irecv, pair[1], rank - 1))
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return tuple(arrived)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def _attractions(attraction: Tensor, gather: Gather) -> Iterator[Tensor]:
    """That of own rows, which counts once, then nothing."""
    yield attraction.detach()
    for _ in range(gather.world_size - 1):
        yield torch.zeros_like(attraction)


def _same_group(rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of the matrix that is 1 where a row and a column are of one group."""
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        yield part, (rows[part, None] == columns).to(dtype)
