"""A diffusion transformer (DiT): the one transformer over the patches of a noisy sample, its norms modulated by the moment.

Sources: DiT https://arxiv.org/abs/2212.09748, shared modulations and attention to the words PixArt
https://arxiv.org/abs/2310.00426, RMS norms, SwiGLU and rotary positions https://arxiv.org/abs/2501.01423 (LightningDiT).

Shapes: B samples, C channels, H and W their grid, p patch, N = H W / p^2 tokens, D width.
"""

import functools
from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import ConfigError
from mm.generators.denoiser import Condition, seen
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import GridRotary, TimeEmbedding
from mm.nn.ends import end
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.norm import RMSNorm
from mm.nn.transformer import NUM_MODULATIONS, Block, Contexts, GatedFeedForward, Transformer


class DitConfig(StrictConfig):
    """A diffusion transformer.

    Args:
        patch: Side of the patch that becomes a token, in cells of the latents (pixels where there are none).
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; ``width / heads`` must be a multiple of 4.
        mlp_ratio: Hidden width of the gated feed-forward over ``width``.
        words_every: Every so many layers attend to the words, the first of all.
        dropout: Of each block's branches, in training.
        gradient_checkpointing: Recompute each block in the backward pass: less memory, more time.
    """

    kind: Literal["dit"] = "dit"
    patch: int = Field(default=1, ge=1)
    width: int = Field(default=192, ge=1)
    layers: int = Field(default=8, ge=1)
    heads: int = Field(default=6, ge=1)
    mlp_ratio: float = Field(default=8 / 3, gt=0)
    words_every: int = Field(default=1, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "DitConfig":
        if self.width % (4 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 4 times heads {self.heads}")
        return self


class Dit(nn.Module):
    """See above.

    Args:
        config: Sizes.
        shape: Channels, rows and columns of a sample.
        words_width: Of the features of words.
        vector_width: Of the condition vector; None for none.
        beside: Channels that are seen beside the sample's.
    """

    def __init__(
        self,
        config: DitConfig,
        shape: tuple[int, int, int],
        words_width: int,
        vector_width: int | None = None,
        beside: int = 0,
    ) -> None:
        super().__init__()
        channels, height, width = shape
        self.patch, self.grid = config.patch, (height // config.patch, width // config.patch)
        norm = functools.partial(RMSNorm, config.width, eps=1e-6)

        def make_block(layer: int) -> Block:
            reads = layer % config.words_every == 0
            return Block(
                attention=MultiHeadAttention(config.width, config.heads, bias=False),
                cross_attention=MultiHeadAttention(config.width, config.heads, context_width=config.width, bias=False)
                if reads
                else None,
                feed_forward=GatedFeedForward(config.width, int(config.width * config.mlp_ratio)),
                norm=norm,
                dropout=config.dropout,
                modulated_width=config.width,
            )

        self.input = end(nn.Linear((channels + beside) * config.patch**2, config.width))
        self.words = nn.Linear(words_width, config.width)
        self.words_norm = norm()
        self.time = TimeEmbedding(config.width)
        self.vector = None if vector_width is None else nn.Linear(vector_width, config.width)
        self.modulation = end(nn.Linear(config.width, (NUM_MODULATIONS + 2) * config.width))
        self.transformer = Transformer(
            make_block,
            config.layers,
            final_norm=norm(),
            rotary=GridRotary(*self.grid, config.width // config.heads),
            gradient_checkpointing=config.gradient_checkpointing,
        )
        self.output = end(nn.Linear(config.width, channels * config.patch**2))
        initialise(self.transformer)
        for layer in (self.modulation, self.output):  # every block begins as the identity, and the whole network as zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"], time: Tensor, condition: Condition, *, features: int | None = None
    ) -> Float[Tensor, "b c h w"] | tuple[Tensor, Tensor]:
        """See `mm.generators.denoiser.Denoiser`; with ``features`` also the tokens ``(B, N, D)`` behind so many blocks."""
        patches = rearrange(seen(x, condition), "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch, q=self.patch)
        tokens = self.input(patches.to(self.input.weight.dtype))
        told = self.time(time.expand(len(x)))
        if self.vector is not None and condition.vector is not None:
            told = told + self.vector(condition.vector.to(told.dtype))
        modulations = self.modulation(F.silu(told)).unflatten(1, (NUM_MODULATIONS + 2, -1))
        shared, (shift, scale) = modulations[:, :NUM_MODULATIONS], modulations[:, NUM_MODULATIONS:, None].unbind(1)
        words = self._words(condition) if condition.prepared is None else condition.prepared
        options = {
            "context_mask": attention_mask(tokens.shape[1], condition.known.shape[1], keys=condition.known),
            "condition": shared,
        }
        middle = len(self.transformer.blocks) if features is None else features
        hidden = self.transformer(tokens, words, **options, layers=range(middle))
        ended = hidden
        if middle < len(self.transformer.blocks):
            ended = self.transformer(hidden, words, **options, layers=range(middle, len(self.transformer.blocks)))
        made = self.output(ended * (1 + scale) + shift)
        made = rearrange(made, "b (h w) (p q c) -> b c (h p) (w q)", h=self.grid[0], p=self.patch, q=self.patch)
        return made if features is None else (made, hidden)

    def prepare(self, condition: Condition) -> Condition:
        """See `mm.generators.denoiser.Denoiser`: keys and values of the words in every layer."""
        prepared: Contexts = self.transformer.contexts(self._words(condition))
        return replace(condition, prepared=prepared)

    def _words(self, condition: Condition) -> Tensor:
        return self.words_norm(self.words(condition.words.to(self.words.weight.dtype)))


def build_dit(
    config: DitConfig, shape: tuple[int, int, int], words_width: int, vector_width: int | None, beside: int = 0
) -> Dit:
    """A diffusion transformer with fresh weights for samples of ``shape``. Raises `ConfigError` for an unfit patch."""
    if any(side % config.patch for side in shape[1:]):
        raise ConfigError(f"denoiser.patch {config.patch} does not divide samples of {shape[1]} x {shape[2]} cells")
    return Dit(config, shape, words_width, vector_width, beside)
