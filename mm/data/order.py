"""The order in which an epoch visits its samples: a pure function of seed, epoch, fingerprint and sampling policy.

Any process can compute the order of any epoch again, which is what makes resuming exact. Three steps:

1. draw: every sample once, or, for a mixture with weights, each source's share of the epoch;
2. arrange: at random, or dealt to batches so that no value of a field comes twice in a batch (``distinct``), or so that each
   chosen value comes with `per_value` samples (``several``);
3. cut into batches; what does not fill a batch is the tail: dropped, or delivered in short batches at the end.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mm.errors import UserError
from mm.seeding import generator

Indices = NDArray[np.int64]
Tail = Literal["drop", "short"]


@dataclass(frozen=True)
class EpochOrder:
    """All batches of one epoch, for all ranks together.

    Args:
        indices: Sample of each slot, ``(S,)``.
        visits: How often the sample already came earlier in this epoch, ``(S,)``; only mixtures and ``several`` repeat samples.
        offsets: Batch k holds the slots ``offsets[k]:offsets[k + 1]``.
        indexed: Number of samples in the source.
    """

    indices: Indices
    visits: Indices
    offsets: Indices
    indexed: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tail(self) -> int:
        """Number of samples that this epoch does not visit."""
        return self.indexed - int(np.count_nonzero(self.visits == 0))

    def slots(self, batch: int) -> slice:
        """The slots of global batch number ``batch``."""
        return slice(int(self.offsets[batch]), int(self.offsets[batch + 1]))

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of the whole order, to notice that a resumed run would see other batches."""
        content = hashlib.blake2b(digest_size=16)
        content.update(np.ascontiguousarray(self.indices, dtype="<i8").tobytes())
        content.update(np.ascontiguousarray(self.offsets, dtype="<i8").tobytes())
        return content.hexdigest()


def epoch_order(
    size: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    fingerprint: str,
    shuffle: bool = True,
    codes: Indices | None = None,
    per_value: int = 1,
    shares: Sequence[tuple[int, float]] | None = None,
    tail: Tail = "drop",
) -> EpochOrder:
    """Compute the order of one epoch.

    Args:
        size: Number of samples in the source.
        batch_size: Samples of a global batch.
        shuffle: False visits the samples in the order of the source and ignores the other policies.
        codes: Value of the sampling field of each sample, ``(size,)``; if given, a batch holds each value at most once.
        per_value: Number of samples of each chosen value in a batch; values with too few samples repeat some.
        shares: ``(size, weight)`` of each source of a mixture, in order; the sizes add up to ``size``.
        tail: What happens to samples that fill no batch.

    Raises:
        UserError: The batch size cannot be met with this source and policy.
    """
    if not shuffle:
        return _cut(np.arange(size), np.zeros(size, np.int64), batch_size, size, tail)
    rng = generator(seed, epoch, fingerprint, "order")
    drawn = np.arange(size) if shares is None else _draw(shares, seed, epoch, fingerprint)
    if codes is None:
        indices = rng.permutation(drawn)
        visits = _visits(indices) if shares is not None else np.zeros(len(indices), np.int64)
        return _cut(indices, visits, batch_size, size, tail)
    if batch_size % per_value:
        raise UserError(f"batch size {batch_size} must be a multiple of the {per_value} samples of each value")
    drawn = rng.permutation(drawn)
    units_per_batch = batch_size // per_value
    indices, offsets = _arrange(drawn, codes, units_per_batch=units_per_batch, per_value=per_value, tail=tail, rng=rng)
    return EpochOrder(indices, _visits(indices), offsets, size)


