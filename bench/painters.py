"""Seconds a picture: all tokens in a few parallel steps (emoji-muse) against one token after the other (emoji-dalle).

    python bench/painters.py    (two minutes on one core)

Both hold their shipped weights in fp32, with guidance and without a choice among candidates. Their networks differ a little in
size; the cards tell.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from harness import Case, arguments_parser, interleaved, report

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

import mm
from mm.types import Paints, Sampling


def painting(name: str, sampling: Sampling, batch_size: int) -> Callable[[], object]:
    """A call that paints a batch, made once already."""
    model = mm.load(name, device="cpu", precision="fp32")
    painter, text = model.system, model.processor.text(["red heart"] * batch_size)
    assert isinstance(painter, Paints)
    paint: Callable[[], object] = lambda: painter.paint(text, range(batch_size), sampling)  # noqa: E731
    paint()
    return paint


def main() -> None:
    """Compare at three batch sizes and two numbers of steps."""
    arguments = arguments_parser(__doc__).parse_args()
    torch.set_num_threads(1)
    found: list[Case] = []
    for batch_size in (1, 8, 64):
        one_by_one = painting("emoji-dalle", Sampling(), batch_size)
        for steps in (12, 8):
            parallel = painting("emoji-muse", Sampling(steps=steps), batch_size)
            times = [time / batch_size for time in interleaved(parallel, one_by_one, arguments.repeats)]
            found.append(Case(f"emoji-muse, {steps} steps, batch {batch_size}", "emoji-dalle", *times, "s a picture"))
    report(found, arguments.json)


if __name__ == "__main__":
    main()
