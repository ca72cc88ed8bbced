"""An optimizer's state that waits on the CPU: it comes to the parameters part by part for their step, and goes back.

The accelerator holds the state of one part at a time, during the update, when no activations are there. ZeRO-Offload
(https://arxiv.org/abs/2101.06840) takes the step on the CPU, which sends half as much (a gradient there and a weight back, not
AdamW's two averages both ways) at the CPU's speed. Here the step stays where the parameters are, so it is any optimizer's, in
any layout, to the bit, Muon's with its products and what it gathers included.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mm.placement import local

PART_BYTES = 256 << 20
"""Of parameters; AdamW's state of them is twice as large."""

HOME = torch.device("cpu")


def step_by_parts(optimizer: torch.optim.Optimizer) -> None:
    """Take an optimizer's step, a part of the parameters with gradients after the other.

    Processes with pieces of parameters of other sizes have other parts; what steps send keeps the order of parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    for parameter in gradients:
        parameter.grad = None
    for part in _parts(list(gradients)):
        for parameter in part:
            parameter.grad = gradients[parameter]
            move_state(optimizer, parameter, parameter.device)
        optimizer.step()
        for parameter in part:
            parameter.grad = None
            move_state(optimizer, parameter, HOME)
    for parameter, gradient in gradients.items():
        parameter.grad = gradient


def move_state(optimizer: torch.optim.Optimizer, parameter: Tensor, device: torch.device = HOME) -> None:
    """Bring what an optimizer keeps of a parameter to a device, but for counters, of which kernels know where they are."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.ndim:
            state[key] = value.to(device)


def _parts(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    part, size = [], 0
    for parameter in parameters:
        part.append(parameter)
        size += local(parameter).nbytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
