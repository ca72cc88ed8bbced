"""Figures with their 95 % bootstrap intervals and the protocol they were measured under.

Shapes: n resampled units (pictures), R resamples.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from mm.errors import UserError
from mm.seeding import generator

RESAMPLES = 1000
CONFIDENCE = 0.95
ALSO = " | "
"""Between two statements of a protocol on the same."""

MAX_WEIGHTS = 1 << 21
"""Resampling weights held at once: 16 MiB of float64, whatever the size of the data."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""Maps weights ``(R, n)``, the draws of each unit, to the R values of a figure; weights of one give the figure itself."""


@dataclass(frozen=True)
class Interval:
    """A measured figure between the bounds of its 95 % interval.

    Args:
        value: The figure on the data as they are.
        low: Lower bound.
        high: Upper bound.
        unit: ``"rate"`` is a fraction from 0 to 1 and shown in percent; ``"number"`` is shown as it is.
    """

    value: float
    low: float
    high: float
    unit: Literal["rate", "number"] = "rate"

    def show(self) -> tuple[str, str]:
        """The figure and its interval as text, e.g. ``("43.2 %", "41.0 to 45.4")``."""
        if self.unit == "rate":
            return f"{100 * self.value:.1f} %", f"{100 * self.low:.1f} to {100 * self.high:.1f}"
        return _number(self.value), f"{_number(self.low)} to {_number(self.high)}"


