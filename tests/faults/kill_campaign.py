"""Train once undisturbed and once killed at ten random moments; run as a script, it prints the moments as JSON.

PyTorch is imported once; every session is a fork of this process, so that a killed session costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch._dynamo  # optimizers import it at their first step: once here instead of in every fork
from PIL import Image
from toy_training import ToyClip, ToyStream, make, toy_config

from mm.config import validate
from mm.run.config import RunConfig
from mm.run.training import assemble
from mm.training import checkpoint
from mm.training.loop import train
from mm.types import Batch, BatchStream, System

STEPS = 200
SYNCS_PER_SAVE = 9  # model, ema, optimizer, state, manifest, their folder, its parent, pointer, parent again
NUM_PICTURES = 44
assert timm  # imported before the forks, like torch._dynamo

Parts = tuple[System, BatchStream, dict[str, Any]]


def toy_parts() -> Parts:
    """A toy with dropout on a toy stream."""
    return make(ToyClip), ToyStream(), {}


def real_parts(folder: Path, workers: int) -> Parts:
    """A tiny CLIP on a folder of pictures, two of them damaged, assembled as ``mm train`` does it."""
    values = {
        "system": {
            "name": "clip",
            "image": {"backbone": "resnet10t", "image_size": 16, "options": {"channels": [8, 8, 8, 8], "stem_width": 8}},
            "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "dropout": 0.1, "vocab_size": 300},
            "embed_dim": 8,
        },
        "data": {"train": str(folder), "workers": workers, "augment": {"flip": 0.5, "hue": 0.1, "rotation": 0.1}},
        "train": {"batch_size": 8},
    }
    run = assemble(validate(RunConfig, values, "test"))
    return run.system, run.stream, {"extra_files": run.write_files}


def draw_pictures(folder: Path) -> None:
    """Pictures with captions beside them."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    for number in range(NUM_PICTURES):
        path = folder / f"{number:02d}.png"
        Image.fromarray(chance.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"picture {'abcdefghij'[number % 10]} of row {number // 10}")
        if number in (7, 30):
            path.write_bytes(path.read_bytes()[:200])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DeadlyStream:
    """Passes a stream on and starts the clock that kills when a step is reached."""

    def __init__(self, stream: BatchStream, step: int, seconds: float) -> None:
        self.stream, self.step, self.seconds = stream, step, seconds
        self.state, self.restore = stream.state, stream.restore

    def __iter__(self) -> Iterator[Batch]:
        for count, batch in enumerate(self.stream):
            if count == self.step:
                threading.Timer(self.seconds, die).start()
            yield batch


def kill_in_save(num_syncs: int) -> None:
    """Kill when this many files or folders were forced to disk."""
    original, left = checkpoint._sync, [num_syncs]

    def counted(path: Path) -> None:
        left[0] -= 1
        if left[0] <= 0:
            die()
        original(path)

    checkpoint._sync = counted


def session(run: Path, make_parts: Callable[[], Parts], plan: dict | None) -> int:
    """Train in a fork, killed as planned; returns the status that waitpid gives."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            system, stream, options = make_parts()
            if plan and plan["where"] == "step":
                stream = DeadlyStream(stream, plan["after_steps"], plan["seconds"])
            elif plan:
                kill_in_save(plan["after_syncs"])
            config = toy_config(steps=STEPS, accumulate=2, checkpoint_every_steps=17)
            train(system, stream, config, run, progress=False, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def campaign(folder: Path, make_parts: Callable[[], Parts], seed: int) -> list[dict]:
    """Both runs; raises when a session ends otherwise than planned."""
    chance = random.Random(seed)
    if session(folder / "whole", make_parts, None) != 0:
        raise RuntimeError("the undisturbed run failed")
    plans = []
    for number in range(10):
        if number % 2:
            plan = {"where": "save", "after_syncs": chance.randint(1, 2 * SYNCS_PER_SAVE)}
        else:
            plan = {"where": "step", "after_steps": chance.randint(0, 25), "seconds": chance.uniform(0, 0.03)}
        status = session(folder / "killed", make_parts, plan)
        if status != signal.SIGKILL:
            raise RuntimeError(f"session {number} was to be killed, but ended with status {status}")
        plans.append(plan | {"left": sorted(p.name for p in (folder / "killed" / "checkpoints").glob("*"))})
    if session(folder / "killed", make_parts, None) != 0:
        raise RuntimeError("the run could not be finished after the last kill")
    return plans


def main(folder: Path, seed: int, kind: str) -> None:
    torch.set_num_threads(1)
    make_parts = toy_parts
    if kind != "toy":
        draw_pictures(folder / "pictures")
        make_parts = partial(real_parts, folder / "pictures", int(kind))
    print(json.dumps(campaign(folder, make_parts, seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
