"""Prefix tuning: trained keys and values that every position of a frozen attention sees (https://arxiv.org/abs/2101.00190).

Deviations: the prefix has a softmax of its own, as in LLaMA-Adapter (https://arxiv.org/abs/2303.16199), and its values begin at
zero. So nothing changes at first, without a gate, and neither masks nor positions, caches or attention maps know of it; in one
softmax with the sequence the R vectors would take weight from it whatever their values were. Keys and values are trained
directly, not by way of a network that is thrown away afterwards.

Prompt tuning (https://arxiv.org/abs/2104.08691) is here the same in the first layer of each transformer alone, where vectors in
front of the sequence are keys and values, too. At the input itself they would move the positions, masks and pooling of every
system. Deviation: deeper layers see no prompt of their own.

Shapes: B batch, T queries, H heads, G key-value heads, E width of a head, R vectors of the prefix.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mm.nn.attention import MultiHeadAttention
from mm.nn.masks import Mask
from mm.nn.targets import TargetsConfig, choose, freeze_all_but
from mm.nn.transformer import Block, Transformer


class PrefixConfig(TargetsConfig):
    """Which self-attentions get a prefix, and how long it is. Targets are attentions, such as "*.text.*.attention".

    Args:
        method: Names these prefixes.
        length: R; an attention gets ``2 R G E`` parameters.
    """

    method: Literal["prefix"] = "prefix"
    length: int = Field(default=16, ge=1)


class PromptConfig(TargetsConfig):
    """As `PrefixConfig`, in the first layer of each transformer alone.

    Args:
        method: Names these prompts.
        length: R.
    """

    method: Literal["prompt"] = "prompt"
    length: int = Field(default=16, ge=1)


class Prefix(nn.Module):
    """Keys and values ``(G, R, E)``. Values begin at zero, so that nothing changes at first.

    Args:
        attention: Whose queries see them.
        length: R.
    """

    def __init__(self, attention: MultiHeadAttention, length: int) -> None:
        super().__init__()
        shape, like = (attention.num_kv_heads, length, attention.head_width), attention.query.weight
        self.keys = nn.Parameter(torch.randn(shape, dtype=like.dtype, device=like.device))
        self.values = nn.Parameter(like.new_zeros(shape))

    def forward(self, query: Float[Tensor, "b h t e"]) -> Float[Tensor, "b h t e"]:
        """What the queries find; those that share keys and values become the rows of one product."""
        grouped = query.reshape(query.shape[0], self.keys.shape[0], -1, query.shape[-1])
        scores = grouped * query.shape[-1] ** -0.5 @ self.keys.mT
        return (scores.softmax(-1, torch.float32).to(query.dtype) @ self.values).reshape(query.shape)


class PrefixedAttention(MultiHeadAttention):
    """Attention that a prefix was added to, in place."""

    prefix: Prefix

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, need_weights: bool, unrotated: Tensor
    ) -> tuple[Float[Tensor, "b h t e"], Float[Tensor, "b h t s"] | None]:
        """As that of any attention, and what is found in the prefix on top; weights are those of the sequence."""
        attended, weights = super().attend(query, key, value, mask, need_weights, unrotated)
        return attended + self.prefix(unrotated.to(self.prefix.keys.dtype)).to(attended.dtype), weights


def add_prefixes(module: nn.Module, config: PrefixConfig | PromptConfig) -> list[str]:
    """Freeze a module and give the self-attentions that ``targets`` name a trainable prefix, in place.

    What was frozen before gets none, nor does an attention that is not of the suite's blocks.

    Returns:
        Names of the attentions that have a prefix.

    Raises:
        UserError: A pattern matches no such attention.
    """
    attentions = dict(_self_attentions(module, first=config.method == "prompt"))
    chosen = choose(list(attentions), config.targets, "self-attention")
    freeze_all_but(module, config.train)
    for name in chosen:
        attention = attentions[name]
        attention.__class__ = PrefixedAttention
        attention.add_module("prefix", Prefix(attention, config.length))
    return chosen


def _self_attentions(module: nn.Module, *, first: bool) -> Iterator[tuple[str, MultiHeadAttention]]:
    """The trained ones by name, of all blocks or of the first one of each transformer."""
    firsts = {part.blocks[0] for part in module.modules() if isinstance(part, Transformer)}
    for name, block in module.named_modules():
        if isinstance(block, Block) and (block in firsts or not first) and block.attention.query.weight.requires_grad:
            yield f"{name}.attention", block.attention
