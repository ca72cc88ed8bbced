"""Gradients of one step: of the whole batch at once, averaged over slices, or exact over slices (`mm.training.gradcache`)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mm.training.gradcache import cached_backward, slices
from mm.types import Batch, CachesGradients, Losses, System

Autocast = Callable[[], AbstractContextManager[object]]


def backward(system: System, batch: Batch, step: int, accumulate: int, autocast: Autocast) -> Losses:
    """Add the gradients of a batch to ``.grad`` and return its losses, detached.

    Args:
        system: In training mode.
        batch: This process's part of the global batch, on the system's device.
        step: Number of the step.
        accumulate: Number of slices to compute one after the other.
        autocast: Gives a fresh autocast context for each forward pass.
    """
    if accumulate == 1 or len(batch) == 1:
        with autocast():
            losses = system(batch, step)
        losses.total.backward()
        return _detached(losses)
    if isinstance(system, CachesGradients):
        return _detached(cached_backward(system, batch, step, accumulate, autocast))
    return _averaged_backward(system, batch, step, accumulate, autocast)


def _averaged_backward(system: System, batch: Batch, step: int, accumulate: int, autocast: Autocast) -> Losses:
    """Mean of the slices' losses weighted by their samples: exact for losses that are means over samples."""
    total = torch.zeros(())
    parts: dict[str, Tensor] = {}
    for rows in slices(len(batch), accumulate):
        weight = (rows.stop - rows.start) / len(batch)
        with autocast():
            losses = system(batch[rows], step)
        (losses.total * weight).backward()
        total = total.to(losses.total.device) + losses.total.detach() * weight
        for name, value in losses.parts.items():
            parts[name] = parts.get(name, 0.0) + value.detach() * weight
    return Losses(total, parts)


def _detached(losses: Losses) -> Losses:
    return Losses(losses.total.detach(), {name: value.detach() for name, value in losses.parts.items()})
