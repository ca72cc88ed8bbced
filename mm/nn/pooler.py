"""Attentional pooling: a few trained queries gather what a sequence holds.

Sources: CoCa https://arxiv.org/abs/2205.01917, section 3.2; Set Transformer https://arxiv.org/abs/1810.00825.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.attention import MultiHeadAttention


class AttentionPooler(nn.Module):
    """One layer of attention from trained queries.

    Args:
        num_queries: N, of the result.
        width: D of the result.
        context_width: C of the sequence.
        num_heads: Divides ``width``.
    """

    def __init__(self, num_queries: int, width: int, context_width: int, num_heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(num_queries, width))
        self.queries.no_decay = True  # pyright: ignore[reportAttributeAccessIssue]
        self.attention = MultiHeadAttention(width, num_heads, context_width=context_width)
        self.context_norm, self.norm = nn.LayerNorm(context_width), nn.LayerNorm(width)
        nn.init.normal_(self.queries, std=0.02)
        for layer in (self.attention.query, self.attention.key_value, self.attention.output):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Float[Tensor, "b s c"]) -> Float[Tensor, "b n d"]:
        queries = self.queries.expand(len(tokens), -1, -1)
        return self.norm(self.attention(queries, self.context_norm(tokens))[0])