def rank_slice(batch_length: int, rank: int, world_size: int) -> slice:
    """The part of a global batch that one rank loads; the parts of all ranks, joined in order, are the batch."""
    return slice(rank * batch_length // world_size, (rank + 1) * batch_length // world_size)


def _cut(indices: Indices, visits: Indices, batch_size: int, indexed: int, tail: Tail) -> EpochOrder:
    slots = len(indices) if tail == "short" else len(indices) // batch_size * batch_size
    offsets = np.append(np.arange(0, slots, batch_size), slots)
    return EpochOrder(indices[:slots], visits[:slots], offsets, indexed)


def _visits(indices: Indices) -> Indices:
    """For each position, how often its value occurs at earlier positions."""
    order = np.argsort(indices, kind="stable")
    ordered = indices[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    visits = np.empty(len(indices), np.int64)
    visits[order] = np.arange(len(indices)) - np.repeat(starts, np.diff(np.append(starts, len(indices))))
    return visits


def _draw(shares: Sequence[tuple[int, float]], seed: int, epoch: int, fingerprint: str) -> Indices:
    """Samples of an epoch of a mixture. Each source walks through its own permutations, on and on, by its share an epoch."""
    sizes = np.array([size for size, _ in shares])
    weights = np.array([weight for _, weight in shares], dtype=np.float64)
    exact = sizes.sum() * weights / weights.sum()
    quotas = np.floor(exact).astype(np.int64)
    quotas[np.argsort(quotas - exact, kind="stable")[: sizes.sum() - quotas.sum()]] += 1
    if (quotas == 0).any():
        raise UserError(
            f"mixture part {int(quotas.argmin()) + 1} has so little weight that no sample of it would be seen; raise it"
        )
    pieces = []
    for part, (start, size, quota) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, quotas, strict=True)):
        begin, end = epoch * quota, (epoch + 1) * quota
        for cycle in range(begin // size, (end - 1) // size + 1):
            permutation = generator(seed, cycle, fingerprint, f"mixture {part}").permutation(int(size))
            pieces.append(start + permutation[max(begin - cycle * size, 0) : end - cycle * size])
    return np.concatenate(pieces)


def _arrange(
    indices: Indices, codes: Indices, *, units_per_batch: int, per_value: int, tail: Tail, rng: np.random.Generator
) -> tuple[Indices, Indices]:
    """Deal units (``per_value`` samples of one value) to batches so that no batch holds two units of the same value.

    Returns the sample of each slot and the offsets of the batches.
    """
    units, values = _units(indices, codes, per_value, rng)
    place_in_run = _visits(values)
    counts = np.bincount(values)
    num_batches = _most_batches(counts[counts > 0], units_per_batch)
    kept = np.flatnonzero(place_in_run < num_batches)
    kept = np.sort(rng.permutation(kept)[: num_batches * units_per_batch])
    batch_of_unit = np.full(len(units), -1, np.int64)
    batch_of_unit[kept] = _deal(values[kept], num_batches, rng)
    if tail == "short":
        left = np.flatnonzero(batch_of_unit < 0)
        if len(left):
            short = max(-(-len(left) // units_per_batch), int(np.bincount(values[left]).max()))
            batch_of_unit[left] = num_batches + _deal(values[left], short, rng)
    order = rng.permutation(len(units))
    order = order[np.argsort(batch_of_unit[order], kind="stable")]
    order = order[batch_of_unit[order] >= 0]
    sizes = np.bincount(batch_of_unit[order]) * per_value
    return units[order].reshape(-1), np.append(0, np.cumsum(sizes)).astype(np.int64)


def _units(indices: Indices, codes: Indices, per_value: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Group samples by value: units ``(U, per_value)`` and their values ``(U,)``, equal values adjacent, in random order.

    A value whose count is no multiple of ``per_value`` completes its last unit with its first samples.
    """
    rank = rng.permutation(int(codes.max()) + 1)[codes[indices]]
    indices = indices[np.argsort(rank, kind="stable")]
    counts = np.bincount(rank)
    counts = counts[counts > 0]
    units_of_value = -(-counts // per_value)
    values = np.repeat(np.arange(len(counts)), units_of_value)
    position = _visits(values)[:, None] * per_value + np.arange(per_value)
    starts = np.cumsum(counts) - counts
    return indices[starts[values][:, None] + position % counts[values][:, None]], values


def _most_batches(counts: Indices, units_per_batch: int) -> int:
    """The largest K with ``sum(min(count, K)) >= K * units_per_batch``: that many full batches of different values exist.

    The difference of the two sides is concave in K and zero at K = 0, so the valid K form an interval; bisection finds its end.
    """
    low, high = 0, int(counts.sum()) // units_per_batch
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(counts, middle).sum() >= middle * units_per_batch:
            low = middle
        else:
            high = middle - 1
    return low


def _deal(values: Indices, num_batches: int, rng: np.random.Generator) -> Indices:
    """Batch of each unit. ``values`` come in runs no longer than ``num_batches``; no batch gets the same value twice.

    Each round deals one unit to every batch, in random order. A run that crosses from one round into the next first takes
    batches that it has not had.
    """
    batch_of_unit = np.empty(len(values), np.int64)
    for start in range(0, len(values), max(num_batches, 1)):
        stop = min(start + num_batches, len(values))
        places = rng.permutation(num_batches)
        if start and values[start] == values[start - 1]:
            before = slice(start - num_batches, start)
            taken = batch_of_unit[before][values[before] == values[start]]
            run = int(np.count_nonzero(values[start:stop] == values[start]))
            first = places[~np.isin(places, taken)][:run]
            places = np.concatenate([first, places[~np.isin(places, first)]])
        batch_of_unit[start:stop] = places[: stop - start]
    return batch_of_unit
