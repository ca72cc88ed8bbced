"""Networks whose weights do not change: held fixed within a training, or folded into compiled code."""

from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """Hold the weights of a module fixed and the module in evaluation mode, whatever mode its owners are put in."""
    hold_in_evaluation(module.requires_grad_(False))
    return module


def hold_in_evaluation(module: nn.Module) -> None:
    """Make ``module.train()`` do nothing."""
    module.eval()
    module.train = MethodType(lambda self, mode=True: self, module)


def release(module: nn.Module) -> None:
    """Give ``module.train()`` its effect back."""
    module.__dict__.pop("train", None)


def folded_weights(device: torch.device) -> AbstractContextManager[object]:
    """Context in which compiled networks are traced and run with their weights as constants, packed as a CPU likes them best.

    As an option of torch.compile the same setting comes too late to reach the tracing of parameters.
    """
    if device.type != "cpu":
        return nullcontext()
    from torch._inductor import config

    return config.patch(freezing=True)
