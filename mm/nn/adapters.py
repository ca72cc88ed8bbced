"""Adapters: a narrow trained detour behind the branches of frozen blocks (https://arxiv.org/abs/1902.00751).

An adapter belongs to the linear layer that its branch ends with and is called by a hook of that layer: nothing is wrapped, all
weights keep their names. It reads what the branch gives, before the residual sum and any norm behind it. Adapters behind both
attention and feed-forward are those of the paper, behind the feed-forward alone that of https://arxiv.org/abs/2005.00247.
Deviation: norms stay frozen, unless ``train`` names them.
"""

from collections.abc import Mapping
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mm.nn.linear import Linear
from mm.nn.targets import TargetsConfig, choose, freeze_all_but

Branch = Literal["attention", "cross_attention", "feed_forward"]

BRANCHES: Mapping[str, Branch] = {
    "attention.output": "attention",
    "cross_attention.output": "cross_attention",
    "feed_forward.output": "feed_forward",
    "attn.proj": "attention",
    "mlp.fc2": "feed_forward",
    "mlp.c_proj": "feed_forward",
}
"""Last linear layers of the branches of a block, by the names of the suite, then of timm and open_clip.

torch's own attention is left out: it multiplies with the weight of its last layer without calling the layer."""


class AdapterConfig(TargetsConfig):
    """Where adapters stand, and how narrow they are. Targets are blocks, such as "*.text.transformer.blocks.*".

    Args:
        method: Names these adapters.
        width: Of the bottleneck, W; behind a branch of width D an adapter has ``2 W D + W + D`` parameters.
        behind: Branches of a block that end with an adapter.
    """

    method: Literal["adapter"] = "adapter"
    width: int = Field(default=32, ge=1)
    behind: tuple[Branch, ...] = Field(default=("feed_forward",), min_length=1)


class Adapter(nn.Module):
    """``up(gelu(down(x)))``. ``up`` begins at zero, so that nothing changes at first.

    Args:
        width: D.
        hidden_width: Of the bottleneck.
    """

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.down = Linear(width, hidden_width)
        self.up = Linear(hidden_width, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.up(F.gelu(self.down(x)))


def add_adapters(module: nn.Module, config: AdapterConfig) -> list[str]:
    """Freeze a module and put a trainable adapter behind branches of the blocks that ``targets`` name, in place.

    Blocks are the suite's and those of timm and open_clip whose branches end with a linear layer that is called as one. What
    was frozen before gets none.

    Returns:
        Names of the layers that have an adapter.

    Raises:
        UserError: A pattern matches no block with such a branch.
    """
    blocks = {name: found for name, block in module.named_modules() if (found := _ends(block, config.behind))}
    chosen = choose(list(blocks), config.targets, f"block with {' or '.join(config.behind)}")
    freeze_all_but(module, config.train)
    adapted = []
    for name in chosen:
        for path, layer in blocks[name].items():
            adapter = Adapter(layer.out_features, config.width).to(layer.weight)
            layer.add_module("adapter", adapter)
            layer.register_forward_hook(_add)
            adapted.append(f"{name}.{path}")
    return adapted


def _add(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    """Hook of a layer with an adapter; it holds no module itself, so that a copied layer calls its own adapter."""
    return output + layer.adapter(output)  # pyright: ignore[reportCallIssue]


def _ends(block: nn.Module, behind: tuple[Branch, ...]) -> dict[str, nn.Linear]:
    """The last layers of some branches of a module, where it is a block, has them, and they are trained."""
    found = {}
    for path, branch in BRANCHES.items():
        layer = _child(block, path)
        if branch in behind and isinstance(layer, nn.Linear) and layer.weight.requires_grad:
            found[path] = layer
    return found


def _child(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None
