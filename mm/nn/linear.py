"""A linear layer that is as quick for the one to three rows of a step of decoding as for many."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

FEW_ROWS = range(1, 4)
SHORT = 1600
"""Longest single row for which the product of matrices is quicker than that of a matrix and a vector."""


def linear(
    input: Float[Tensor, "*b i"], weight: Float[Tensor, "o i"], bias: Float[Tensor, " o"] | None = None
) -> Float[Tensor, "*b o"]:
    """torch's `linear`, with the operands exchanged in eager fp32 inference on CPUs for up to 3 rows.

    MKL computes ``weight @ x.T`` for 2 rows, which is one picture with guidance, in half the time of ``x @ weight.T``; at such
    sizes the layers are nearly all of a step. From 4 rows on it is the other way round. A single row is quicker as two equal
    ones (0.47 to 0.86 of the time for rows of 256 to 1,600), unless it is long. Results differ in rounding alone.
    """
    compiling = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # the number of rows may be a symbol there
    if compiling or torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
        return F.linear(input, weight, bias)
    num_rows = input.shape[:-1].numel()
    if num_rows not in FEW_ROWS or (num_rows == 1 and input.shape[-1] > SHORT):
        return F.linear(input, weight, bias)
    rows = input.reshape(num_rows, -1)
    columns = (rows.expand(2, -1) if num_rows == 1 else rows).contiguous().t()
    product = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t()[:num_rows].contiguous().view(*input.shape[:-1], len(weight))


class Linear(nn.Linear):
    """torch's linear layer by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
