"""Perceiver resampler: however many tokens a medium has, so many trained latents are what becomes of it.

Source: Flamingo https://arxiv.org/abs/2204.14198, section 3.1.1 and figure 5 (keys and values come from the tokens and the
latents, one after the other).

Shapes: B media, N tokens of width C, L latents, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.nn.attention import MultiHeadAttention
from mm.nn.initialise import initialise_block
from mm.nn.masks import attention_mask
from mm.nn.transformer import FeedForward
from mm.types import Encoded


class ResamplerLayer(nn.Module):
    """Latents read the tokens and each other.

    Args:
        width: D.
        num_heads: Attention heads; divides ``width``.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.token_norm, self.latent_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads)
        self.feed_forward = FeedForward(width, 4 * width, nn.GELU())

    def forward(self, latents: Float[Tensor, "b l d"], tokens: Float[Tensor, "b n d"], mask: Tensor) -> Float[Tensor, "b l d"]:
        """The latents after reading; ``mask``, ``(B, N)``, is True for tokens that may be read."""
        own = self.latent_norm(latents)
        sources = torch.cat([self.token_norm(tokens), own], 1)
        keys = torch.cat([mask, mask.new_ones(own.shape[:2])], 1)
        attended, _ = self.attention(own, sources, mask=attention_mask(own.shape[1], sources.shape[1], keys=keys))
        latents = latents + attended
        return latents + self.feed_forward(self.norm(latents))


class Resampler(nn.Module):
    """A fixed number of vectors from any number of tokens.

    Args:
        token_width: C.
        width: D.
        num_latents: L.
        num_layers: How often the latents read.
        num_heads: Attention heads; divides ``width``.
    """

    def __init__(self, token_width: int, width: int, *, num_latents: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ConfigError(f"resampler_heads {num_heads} must divide the width of the language model, {width}")
        self.project = nn.Linear(token_width, width)
        self.latents = nn.Parameter(torch.empty(num_latents, width))
        self.latents.no_decay = True  # pyright: ignore[reportAttributeAccessIssue]
        nn.init.normal_(self.latents)
        self.layers = nn.ModuleList(ResamplerLayer(width, num_heads) for _ in range(num_layers))
        for layer in self.layers:
            initialise_block(layer, num_layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Encoded) -> Float[Tensor, "b l d"]:
        """Resample the tokens that the mask allows."""
        tokens = self.project(media.tokens)
        latents = self.latents.expand(len(tokens), -1, -1)
        if not len(tokens):
            return latents
        for layer in self.layers:
            latents = layer(latents, tokens, media.mask)
        return self.norm(latents)