def _number(value: float) -> str:
    """One decimal, small numbers with three digits."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


@dataclass(frozen=True)
class Result:
    """Named figures and the protocol stamp that makes them comparable.

    Args:
        metrics: Figures by their stable names (``top1``, ``image_to_text_r5``, ``top1_novel``).
        protocol: What was compared and how: split, templates, resize, precision, tie rule. JSON values.
    """

    metrics: Mapping[str, Interval]
    protocol: Mapping[str, Any]

    def __or__(self, other: "Result") -> "Result":
        """Both sets of figures; of a key that the protocols state differently both statements are kept, in one text."""
        shared = {key: _both(self.protocol[key], other.protocol[key]) for key in self.protocol if key in other.protocol}
        return Result({**self.metrics, **other.metrics}, {**self.protocol, **other.protocol, **shared})

    def stamp(self) -> str:
        """The protocol in one line of text."""
        return "; ".join(f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in self.protocol.items())

    def table(self, title: str = "") -> Table:
        """A table for the terminal with the protocol stamp beneath it."""
        table = Table(title=Text(title) if title else None, caption=Text(self.stamp(), style="dim"), caption_justify="left")
        table.add_column("metric")
        table.add_column("value", justify="right")
        table.add_column(f"{CONFIDENCE:.0%} interval", justify="right")
        for name, interval in self.metrics.items():
            table.add_row(Text(name), *interval.show())
        return table

    def to_json(self) -> dict[str, Any]:
        """``{"metrics": {NAME: {"value", "low", "high"}}, "protocol": {...}}``, rates as fractions from 0 to 1."""
        figures = {name: {"value": i.value, "low": i.low, "high": i.high} for name, i in self.metrics.items()}
        return {"metrics": figures, "protocol": dict(self.protocol)}

    def write(self, path: Path) -> None:
        """Write `to_json` to a file. Raises `UserError` where the file cannot be written."""
        try:
            text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
            path.write_bytes(f"{text}\n".encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(
                f"{path}: the results cannot be written: {error.strerror}; give a path in an existing folder"
            ) from None


def _both(first: Any, second: Any) -> Any:
    """One statement where they agree, else a text with each once."""
    if first == second:
        return first
    stated = _plain(first).split(ALSO)
    return ALSO.join([*stated, *(one for one in _plain(second).split(ALSO) if one not in stated)])


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def bootstrap(
    statistics: Mapping[str, Statistic],
    num_units: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Interval]:
    """Percentile bootstrap: draw the units with replacement, all statistics on the same draws.

    Args:
        statistics: Figures by name, each a function of the weights (see `share`, `mean_per_class`, `median`).
        num_units: Number n of independent units; what belongs to one unit (the captions of a picture) is drawn together.
        seed: Names the draws; equal seeds give equal intervals.
        resamples: Number R of draws.

    Raises:
        UserError: there is nothing to evaluate.

    Source: Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    if num_units < 1:
        raise UserError("nothing to evaluate: no sample is left; check the data, the subset and the label field")
    random = generator(seed, "bootstrap")
    rows = max(1, MAX_WEIGHTS // num_units)
    draws: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    for start in range(0, resamples, rows):
        weights = _resample(random, min(rows, resamples - start), num_units)
        for name, statistic in statistics.items():
            draws[name].append(statistic(weights))
    tails = [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]
    whole = np.ones((1, num_units))
    intervals = {}
    for name, statistic in statistics.items():
        low, high = np.percentile(np.concatenate(draws[name]), tails)
        intervals[name] = Interval(float(statistic(whole)[0]), float(low), float(high))
    return intervals


def _resample(random: np.random.Generator, rows: int, num_units: int) -> np.ndarray:
    """How often each of n units is drawn in n draws, for each row: ``(rows, n)`` float64."""
    drawn = random.integers(0, num_units, (rows, num_units))
    drawn += np.arange(rows)[:, None] * num_units
    return np.bincount(drawn.ravel(), minlength=rows * num_units).reshape(rows, num_units).astype(np.float64)


def share(hits: np.ndarray, trials: np.ndarray | None = None) -> Statistic:
    """Share of trials that hit, each unit bringing ``trials`` (default one) of which ``hits`` succeed: both ``(n,)``."""
    hits = np.asarray(hits, dtype=np.float64)
    trials = np.ones(len(hits)) if trials is None else np.asarray(trials, dtype=np.float64)
    return lambda weights: (weights @ hits) / (weights @ trials)


def mean_per_class(hits: np.ndarray, labels: np.ndarray) -> Statistic:
    """Recall of each class that occurs, averaged over classes (balanced accuracy); ``hits`` and ``labels`` are ``(n,)``."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(np.asarray(labels)[order], prepend=-1))
    ordered_hits = np.asarray(hits, dtype=np.float64)[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        ordered = weights[:, order]
        members = np.add.reduceat(ordered, starts, axis=1)
        found = np.add.reduceat(ordered * ordered_hits, starts, axis=1)
        present = members > 0
        return (found / np.where(present, members, 1)).sum(axis=1) / present.sum(axis=1)

    return statistic


def median(values: np.ndarray, units: np.ndarray) -> Statistic:
    """Median of ``values (m,)``, value j drawn with unit ``units[j]``; the mean of the two middle ones where m is even."""
    order = np.argsort(values, kind="stable")
    ordered, owners = np.asarray(values, dtype=np.float64)[order], np.asarray(units)[order]

    def statistic(weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights[:, owners], axis=1)
        total = below[:, -1]
        lower = [np.searchsorted(row, middle, side="right") for row, middle in zip(below, (total - 1) // 2, strict=True)]
        upper = [np.searchsorted(row, middle, side="right") for row, middle in zip(below, total // 2, strict=True)]
        return (ordered[lower] + ordered[upper]) / 2

    return statistic


def selections(subsets: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """Name suffixes of figures (``""`` first, then ``"_novel"``) and the pictures ``(length,)`` that each is about.

    Raises `UserError` for a mask of another length and for an empty subset.
    """
    selections = {"": np.ones(length, dtype=bool)}
    for name, mask in subsets.items():
        chosen = np.asarray(mask, dtype=bool)
        if chosen.shape != (length,):
            raise UserError(f"subset '{name}': expected {length} truth values, got shape {chosen.shape}")
        if not chosen.any():
            raise UserError(f"subset '{name}': no picture belongs to it; leave it out or check the field it is made from")
        selections[f"_{name}"] = chosen
    return selections


def subset_sizes(subsets: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """The protocol's entry on subsets: none without subsets, else the number of pictures of each."""
    return {"subsets": {name: int(np.asarray(mask).sum()) for name, mask in subsets.items()}} if subsets else {}
