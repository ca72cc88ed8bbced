"""Networks that take part in training without being trained."""

from types import MethodType
from typing import TypeVar

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
