"""Train once undisturbed and once interrupted at random moments; run as a script, it prints the moments as JSON.

PyTorch is imported once; every session is a fork of this process, so that an interrupted session costs milliseconds.
"""

import json
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here instead of in every fork
from real_training import assembled, draw_pictures
from toy_training import ToyClip, ToyStream, make, toy_config

from mm.training import checkpoint
from mm.training.loop import train
from mm.types import Batch, BatchStream, System

STEPS_PER_STOP = 20
SYNCS_PER_SAVE = 9  # model, ema, optimizer, state, manifest, their folder, its parent, pointer, parent again

Parts = tuple[System, BatchStream, dict[str, Any]]


def toy_parts() -> Parts:
    """A toy with dropout on a toy stream."""
    return make(ToyClip), ToyStream(), {}


def real_parts(pictures: Path, workers: int) -> Parts:
    """A tiny CLIP on a folder of pictures, two of them damaged."""
    run = assembled(pictures, workers=workers)
    return run.system, run.stream, {"extra_files": run.write_files}


def send(number: int, told: Path) -> None:
    """Interrupt this process, having noted when."""
    told.write_text(str(time.time()))
    os.kill(os.getpid(), number)


class DeadlyStream:
    """Passes a stream on and starts a clock when a step is reached."""

    def __init__(self, stream: BatchStream, step: int, seconds: float, end: Callable[[], None]) -> None:
        self.stream, self.step, self.seconds, self.end = stream, step, seconds, end
        self.state, self.restore = stream.state, stream.restore

    def __iter__(self) -> Iterator[Batch]:
        for count, batch in enumerate(self.stream):
            if count == self.step:
                threading.Timer(self.seconds, self.end).start()
            yield batch


def end_in_save(num_syncs: int, end: Callable[[], None]) -> None:
    """Interrupt when this many files or folders were forced to disk."""
    original, left = checkpoint._sync, [num_syncs]

    def counted(path: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            end()
        original(path)

    checkpoint._sync = counted


def session(run: Path, make_parts: Callable[[], Parts], steps: int, number: int, plan: dict | None) -> tuple[int, float]:
    """Train in a fork, interrupted as planned; returns the status that waitpid gives, and the seconds from signal to end."""
    told = run.parent / "interrupted"
    told.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code, end = 1, partial(send, number, told)
        try:
            system, stream, options = make_parts()
            if plan and plan["where"] == "step":
                stream = DeadlyStream(stream, plan["after_steps"], plan["seconds"], end)
            elif plan:
                end_in_save(plan["after_syncs"], end)
            config = toy_config(steps=steps, accumulate=2, checkpoint_every_steps=17)
            train(system, stream, config, run, progress=False, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return status, time.time() - float(told.read_text()) if told.exists() else 0.0


def campaign(folder: Path, make_parts: Callable[[], Parts], seed: int, stops: int, number: int) -> list[dict]:
    """Both runs; raises when a session ends otherwise than planned: by the signal that kills, else with exit code 0."""
    chance, steps = random.Random(seed), STEPS_PER_STOP * stops
    if session(folder / "whole", make_parts, steps, number, None)[0] != 0:
        raise RuntimeError("the undisturbed run failed")
    expected = signal.SIGKILL if number == signal.SIGKILL else 0
    plans = []
    for count in range(stops):
        if count % 2:
            plan = {"where": "save", "after_syncs": chance.randint(1, 2 * SYNCS_PER_SAVE)}
        else:
            plan = {"where": "step", "after_steps": chance.randint(0, 25), "seconds": chance.uniform(0, 0.03)}
        status, seconds = session(folder / "stopped", make_parts, steps, number, plan)
        if status != expected:
            raise RuntimeError(f"session {count} of plan {plan} ended with status {status}")
        left = sorted(p.name for p in (folder / "stopped" / "checkpoints").glob("*"))
        plans.append(plan | {"seconds_to_end": seconds, "left": left})
    if session(folder / "stopped", make_parts, steps, number, None)[0] != 0:
        raise RuntimeError("the run could not be finished after the last interruption")
    return plans


def main(folder: Path, seed: int, kind: str, stops: int, number: int) -> None:
    torch.set_num_threads(1)
    make_parts = toy_parts if kind == "toy" else partial(real_parts, draw_pictures(folder / "pictures"), int(kind))
    print(json.dumps(campaign(folder, make_parts, seed, stops, number)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), signal.Signals[sys.argv[5]])
