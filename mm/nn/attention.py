"""Multi-head attention over torch's fused kernel, with grouped queries, another sequence as context and a static cache.

Shapes: B batch, T queries, S keys, D width, H heads, G key-value heads, E width of a head.
Source: https://arxiv.org/abs/1706.03762 (attention), https://arxiv.org/abs/2305.13245 (grouped queries).
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.embeddings import rotate
from mm.nn.masks import EVERYTHING, Mask


class KVCache:
    """Keys and values of one layer, allocated once for ``capacity`` positions and filled from the left.

    Args:
        keys: Room for the keys, ``(B, G, capacity, E)``.
        values: Room for the values, the same shape.
    """

    def __init__(self, keys: Float[Tensor, "b g s e"], values: Float[Tensor, "b g s e"]) -> None:
        self.keys, self.values = keys, values
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions ``(B, G, T, E)`` and return all that are stored."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[2], f"the cache holds {self.keys.shape[2]} positions, {end} were asked of it"
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class MultiHeadAttention(nn.Module):
    """Attention of a sequence to itself, or to another one where ``context_width`` is given.

    Args:
        width: D, also of the result.
        num_heads: H; the width of a head is ``width // num_heads``.
        num_kv_heads: G, a divisor of H; fewer than H make the cache smaller. H if None.
        context_width: Width of the sequence that keys and values come from, if it is another one.
        bias: Whether the four projections have a bias.
        dropout: Probability of dropping an attention weight in training.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        context_width: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads or num_heads
        assert width % num_heads == 0, f"width {width} is not a multiple of {num_heads} heads"
        assert num_heads % self.num_kv_heads == 0, f"{num_heads} heads cannot share {self.num_kv_heads} key-value heads"
        self.head_width = width // num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width, bias)
        self.key_value = nn.Linear(context_width or width, 2 * self.num_kv_heads * self.head_width, bias)
        self.output = nn.Linear(width, width, bias)

    def cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` positions, in the type and on the device of the weights."""
        shape = (batch_size, self.num_kv_heads, capacity, self.head_width)
        like = self.key_value.weight
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None = None,
        *,
        mask: Mask = EVERYTHING,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        need_weights: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h t s"] | None]:
        """Attend. Returns the result and, if ``need_weights``, the attention weights it was computed from (for Grad-CAM).

        Args:
            x: The queries come from here.
            context: Keys and values come from here; from ``x`` if None.
            mask: See `mm.nn.masks.attention_mask`.
            rotation: Cosines and sines of rotary positions, from `mm.nn.embeddings.Rotary`.
            cache: Earlier keys and values, to which the ones of ``x`` are appended.
        """
        query = rearrange(self.query(x), "b t (h e) -> b h t e", e=self.head_width)
        key_value = self.key_value(x if context is None else context)
        key, value = rearrange(key_value, "b s (two g e) -> two b g s e", two=2, e=self.head_width)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(key.to(cache.keys.dtype), value.to(cache.values.dtype))
            query = query.to(key.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _attention_weights(query, key, mask)
            groups = weights.shape[1] // self.num_kv_heads
            attended = F.dropout(weights, dropout) @ value.repeat_interleave(groups, 1)
        else:
            attended = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask.allowed,
                is_causal=mask.causal,
                dropout_p=dropout,
                enable_gqa=self.num_kv_heads != query.shape[1],
            )
        if mask.empty is not None:
            attended = attended.masked_fill(mask.empty, 0.0)
        return self.output(rearrange(attended, "b h t e -> b t (h e)")), weights


def _attention_weights(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """Softmax of the scaled products ``(B, H, T, S)``; zero in the rows that may see nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = mask.tensor(scores.shape[-2], scores.shape[-1], scores.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1)
    return weights if mask.empty is None else weights.masked_fill(mask.empty, 0.0)
