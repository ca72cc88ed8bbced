"""Align before fuse: towers whose vectors meet in one space, and whose tokens then meet by cross-attention.

Source: ALBEF https://arxiv.org/abs/2107.07651, section 3.1.

Shapes: B batch, N picture tokens of width C, D width of the words, M positions, V vocabulary.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.fusion.cross_attention import CrossAttention
from mm.fusion.dual_tower import DualTower
from mm.nn.embeddings import LearnedPositions
from mm.types import Encoded, TextBatch


class FeatureMap(nn.Module):
    """A bare feature map as tokens: brought to one scale and to the width of the words, told where they are.

    Args:
        num_tokens: N.
        map_width: C.
        width: D.
    """

    def __init__(self, num_tokens: int, map_width: int, width: int) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(map_width), nn.Linear(map_width, width)
        self.positions = LearnedPositions(num_tokens, width)

    def forward(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b n d"]:
        return self.project(self.norm(tokens)) + self.positions(tokens.shape[1])


class AlignBeforeFuse(nn.Module):
    """A dual tower whose tokens are fused, with a head that predicts words.

    Args:
        towers: The ``image`` encoder and the ``text`` encoder, a `mm.encoders.text.TextEncoder`, with their projections. The
            last id of the words stands for a hidden one.
        picture_tokens: Between the picture encoder's tokens and the fusion.
        fusion: Of words and picture tokens.
        width: D of the words.
        vocab_size: V.
        norm_eps: Added to the variance in the norm of the head.
    """

    def __init__(
        self,
        towers: DualTower,
        picture_tokens: nn.Module,
        fusion: CrossAttention,
        width: int,
        vocab_size: int,
        *,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.towers, self.picture_tokens, self.fusion = towers, picture_tokens, fusion
        self.masked_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=norm_eps))
        self.word_bias = nn.Parameter(torch.zeros(vocab_size))

    def encode_image(self, image: Tensor) -> Encoded:
        """Picture tokens for the fusion; what is pooled is the unit vector of the picture."""
        encoded = self.towers.encoders["image"](image)
        return replace(encoded, tokens=self.picture_tokens(encoded.tokens), pooled=self.towers.project("image", encoded))

    def encode_text(self, text: TextBatch) -> Encoded:
        """Words before the fusion; what is pooled is the unit vector of the text."""
        encoded = self.towers.encoders["text"](text)
        return replace(encoded, pooled=self.towers.project("text", encoded))

    def words(self, features: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Logits of the words that fused features stand for, by the vectors that words come in with."""
        vectors = self.towers.encoders["text"].get_parameter("embedding.tokens.weight")[: len(self.word_bias)]
        return F.linear(self.masked_head(features), vectors, self.word_bias.to(vectors.dtype))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold all but the projections in another floating type, for inference."""
        self.towers.cast_(dtype)
        for part in (self.picture_tokens, self.fusion, self.masked_head):
            part.to(dtype)
