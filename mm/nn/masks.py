"""Who may attend to whom: one function for bidirectional, causal, prefix and block-sparse attention with key padding.

Shapes: B batch, H heads, Q queries, K keys.
"""

from dataclasses import dataclass

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


def attention_mask(
    num_queries: int,
    num_keys: int | None = None,
    *,
    causal: bool = False,
    prefix: Int[Tensor, " b"] | int = 0,
    keys: Bool[Tensor, "b k"] | None = None,
    blocks: Bool[Tensor, "qb kb"] | None = None,
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
        device: Of the mask, where neither ``keys`` nor ``blocks`` nor ``prefix`` is a tensor that tells it.
    """
    num_keys = num_queries if num_keys is None else num_keys
    has_prefix = isinstance(prefix, Tensor) or prefix > 0
    assert causal or not has_prefix, "a prefix is an exception to a causal mask"
    assert num_keys >= num_queries or not causal, "causal queries are the last positions of the keys"
    if keys is None and blocks is None:
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
