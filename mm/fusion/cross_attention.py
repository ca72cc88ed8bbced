"""Cross-attention: the words of a text attend to each other, then to the tokens of a picture, in every layer.

The fusion of ALBEF (https://arxiv.org/abs/2107.07651), whose layers are those of BERT with cross-attention between
self-attention and feed-forward.

Shapes: B batch, T words, N picture tokens, D width of the text, H heads.
"""

import torch
from torch import Tensor, nn

from mm.nn import buckets
from mm.nn.masks import attention_mask
from mm.nn.transformer import Transformer
from mm.types import Encoded


class CrossAttention(nn.Module):
    """Reads a picture with a text.

    Args:
        transformer: Blocks with cross-attention whose context is as wide as the picture tokens. Whether norms stand before or
            behind the branches is their own business; with norms before them it ends with its own.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, text: Encoded, image: Encoded, *, causal: bool = False, maps: list[dict[str, Tensor]] | None = None
    ) -> Encoded:
        """Fuse pairs: row i of the texts with row i of the pictures.

        Args:
            text: Words, ``(B, T, D)``.
            image: Picture tokens, ``(B, N, C)``.
            causal: Whether a word sees only those before it, for decoders.
            maps: Receives the attention weights of each layer, "attention" ``(B, H, T, T)`` and "cross_attention"
                ``(B, H, T, N)``, part of the graph.

        Returns:
            Fused words; what is pooled is the first of them.
        """
        length = text.tokens.shape[1]
        if maps is not None or not buckets.pays(len(text.tokens), text.tokens.device):
            return self._fuse(text.tokens, text.mask, image.tokens, image.mask, causal, maps)
        needed = (text.mask * torch.arange(1, length + 1, device=text.mask.device)).amax(1).clamp(min=1)

        def fuse(longest: int, words: Tensor, mask: Tensor, picture: Tensor, picture_mask: Tensor) -> Encoded:
            return self._fuse(words[:, :longest], mask[:, :longest], picture, picture_mask, causal)

        return buckets.by_length(length, needed, (text.tokens, text.mask, image.tokens, image.mask), fuse)

    def _fuse(
        self,
        words: Tensor,
        mask: Tensor,
        picture: Tensor,
        picture_mask: Tensor,
        causal: bool,
        maps: list[dict[str, Tensor]] | None = None,
    ) -> Encoded:
        length = words.shape[1]
        tokens = self.transformer(
            words,
            picture,
            mask=attention_mask(length, causal=causal, keys=mask),
            context_mask=attention_mask(length, picture.shape[1], keys=picture_mask),
            maps=maps,
        )
        return Encoded(tokens, mask, tokens[:, 0])
