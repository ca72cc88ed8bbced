"""Common ground of the benchmarks: fair timing, peak memory of fresh processes, one table and one JSON format."""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        name: What was measured, with its size.
        peer: What ours is compared with.
        ours: Our figure.
        theirs: The peer's figure.
        unit: Of both figures.
        higher_is_better: Whether the figures are rates instead of costs.
    """

    name: str
    peer: str
    ours: float
    theirs: float
    unit: str
    higher_is_better: bool = False

    @property
    def ratio(self) -> float:
        """Above 1 where ours is faster or smaller."""
        return self.ours / self.theirs if self.higher_is_better else self.theirs / self.ours


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def median_of(function: Callable[[], object], repeats: int) -> float:
    """Median wall-clock seconds of ``repeats`` calls."""
    return statistics.median(seconds(function) for _ in range(repeats))


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of both, called in turn so that both meet the same state of the machine."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes by which this process's resident set was larger at its highest than before the call.

    To be called once in a fresh process, because the operating system's high-water mark (``ru_maxrss``) cannot be reset. What
    libraries allocate once and for all should be warmed up before.
    """
    before = _resident_bytes()
    function()
    return _high_water_bytes() - before


def in_fresh_process(script: Path, *arguments: str) -> int:
    """Run a benchmark script that prints one integer as its last line, and return it."""
    done = subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True, text=True)
    return int(done.stdout.strip().splitlines()[-1])


def arguments_parser(description: str) -> argparse.ArgumentParser:
    """Options that all benchmarks share: ``--json FILE`` and ``--repeats N``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the cases as JSON")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each side, in turn; the median counts")
    return parser


def report(cases: Sequence[Case], json_file: Path | None = None) -> None:
    """Print the cases as a table and write them as ``{"cases": [...]}``."""
    table = Table("case", "peer", "ours", "theirs", "ratio", title="ratio above 1: ours is faster or smaller")
    for case in cases:
        figures = (f"{value:.4g} {case.unit}" for value in (case.ours, case.theirs))
        table.add_row(case.name, case.peer, *figures, f"{case.ratio:.2f}")
    Console().print(table)
    if json_file is not None:
        keys = ("name", "peer", "ours", "theirs", "ratio", "unit")
        content = {"cases": [{key: getattr(case, key) for key in keys} for case in cases]}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _high_water_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except FileNotFoundError:  # no /proc outside Linux: the high-water mark so far is the best there is
        return _high_water_bytes()
    return pages * resource.getpagesize()
