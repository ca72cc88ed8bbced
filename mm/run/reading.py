"""All samples of a source once, in its order, as they are measured."""

import os
from collections.abc import Callable
from typing import Any

from mm.data.loader import Loader
from mm.processor import Processor
from mm.run.preparation import EvalPreparation
from mm.types import Sample, Source

BATCH_SIZE = 64
MAX_BAD_SHARE = 0.2
"""Pictures of a user's own source that may be left out; of a published set, whose figures are compared, none may."""
MAX_WORKERS = 8
WORKERS_FROM = 1000
"""Samples from which decoding in other processes saves more than their start takes."""


def evaluation_loader(
    source: Source,
    processor: Processor,
    media: tuple[str, ...] = ("image", "audio"),
    *,
    prepare: Callable[[EvalPreparation], Callable[[Sample, int], Any]] | None = None,
    batch_size: int = BATCH_SIZE,
    workers: int | None = None,
    max_bad_fraction: float = 1.0,
) -> Loader:
    """A loader whose one epoch is every usable sample of a source, in its order; nothing stands in for the others.

    Args:
        source: What is read.
        processor: The model's preparation.
        media: See `mm.run.preparation.EvalPreparation`.
        prepare: Makes of that preparation another one, for samples that hold more than media and captions.
        batch_size: Samples at a time.
        workers: Processes that decode beside the network; chosen by the size of the source if None.
        max_bad_fraction: Largest share of unusable samples; 1 where their counts are judged by the caller.
    """
    plain = EvalPreparation(processor, media)
    return Loader(
        source,
        plain if prepare is None else prepare(plain),
        plain.collate,
        batch_size=batch_size,
        seed=0,
        tail="short",
        shuffle=False,
        substitute=False,
        workers=decoding_workers(len(source)) if workers is None else workers,
        max_bad_fraction=max_bad_fraction,
    )


def decoding_workers(samples: int) -> int:
    """Processes that decode beside the network, none where their start would take longer than they save."""
    return min(MAX_WORKERS, (os.cpu_count() or 1) // 2) if samples >= WORKERS_FROM else 0
