"""Product quantization with Gumbel noise: of several codebooks a code each is drawn, and the codes are put in a row.

Source: wav2vec 2.0, https://arxiv.org/abs/2006.11477, section 2.

Shapes: B batch, N frames, C width of the features, G codebooks, V codes of each, P width of all codes of a frame together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

LOG_FLOOR = 1e-7
"""Added to shares before their logarithm, as in the published code."""


@dataclass(frozen=True)
class ProductCodes:
    """Codes and how they are used.

    Args:
        codes: ``(B, N, P)``, through which gradients pass.
        ids: Number of the code of each codebook, ``(B, N, G)`` int64.
        perplexity: Number of equally frequent codes that would carry as much information as the mean distribution, summed over
            codebooks, a scalar in G..G*V.
    """

    codes: Tensor
    ids: Tensor
    perplexity: Tensor


class ProductQuantizer(nn.Module):
    """Draws a code of each codebook in training; takes the likeliest otherwise. Computes in fp32.

    Args:
        in_width: C.
        groups: G.
        codes: V.
        width: P, a multiple of G.

    Attributes:
        temperature: Of the draws, above 0; low values leave little to chance. Training anneals it.
    """

    def __init__(self, in_width: int, *, groups: int, codes: int, width: int) -> None:
        super().__init__()
        self.groups, self.codes = groups, codes
        self.temperature = 2.0
        self.logits = nn.Linear(in_width, groups * codes)
        self.codebook = nn.Parameter(torch.rand(1, groups * codes, width // groups))
        nn.init.normal_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    def forward(self, features: Float[Tensor, "b n c"], counted: Bool[Tensor, "b n"]) -> ProductCodes:
        """Quantise all frames; the perplexity is of the counted ones alone."""
        with torch.autocast(features.device.type, enabled=False):
            batch, count = counted.shape
            logits = F.linear(features.float(), self.logits.weight.float(), self.logits.bias.float())
            logits = logits.view(batch * count * self.groups, self.codes)
            if self.training:
                chosen = F.gumbel_softmax(logits, self.temperature, hard=True)
                shares = logits.softmax(-1)
            else:
                chosen = shares = F.one_hot(logits.argmax(-1), self.codes).float()
            ids = chosen.argmax(-1).view(batch, count, self.groups)
            book = self.codebook.float().view(self.groups, self.codes, -1)
            rows = chosen.view(batch * count, self.groups, self.codes).transpose(0, 1)
            codes = torch.bmm(rows, book).transpose(0, 1).reshape(batch, count, -1)
            weights = counted.flatten().float() / counted.sum().clamp(min=1)
            mean = (shares.view(batch * count, -1) * weights[:, None]).sum(0).view(self.groups, self.codes)
            return ProductCodes(codes, ids, (-(mean * (mean + LOG_FLOOR).log()).sum(-1)).exp().sum())
