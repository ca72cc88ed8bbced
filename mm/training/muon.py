"""Muon: matrices take steps of orthogonalised momentum, all else AdamW's.

Sources: https://kellerjordan.github.io/posts/muon (the method and the coefficients of the iteration; convolutions are matrices
of one row an output channel), https://arxiv.org/abs/2502.16982 (steps as long as AdamW's, so that one rate serves both).
torch's own class refuses convolutions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm.placement import own, whole
from mm.training.devices import choose_dtype

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADAMW_LENGTH = 0.2
"""Root mean square of an entry of AdamW's usual step, in learning rates."""


class Muon(torch.optim.Optimizer):
    """One optimizer of two rules.

    Args:
        matrices: Groups of parameters of two or more dimensions, which are flattened behind the first.
        others: Groups that AdamW moves.
        lr: Learning rate of groups that have none of their own.
        weight_decay: Decoupled decay of groups that have none of their own.
        adamw: AdamW's other options.
    """

    def __init__(
        self,
        matrices: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float,
        **adamw: Any,
    ) -> None:
        nothing = [{"params": []}]
        super().__init__(matrices or nothing, {"lr": lr, "weight_decay": weight_decay})
        self._matrices = list(self.param_groups)
        self._adamw = torch.optim.AdamW(others or nothing, lr=lr, weight_decay=weight_decay, **adamw)
        self._adamw.state = self.state
        self.param_groups += self._adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every parameter that has a gradient."""
        assert closure is None, "gradients are computed before"
        self._adamw.step()
        for group in self._matrices:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov's
        ahead = whole(ahead, parameter)  # a matrix is orthogonal as a whole; processes that share it all compute it
        direction = orthogonalised(ahead.flatten(1))
        length = ADAMW_LENGTH * max(direction.shape) ** 0.5
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(own(direction.to(parameter.dtype).view(ahead.shape), parameter), alpha=-lr * length)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Roughly the nearest matrix with orthonormal rows or columns, by Newton and Schulz's iteration in the device's quick type.

    Singular values end up between about 0.7 and 1.2: the coefficients trade exactness for speed.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(choose_dtype("auto", matrix.device))
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.t()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.t() if tall else x


def split_groups(groups: Sequence[dict[str, Any]], module: nn.Module) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Parts of parameter groups for `Muon`: those of matrices within the network, and the rest.

    The matrices are the weights of linear layers and ungrouped convolutions that are not shared with an embedding and have no
    attribute ``end``, which marks the first and last layers of a network.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)]
    inner = {
        id(layer.weight) for layer in layers if getattr(layer, "groups", 1) == 1 and not getattr(layer.weight, "end", False)
    }
    inner -= {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}

    def part(matrices: bool) -> list[dict[str, Any]]:
        chosen = [{**group, "params": [p for p in group["params"] if (id(p) in inner) == matrices]} for group in groups]
        return [group for group in chosen if group["params"]]

    return part(True), part(False)
