"""Trainings of several processes with planned faults; run as a script with a plan, it prints how each process ended.

PyTorch is imported once; every process is a fork of this one and joins the others as those of torchrun do.
"""

import errno
import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it at their first step: once here instead of in every fork
from toy_training import ToyClip, ToyRegression, ToyStream, make, toy_config

from mm.training import checkpoint
from mm.training.config import ParallelConfig
from mm.training.loop import train
from mm.types import Batch

SYSTEMS = {"regression": ToyRegression, "clip": partial(ToyClip, dropout=0.0)}


class Troubled:
    """The toy stream of one process, which brings trouble when a step is reached."""

    def __init__(self, stream: ToyStream, trouble: str, step: int) -> None:
        self.stream, self.trouble, self.step = stream, trouble, step
        self.state, self.restore = stream.state, stream.restore

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.stream:
            if self.stream.cursor == self.step:
                if self.trouble == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                elif self.trouble == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
                elif self.trouble == "stuck":
                    time.sleep(60)
            yield batch


def full_disk(first_save: int) -> None:
    """Let saving fail from this one on, the first being 1."""
    original, count = checkpoint._sync, [0]

    def sync(path: Path) -> None:
        count[0] += path.name.startswith("model")
        if count[0] >= first_save:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    checkpoint._sync = sync


def one(rank: int, size: int, plan: dict[str, Any], report: Path) -> int:
    """A process of the training; its end is written down. Returns its exit code."""
    stream = ToyStream(rank=rank, world_size=size, poison=frozenset(plan.get("poison", []) if rank == size - 1 else []))
    system = make(SYSTEMS[plan["system"]])
    mine = plan.get("trouble", {}).get(str(rank))
    if "full_disk_from" in plan and rank == 0:
        full_disk(plan["full_disk_from"])
    began, code, told = time.monotonic(), 0, ""
    try:
        train(
            system,
            Troubled(stream, *mine) if mine else stream,
            toy_config(**plan["train"]),
            Path(plan["run"]),
            parallel=ParallelConfig(timeout_seconds=plan.get("timeout", 30.0)),
            progress=False,
        )
    except BaseException as error:
        code, told = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
        traceback.print_exc()
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in system.parameters())).hexdigest()
    ended = {"code": code, "told": told, "seconds": time.monotonic() - began, "at": time.time(), "weights": weights}
    report.write_text(json.dumps(ended))
    return code


def together(plan: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Run all processes of a plan; None for one that was killed or stopped."""
    size, folder = plan["size"], Path(plan["run"]).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = [folder / f"rank-{rank}.json" for rank in range(size)]
    processes = []
    for rank, report in enumerate(reports):
        report.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            os.environ.update(
                RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
            )
            code = 1
            try:
                code = one(rank, size, plan, report)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        processes.append(pid)
    stopped = {
        processes[int(rank)] for rank, (trouble, _) in plan.get("trouble", {}).items() if trouble in ("stopped", "stuck")
    }
    for pid in sorted(processes, key=lambda pid: pid in stopped):
        if pid in stopped:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [json.loads(report.read_text()) if report.exists() else None for report in reports]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([together(plan) for plan in json.loads(sys.argv[1])]))
