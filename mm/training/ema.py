"""Exponential moving average of the weights, which evaluation uses instead of the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mm.placement import here, own
from mm.training.statistics import running_statistics


class Ema:
    """Average of the trainable parameters and of the running statistics of normalisation layers; the rest is taken as it is.

    Args:
        system: The network whose weights are followed. Its device must not change afterwards.
        decay: Share of the average that stays at each update, in 0..1. Early updates use ``(1 + n) / (10 + n)`` where that is
            smaller, so that the initial weights fade quickly.
    """

    def __init__(self, system: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._live = _followed(system)
        self._average = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the present weights; call it after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, live = here(list(self._average.values())), here(list(self._live.values()))
        torch._foreach_lerp_(averages, live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        self.num_updates += 1

    def state_dict(self, system: nn.Module) -> dict[str, Tensor]:
        """A complete set of the network's weights, averaged where there is an average."""
        first_names = {id(tensor): name for name, tensor in self._live.items()}  # a tied weight has several names
        state = system.state_dict(keep_vars=True)
        return {
            name: self._average[first_names[id(tensor)]] if id(tensor) in first_names else tensor.detach()
            for name, tensor in state.items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], num_updates: int) -> None:
        """Restore what `state_dict` gave."""
        for name, average in self._average.items():
            average.copy_(own(tensors[name], self._live[name]))
        self.num_updates = num_updates

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The network holds the average inside this context, without a copy."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, live in self._live.items():
            live.data, self._average[name] = self._average[name], live.data


def _followed(system: nn.Module) -> dict[str, Tensor]:
    """Floating-point tensors that training changes and that are worth averaging, by the name that they have in the state."""
    trainable = {name: parameter for name, parameter in system.named_parameters() if parameter.requires_grad}
    return trainable | {name: buffer for name, buffer in running_statistics(system).items() if buffer.is_floating_point()}
