"""The one transformer: a stack of blocks that a small factory makes from injected parts.

A BERT, GPT-2, LLaMA or CLIP text model differs in the parts it injects: the norm and its place, the attention, the
feed-forward, the positions. So none of them is an option here.

Shapes: B batch, T positions, S positions of the context, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import GridRotary, Rotary
from mm.nn.experts import Experts
from mm.nn.linear import Linear
from mm.nn.masks import EVERYTHING, Mask

NormPlace = Literal["pre", "post", "sandwich"]

NUM_MODULATIONS = 6
"""Shift, scale and gate of self-attention, then of the feed-forward."""

Triple = tuple[Tensor, Tensor, Tensor]

Contexts = tuple[tuple[Tensor, Tensor] | None, ...]
"""Keys and values of a context for each layer; None for layers without cross-attention."""


class QuickGELU(nn.Module):
    """``x * sigmoid(1.702 x)``: what OpenAI's CLIP weights were trained with; GELU in its place costs accuracy silently."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class FeedForward(nn.Module):
    """Two linear layers with an activation between.

    Args:
        width: D.
        hidden_width: Of the activation.
        activation: Any elementwise module.
        bias: Whether the layers have a bias.
    """

    def __init__(self, width: int, hidden_width: int, activation: nn.Module, *, bias: bool = True) -> None:
        super().__init__()
        self.input = Linear(width, hidden_width, bias)
        self.activation = activation
        self.output = Linear(hidden_width, width, bias)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.output(self.activation(self.input(x)))


