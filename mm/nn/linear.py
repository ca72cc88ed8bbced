"""A linear layer that is as quick for the few rows of guided decoding as for many."""

import torch
from torch import Tensor, nn

FEW_ROWS = range(2, 4)


class Linear(nn.Linear):
    """torch's linear layer, with the operands exchanged in eager fp32 inference on CPUs for 2 or 3 rows.

    MKL computes ``weight @ x.T`` for 2 rows, which is one picture with guidance, in half the time of ``x @ weight.T``; at such
    sizes the layers are nearly all of a step. From 4 rows on it is the other way round. Results differ in rounding alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling() or torch.compiler.is_exporting()  # the number of rows may be a symbol there
        if compiling or torch.is_grad_enabled() or input.device.type != "cpu" or input.dtype != torch.float32:
            return super().forward(input)
        if input.shape[:-1].numel() not in FEW_ROWS:
            return super().forward(input)
        columns = input.flatten(0, -2).contiguous().t()
        product = self.weight @ columns if self.bias is None else torch.addmm(self.bias[:, None], self.weight, columns)
        return product.t().contiguous().view(*input.shape[:-1], self.out_features)
