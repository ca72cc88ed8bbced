"""Prefix: a medium as vectors among the words of a language model.

Source: Frozen https://arxiv.org/abs/2106.13884, section 3.1 (one linear layer from the pooled vector to all vectors of the
prefix). Any encoder's result will do, of pictures as of sound.

Shapes: B media, N tokens of width C, n vectors of a prefix, D width of the words.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mm.nn.resampler import Resampler
from mm.types import Encoded

PrefixSource = Literal["pooled", "tokens", "resampled"]


class PooledPrefix(nn.Module):
    """All vectors by one linear layer from the pooled one.

    That is brought to mean 0 and variance 1 before, by batch normalisation without parameters: vectors of a dual tower lie in a
    cone, and what they have in common would drown what tells them apart in the norms of the language model.

    Args:
        pooled_width: Of what is pooled.
        width: D.
        length: n.
    """

    def __init__(self, pooled_width: int, width: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.norm = nn.BatchNorm1d(pooled_width, affine=False)
        self.linear = nn.Linear(pooled_width, length * width)

    def forward(self, media: Encoded) -> tuple[Float[Tensor, "b n d"], Int64[Tensor, " b"]]:
        """The vectors of each prefix, and how many there are."""
        pooled = media.pooled.to(self.linear.weight.dtype)
        mean, var = self.norm.running_mean, self.norm.running_var
        several = self.norm.training and len(pooled) > 1  # one alone has no variance
        pooled = F.batch_norm(pooled, mean, var, training=several, momentum=self.norm.momentum or 0.0, eps=self.norm.eps)
        vectors = self.linear(pooled).unflatten(1, (self.length, -1))
        return vectors, torch.full((len(vectors),), self.length, device=vectors.device)


class TokenPrefix(nn.Module):
    """Each token is a vector, by one linear layer; tokens that may not be attended to are left out.

    Args:
        token_width: C.
        width: D.
    """

    def __init__(self, token_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(token_width, width)

    def forward(self, media: Encoded) -> tuple[Float[Tensor, "b n d"], Int64[Tensor, " b"]]:
        """The vectors of each prefix, those that are real in front, and how many are."""
        order = media.mask.long().argsort(dim=1, descending=True, stable=True)
        tokens = media.tokens.gather(1, order[..., None].expand_as(media.tokens))
        return self.linear(tokens), media.mask.sum(1)


class ResampledPrefix(nn.Module):
    """The latents that have read the tokens.

    Args:
        resampler: To n vectors of width D.
    """

    def __init__(self, resampler: Resampler) -> None:
        super().__init__()
        self.resampler = resampler

    def forward(self, media: Encoded) -> tuple[Float[Tensor, "b n d"], Int64[Tensor, " b"]]:
        """The vectors of each prefix, and how many there are."""
        vectors = self.resampler(media)
        return vectors, torch.full((len(vectors),), vectors.shape[1], device=vectors.device)
