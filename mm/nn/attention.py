"""Multi-head attention over torch's fused kernel, with grouped queries, another sequence as context and a static cache.

Shapes: B batch, T queries, S keys, D width, H heads, G key-value heads, E width of a head.
Source: https://arxiv.org/abs/1706.03762 (attention), https://arxiv.org/abs/2305.13245 (grouped queries).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.embeddings import rotate
from mm.nn.linear import Linear
from mm.nn.masks import EVERYTHING, Groups, Mask

MATRIX_UNITS = torch.cpu._is_amx_tile_supported()
"""Whether this machine's CPU multiplies bf16 matrices in units of their own (AMX)."""


SCORES_FOR_MATRIX_UNITS = 1 << 16
"""Scores of a head from which the fused kernel's backward pass in bf16 gains more from matrix units than it loses by
packing for them: at 50 queries and keys it takes 4.4 times as long as in fp32, at 197 as long, at 512 two thirds."""

SCORES = range(1 << 15, 1 << 21)
"""Scores of a head for which `attend_by_products` was measured to be quicker than the fused kernel."""


class KVCache:
    """Keys and values of one layer, allocated once for ``capacity`` positions and filled from the left.

    Args:
        keys: Room for the keys, ``(B, G, capacity, E)``.
        values: Room for the values, the same shape.

    Attributes:
        length: Number of positions that hold something.
        context: Keys and values of the sequence that the layer's cross-attention goes to, once they have been computed.
    """

    def __init__(self, keys: Float[Tensor, "b g s e"], values: Float[Tensor, "b g s e"]) -> None:
        self.keys, self.values = keys, values
        self.length = 0
        self.context: tuple[Tensor, Tensor] | None = None

    def append(self, keys: Tensor, values: Tensor, position: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Store T new positions ``(B, G, T, E)`` and return what they may see.

        Args:
            keys: Of the new positions.
            values: Of the new positions.
            position: Of the first new one, behind what is stored if None. A number forgets what is stored from there on. An
                int64 tensor ``(1,)`` leaves ``length`` alone and returns the whole room, so that nothing that torch.compile
                guards changes from step to step; what of it is visible is for the mask to say.
        """
        if isinstance(position, Tensor):
            places = position + torch.arange(keys.shape[2], device=position.device)
            self.keys.index_copy_(2, places, keys)
            self.values.index_copy_(2, places, values)
            return self.keys, self.values
        start = self.length if position is None else position
        end = start + keys.shape[2]
        assert end <= self.keys.shape[2], f"the cache holds {self.keys.shape[2]} positions, {end} were asked of it"
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def first(self, rows: int) -> "KVCache":
        """The cache of the first ``rows`` of the batch, in the same memory."""
        part = KVCache(self.keys[:rows], self.values[:rows])
        part.length = self.length
        if self.context is not None:
            part.context = self.context[0][:rows], self.context[1][:rows]
        return part

    def select(self, rows: Tensor) -> "KVCache":
        """The cache of some rows of the batch, which may be repeated, in memory of its own."""
        part = KVCache(self.keys[rows], self.values[rows])
        part.length = self.length
        if self.context is not None:
            part.context = self.context[0][rows], self.context[1][rows]
        return part


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
        self.query = Linear(width, width, bias)
        self.key_value = Linear(context_width or width, 2 * self.num_kv_heads * self.head_width, bias)
        self.output = Linear(width, width, bias)

    def cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for ``capacity`` positions, in the type and on the device of the weights."""
        shape = (batch_size, self.num_kv_heads, capacity, self.head_width)
        like = self.key_value.weight
        return KVCache(like.new_zeros(shape), like.new_zeros(shape))

    def keys_and_values(self, x: Float[Tensor, "b s c"]) -> tuple[Float[Tensor, "b g s e"], Float[Tensor, "b g s e"]]:
        """What a sequence offers to queries; may be kept where the same context is attended to many times."""
        batch_size, length, _ = x.shape
        pair = self.key_value(x).view(batch_size, length, 2, self.num_kv_heads, self.head_width).permute(2, 0, 3, 1, 4)
        return pair[0], pair[1]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | tuple[Tensor, Tensor] | None = None,
        *,
        mask: Mask = EVERYTHING,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        position: int | Tensor | None = None,
        need_weights: bool = False,
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b h t s"] | None]:
        """Attend. Returns the result and, if ``need_weights``, the attention weights it was computed from (for Grad-CAM).

        Args:
            x: The queries come from here.
            context: Keys and values come from here, or are these, from `keys_and_values`; from ``x`` if None.
            mask: See `mm.nn.masks.attention_mask`.
            rotation: Cosines and sines of rotary positions, from `mm.nn.embeddings.Rotary`.
            cache: Earlier keys and values, to which the ones of ``x`` are appended.
            position: See `KVCache.append`.
        """
        query = self.query(x).view(*x.shape[:2], -1, self.head_width).transpose(1, 2)
        key, value = context if isinstance(context, tuple) else self.keys_and_values(x if context is None else context)
        unrotated = query
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.append(key.to(cache.keys.dtype), value.to(cache.values.dtype), position)
            query = query.to(key.dtype)
        attended, weights = self.attend(query, key, value, mask, need_weights, unrotated)
        return self.output(attended.transpose(1, 2).flatten(2)), weights

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, need_weights: bool, unrotated: Tensor
    ) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t s"] | None]:
        """What queries ``(B, H, T, E)`` find among keys and values ``(B, G, S, E)``, head by head, and with which weights.

        ``unrotated`` are the queries before rotary positions, for attention to what has no place in the sequence.
        """
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _attention_weights(query, key, mask)
            groups = weights.shape[1] // self.num_kv_heads
            attended = F.dropout(weights, dropout) @ value.repeat_interleave(groups, 1)
        elif query.shape[2] == 1 and query.device.type == "cpu" and not dropout:
            attended = _attend_once(query, key, value, mask.allowed)
        elif mask.groups is not None:
            attended = _attend_by_groups(query, key, value, mask, mask.groups, dropout)
        else:
            attended = _attend(query, key, value, mask, dropout)
        if mask.empty is not None:
            attended = attended.masked_fill(mask.empty, 0.0)
        return attended, weights


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask, dropout: float) -> Tensor:
    """The fused kernel; on CPUs in fp32 where its backward pass in bf16 takes about four times as long."""
    options = {"is_causal": mask.causal, "dropout_p": dropout, "enable_gqa": key.shape[1] != query.shape[1]}
    trained = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.requires_grad
    if not trained or (MATRIX_UNITS and query.shape[2] * key.shape[2] >= SCORES_FOR_MATRIX_UNITS):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.allowed, **options)
    with torch.autocast("cpu", enabled=False):
        triple = query.float(), key.float(), value.float()
        return F.scaled_dot_product_attention(*triple, attn_mask=mask.allowed, **options).to(query.dtype)


