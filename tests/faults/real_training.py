"""Tiny CLIP models on real files, assembled as ``mm train`` does it: pictures in folders and in uneven shards, some damaged."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

from mm.config import validate
from mm.data.write import write_shards
from mm.run.config import RunConfig
from mm.run.training import Assembled, assemble
from mm.types import Sample

assert timm  # imported once, before processes are forked

NUM_PICTURES = 44
DAMAGED = (7, 30)
BATCH_SIZE = 8
WITH_BATCH_NORM = {"backbone": "resnet10t", "image_size": 16, "options": {"channels": [8, 8, 8, 8], "stem_width": 8}}
WITHOUT = {"backbone": "convnext_atto", "image_size": 32, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}


def draw_pictures(folder: Path, count: int = NUM_PICTURES, damaged: tuple[int, ...] = DAMAGED) -> Path:
    """Pictures with captions beside them, some cut short."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:02d}.png"
        Image.fromarray(chance.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {'abcdefghij'[number % 10]} of row {number // 10}")
        if number in damaged:
            path.write_bytes(path.read_bytes()[:200])
    return folder


def write_uneven_shards(folder: Path, sizes: tuple[int, ...]) -> Path:
    """Whole pictures in as many shards as there are sizes."""
    pictures = draw_pictures(folder / "pictures", sum(sizes), damaged=())
    paths = iter(sorted(pictures.glob("*.png")))
    shards = folder / "shards"
    shards.mkdir()
    for number, size in enumerate(sizes):
        one = [next(paths) for _ in range(size)]
        samples = (Sample(path.stem, {"image": path.read_bytes()}, (path.with_suffix(".txt").read_text(),)) for path in one)
        [written] = write_shards(samples, folder / str(number))
        written.rename(shards / f"{number}.tar")
    return shards


def assembled(data: Path, *, workers: int = 0, batch_norm: bool = True, dropout: float = 0.1, **more: Any) -> Assembled:
    """A run with changed pictures.

    Args:
        data: Folder of pictures or shards.
        workers: Loading processes.
        batch_norm: Take a network with layers that see only this process's samples.
        dropout: Of the text encoder.
        more: Further settings of the data.
    """
    values = {
        "system": {
            "name": "clip",
            "image": WITH_BATCH_NORM if batch_norm else WITHOUT,
            "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "dropout": dropout, "vocab_size": 300},
            "embed_dim": 8,
        },
        "data": {"train": str(data), "workers": workers, "augment": {"flip": 0.5, "hue": 0.1, "rotation": 0.1}} | more,
        "train": {"batch_size": BATCH_SIZE, "device": "cpu"},
    }
    return assemble(validate(RunConfig, values, "test"))
