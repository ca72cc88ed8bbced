"""Cross-attention: the words of a text attend to each other, then to the tokens of a picture, in every layer.

The fusion of ALBEF (https://arxiv.org/abs/2107.07651), whose layers are those of BERT with cross-attention between
self-attention and feed-forward.

Shapes: B batch, T words, N picture tokens, D width of the text, H heads.
"""

from torch import Tensor, nn

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
        tokens = self.transformer(
            text.tokens,
            image.tokens,
            mask=attention_mask(length, causal=causal, keys=text.mask),
            context_mask=attention_mask(length, image.tokens.shape[1], keys=image.mask),
            maps=maps,
        )
        return Encoded(tokens, text.mask, tokens[:, 0])
