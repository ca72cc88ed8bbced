"""Sum of the softplus of a whole similarity matrix and its gradients in one walk over row tiles.

A pairwise sigmoid loss does not couple its pairs, so the gradients of a tile are known as soon as the tile is: each tile is
computed once, forward and backward together, and forgotten.

Shapes: M rows, K columns, D width.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm.nn.precision import full_precision

SOFTPLUS_THRESHOLD = 40.0
"""Above it softplus(x) is x to within fp64 precision."""


@full_precision
def softplus_excess(
    a: Float[Tensor, "m d"],
    b: Float[Tensor, "k d"],
    scale: Float[Tensor, ""],
    bias: Float[Tensor, ""],
    attraction: Float[Tensor, " m"],
    chunk_size: int,
) -> Float[Tensor, ""]:
    """``sum_i (sum_j softplus(scale * a_i . b_j + bias) - attraction_i)``, differentiable once in all tensors.

    With ``attraction_i`` the sum of row i's positive logits this is the sum of all pairs' binary cross-entropies, because
    ``softplus(-x) = softplus(x) - x``. The difference is taken row by row, before large numbers add up.

    Args:
        a: Row features, fp32 or fp64.
        b: Column features, of the same type.
        scale: Multiplier of the inner products.
        bias: Added to every logit.
        attraction: Subtracted from the rows.
        chunk_size: Rows of a tile.
    """
    arguments = a, b, scale, bias, attraction, chunk_size, torch.is_grad_enabled()
    return _SoftplusExcess.apply(*arguments)  # pyright: ignore[reportReturnType]


class Walked(NamedTuple):
    """What a walk over the tiles of a similarity matrix finds, with ``S = sigmoid(scale * a @ b.T + bias)``.

    Args:
        row: Sum of the softplus of each row's logits.
        a_product: ``S @ b``, where it was asked for.
        b_product: ``S.T @ a``, where it was asked for.
        total: Sum of ``S``, 0 where no product was asked for.
    """

    row: Float[Tensor, " m"]
    a_product: Float[Tensor, "m d"] | None
    b_product: Float[Tensor, "k d"] | None
    total: Float[Tensor, ""]


def walk(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, chunk_size: int, needs_a: bool, needs_b: bool) -> Walked:
    """Walk over tiles of ``chunk_size`` rows; without gradients, which the products are for."""
    b_columns = b.T.contiguous()
    row, total = a.new_empty(len(a)), torch.zeros_like(scale)
    a_product = torch.empty_like(a) if needs_a else None
    b_product = torch.zeros_like(b) if needs_b else None
    buffer = a.new_empty(min(chunk_size, len(a)), len(b))
    for start in range(0, len(a), chunk_size):
        rows = slice(start, min(start + chunk_size, len(a)))
        logits = torch.mm(a[rows] * scale, b_columns, out=buffer[: rows.stop - rows.start]).add_(bias)
        row[rows] = F.softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(1)
        if not (needs_a or needs_b):
            continue
        weights = logits.sigmoid_()
        total += weights.sum()
        if a_product is not None:
            torch.mm(weights, b_columns.T, out=a_product[rows])
        if b_product is not None:
            b_product.addmm_(weights.T, a[rows])
    return Walked(row, a_product, b_product, total)


class _SoftplusExcess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, attraction: Tensor, chunk_size: int, differentiate: bool
    ) -> Tensor:
        needed = ctx.needs_input_grad if differentiate else (False,) * 4
        found = walk(a, b, scale, bias, chunk_size, needed[0] or needed[2] or needed[3], needed[1])
        scale_gradient = torch.linalg.vecdot(a, found.a_product).sum() if found.a_product is not None else None
        ctx.save_for_backward(
            found.a_product.mul_(scale) if found.a_product is not None and needed[0] else None,
            found.b_product.mul_(scale) if found.b_product is not None else None,
            scale_gradient,
            found.total,
        )
        ctx.num_rows = len(a)
        return (found.row - attraction).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        products = (None if product is None else product * gradient for product in ctx.saved_tensors)
        return *products, -gradient.expand(ctx.num_rows), None, None
