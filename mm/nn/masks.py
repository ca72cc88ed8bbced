"""Who may attend to whom: one function for bidirectional, causal, prefix and sparse attention with key padding.

Shapes: B batch, H heads, Q queries, K keys.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from pydantic import Field, model_validator
from torch import Tensor

from mm.config import StrictConfig

MIN_GROUP = 64
"""Queries that are computed together where a pattern would have fewer beside each other."""

MOST_WORK = 0.6
"""Largest share of all pairs that are computed group by group; with more of them one dense product is as quick."""


class Groups(NamedTuple):
    """Queries that see nearly the same keys, so that all other keys can be skipped.

    Args:
        queries: All positions, group after group, ``(T,)``.
        num_queries: Of each group.
        keys: What any query of the group sees, group after group.
        num_keys: Of each group.
        back: Where in ``queries`` each position is, ``(T,)``.
    """

    queries: Int[Tensor, " t"]
    num_queries: tuple[int, ...]
    keys: Int[Tensor, " s"]
    num_keys: tuple[int, ...]
    back: Int[Tensor, " t"]


@dataclass(frozen=True)
class Mask:
    """What `mm.nn.attention.MultiHeadAttention` needs to know about visibility.

    Args:
        allowed: True where a query may see a key, broadcastable to ``(B, H, Q, K)``; None where `causal` says it all. A row
            that may see nothing is stored as seeing everything, so that no softmax is ever taken over nothing.
        empty: True for the rows that may see nothing, broadcastable to ``(B, H, Q, 1)``; their attention result is zero.
        causal: Query i sees the keys 0..i; the fastest kernels know this case without a tensor.
        groups: Where ``allowed`` is sparse: what need not be computed.
    """

    allowed: Bool[Tensor, "..."] | None = None
    empty: Bool[Tensor, "..."] | None = None
    causal: bool = False
    groups: Groups | None = None

    def tensor(self, num_queries: int, num_keys: int, device: torch.device) -> Bool[Tensor, "..."] | None:
        """The visibility as a tensor also where it is stored as a flag; None where everything is visible."""
        if not self.causal:
            return self.allowed
        return torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril()


EVERYTHING = Mask()
"""Every query sees every key."""


class Pattern(Protocol):
    """Sparse attention by position: hashable, so that what follows from it is computed once."""

    def visible(self, queries: Int[Tensor, "*b q"], keys: Int[Tensor, "*b k"]) -> Bool[Tensor, "*b q k"]:
        """Which pairs of positions it leaves; under a causal mask those of later keys mean nothing."""
        ...

    def groups(self, length: int) -> Int[Tensor, " t"]:
        """A number for each position: queries of the same number see nearly the same keys."""
        ...


Heads = Literal["both", "near", "far"]


@dataclass(frozen=True)
class Strided:
    """A position sees the last ``stride`` ones (near) and every ``stride``-th one (far), for data with a period.

    Source: https://arxiv.org/abs/1904.10509, section 4.3. Without a causal mask it looks to both sides.

    Args:
        stride: The period.
        heads: One of the two parts, or both.
    """

    stride: int
    heads: Heads = "both"

    def visible(self, queries: Int[Tensor, "*b q"], keys: Int[Tensor, "*b k"]) -> Bool[Tensor, "*b q k"]:
        """See `Pattern`."""
        distance = queries[..., :, None] - keys[..., None, :]
        near, far = distance.abs() <= self.stride, distance % self.stride == 0
        return {"near": near, "far": far, "both": near | far}[self.heads]

    def groups(self, length: int) -> Int[Tensor, " t"]:
        """See `Pattern`."""
        positions = torch.arange(length)
        return positions % self.stride if self.heads == "far" else positions // max(self.stride, MIN_GROUP)


@dataclass(frozen=True)
class Fixed:
    """A position sees those of its own stretch (near), and the last ``summary`` ones of every stretch and itself (far).

    Source: https://arxiv.org/abs/1904.10509, section 4.3, for data without a period, such as text.

    Args:
        stride: Length of a stretch.
        summary: Positions at the end of each stretch that all others may look at.
        heads: One of the two parts, or both.
    """

    stride: int
    summary: int
    heads: Heads = "both"

    def visible(self, queries: Int[Tensor, "*b q"], keys: Int[Tensor, "*b k"]) -> Bool[Tensor, "*b q k"]:
        """See `Pattern`."""
        queries, keys = queries[..., :, None], keys[..., None, :]
        near = queries // self.stride == keys // self.stride
        far = (keys % self.stride >= self.stride - self.summary) | (queries == keys)
        return {"near": near, "far": far, "both": near | far}[self.heads]

    def groups(self, length: int) -> Int[Tensor, " t"]:
        """See `Pattern`."""
        return torch.arange(length) // (self.stride * -(-MIN_GROUP // self.stride))


class SparseAttentionConfig(StrictConfig):
    """Attention to a part of the positions (https://arxiv.org/abs/1904.10509).

    Args:
        pattern: ``strided`` or ``fixed``, see `Strided` and `Fixed`.
        stride: Period, or length of a stretch; about the square root of the longest sequence leaves the least work.
        summary: Positions at the end of each stretch that all others see, for ``fixed``.
        heads: Layers take the near and the far part in turn (``alternate``), or each layer sees ``both``; of ``strided`` both
            together save no time.
    """

    pattern: Literal["strided", "fixed"]
    stride: int = Field(ge=2)
    summary: int = Field(default=4, ge=1)
    heads: Literal["alternate", "both"] = "alternate"

    @model_validator(mode="after")
    def _possible(self) -> "SparseAttentionConfig":
        if self.pattern == "fixed" and self.summary > self.stride:
            raise ValueError(f"summary {self.summary} is longer than a stretch of {self.stride}; lower it")
        return self

    def of_layer(self, layer: int) -> Pattern:
        """The pattern of a layer, counted from 0."""
        heads: Heads = "both" if self.heads == "both" else "far" if layer % 2 else "near"
        return Strided(self.stride, heads) if self.pattern == "strided" else Fixed(self.stride, self.summary, heads)


def patterns_of(config: SparseAttentionConfig | None, num_layers: int) -> tuple[Pattern | None, ...]:
    """The pattern of each layer, or one None for all."""
    return (None,) if config is None else tuple(config.of_layer(layer) for layer in range(num_layers))


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

    def visible(self, queries: Int[Tensor, "*b q"], keys: Int[Tensor, "*b k"]) -> Bool[Tensor, "*b q k"]:
        """See `Pattern`."""
        queries, keys = queries[..., :, None], keys[..., None, :]
        distance = queries - keys
        if self.pattern == "row":
            near = distance <= self.columns
        elif self.pattern == "column":
            near = distance % self.columns == 0
        else:
            half = self.kernel // 2
            near = ((distance + half) % self.columns <= 2 * half) & (distance <= half * (self.columns + 1))
        return near | (keys < self.num_text) | (queries < self.num_text)

    def groups(self, length: int) -> Int[Tensor, " t"]:
        """See `Pattern`."""
        place = torch.arange(length) - self.num_text
        if self.pattern == "column":
            return torch.where(place < 0, 0, 1 + place % self.columns)
        return torch.where(place < 0, 0, 1 + place // (self.columns * -(-MIN_GROUP // self.columns)))


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
    pattern: Pattern | None = None,
    positions: Int[Tensor, "b k"] | None = None,
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
        pattern: Sparse attention by position; `Raster` restricts a causal mask.
        positions: Of all keys, for ``pattern``, where rows do not begin at 0.
        device: Of the mask, where neither ``keys`` nor ``blocks`` nor ``prefix`` is a tensor that tells it.
    """
    num_keys = num_queries if num_keys is None else num_keys
    has_prefix = isinstance(prefix, Tensor) or prefix > 0
    assert causal or not has_prefix, "a prefix is an exception to a causal mask"
    assert causal or not isinstance(pattern, Raster), "raster patterns restrict a causal mask"
    assert num_keys >= num_queries or not causal, "causal queries are the last positions of the keys"
    if keys is None and blocks is None and pattern is None:
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
    groups = None
    if pattern is not None and positions is not None:
        allowed = allowed & pattern.visible(positions[:, num_keys - num_queries :], positions)[:, None]
    elif pattern is not None:
        if num_queries == num_keys and not torch.compiler.is_compiling():
            visible, groups = _whole(pattern, num_keys, causal, device)
        else:
            positions = torch.arange(num_keys, device=device)
            visible = pattern.visible(positions[num_keys - num_queries :], positions)
        allowed = allowed & visible
    if blocks is not None:
        assert num_queries % blocks.shape[0] == 0, "queries are divided evenly into blocks"
        assert num_keys % blocks.shape[1] == 0, "keys are divided evenly into blocks"
        rows = blocks.repeat_interleave(num_queries // blocks.shape[0], 0)
        allowed = allowed & rows.repeat_interleave(num_keys // blocks.shape[1], 1)
    if keys is not None:
        allowed = allowed & keys[:, None, None, :]
    if keys is None and blocks is None:
        return Mask(allowed, groups=groups)
    empty = ~allowed.any(-1, keepdim=True)
    return Mask(allowed | empty, empty, groups=groups)


def layer_masks(patterns: Sequence[Pattern | None], make: Callable[[Pattern | None], Mask]) -> Mask | list[Mask]:
    """One mask for all layers, or one for each; layers of the same pattern share theirs."""
    masks = {pattern: make(pattern) for pattern in dict.fromkeys(patterns)}
    return masks[patterns[0]] if len(masks) == 1 else [masks[pattern] for pattern in patterns]


@functools.lru_cache(maxsize=16)
def _whole(pattern: Pattern, length: int, causal: bool, device: torch.device | None) -> tuple[Tensor, Groups | None]:
    """What a pattern leaves of all pairs, ``(T, T)``, and groups of queries where much is left out; computed once."""
    with torch.inference_mode(mode=False):
        positions = torch.arange(length, device=device)
        visible = pattern.visible(positions, positions)
        seen = visible.tril() if causal else visible
        number = pattern.groups(length).to(seen.device)
        order = number.argsort(stable=True)
        num_of_group = torch.bincount(number)
        queries = order.split([count for count in num_of_group.tolist() if count])
        keys = [seen[group].any(0).nonzero()[:, 0] for group in queries]
        if sum(len(q) * len(k) for q, k in zip(queries, keys, strict=True)) > MOST_WORK * length**2:
            return visible, None
        sizes = tuple(map(len, queries)), tuple(map(len, keys))
        return visible, Groups(order, sizes[0], torch.cat(keys), sizes[1], order.argsort())
