"""A first-in first-out queue of past features, each with the id of what it shows, as additional negatives.

Queues of past features: https://arxiv.org/abs/1911.05722 (MoCo). Ids are kept so that a feature that shows the same thing as a
row is never that row's negative.

Shapes: B rows of this rank, Q queued features, D width.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mm.losses.gather import Gather


class Queued(NamedTuple):
    """Detached features and the ids of what they show."""

    features: Float[Tensor, "q d"]
    ids: Int[Tensor, " q"]


class FeatureQueue(nn.Module):
    """Holds the last ``capacity`` features. Its content is part of the state of the model, so that training resumes exactly.

    Args:
        capacity: Number of features.
        width: D.
    """

    features: Tensor
    ids: Tensor
    num_pushed: Tensor

    def __init__(self, capacity: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(capacity, width))
        self.register_buffer("ids", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.int64))
        self._staged: list[Queued] = []
        self._staged_step = -1
        self._pushed: int | None = None  # once known, so that no step waits for the device to tell
        self.register_load_state_dict_post_hook(_ask_again)

    def __len__(self) -> int:
        return min(self._count(), len(self.ids))

    def content(self) -> Queued:
        """What the queue holds, in no particular order; copies, so that a later `push` does not disturb a backward pass."""
        size = len(self)
        return Queued(self.features[:size].clone(), self.ids[:size].clone())

    @torch.no_grad()
    def push(self, features: Float[Tensor, "b d"], ids: Int[Tensor, " b"], gather: Gather | None = None) -> None:
        """Replace the oldest entries by these rows; with a `Gather`, by those of all ranks, so that all queues stay equal."""
        if gather is not None:
            features, ids = gather(features), gather(ids)
        capacity = len(self.ids)
        skipped = max(0, len(ids) - capacity)  # of more rows than there is room for, the last ones stay
        start = self._count() + skipped
        places = torch.arange(start, start + len(ids) - skipped, device=self.ids.device) % capacity
        self.features[places] = features[skipped:].detach().to(self.features.dtype)
        self.ids[places] = ids[skipped:]
        self._pushed = start + len(ids) - skipped
        self.num_pushed.fill_(self._pushed)

    def stage(self, features: Float[Tensor, "b d"], ids: Int[Tensor, " b"], step: int) -> None:
        """Keep rows until their step is applied; those of an earlier step that was not are forgotten."""
        if step != self._staged_step:
            self._staged, self._staged_step = [], step
        self._staged.append(Queued(features.detach(), ids))

    def commit(self, gather: Gather | None = None) -> None:
        """Push what is staged: to be called when its step has been applied."""
        for rows in self._staged:
            self.push(*rows, gather)
        self._staged = []

    def _count(self) -> int:
        if self._pushed is None:
            self._pushed = int(self.num_pushed)
        return self._pushed


def _ask_again(queue: FeatureQueue, _: object) -> None:
    queue._pushed = None
