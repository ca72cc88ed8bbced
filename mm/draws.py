"""Random numbers of a training step, a stream of its own for each sample: the same for any number of processes and slices.

A number is a hash of the sample's seed, of how many draws were made before and of its place within the draw, by the finaliser
of SplitMix64 (https://doi.org/10.1145/2660193.2660195): so all samples are drawn at once, on any device.

Shapes: B samples.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mm.seeding import derive_seed

STEP = -7046029254386353131
"""2^64 over the golden ratio, as a signed number: successive multiples of it are far apart in all bits."""

FACTORS = ((30, -4658895280553007687), (27, -7723592293110705685))


class Draws:
    """Draws for a batch, one after the other.

    Args:
        seeds: One of each sample, ``(B,)`` int64; None draws from torch's generators.
        num_rows: B.
        device: Where the numbers are wanted.
    """

    def __init__(self, seeds: Tensor | None, num_rows: int, device: torch.device) -> None:
        self._seeds = None if seeds is None else seeds.to(device)
        self._num_rows, self._device = num_rows, device

    def uniform(self, *shape: int) -> Tensor:
        """``(B, *shape)``, fp32, evenly in 0..1, both ends excluded (with seeds)."""
        if self._seeds is None:
            return torch.rand(self._num_rows, *shape, device=self._device)
        bits = self._bits(math.prod(shape))
        return (((bits >> 41) & 0x7FFFFF).float() + 0.5).mul_(2.0**-23).view(self._num_rows, *shape)

    def normal(self, *shape: int) -> Tensor:
        """``(B, *shape)``, fp32, standard normal: pairs by Box and Muller's transform."""
        if self._seeds is None:
            return torch.randn(self._num_rows, *shape, device=self._device)
        numbers = math.prod(shape)
        bits = self._bits((numbers + 1) // 2)
        radius = (((bits >> 32) & 0xFFFFFFFF).float() + 0.5).mul_(2.0**-32).log_().mul_(-2).clamp_(min=0).sqrt_()
        angle = (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
        pairs = torch.cat([radius * angle.cos(), radius * angle.sin()], 1)
        return pairs[:, :numbers].reshape(self._num_rows, *shape)

    def below(self, end: int, *shape: int) -> Tensor:
        """``(B, *shape)``, int64, evenly in ``0..end - 1``."""
        return (self.uniform(*shape) * end).long().clamp_(max=end - 1)

    def _bits(self, numbers: int) -> Tensor:
        """``(B, numbers)`` of 64 random bits."""
        assert self._seeds is not None
        self._seeds = _mixed(self._seeds + STEP)
        places = torch.arange(1, numbers + 1, device=self._device)
        return _mixed(self._seeds[:, None] + places * STEP)


def sample_seeds(ids: Sequence[str], *parts: int | str) -> Tensor:
    """A seed of each sample, ``(B,)`` int64: a function of its id and of ``parts``, such as the seed and number of a step."""
    return torch.tensor([derive_seed(*parts, name) for name in ids], dtype=torch.int64)


def _mixed(z: Tensor) -> Tensor:
    """Bits of which each depends on all of the given ones. Arithmetic wraps around; shifts must not drag the sign along."""
    for places, factor in FACTORS:
        z = (z ^ _shifted(z, places)) * factor
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)
