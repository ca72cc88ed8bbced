"""Train a toy once undisturbed and once killed at ten random moments; run as a script, it prints the moments as JSON.

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
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it at their first step: once here instead of in every fork
from toy_training import ToyClip, ToyStream, make, toy_config

from mm.training import checkpoint
from mm.training.loop import train
from mm.types import Batch, BatchStream

STEPS = 200
SYNCS_PER_SAVE = 9  # model, ema, optimizer, state, manifest, their folder, its parent, pointer, parent again

MakeStream = Callable[[], BatchStream]


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


def session(run: Path, make_stream: MakeStream, plan: dict | None) -> int:
    """Train in a fork, killed as planned; returns the status that waitpid gives."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            stream = make_stream()
            if plan and plan["where"] == "step":
                stream = DeadlyStream(stream, plan["after_steps"], plan["seconds"])
            elif plan:
                kill_in_save(plan["after_syncs"])
            config = toy_config(steps=STEPS, accumulate=2, checkpoint_every_steps=17)
            train(make(ToyClip), stream, config, run, progress=False)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def campaign(folder: Path, make_stream: MakeStream, seed: int) -> list[dict]:
    """Both runs; raises when a session ends otherwise than planned."""
    chance = random.Random(seed)
    if session(folder / "whole", make_stream, None) != 0:
        raise RuntimeError("the undisturbed run failed")
    plans = []
    for number in range(10):
        if number % 2:
            plan = {"where": "save", "after_syncs": chance.randint(1, 2 * SYNCS_PER_SAVE)}
        else:
            plan = {"where": "step", "after_steps": chance.randint(0, 25), "seconds": chance.uniform(0, 0.03)}
        status = session(folder / "killed", make_stream, plan)
        if status != signal.SIGKILL:
            raise RuntimeError(f"session {number} was to be killed, but ended with status {status}")
        plans.append(plan | {"left": sorted(p.name for p in (folder / "killed" / "checkpoints").glob("*"))})
    if session(folder / "killed", make_stream, None) != 0:
        raise RuntimeError("the run could not be finished after the last kill")
    return plans


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(campaign(Path(sys.argv[1]), ToyStream, int(sys.argv[2]))))
