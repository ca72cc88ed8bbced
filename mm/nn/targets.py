"""What all ways of training a part of a network share: which places they choose, and that the rest is held fixed."""

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from pydantic import Field
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn.freeze import hold_in_evaluation

TEMPERATURE = ("*logit_scale", "*logit_bias")
"""Scale and bias of scores: two numbers that have to follow whatever else is trained."""


class TargetsConfig(StrictConfig):
    """Where something trained is added, and what is trained beside it.

    Args:
        targets: Glob patterns of the qualified names of places; each must match one that is not locked.
        train: Glob patterns of parameters that are trained whole beside what is added.
    """

    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
    train: tuple[str, ...] = TEMPERATURE


def choose(names: Sequence[str], patterns: Iterable[str], kind: str) -> list[str]:
    """The names that a pattern matches, in their own order.

    Args:
        names: Of all places.
        patterns: Glob patterns.
        kind: What the names are of, for the message.

    Raises:
        UserError: A pattern matches no name.
    """
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.2) or names[:3]
            hint = f"there are such as {', '.join(near)}" if near else "nothing that is not locked has one"
            raise UserError(f"tune: '{pattern}' matches no {kind}; {hint}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def freeze_all_but(module: nn.Module, patterns: Iterable[str]) -> None:
    """Hold all parameters of a module fixed except those that a pattern matches and that were trained before.

    Running statistics of batch normalization stay as they are, in training too: they belong to the frozen weights.

    Raises:
        UserError: A pattern matches no such parameter, except those of `TEMPERATURE`, which not every network has.
    """
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    choose(trained, [pattern for pattern in patterns if pattern not in TEMPERATURE], "parameter")
    for name, parameter in module.named_parameters():
        chosen = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        parameter.requires_grad_(chosen and parameter.requires_grad)
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            hold_in_evaluation(part)
