"""Random numbers for a batch of pictures, each row from its picture's own seed."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mm.seeding import generator

NUM_UNIFORM, NUM_NORMAL = 64, 96
NOISE_TABLE = 1 << 20


class Draws:
    """A table of random numbers that is taken column by column, in a fixed order.

    Every user takes its columns whether it needs them or not, so that one setting never changes the numbers behind another. The
    numbers are float64: what is computed from them and rounded to float32 does not depend on how the processor groups a batch.

    Args:
        seeds: One for each picture.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        uniform, normal = np.empty((len(seeds), NUM_UNIFORM)), np.empty((len(seeds), NUM_NORMAL))
        for row, seed in enumerate(seeds):
            rng = np.random.Generator(np.random.PCG64(seed))
            rng.random(out=uniform[row])
            rng.standard_normal(out=normal[row])
        self._uniform, self._normal = torch.from_numpy(uniform), torch.from_numpy(normal)
        self._next_uniform = self._next_normal = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One number in [low, high) a picture, ``(B,)``."""
        self._next_uniform += 1
        return low + (high - low) * self._uniform[:, self._next_uniform - 1]

    def happens(self, probability: float) -> Tensor:
        """True with a probability, ``(B,)``."""
        return self.uniform() < probability

    def normal(self, std: float) -> Tensor:
        """One normal number a picture, ``(B,)``."""
        return self.normals(1)[:, 0] * std

    def normals(self, *shape: int) -> Tensor:
        """Standard normal numbers, ``(B, *shape)``."""
        count = int(np.prod(shape))
        self._next_normal += count
        assert self._next_normal <= NUM_NORMAL, "raise NUM_NORMAL"
        return self._normal[:, self._next_normal - count : self._next_normal].reshape(-1, *shape)


@lru_cache
def _noise_table() -> Tensor:
    return torch.from_numpy(generator("pixel noise").standard_normal(NOISE_TABLE, dtype=np.float32))


def pixel_noise(place: float, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, float32, read from a fixed table (fresh ones would cost more than all the rest of augmentation).

    Args:
        place: Where in the table to begin, in [0, 1).
        shape: Shape of the result; one of more numbers than the table holds repeats them.
    """
    count = int(np.prod(shape))
    table = _noise_table()
    start = int(place * NOISE_TABLE)
    numbers = (
        table[start : start + count] if start + count <= NOISE_TABLE else table[(torch.arange(count) + start) % NOISE_TABLE]
    )
    return numbers.reshape(tuple(shape))