def _attend_by_groups(query: Tensor, key: Tensor, value: Tensor, mask: Mask, groups: Groups, dropout: float) -> Tensor:
    """Sparse attention that skips what no query of a group sees; one gather, so that the backward pass has one scatter."""
    assert mask.allowed is not None
    queries = query[:, :, groups.queries].split(groups.num_queries, 2)
    keys, values = (part[:, :, groups.keys].split(groups.num_keys, 2) for part in (key, value))
    rows, columns = groups.queries.split(groups.num_queries), groups.keys.split(groups.num_keys)
    parts = []
    for q, k, v, row, column in zip(queries, keys, values, rows, columns, strict=True):
        parts.append(_attend(q, k, v, Mask(mask.allowed[:, :, row[:, None], column]), dropout))
    return torch.cat(parts, 2)[:, :, groups.back]


def attend_by_products(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Attention without causality or dropout, by two products a head in bf16 inference on CPUs without matrix units.

    The fused kernel gains nothing from bf16 there. For 1,024 queries and keys of 64 numbers the products take 0.7 of its time,
    one head after the other so that scores stay in the cache, and for 256 of them in one piece; below a width of 32 it is
    quicker. Logits are rounded to bf16. Elsewhere it is the fused kernel that attends.
    """
    scores = query.shape[2] * key.shape[2]
    fits = query.shape[-1] >= 32 and scores in SCORES and query.shape == (*key.shape[:2], *query.shape[2:])
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not MATRIX_UNITS
    if not (short and fits) or allowed is not None or torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    triple = [part.flatten(0, 1) for part in (query * query.shape[-1] ** -0.5, key, value)]
    pieces = zip(*(part.split(1 if scores >= 1 << 19 else len(part)) for part in triple), strict=True)
    return torch.cat([(a @ b.transpose(-1, -2)).softmax(-1) @ c for a, b, c in pieces]).view(query.shape)


def _attention_weights(query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    """Softmax of the scaled products ``(B, H, T, S)``; zero in the rows that may see nothing."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    allowed = mask.tensor(scores.shape[-2], scores.shape[-1], scores.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1)
    return weights if mask.empty is None else weights.masked_fill(mask.empty, 0.0)


def _attend_once(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention of a single query, ``(B, H, 1, E)``, by two small products.

    The fused kernel for CPUs is made for many queries: with one it was slower by a quarter in fp32 and threefold in bf16. The
    queries that share keys and values become the rows of one product, so that nothing is repeated. Logits are rounded to the
    type of the keys, which the fused kernel's are not; the softmax is in fp32.
    """
    batch_size, num_heads, _, head_width = query.shape
    grouped = query.reshape(batch_size, key.shape[1], -1, head_width)
    scores = (grouped * head_width**-0.5) @ key.transpose(-1, -2)  # scaled first: a large product might not fit the type
    if allowed is not None:
        if num_heads != key.shape[1]:
            allowed = allowed.broadcast_to(batch_size, num_heads, 1, key.shape[2]).reshape(scores.shape)
        scores = scores.masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1, torch.float32).to(value.dtype) @ value).reshape(query.shape)
