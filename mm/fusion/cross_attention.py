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

Maps = list[dict[str, Tensor]]
"""Attention weights by layer and kind, where they are asked for."""


class CrossAttention(nn.Module):
    """Reads a picture with a text.

    Args:
        transformer: Blocks with cross-attention whose context is as wide as the picture tokens. Whether norms stand before or
            behind the branches is their own business; with norms before them it ends with its own.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, text: Encoded, image: Encoded, *, causal: bool = False, maps: Maps | None = None) -> Encoded:
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
        if maps is not None or not buckets.pays(text.tokens.shape[0], text.tokens.device):
            return self._fuse(text, image, causal, maps)
        needed = (text.mask * torch.arange(1, length + 1, device=text.mask.device)).amax(1).clamp(min=1)

        def fuse(longest: int, words: Tensor, mask: Tensor, picture: Tensor, picture_mask: Tensor) -> Encoded:
            cut = Encoded(words[:, :longest], mask[:, :longest], words[:, 0])
            return self._fuse(cut, Encoded(picture, picture_mask, picture[:, 0]), causal)

        return buckets.by_length(length, needed, (text.tokens, text.mask, image.tokens, image.mask), fuse)

    def _fuse(self, text: Encoded, image: Encoded, causal: bool, maps: Maps | None = None) -> Encoded:
        tokens = self._read(text, image, causal, maps)
        return Encoded(tokens, text.mask, tokens[:, 0])

    def _read(self, text: Encoded, image: Encoded, causal: bool, maps: Maps | None) -> Tensor:
        length = text.tokens.shape[1]
        return self.transformer(
            text.tokens,
            image.tokens,
            mask=attention_mask(length, causal=causal, keys=text.mask),
            context_mask=attention_mask(length, image.tokens.shape[1], keys=image.mask),
            maps=maps,
        )


class CoAttention(CrossAttention):
    """Two streams: in every layer words attend to the picture and the picture to the words, each as the layer before left it.

    Sources: ViLBERT https://arxiv.org/abs/1908.02265, LXMERT https://arxiv.org/abs/1908.07490. What comes out are the words, so
    the picture has no use for a last layer. Words cannot be causal, since the picture would tell them what follows.

    Args:
        transformer: As `CrossAttention`.
        picture: Blocks over the picture tokens with cross-attention to words, one fewer.
    """

    def __init__(self, transformer: Transformer, picture: Transformer) -> None:
        super().__init__(transformer)
        if len(picture.blocks) != len(transformer.blocks) - 1:
            raise ValueError(f"{len(transformer.blocks)} layers over words need one layer over the picture fewer")
        self.picture = picture

    def _read(self, text: Encoded, image: Encoded, causal: bool, maps: Maps | None) -> Tensor:
        if causal:
            raise ValueError("two streams cannot be causal: the picture would tell the words what follows")
        words, picture = text.tokens, image.tokens
        num_words, num_tokens = words.shape[1], picture.shape[1]
        own, seen = attention_mask(num_words, keys=text.mask), attention_mask(num_words, num_tokens, keys=image.mask)
        around, read = attention_mask(num_tokens, keys=image.mask), attention_mask(num_tokens, num_words, keys=text.mask)
        for layer, block in enumerate(self.transformer.blocks):
            weights: dict[str, Tensor] | None = None if maps is None else {}
            before, words = words, block(words, picture, mask=own, context_mask=seen, maps=weights)
            if layer < len(self.picture.blocks):
                picture = self.picture.blocks[layer](picture, before, mask=around, context_mask=read)
            if maps is not None and weights is not None:
                maps.append(weights)
        return self.transformer.final_norm(words)
