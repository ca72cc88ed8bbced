"""Published evaluation sets in the layouts that they are distributed in: ``NAME:FOLDER`` or ``NAME/SPLIT:FOLDER``."""

import re
from collections.abc import Mapping
from pathlib import Path

from mm.data.benchmarks import arrays, captioned, contrasts, folders, imagenet, lists, questions, recordings
from mm.data.benchmarks.layout import Benchmark, Copy, Evaluation
from mm.data.benchmarks.source import BenchmarkSource
from mm.data.fields import nearest
from mm.errors import UserError
from mm.types import Source

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkSource", "Evaluation", "is_benchmark", "open_benchmark"]

BENCHMARKS: Mapping[str, Benchmark] = {
    **imagenet.SETS,
    **arrays.SETS,
    **lists.SETS,
    **folders.SETS,
    **captioned.SETS,
    **contrasts.SETS,
    **recordings.SETS,
    **questions.SETS,
}
"""Every set by its name."""

_SPEC = re.compile(r"(?P<name>[a-z][a-z0-9-]+)(/(?P<split>[A-Za-z0-9_-]+))?(:(?P<folder>.*))?", re.DOTALL)


def is_benchmark(spec: str) -> bool:
    """True when a source specification begins with the name of a set and a colon, or is such a name and no file or folder."""
    found = _SPEC.fullmatch(spec)
    if found is None or found["name"] not in BENCHMARKS:
        return False
    return found["folder"] is not None or not Path(spec).exists()


def open_benchmark(spec: str) -> Source:
    """Open a user's copy of an evaluation set.

    Args:
        spec: ``NAME:FOLDER``, such as ``imagenet:/data/imagenet``, for the split that figures are published for, or
            ``NAME/SPLIT:FOLDER``, such as ``cifar10/train:/data``.

    Returns:
        A source with ``task`` (a `mm.data.labels.LabelTask`, or None where the set has no classes), ``templates`` (its
        published prompts) and ``evaluation`` (what figures are published for).

    Raises:
        UserError: No such set or split, or the folder does not have its layout; the message says what is missing.
    """
    found = _SPEC.fullmatch(spec)
    if found is None or found["name"] not in BENCHMARKS:
        name = spec.split(":", 1)[0].split("/", 1)[0]
        raise UserError(f"{spec}: no evaluation set is called '{name}'; {nearest(name, list(BENCHMARKS))}")
    name, benchmark = found["name"], BENCHMARKS[found["name"]]
    if not found["folder"]:
        raise UserError(f"{spec}: name the folder of your copy, such as {name}:/data/{name}; it holds {benchmark.layout}")
    split = found["split"] or benchmark.splits[0]
    if split not in benchmark.splits:
        raise UserError(f"{spec}: {name} has no split '{split}'; {nearest(split, benchmark.splits)}")
    folder = Path(found["folder"]).expanduser()
    if not folder.is_dir():
        raise UserError(f"{spec}: no folder {folder}; give the one that holds {benchmark.layout}")
    return benchmark.open(Copy(spec, name, split, folder, benchmark.layout, benchmark.evaluation))
