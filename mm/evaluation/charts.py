"""Small charts as inline SVG: bars with intervals and training curves, coloured by the page they stand in.

Text and colours come from CSS classes (see `mm.evaluation.report`), so one chart serves light and dark pages. Drawn 360 units
wide with text of 12 units, a chart stays readable on a phone.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

WIDTH = 360.0
NUM_COLOURS = 4
MAX_POINTS = 400
"""Longest polyline; longer series are averaged in groups."""


@dataclass(frozen=True)
class Chart:
    """Finished SVG markup (made by this module only, with all text escaped), the words above it and those beneath it."""

    svg: str
    title: str
    caption: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: its name, value, the bounds of its interval if it has one, and whether it is the one to look at."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = True


def bar_chart(bars: Sequence[Bar], *, title: str, percent: bool = True, caption: str = "") -> Chart:
    """Horizontal bars with their 95 % intervals, label above each bar, value at its right.

    Args:
        bars: Non-negative values; the axis starts at 0 and ends at 1 for rates above one half, else at a round number.
        title: What is measured.
        percent: Values are rates from 0 to 1, shown in percent.
        caption: Words beneath the chart.
    """
    assert bars, "a bar chart needs a bar"
    top = max(max(bar.value, bar.high or 0.0) for bar in bars)
    end = 1.0 if percent and top > 0.5 else max(_ticks(0.0, top or 1.0)[-1], top)
    row, room = 40.0, 74.0
    scale = (WIDTH - room) / end
    parts = []
    for index, bar in enumerate(bars):
        y = index * row + 16
        shown = f"{100 * bar.value:.1f} %" if percent else f"{bar.value:.4g}"
        parts.append(f'<text class="label" x="0" y="{y - 4:.1f}">{escape(bar.label)}</text>')
        parts.append(f'<rect class="track" x="0" y="{y:.1f}" width="{end * scale:.1f}" height="14" rx="4"/>')
        strong = "bar" if bar.strong else "bar weak"
        parts.append(f'<rect class="{strong}" x="0" y="{y:.1f}" width="{max(bar.value * scale, 1):.1f}" height="14" rx="4"/>')
        if bar.low is not None and bar.high is not None:
            left, right, middle = bar.low * scale, bar.high * scale, y + 7
            parts.append(f'<path class="whisker" d="M{left:.1f} {middle:.1f}H{right:.1f}"/>')
            parts += [f'<path class="whisker" d="M{x:.1f} {middle - 4:.1f}v8"/>' for x in (left, right)]
        parts.append(f'<text class="value" x="{end * scale + 8:.1f}" y="{y + 11.5:.1f}">{shown}</text>')
    return Chart(_svg("".join(parts), len(bars) * row, title), title, caption)


def curve_chart(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x_label: str = "step", caption: str = ""
) -> Chart:
    """Lines over a common axis, each named at the top in its colour. Points that are not finite are left out.

    Args:
        series: Points ``(x, y)`` in order by name; empty ones are left out. At most four are told apart by colour.
        title: What is shown.
        x_label: Name of the horizontal axis.
        caption: Words beneath the chart.
    """
    kept = {name: [point for point in points if all(map(math.isfinite, point))] for name, points in series.items()}
    lines = {name: _thin(points) for name, points in kept.items() if points}
    if not lines:
        return Chart(_svg('<text class="label" x="0" y="20">no points were logged</text>', 30, title), title, caption)
    flat = [point for points in lines.values() for point in points]
    x_low, x_high = min(x for x, _ in flat), max(x for x, _ in flat)
    y_ticks = _ticks(min(y for _, y in flat), max(y for _, y in flat))
    parts, legend = _legend(lines)
    left, right, top, bottom, height = 40.0, 12.0, legend + 14, 38.0, legend + 204

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return left + across * (WIDTH - left - right), height - bottom - up * (height - top - bottom)

    for tick in y_ticks:
        y = place(x_low, tick)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{WIDTH - right}"/>')
        parts.append(_tick(left - 6, y + 4, _number(tick), "end"))
    for tick in _ticks(x_low, x_high, inside=True):
        parts.append(_tick(place(tick, y_ticks[0])[0], height - bottom + 16, _number(tick), "middle"))
    parts.append(_tick((left + WIDTH - right) / 2, height - 4, x_label, "middle"))
    for index, (name, points) in enumerate(lines.items()):
        colour = f"s{index % NUM_COLOURS + 1}"
        placed = [place(x, y) for x, y in points]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        parts.append(f'<path class="line {colour}" d="M{path}"><title>{escape(name)}</title></path>')
        parts.append(f'<circle class="dot {colour}" cx="{placed[-1][0]:.1f}" cy="{placed[-1][1]:.1f}" r="4"/>')
    return Chart(_svg("".join(parts), height, title), title, caption)


def _tick(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(lines: Mapping[str, Sequence[tuple[float, float]]]) -> tuple[list[str], float]:
    """Names of the lines with their last values, above the chart in as many rows as they need, and the height of these rows."""
    parts, x, y = [], 0.0, 6.0
    for index, (name, points) in enumerate(lines.items()):
        entry = f"{name} {points[-1][1]:.3g}"
        width = 31 + 6.6 * len(entry)
        if x > 0 and x + width > WIDTH:
            x, y = 0.0, y + 18
        parts.append(f'<rect class="dot s{index % NUM_COLOURS + 1}" x="{x:.1f}" y="{y:.1f}" width="10" height="10" rx="3"/>')
        parts.append(f'<text class="label" x="{x + 15:.1f}" y="{y + 9:.1f}">{escape(entry)}</text>')
        x += width
    return parts, y + 10


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a ``metrics.jsonl``; a last line cut short by a kill is left out, a missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` points: groups of neighbours are averaged."""
    group = -(-len(points) // MAX_POINTS)
    chunks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(sum(x for x, _ in chunk) / len(chunk), sum(y for _, y in chunk) / len(chunk)) for chunk in chunks]


def _ticks(low: float, high: float, inside: bool = False) -> list[float]:
    """Four to six round numbers that enclose the range, or that lie ``inside`` it."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = (
        (math.ceil(low / step), math.floor(high / step)) if inside else (math.floor(low / step), math.ceil(high / step))
    )
    return [index * step for index in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{round(value, 10):g}"


def _svg(body: str, height: float, title: str) -> str:
    head = (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )
    return f"{head}<title>{escape(title)}</title>{body}</svg>"
