"""The optimizer, its learning-rate schedule, clipping, and its state by parameter name."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mm.errors import CheckpointError
from mm.placement import is_sharded, own, whole_shape
from mm.training.config import TrainConfig
from mm.training.muon import Muon, split_groups
from mm.training.offload import move_state
from mm.types import System


def build_optimizer(system: System, config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW or Muon over `System.parameter_groups`; a group's ``lr_scale`` multiplies its learning rate (default 1)."""
    groups = [
        {**group, "params": alike}
        for group in system.parameter_groups()
        for sharded in (False, True)  # torch's kernels take no list of both
        if (alike := [p for p in group["params"] if is_sharded(p) == sharded and not p.is_meta])
    ]
    options: dict[str, Any] = {
        "lr": config.lr,
        "weight_decay": config.weight_decay,
        "betas": config.betas,
        "eps": config.eps,
        "fused": device.type in ("cpu", "cuda", "mps"),
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    return Muon(*split_groups(groups, system), **options)


def lr_factor(step: int, config: TrainConfig) -> float:
    """Fraction of the peak learning rate at a step, the first being 0: warm-up, then the schedule down to ``final_lr``."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    remaining = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.final_lr + (1 - config.final_lr) * remaining


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer, system: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as tensors named ``PARAMETER:KEY``, in the order of its groups, on all processes alike."""
    names = {id(parameter): name for name, parameter in system.named_parameters()}
    return {
        f"{names[id(parameter)]}:{key}": value
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, system: nn.Module, tensors: Mapping[str, Tensor], *, offload: bool = False
) -> None:
    """Restore what `optimizer_tensors` gave. Averages take their parameter's device and strides, as fused kernels require.

    Args:
        optimizer: Its state is replaced.
        system: Whose parameters it moves.
        tensors: By name.
        offload: Leave averages on the CPU, see `mm.training.offload`.

    Raises:
        CheckpointError: When a name or shape does not belong to ``system``.
    """
    parameters = dict(system.named_parameters())
    optimizer.state.clear()
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition(":")
        parameter = parameters.get(name)
        if parameter is None or (value.ndim and value.shape != whole_shape(parameter)):
            raise CheckpointError(f"optimizer state '{full_name}' does not belong to this network; start a new run folder")
        if parameter.is_meta:  # of another stage
            continue
        if value.shape == whole_shape(parameter) and key != "step":
            optimizer.state[parameter][key] = torch.empty_like(parameter, dtype=value.dtype).copy_(own(value, parameter))
        else:
            optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
        if offload:
            move_state(optimizer, parameter)


def align_strides(optimizer: torch.optim.Optimizer) -> None:
    """Give averages the strides of their parameter again, after a network changed its memory format at its first pass."""
    for parameter, state in optimizer.state.items():
        if is_sharded(parameter):  # keeps the strides that it had when it was cut
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
