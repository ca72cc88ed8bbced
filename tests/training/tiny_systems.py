"""The smallest of some kinds of systems; on each process texts and recordings are as long as its own longest one."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from mm.systems import build, read_system
from mm.types import AudioBatch, Batch, System, TextBatch

ROWS, SIDE, WORDS, LENGTH, SAMPLES = 8, 16, 40, 10, 900

VIT = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": SIDE,
    "patch_size": 8,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
TEXT = {"width": 16, "layers": 2, "heads": 2, "vocab_size": WORDS, "context_length": LENGTH, "token_dropout": 0.3}
MASKED = {"mels": 8, "width": 16, "layers": 2, "heads": 2, "stride": 2, "mask_time": 0.03, "mask_bands": 0.5}
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
    "clap": {"name": "clap", "audio": MASKED, "text": TEXT, "embed_dim": 12},
    "wav2vec2": {
        "name": "wav2vec2",
        "audio": {
            "extractor": "layer_norm",
            "conv_layers": [[8, 10, 5], [8, 4, 4]],
            "width": 16,
            "layers": 1,
            "heads": 2,
            "hidden": 16,
            "position_kernel": 4,
            "position_groups": 2,
            "dropout": 0,
            "projection_dropout": 0,
            "attention_dropout": 0,
            "layer_drop": 0,
        },
        "objective": {"mask_length": 4, "codes": 8, "code_width": 16, "width": 16, "negatives": 10},
    },
}

OF_LIBRARIES = ("wav2vec2",)
"""Systems whose layers are not the suite's own, so that processes hold all of them."""


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
    waves, lengths = torch.randn(ROWS, SAMPLES, generator=generator), torch.randint(150, SAMPLES, (ROWS,), generator=generator)
    audio = AudioBatch(waves * (torch.arange(SAMPLES) < lengths[:, None]), lengths)
    return Batch(tuple(f"{step}-{row}" for row in range(ROWS)), image, text, groups, audio=audio)


def share(batch: Batch, rank: int, size: int) -> Batch:
    """A process's part of it, without padding that no row needs."""
    part = batch[rank * ROWS // size : (rank + 1) * ROWS // size]
    assert part.text is not None
    assert part.audio is not None
    text, audio = part.text, part.audio
    return replace(
        part,
        text=TextBatch(text.ids[:, : int(text.lengths.max())], text.lengths),
        audio=AudioBatch(audio.waves[:, : int(audio.lengths.max())], audio.lengths),
    )


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