class GatedFeedForward(nn.Module):
    """SwiGLU, ``output(silu(gate(x)) * input(x))`` (https://arxiv.org/abs/2002.05202), without biases as in LLaMA.

    Args:
        width: D.
        hidden_width: Of the gate.
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate = Linear(width, hidden_width, bias=False)
        self.input = Linear(width, hidden_width, bias=False)
        self.output = Linear(hidden_width, width, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.output(F.silu(self.gate(x)) * self.input(x))


class Residual(nn.Module):
    """Adds a branch to its input, with a norm somewhere.

    | Place      | Result              | Used by |
    |------------|---------------------|---------|
    | "pre"      | x + f(norm(x))      | GPT-2, CLIP, LLaMA |
    | "post"     | norm(x + f(x))      | BERT, ALBEF |
    | "sandwich" | x + norm(f(norm(x)))| CogView (https://arxiv.org/abs/2105.13290, section 2.3), with two norms |

    CogView's other measures against overflow in fp16 change nothing here: torch's fused attention forms its logits in fp32 and
    subtracts their maximum, which is what PB-relax is for, and torch's norms compute in fp32, so that their input need not be
    scaled down first.

    Args:
        norm: Makes a norm of the last dimension; called once, or twice for "sandwich".
        place: See above.
        dropout: Probability of dropping a component of the branch in training.
    """

    def __init__(self, norm: Callable[[], nn.Module], place: NormPlace, dropout: float) -> None:
        super().__init__()
        self.norm = norm()
        self.branch_norm = norm() if place == "sandwich" else nn.Identity()
        self.place = place
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, branch: Callable[[Tensor], Tensor], modulation: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """Add ``branch`` of ``x``. A modulation (shift, scale, gate, each ``(B, 1, D)``) changes what the branch reads and how
        much of its result counts: adaptive layer norm (https://arxiv.org/abs/2212.09748), for places other than "post"."""
        if self.place == "post":
            return self.norm(x + self.dropout(branch(x)))
        normed = self.norm(x)
        if modulation is None:
            return x + self.dropout(self.branch_norm(branch(normed)))
        shift, scale, gate = modulation
        return x + gate * self.dropout(self.branch_norm(branch(normed * (1 + scale) + shift)))


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward, each added to its input.

    Args:
        attention: Within the sequence.
        feed_forward: Any module that keeps the shape ``(B, T, D)``.
        norm: Makes one norm; called for each branch.
        norm_place: See `Residual`.
        cross_attention: To the context, between the other two.
        dropout: Of each branch's result.
        modulated_width: D, where self-attention and feed-forward are modulated by a condition that all blocks share, to which
            each block adds its own constants (adaLN-single, https://arxiv.org/abs/2310.00426).
    """

    def __init__(
        self,
        *,
        attention: MultiHeadAttention,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        norm_place: NormPlace = "pre",
        cross_attention: MultiHeadAttention | None = None,
        dropout: float = 0.0,
        modulated_width: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_residual = Residual(norm, norm_place, dropout)
        self.cross_attention = cross_attention
        self.cross_attention_residual = Residual(norm, norm_place, dropout) if cross_attention is not None else None
        self.feed_forward = feed_forward
        self.feed_forward_residual = Residual(norm, norm_place, dropout)
        self.modulation: nn.Parameter | None = None
        if modulated_width is not None:
            self.modulation = nn.Parameter(torch.zeros(NUM_MODULATIONS, modulated_width))
            self.modulation.no_decay = True  # pyright: ignore[reportAttributeAccessIssue]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | tuple[Tensor, Tensor] | None = None,
        *,
        mask: Mask = EVERYTHING,
        context_mask: Mask = EVERYTHING,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        position: int | Tensor | None = None,
        condition: Float[Tensor, "b 6 d"] | None = None,
        token_ids: Int[Tensor, "b t"] | None = None,
        maps: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """One block; see `Transformer.forward`. ``maps``, where given, receives "attention" and "cross_attention" weights."""
        first, second = self._modulations(condition)

        def attend(x: Tensor) -> Tensor:
            result, weights = self.attention(
                x, mask=mask, rotation=rotation, cache=cache, position=position, need_weights=maps is not None
            )
            if maps is not None and weights is not None:
                maps["attention"] = weights
            return result

        def cross_attend(x: Tensor) -> Tensor:
            assert self.cross_attention is not None
            source = context if cache is None or cache.context is None else cache.context
            assert source is not None, "a block with cross-attention needs a context"
            if cache is not None and isinstance(source, Tensor):
                source = cache.context = self.cross_attention.keys_and_values(source)
            result, weights = self.cross_attention(x, source, mask=context_mask, need_weights=maps is not None)
            if maps is not None and weights is not None:
                maps["cross_attention"] = weights
            return result

        def feed(x: Tensor) -> Tensor:
            experts = isinstance(self.feed_forward, Experts)
            return self.feed_forward(x, token_ids) if experts else self.feed_forward(x)

        x = self.attention_residual(x, attend, first)
        if self.cross_attention_residual is not None:
            x = self.cross_attention_residual(x, cross_attend)
        return self.feed_forward_residual(x, feed, second)

    def _modulations(self, condition: Tensor | None) -> tuple[Triple | None, Triple | None]:
        """Shift, scale and gate of self-attention and of the feed-forward."""
        assert (condition is None) == (self.modulation is None), "a modulated block, and only that, is given a condition"
        if condition is None or self.modulation is None:
            return None, None
        a, b, c, d, e, f = (condition + self.modulation.to(condition.dtype)).unsqueeze(2).unbind(1)
        return (a, b, c), (d, e, f)


class Transformer(nn.Module):
    """A stack of blocks.

    Args:
        make_block: Makes the block of a layer, counted from 0 (so that only some layers attend to the context).
        num_layers: How many.
        final_norm: After the last block, if the blocks themselves do not end with one.
        rotary: Rotary positions, shared by all layers.
        gradient_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(
        self,
        make_block: Callable[[int], Block],
        num_layers: int,
        *,
        final_norm: nn.Module | None = None,
        rotary: Rotary | GridRotary | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make_block(layer) for layer in range(num_layers))
        self.final_norm = nn.Identity() if final_norm is None else final_norm
        self.rotary = rotary
        self.gradient_checkpointing = gradient_checkpointing

    def caches(self, batch_size: int, capacity: int) -> list[KVCache]:
        """Empty caches of all layers for step-by-step decoding of at most ``capacity`` positions."""
        return [block.attention.cache(batch_size, capacity) for block in self._blocks()]

    def contexts(self, context: Float[Tensor, "b s c"]) -> Contexts:
        """Keys and values of the context for each layer, for calls that attend to the same one many times."""
        attentions = [block.cross_attention for block in self._blocks()]
        return tuple(None if attention is None else attention.keys_and_values(context) for attention in attentions)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | Contexts | None = None,
        *,
        mask: Mask | Sequence[Mask] = EVERYTHING,
        context_mask: Mask = EVERYTHING,
        caches: list[KVCache] | None = None,
        position: int | Tensor | None = None,
        condition: Float[Tensor, "b 6 d"] | None = None,
        token_ids: Int[Tensor, "b t"] | None = None,
        maps: list[dict[str, Tensor]] | None = None,
        layers: range | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Run all blocks.

        Args:
            x: The sequence; with ``caches``, only its positions that are not in them yet.
            context: Another sequence, for blocks that have cross-attention, or what `contexts` made of it.
            mask: Visibility within the sequence, or that of each layer; with ``position``, of all that the caches have room
                for, of which nothing behind ``x`` is ever seen.
            context_mask: Visibility of the context.
            caches: From `caches`; filled as a side effect. They also keep the keys and values of the context, which later
                calls need not give again.
            position: Where ``x`` begins in the caches, behind what they hold if None. An int64 tensor ``(1,)``, for a
                single position, keeps every shape the same from step to step, as torch.compile wants it.
            condition: For modulated blocks: shifts, scales and gates, to which each block adds its own.
            token_ids: What stands at each position of ``x``, for blocks with experts (`mm.nn.experts.Experts`); negative for
                padding.
            maps: Receives one dictionary of attention weights ``(B, H, T, S)`` a layer, part of the graph.
            layers: Run only these; the final norm belongs to the last one.
        """
        layers = range(len(self.blocks)) if layers is None else layers
        rotation = None if self.rotary is None else self._rotation(x.shape[1], caches, position)
        if caches is not None and position is not None:
            mask = _up_to(mask, position, x.shape[1], caches[0].keys.shape[2])
        blocks = self._blocks()
        for layer in layers:
            block = blocks[layer]
            layer_maps: dict[str, Tensor] | None = None if maps is None else {}
            layer_mask = mask if isinstance(mask, Mask) else mask[layer]
            options = {"mask": layer_mask, "context_mask": context_mask, "rotation": rotation, "maps": layer_maps}
            options |= {"condition": condition, "token_ids": token_ids}
            source = context[layer] if isinstance(context, tuple) else context
            if self.gradient_checkpointing and self.training and caches is None:
                x = checkpoint(block, x, source, use_reentrant=False, **options)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, source, cache=None if caches is None else caches[layer], position=position, **options)
            if maps is not None and layer_maps is not None:
                maps.append(layer_maps)
        return self.final_norm(x) if layers.stop == len(blocks) else x

    def _rotation(self, length: int, caches: list[KVCache] | None, position: int | Tensor | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions of ``length`` vectors."""
        assert self.rotary is not None
        if isinstance(position, Tensor):
            assert caches is not None
            cos, sin = self.rotary(caches[0].keys.shape[2])
            return cos[position], sin[position]
        if position is None:
            position = caches[0].length if caches else 0
        return self.rotary(length, position)

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyright: ignore[reportReturnType]


class Stack(nn.Module):
    """Transformers one after the other, as if they were one.

    Args:
        transformers: Each takes what the one before gives; blocks without cross-attention make nothing of the context.
    """

    def __init__(self, *transformers: Transformer) -> None:
        super().__init__()
        self.transformers = nn.ModuleList(transformers)

    @property
    def blocks(self) -> list[Block]:
        """Of all transformers."""
        return [block for part in self._parts() for block in part._blocks()]

    def caches(self, batch_size: int, capacity: int) -> list[KVCache]:
        """Those of all layers, see `Transformer.caches`."""
        return [cache for part in self._parts() for cache in part.caches(batch_size, capacity)]

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None = None,
        *,
        caches: list[KVCache] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b t d"]:
        """See `Transformer.forward`."""
        first = 0
        for part in self._parts():
            last = first + len(part.blocks)
            x = part(x, context, caches=None if caches is None else caches[first:last], **options)
            first = last
        return x

    def _parts(self) -> list[Transformer]:
        return list(self.transformers)  # pyright: ignore[reportReturnType]


def _up_to(mask: Mask | Sequence[Mask], position: int | Tensor, length: int, capacity: int) -> Mask | list[Mask]:
    """Visibility for ``length`` vectors at ``position``, of a mask over ``capacity`` keys."""
    if not isinstance(mask, Mask):
        return [replace(layer, allowed=_reached(layer, position, length, capacity)) for layer in mask]
    return replace(mask, allowed=_reached(mask, position, length, capacity))


def _reached(mask: Mask, position: int | Tensor, length: int, capacity: int) -> Tensor | None:
    if isinstance(position, int):
        return None if mask.allowed is None else mask.allowed[..., : position + length]
    assert length == 1, "a position in a tensor is that of a single vector"
    reached = torch.arange(capacity, device=position.device) <= position
    return reached if mask.allowed is None else mask.allowed & reached
