"""Gated cross-attention: layers between those of a language model through which its words see media.

Source: Flamingo https://arxiv.org/abs/2204.14198, section 3.1.2 and figure 4. Each of the two branches is multiplied by the
tanh of a trained number that starts at 0, so that at first the language model computes exactly what it did without them.

Shapes: B texts, T positions, S positions of the context of width C, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.initialise import initialise_block
from mm.nn.masks import EVERYTHING, Mask
from mm.nn.transformer import Block, FeedForward


class GatedCrossAttention(nn.Module):
    """Cross-attention and feed-forward, each added to its input by a gate.

    Args:
        width: D.
        num_heads: Attention heads; divides ``width``.
        context_width: C.
    """

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, num_heads, context_width=context_width, bias=False)  # nothing adds nothing
        self.feed_forward = FeedForward(width, 4 * width, nn.GELU())
        self.attention_gate, self.feed_forward_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None,
        *,
        mask: Mask = EVERYTHING,
        cache: KVCache | None = None,
        maps: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """Read the context, or what ``cache`` has kept of it; arguments as `mm.nn.transformer.Block.forward`."""
        source = context if cache is None or cache.context is None else cache.context
        assert source is not None, "gated cross-attention needs a context"
        if cache is not None and isinstance(source, Tensor):
            source = cache.context = self.attention.keys_and_values(source)
        attended, weights = self.attention(self.attention_norm(x), source, mask=mask, need_weights=maps is not None)
        if maps is not None and weights is not None:
            maps["cross_attention"] = weights
        x = x + self.attention_gate.tanh() * attended
        return x + self.feed_forward_gate.tanh() * self.feed_forward(self.feed_forward_norm(x))


class GatedBlock(Block):
    """A block of a language model with gated cross-attention before it.

    Its parts are those of the block, under the names that they had, so that the language model's weights fit as they are. The
    gated layer is not among them: whoever has made it trains and keeps it.

    Args:
        block: Without cross-attention of its own.
        gated: What stands before it.
    """

    def __init__(self, block: Block, gated: GatedCrossAttention) -> None:
        nn.Module.__init__(self)
        assert block.cross_attention is None, "the block attends to a context by itself"
        self.cross_attention = self.cross_attention_residual = None
        self.modulation = block.modulation
        for name, part in block.named_children():
            self.add_module(name, part)
        self.__dict__["gated"] = gated

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | tuple[Tensor, Tensor] | None = None,
        *,
        context_mask: Mask = EVERYTHING,
        cache: KVCache | None = None,
        maps: dict[str, Tensor] | None = None,
        **options: Any,
    ) -> Float[Tensor, "b t d"]:
        """See `Block.forward`."""
        x = self.__dict__["gated"](x, context, mask=context_mask, cache=cache, maps=maps)
        return super().forward(x, cache=cache, maps=maps, **options)


def gates(context_width: int, every: int) -> tuple[nn.ModuleList, Callable[[int, Block], Block]]:
    """Gated cross-attention before every so many blocks, the first one included.

    Args:
        context_width: C.
        every: 1 puts one before each block.

    Returns:
        The new layers, none yet, which belong to the caller; and what puts them before the blocks of a language model while it
        is built, see `mm.generators.language_model.build_language_model`. `initialise_gates` is to be called when it is.
    """
    layers = nn.ModuleList()

    def wrap(layer: int, block: Block) -> Block:
        if layer % every:
            return block
        query = block.attention.query
        gated = GatedCrossAttention(query.in_features, query.in_features // block.attention.head_width, context_width)
        layers.append(gated)
        return GatedBlock(block, gated)

    return layers, wrap


def initialise_gates(layers: nn.ModuleList) -> None:
    """Draw the initial weights of all gated layers of a network."""
    for layer in layers:
        initialise_block(layer, len(layers))
