"""Sum of the softplus of a whole similarity matrix and its gradients in one walk over row tiles.

A pairwise sigmoid loss does not couple its pairs, so the gradients of a tile are known as soon as the tile is: each tile is
computed once, forward and backward together, and forgotten.

Shapes: M rows, K columns, D width.
"""

from typing import Any

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


class _SoftplusExcess(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, attraction: Tensor, chunk_size: int, differentiate: bool
    ) -> Tensor:
        b_columns = b.T.contiguous()
        row = torch.empty_like(attraction)
        needed = ctx.needs_input_grad if differentiate else (False,) * 4
        a_product = torch.empty_like(a) if needed[0] or needed[2] else None
        b_product = torch.zeros_like(b) if needed[1] else None
        total = torch.zeros_like(scale)
        buffer = a.new_empty(min(chunk_size, len(a)), len(b))
        for start in range(0, len(a), chunk_size):
            rows = slice(start, min(start + chunk_size, len(a)))
            logits = torch.mm(a[rows] * scale, b_columns, out=buffer[: rows.stop - rows.start]).add_(bias)
            row[rows] = F.softplus(logits, threshold=SOFTPLUS_THRESHOLD).sum(1)
            if not any(needed):
                continue
            weights = logits.sigmoid_()
            total += weights.sum()
            if a_product is not None:
                torch.mm(weights, b_columns.T, out=a_product[rows])
            if b_product is not None:
                b_product.addmm_(weights.T, a[rows])
        scale_gradient = torch.linalg.vecdot(a, a_product).sum() if a_product is not None else None
        ctx.save_for_backward(
            a_product.mul_(scale) if a_product is not None and needed[0] else None,
            b_product.mul_(scale) if b_product is not None else None,
            scale_gradient,
            total,
        )
        ctx.num_rows = len(a)
        return (row - attraction).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = gradients
        products = (None if product is None else product * gradient for product in ctx.saved_tensors)
        return *products, -gradient.expand(ctx.num_rows), None, None
