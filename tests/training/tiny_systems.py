"""The smallest of four kinds of systems, with batches whose texts are as long on each process as its own longest one."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mm.systems import build, read_system
from mm.types import Batch, System, TextBatch

ROWS, SIDE, WORDS, LENGTH = 8, 16, 40, 10

VIT = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": SIDE,
    "patch_size": 8,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
TEXT = {"width": 16, "layers": 2, "heads": 2, "vocab_size": WORDS, "context_length": LENGTH}
VQ = {"name": "vq", "tokenizer": {"image_size": SIDE, "patch": 2, "widths": [8, 16]}}

SYSTEMS: Mapping[str, Mapping[str, Any]] = {
    "clip": {"name": "clip", "image": VIT, "text": TEXT, "embed_dim": 12, "queue_size": 12},
    "albef": {
        "name": "albef",
        "image": VIT,
        "width": 16,
        "heads": 2,
        "vocab_size": WORDS,
        "context_length": LENGTH,
        "embed_dim": 12,
        "queue_size": 12,
        "momentum": 0.9,
        "distillation_ramp_steps": 3,
        "caption_weight": 0.5,
    },
    "dalle": {
        "name": "dalle",
        "tokenizer": VQ,
        "text": {"vocab_size": WORDS, "context_length": LENGTH},
        "width": 16,
        "layers": 2,
        "heads": 2,
        "caption_dropout": 0.5,
    },
    "flow": {
        "name": "flow",
        "latents": VQ,
        "text": TEXT,
        "denoiser": {"width": 16, "layers": 2, "heads": 2},
        "caption_dropout": 0.5,
    },
}


def tiny(name: str) -> System:
    """A system with the same weights every time; nothing of it is zero, so that every gradient counts from the first step."""
    torch.manual_seed(0)
    system = build(read_system(dict(SYSTEMS[name]), "test"))
    with torch.no_grad():
        for parameter in system.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.02)
    return system


def global_batch(step: int) -> Batch:
    """Batch of a step, a pure function of it."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (ROWS, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, WORDS, (ROWS, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (ROWS,), generator=generator)
    groups = torch.randint(0, 1000, (ROWS,), generator=generator)
    text = TextBatch(ids.masked_fill(torch.arange(LENGTH) >= lengths[:, None], 0), lengths)
    return Batch(tuple(f"{step}-{row}" for row in range(ROWS)), image, text, groups)


def share(batch: Batch, rank: int, size: int) -> Batch:
    """A process's part of it, without padding that no row needs."""
    part = batch[rank * ROWS // size : (rank + 1) * ROWS // size]
    assert part.text is not None
    longest = int(part.text.lengths.max())
    return replace(part, text=TextBatch(part.text.ids[:, :longest], part.text.lengths))


class TinyStream:
    """The batches from `global_batch`, a process's share of each."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self._rank, self._size, self.cursor = rank, size, 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.cursor += 1
            yield share(global_batch(self.cursor - 1), self._rank, self._size)

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "accounting": {"delivered": self.cursor * ROWS // self._size}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]
