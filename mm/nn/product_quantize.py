"""Product quantization with Gumbel noise: of several codebooks a code each is drawn, and the codes are put in a row.

Source: wav2vec 2.0, https://arxiv.org/abs/2006.11477, section 2.

Shapes: B batch, N frames, C width of the features, G codebooks, V codes of each, P width of all codes of a frame together.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mm.draws import Draws

LOG_FLOOR = 1e-7
"""Added to shares before their logarithm, as in the published code."""


@dataclass(frozen=True)
class ProductCodes:
    """Codes and how they are used.

    Args:
        codes: ``(B, N, P)``, through which gradients pass.
        ids: Number of the code of each codebook, ``(B, N, G)`` int64.
        perplexity: Number of equally frequent codes that would carry as much information as the mean distribution, summed over
            codebooks, a scalar in G..G*V. In training the distribution is that of the draws, through which gradients pass.
        used: The same of the likeliest code of each frame. Where frames are undecided it is far below ``perplexity``.
    """

    codes: Tensor
    ids: Tensor
    perplexity: Tensor
    used: Tensor


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

    def forward(
        self,
        features: Float[Tensor, "b n c"],
        counted: Bool[Tensor, "b n"],
        draws: Draws | None = None,
        add_up: Callable[[Tensor], Tensor] | None = None,
    ) -> ProductCodes:
        """Quantise all frames.

        Args:
            features: ``(B, N, C)``.
            counted: The frames that perplexities are of.
            draws: Random numbers; None draws from torch's generators.
            add_up: Sum over the processes whose frames are counted together, differentiable; None for this one alone.
        """
        with torch.autocast(features.device.type, enabled=False):
            batch, count = counted.shape
            logits = F.linear(features.float(), self.logits.weight.float(), self.logits.bias.float())
            logits = logits.view(batch * count * self.groups, self.codes)
            chosen = shares = likeliest = F.one_hot(logits.argmax(-1), self.codes).float()
            if self.training:
                drawn = ((logits + self._noise(logits, count, draws)) / self.temperature).softmax(-1)
                chosen = F.one_hot(drawn.argmax(-1), self.codes) - drawn.detach() + drawn
                shares = logits.softmax(-1)
            ids = chosen.argmax(-1).view(batch, count, self.groups)
            book = self.codebook.float().view(self.groups, self.codes, -1)
            rows = chosen.view(batch * count, self.groups, self.codes).transpose(0, 1)
            codes = torch.bmm(rows, book).transpose(0, 1).reshape(batch, count, -1)
            sums = torch.stack(
                [part.view(batch, count, self.groups, self.codes)[counted].sum(0) for part in (shares, likeliest)]
            )
            if add_up is not None:
                sums = add_up(sums)
            means = sums / sums[:, :1].sum(-1, keepdim=True).clamp(min=1)
            perplexity, used = (-(means * (means + LOG_FLOOR).log()).sum(-1)).exp().sum(-1)
            return ProductCodes(codes, ids, perplexity, used)

    def _noise(self, logits: Float[Tensor, "m v"], count: int, draws: Draws | None) -> Float[Tensor, "m v"]:
        """Gumbel noise."""
        if draws is None:
            return -torch.empty_like(logits).exponential_().log()
        return -(-draws.uniform(count, self.groups * self.codes).log()).log().view_as(logits)
