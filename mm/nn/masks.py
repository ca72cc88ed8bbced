"""Who may attend to whom: one function for bidirectional, causal, prefix and sparse attention with key padding.

Shapes: B batch, H heads, Q queries, K keys.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """What `mm.nn.attention.MultiHeadAttention` needs to know about visibility.

    Args:
        allowed: True where a query may see a key, broadcastable to ``(B, H, Q, K)``; None where `causal` says it all. A row
            that may see nothing is stored as seeing everything, so that no softmax is ever taken over nothing.
        empty: True for the rows that may see nothing, broadcastable to ``(B, H, Q, 1)``; their attention result is zero.
        causal: Query i sees the keys 0..i; the fastest kernels know this case without a tensor.
    """

    allowed: Bool[Tensor, "..."] | None = None
    empty: Bool[Tensor, "..."] | None = None
    causal: bool = False

    def tensor(self, num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "..."] | None:
        """The visibility as a tensor also where it is stored as a flag; None where everything is visible."""
        if not self.causal:
            return self.allowed
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()


EVERYTHING = Mask()
"""Every query sees every key."""


RasterPattern = Literal["row", "column", "convolutional"]


@dataclass(frozen=True)
class Raster:
    """DALL-E's sparse attention among the tokens of a picture behind a text (https://arxiv.org/abs/2102.12092, B.1, figure 11).

    It restricts a causal mask: a picture token sees all of the text, itself, and of the earlier picture tokens

    - "row": the last ``columns`` ones in raster order, back to the one right above, so that row ends are no borders,
    - "column": those above it,
    - "convolutional": those under a square kernel centred on it, which wraps around row ends, too.

    Args:
        pattern: One of the above.
        num_text: Positions before the picture.
        columns: Tokens in a row of the picture.
        kernel: Side of the convolutional kernel, odd.
    """

    pattern: RasterPattern
    num_text: int
    columns: int
    kernel: int = 11

    def visible(self, queries: Int[Tensor, " q"], keys: Int[Tensor, " k"]) -> Bool[Tensor, "q k"]:
        """Which pairs of positions the pattern leaves; those of later keys mean nothing."""
        distance = queries[:, None] - keys
        if self.pattern == "row":
            near = distance <= self.columns
        elif self.pattern == "column":
            near = distance % self.columns == 0
        else:
            half = self.kernel // 2
            near = ((distance + half) % self.columns <= 2 * half) & (distance <= half * (self.columns + 1))
        return near | (keys < self.num_text) | (queries < self.num_text)[:, None]


def dalle_layer_pattern(layer: int, num_layers: int) -> RasterPattern:
    """The pattern of a layer, counted from 0: row, column, row, row and so on, convolutional in the last one.

    The paper counts from 1: column where ``(i - 2) mod 4 = 0``.
    """
    if layer == num_layers - 1:
        return "convolutional"
    return "column" if layer % 4 == 1 else "row"


def attention_mask(
    num_queries: int,
    num_keys: int | None = None,
    *,
    causal: bool = False,
    prefix: Int[Tensor, " b"] | int = 0,
    keys: Bool[Tensor, "b k"] | None = None,
    blocks: Bool[Tensor, "qb kb"] | None = None,
    raster: Raster | None = None,
    device: torch.device | None = None,
) -> Mask:
    """Combine every kind of visibility; a query sees a key only if each given rule allows it.

    Args:
        num_queries: Q. With fewer queries than keys and ``causal``, the queries are the last Q positions (cached decoding).
        num_keys: K, Q if None.
        causal: Query i sees no later key.
        prefix: With ``causal``: the first ``prefix`` positions (of each row, if a tensor) are visible to all queries.
        keys: True for keys that may be attended to (key padding).
        blocks: Block-sparse visibility; positions are divided evenly into ``(qb, kb)`` blocks.
        raster: With ``causal``: sparse attention among the tokens of a picture.
        device: Of the mask, where neither ``keys`` nor ``blocks`` nor ``prefix`` is a tensor that tells it.
    """
    num_keys = num_queries if num_keys is None else num_keys
    has_prefix = isinstance(prefix, Tensor) or prefix > 0
    assert causal or not has_prefix, "a prefix is an exception to a causal mask"
    assert causal or raster is None, "raster patterns restrict a causal mask"
    assert num_keys >= num_queries or not causal, "causal queries are the last positions of the keys"
    if keys is None and blocks is None and raster is None:
        if not causal or num_queries == 1:
            return EVERYTHING
        if num_queries == num_keys and not has_prefix:
            return Mask(causal=True)
    device = next((t.device for t in (keys, blocks, prefix) if isinstance(t, Tensor)), device)
    allowed = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril(num_keys - num_queries)
    if has_prefix:
        ends = torch.as_tensor(prefix, device=device).view(-1, 1, 1, 1)
        allowed = allowed | (torch.arange(num_keys, device=device) < ends)
    if raster is not None:
        positions = torch.arange(num_keys, device=device)
        allowed = allowed & raster.visible(positions[num_keys - num_queries :], positions)
    if blocks is not None:
        assert num_queries % blocks.shape[0] == 0, "queries are divided evenly into blocks"
        assert num_keys % blocks.shape[1] == 0, "keys are divided evenly into blocks"
        rows = blocks.repeat_interleave(num_queries // blocks.shape[0], 0)
        allowed = allowed & rows.repeat_interleave(num_keys // blocks.shape[1], 1)
    if keys is not None:
        allowed = allowed & keys[:, None, None, :]
    if keys is None and blocks is None:
        return Mask(allowed)
    empty = ~allowed.any(-1, keepdim=True)
    return Mask(allowed | empty, empty)
