"""Low-rank adaptation: train a thin correction of frozen weights, fold it in afterwards (https://arxiv.org/abs/2106.09685).

A correction is a parametrization of the weight itself, so it works wherever a weight is used: linear layers, convolutions, and
attention that calls its weights without calling their layers. Shapes: O outputs, I inputs of a flattened weight, R rank.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from mm.nn.freeze import release
from mm.nn.targets import TargetsConfig, choose, freeze_all_but

WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""Matrices that a correction is made for, by the name that torch's layers give them."""


class LoraConfig(TargetsConfig):
    """Which weights are corrected, and how thinly. Targets are layers, such as "*.attn.qkv".

    Args:
        method: Names these corrections.
        rank: R; the corrections of an ``O x I`` weight have ``R (O + I)`` parameters.
        alpha: The correction is scaled by ``alpha / rank``.
        dropout: Probability that the corrections do without an input in a training step, the same inputs for the whole batch.
    """

    method: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class Correction(nn.Module):
    """Adds ``scale * up @ down`` to a weight. ``up`` begins at zero, so that nothing changes at first.

    Args:
        weight: The weight to be corrected, ``(O, ...)``.
        rank: R.
        scale: Multiplier of the correction.
        dropout: See `LoraConfig`.
    """

    def __init__(self, weight: Tensor, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        self.scale = scale
        self.dropout = dropout
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))
        self.down = nn.Parameter(torch.empty(rank, inputs, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        down = self.down
        if self.training and self.dropout:
            down = down * F.dropout(torch.ones_like(down[:1]), self.dropout)
        return weight + self.scale * (self.up @ down).view_as(weight)


def add_lora(module: nn.Module, config: LoraConfig) -> list[str]:
    """Freeze a module and give the layers that ``targets`` name a trainable correction, in place.

    What was frozen before, such as the encoder of a locked tower, gets none.

    Returns:
        Names of the corrected weights.

    Raises:
        UserError: A pattern matches no layer with a weight matrix.
    """
    layers = dict(_layers(module))
    chosen = choose(list(layers), config.targets, "layer")
    freeze_all_but(module, config.train)
    scale, corrected = config.alpha / config.rank, []
    for name in chosen:
        layer = module.get_submodule(name)
        for weight in layers[name]:
            correction = Correction(getattr(layer, weight), rank=config.rank, scale=scale, dropout=config.dropout)
            parametrize.register_parametrization(layer, weight, correction)
            corrected.append(f"{name}.{weight}")
    return corrected


def merge_lora(module: nn.Module) -> None:
    """Fold all corrections into their weights, in place; names are those of the module before `add_lora`.

    What `add_lora` froze stays frozen, except for the running statistics of batch normalization.
    """
    for part in list(module.modules()):
        if isinstance(part, _BatchNorm):
            release(part)
        if parametrize.is_parametrized(part):
            for weight in list(part.parametrizations):  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
                if parametrize.is_parametrized(part, weight):
                    parametrize.remove_parametrizations(part, weight, leave_parametrized=True)


def _layers(module: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """Layers that can be corrected, with the names of their own weights that are trained."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
            found = [(weight, getattr(part, weight, None)) for weight in WEIGHTS]
            weights = [weight for weight, value in found if isinstance(value, Tensor) and value.requires_grad]
            if weights:
                yield name, weights
