"""Momentum encoder: a slowly moving copy of a network, whose features a loss takes as targets.

Sources: MoCo https://arxiv.org/abs/1911.05722 (section 3.2), ALBEF https://arxiv.org/abs/2107.07651 (section 3.3).
"""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from mm.placement import here

M = TypeVar("M", bound=nn.Module)


class Momentum(nn.Module, Generic[M]):
    """An exponential moving average of a network's parameters, held in a copy of the network.

    The copy is part of the state, so that training resumes exactly, and of no parameter group. Processes with equal weights
    keep equal copies without talking. Batch normalisation in the copy has running statistics of its own, from its own passes.

    Args:
        followed: The network. It is no part of this module.
        decay: Share of the average that stays at each update, in 0..1.

    Attributes:
        num_updates: Updates so far, int64.
    """

    num_updates: Tensor

    def __init__(self, followed: M, decay: float) -> None:
        super().__init__()
        self._followed = (followed,)  # in a tuple it is not registered, so its weights are not in the state a second time
        self.copy_again()
        self.decay = decay
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self._moves = False  # once known, so that no step waits for the device to tell
        self.register_load_state_dict_post_hook(_ask_again)

    def copy_again(self) -> None:
        """Follow what the network is by now: before training, where it was given further parts (`mm.nn.tuning`)."""
        self._average = copy.deepcopy(self._followed[0]).requires_grad_(False)

    @property
    def average(self) -> M:
        """The copy, in the mode of its owner. Until the first update it follows exactly, since weights may still be loaded."""
        self._moves = self._moves or bool(self.num_updates)
        if not self._moves:
            self.take_over()
        return self._average

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights: after an optimizer step, which is before the next pass of the copy."""
        averages, present = (here(tensors) for tensors in zip(*self._pairs(), strict=True))
        torch._foreach_lerp_(averages, present, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        self.num_updates += 1
        self._moves = True

    @torch.no_grad()
    def take_over(self) -> None:
        """Copy the present weights, unless there is an average of them already; see `mm.types.Follows`."""
        if self.num_updates:
            return
        for averaged, present in self._pairs():
            averaged.copy_(present)
        for averaged, present in zip(self._average.buffers(), self._followed[0].buffers(), strict=True):
            averaged.copy_(present)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter of the copy beside the one that it follows, low-rank corrections included."""
        pairs = []
        for name, averaged in self._average.named_parameters():
            path, _, leaf = name.rpartition(".")
            pairs.append((averaged, getattr(self._followed[0].get_submodule(path), leaf)))
        return pairs


def _ask_again(momentum: Momentum[nn.Module], _: object) -> None:
    momentum._moves = False
