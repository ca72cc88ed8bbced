"""Exact gradients of a loss that couples the whole batch, with the memory of one slice (GradCache, https://arxiv.org/abs/2101.06983).

The representations of all slices are computed without a graph; the loss of the whole batch gives the gradient of each
representation; each slice is computed once more with a graph and receives its part of that gradient. Parameters that enter the
loss directly, such as ``logit_scale``, get their gradient once, from the whole batch.

Deviation from the paper: the last slice keeps the graph of its first pass, which saves one forward pass.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn

from mm.training.statistics import running_statistics
from mm.types import Batch, CachesGradients, Losses, auxiliary_losses


def slices(num_rows: int, num_slices: int) -> list[slice]:
    """Cut ``num_rows`` into at most ``num_slices`` consecutive slices of nearly equal, non-zero length."""
    num_slices = min(num_slices, num_rows)
    edges = [num_rows * i // num_slices for i in range(num_slices + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def cached_backward(
    system: CachesGradients, batch: Batch, step: int, num_slices: int, autocast: Callable[[], AbstractContextManager[object]]
) -> Losses:
    """Add the gradients of ``system.loss_from(system.represent(batch), ...)`` to ``.grad``.

    Dropout is the same in both passes, because the generators' states are restored. Layers that mix the samples of a batch
    (batch normalisation) see slices, as in any accumulation; their running statistics are updated once a slice. Losses that
    layers have of their own (`mm.types.Auxiliary`) are those of the slices, averaged by samples.

    Args:
        system: In training mode, on one device.
        batch: ``B`` samples on that device.
        step: Number of the step.
        num_slices: Slices to compute one after the other.
        autocast: Gives a fresh autocast context for each forward pass.
    """
    cuts = slices(len(batch), num_slices)
    device = batch_device(batch)
    generators, represented = [], []
    with _statistics_kept(system):
        for rows in cuts[:-1]:
            torch.rand(())  # a state of its own for each slice: stages of a pipeline draw by it, and leave it as it is
            generators.append(GeneratorState(device))
            with torch.no_grad(), autocast():
                represented.append(system.represent(batch[rows]))
    last, auxiliary = _represent(system, batch[cuts[-1]], autocast)
    represented.append(last)
    leaves = {name: torch.cat([part[name].detach() for part in represented]).requires_grad_() for name in last}
    with autocast():
        losses = system.loss_from(leaves, batch, step)
    losses.total.backward()
    losses = _push(last, auxiliary, leaves, cuts[-1], losses)
    after = GeneratorState(device)
    for rows, generator in zip(cuts[:-1], generators, strict=True):
        generator.restore()
        losses = _push(*_represent(system, batch[rows], autocast), leaves, rows, losses)
    after.restore()
    return losses


def _represent(
    system: CachesGradients, batch: Batch, autocast: Callable[[], AbstractContextManager[object]]
) -> tuple[Mapping[str, Tensor], Losses | None]:
    """Representations with their graph, and the losses of the layers that made them."""
    assert isinstance(system, nn.Module)
    with auxiliary_losses(system) as told, autocast():
        return system.represent(batch), told()


def _push(
    representations: Mapping[str, Tensor], auxiliary: Losses | None, leaves: dict[str, Tensor], rows: slice, losses: Losses
) -> Losses:
    """Send the cached gradients of some rows back through their representations, with the losses of their layers.

    Returns the losses with these added.
    """
    pairs = [
        (value, leaf.grad[rows])
        for name, leaf in leaves.items()
        if leaf.grad is not None and (value := representations[name]).requires_grad
    ]
    share = (rows.stop - rows.start) / len(next(iter(leaves.values())))
    if auxiliary is not None and auxiliary.total.requires_grad:
        pairs.append((auxiliary.total, torch.full_like(auxiliary.total, share)))
    if pairs:
        torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])
    return Losses(losses.total.detach(), losses.parts).plus(auxiliary, share)


def batch_device(batch: Batch) -> torch.device:
    """Where a batch's tensors are."""
    for value in (batch.image, batch.text.ids if batch.text is not None else None, batch.groups, batch.latents):
        if value is not None:
            return value.device
    return torch.device("cpu")


class GeneratorState:
    """States of the random generators that layers on ``device`` draw from, at the moment of construction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._other = None
        if device.type == "cuda":
            self._other = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            self._other = torch.mps.get_rng_state()

    def restore(self) -> None:
        """Put the generators back into these states."""
        torch.set_rng_state(self._cpu)
        if self._other is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(self._other, self._device)
        elif self._other is not None:
            torch.mps.set_rng_state(self._other)


@contextmanager
def _statistics_kept(system: object) -> Iterator[None]:
    """Undo what happens to running statistics inside, so that a slice that is computed twice counts once."""
    buffers = list(running_statistics(system).values()) if isinstance(system, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    yield
    with torch.no_grad():
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
