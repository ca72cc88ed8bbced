"""The one transformer: a stack of blocks that a small factory makes from injected parts.

A BERT, GPT-2, LLaMA or CLIP text model differs in the parts it injects: the norm and its place, the attention, the
feed-forward, the positions. So none of them is an option here.

Shapes: B batch, T positions, S positions of the context, D width.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import Rotary
from mm.nn.masks import EVERYTHING, Mask


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
        self.input = nn.Linear(width, hidden_width, bias)
        self.activation = activation
        self.output = nn.Linear(hidden_width, width, bias)

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
        self.gate = nn.Linear(width, hidden_width, bias=False)
        self.input = nn.Linear(width, hidden_width, bias=False)
        self.output = nn.Linear(hidden_width, width, bias=False)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        return self.output(F.silu(self.gate(x)) * self.input(x))


class Residual(nn.Module):
    """Adds a branch to its input: ``x + f(norm(x))`` where the norm comes first, ``norm(x + f(x))`` where it comes last.

    Args:
        norm: Normalises the last dimension.
        place: Before the branch ("pre": GPT-2, CLIP, LLaMA) or after the sum ("post": BERT, ALBEF).
        dropout: Probability of dropping a component of the branch in training.
    """

    def __init__(self, norm: nn.Module, place: Literal["pre", "post"], dropout: float) -> None:
        super().__init__()
        self.norm = norm
        self.place = place
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.place == "pre":
            return x + self.dropout(branch(self.norm(x)))
        return self.norm(x + self.dropout(branch(x)))


class Block(nn.Module):
    """Self-attention, optional cross-attention, feed-forward, each added to its input.

    Args:
        attention: Within the sequence.
        feed_forward: Any module that keeps the shape ``(B, T, D)``.
        norm: Makes one norm; called once a branch.
        norm_place: See `Residual`.
        cross_attention: To the context, between the other two.
        dropout: Of each branch's result.
    """

    def __init__(
        self,
        *,
        attention: MultiHeadAttention,
        feed_forward: nn.Module,
        norm: Callable[[], nn.Module],
        norm_place: Literal["pre", "post"] = "pre",
        cross_attention: MultiHeadAttention | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.attention_residual = Residual(norm(), norm_place, dropout)
        self.cross_attention = cross_attention
        self.cross_attention_residual = Residual(norm(), norm_place, dropout) if cross_attention is not None else None
        self.feed_forward = feed_forward
        self.feed_forward_residual = Residual(norm(), norm_place, dropout)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None = None,
        *,
        mask: Mask = EVERYTHING,
        context_mask: Mask = EVERYTHING,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | None = None,
        maps: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """One block; see `Transformer.forward`. ``maps``, where given, receives "attention" and "cross_attention" weights."""

        def attend(x: Tensor) -> Tensor:
            result, weights = self.attention(x, mask=mask, rotation=rotation, cache=cache, need_weights=maps is not None)
            if maps is not None and weights is not None:
                maps["attention"] = weights
            return result

        def cross_attend(x: Tensor) -> Tensor:
            assert self.cross_attention is not None
            assert context is not None, "a block with cross-attention needs a context"
            result, weights = self.cross_attention(x, context, mask=context_mask, need_weights=maps is not None)
            if maps is not None and weights is not None:
                maps["cross_attention"] = weights
            return result

        x = self.attention_residual(x, attend)
        if self.cross_attention_residual is not None:
            x = self.cross_attention_residual(x, cross_attend)
        return self.feed_forward_residual(x, self.feed_forward)


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
        rotary: Rotary | None = None,
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

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None = None,
        *,
        mask: Mask = EVERYTHING,
        context_mask: Mask = EVERYTHING,
        caches: list[KVCache] | None = None,
        maps: list[dict[str, Tensor]] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Run all blocks.

        Args:
            x: The sequence; with ``caches``, only its positions that are not in them yet.
            context: Another sequence, for blocks that have cross-attention.
            mask: Visibility within the sequence.
            context_mask: Visibility of the context.
            caches: From `caches`; filled as a side effect.
            maps: Receives one dictionary of attention weights ``(B, H, T, S)`` a layer, part of the graph.
        """
        offset = caches[0].length if caches else 0
        rotation = None if self.rotary is None else self.rotary(x.shape[1], offset)
        for layer, block in enumerate(self._blocks()):
            layer_maps: dict[str, Tensor] | None = None if maps is None else {}
            options = {"mask": mask, "context_mask": context_mask, "rotation": rotation, "maps": layer_maps}
            if self.gradient_checkpointing and self.training and caches is None:
                x = checkpoint(block, x, context, use_reentrant=False, **options)  # pyright: ignore[reportAssignmentType]
            else:
                x = block(x, context, cache=None if caches is None else caches[layer], **options)
            if maps is not None and layer_maps is not None:
                maps.append(layer_maps)
        return self.final_norm(x)

    def _blocks(self) -> list[Block]:
        return list(self.blocks)  # pyright: ignore[reportReturnType]
