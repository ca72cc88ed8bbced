"""A network that denoises one vector: a transformer over the words, the text's vector, the moment and the noisy vector, whose
last position, a learned query, gives the result (https://arxiv.org/abs/2204.06125, section 2.2).

Deviation: attention is to all positions, not to those before alone.

Shapes: B samples, T words, E width of the vectors, D width.
"""

import functools
from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.generators.denoiser import Condition
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import TimeEmbedding
from mm.nn.ends import end
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.norm import RMSNorm
from mm.nn.transformer import Block, GatedFeedForward, Transformer


class PriorConfig(StrictConfig):
    """A network that denoises vectors.

    Args:
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the gated feed-forward over ``width``.
    """

    width: int = Field(default=192, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=6, ge=1)
    mlp_ratio: float = Field(default=8 / 3, gt=0)

    @model_validator(mode="after")
    def _possible(self) -> "PriorConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class Prior(nn.Module):
    """See above.

    Args:
        config: Sizes.
        words_width: Of the features of words.
        vector_width: E.
    """

    def __init__(self, config: PriorConfig, words_width: int, vector_width: int) -> None:
        super().__init__()
        norm = functools.partial(RMSNorm, config.width, eps=1e-6)

        def make_block(_: int) -> Block:
            return Block(
                attention=MultiHeadAttention(config.width, config.heads, bias=False),
                feed_forward=GatedFeedForward(config.width, int(config.width * config.mlp_ratio)),
                norm=norm,
            )

        self.words = nn.Linear(words_width, config.width)
        self.text = nn.Linear(vector_width, config.width)
        self.time = TimeEmbedding(config.width)
        self.input = end(nn.Linear(vector_width, config.width))
        self.query = nn.Parameter(0.02 * torch.randn(config.width))
        self.transformer = Transformer(make_block, config.layers, final_norm=norm())
        self.output = end(nn.Linear(config.width, vector_width))
        initialise(self.transformer)

    def forward(self, x: Float[Tensor, "b e"], time: Tensor, condition: Condition) -> Float[Tensor, "b e"]:
        """See `mm.generators.denoiser.Denoiser`."""
        assert condition.vector is not None
        words = condition.prepared if condition.prepared is not None else self._read(condition)
        told = torch.stack([self.time(time.expand(len(x))), self.input(x.to(words.dtype)), self.query.expand(len(x), -1)], 1)
        sequence = torch.cat([words, told], 1)
        keys = torch.cat([condition.known, condition.known.new_ones(len(x), sequence.shape[1] - condition.known.shape[1])], 1)
        hidden = self.transformer(sequence, mask=attention_mask(sequence.shape[1], keys=keys))
        return self.output(hidden[:, -1])

    def prepare(self, condition: Condition) -> Condition:
        """See `mm.generators.denoiser.Denoiser`: words and text's vector as the transformer reads them."""
        return replace(condition, prepared=self._read(condition))

    def _read(self, condition: Condition) -> Float[Tensor, "b t+1 d"]:
        assert condition.vector is not None
        dtype = self.words.weight.dtype
        return torch.cat([self.words(condition.words.to(dtype)), self.text(condition.vector.to(dtype))[:, None]], 1)
