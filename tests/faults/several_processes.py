"""Trainings of several processes with planned faults; run as a script with plans, it prints how each process ended.

PyTorch is imported once; every process is a fork of this one and joins the others as those of torchrun do.
"""

import errno
import hashlib
import importlib
import json
import multiprocessing
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

from mm.data.accounting import merge_states
from mm.training import checkpoint
from mm.training.config import ParallelConfig
from mm.training.loop import train
from mm.training.step import Stepper, StepReport
from mm.types import Batch, BatchStream, System

SYSTEMS = {"regression": ToyRegression, "clip": partial(ToyClip, dropout=0.0)}


class Troubled:
    """The stream of one process, which brings trouble when it is asked for the batch of a step."""

    def __init__(self, stream: BatchStream, trouble: str, step: int, told: Path) -> None:
        self.stream, self.trouble, self.step, self.told = stream, trouble, step, told
        self.state, self.restore = stream.state, stream.restore

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.stream, 1):
            if number == self.step:
                self.told.write_text(str(time.time()))
                self.happen()
            yield batch

    def happen(self) -> None:
        if self.trouble == "stuck":
            time.sleep(60)
            return
        who, signals = os.getpid(), {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "terminated": signal.SIGTERM}
        if self.trouble.startswith("worker "):
            who = multiprocessing.active_children()[0].pid
        assert who is not None
        os.kill(who, signals[self.trouble.removeprefix("worker ")])


def full_disk(first_save: int) -> None:
    """Let saving fail from this one on, the first being 1."""
    original, count = checkpoint._sync, [0]

    def sync(path: Path) -> None:
        count[0] += path.name.startswith("model")
        if count[0] >= first_save:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    checkpoint._sync = sync


def digest_every_step(digests: list[str]) -> None:
    """Note after each step a digest of all that it may change: weights, statistics, optimizer, average."""
    original = Stepper.step

    def step(self: Stepper, *args: Any) -> StepReport:
        report = original(self, *args)
        content = hashlib.sha256()
        for stem, named in sorted(self.tensors().items()):
            for name, tensor in sorted(named.items()):
                content.update(f"{stem} {name}".encode() + tensor.detach().numpy().tobytes())
        digests.append(content.hexdigest())
        return report

    Stepper.step = step


def parts(rank: int, size: int, plan: dict[str, Any]) -> tuple[System, BatchStream, dict[str, Any]]:
    if plan["system"] == "pictures":
        from real_training import assembled

        run = assembled(Path(plan["data"]), batch_norm=False, dropout=0.0, **plan.get("reading", {}))
        return run.system, run.stream, {"extra_files": run.write_files, "merge_states": merge_states}
    poison = frozenset(plan.get("poison", []) if rank == size - 1 else [])
    stream = ToyStream(rank=rank, world_size=size, poison=poison, poison_with=float(plan.get("poison_with", "nan")))
    return make(SYSTEMS[plan["system"]]), stream, {}


def one(rank: int, size: int, plan: dict[str, Any], report: Path) -> int:
    """A process of the training; its end is written down. Returns its exit code."""
    torch.manual_seed(0)
    system, stream, options = parts(rank, size, plan)
    mine = plan.get("trouble", {}).get(str(rank))
    if "full_disk_from" in plan and rank == 0:
        full_disk(plan["full_disk_from"])
    digests: list[str] = []
    digest_every_step(digests)
    code, told, step = 0, "", None
    try:
        step = train(
            system,
            Troubled(stream, *mine, report.with_name("trouble")) if mine else stream,
            toy_config(**plan["train"]),
            Path(plan["run"]),
            parallel=ParallelConfig(timeout_seconds=plan.get("timeout", 30.0)),
            progress=False,
            **options,
        ).step
    except BaseException as error:
        code, told = getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}"
        traceback.print_exc()
    report.write_text(json.dumps({"code": code, "told": told, "step": step, "digests": digests, "at": time.time()}))
    return code


def together(plan: dict[str, Any]) -> list[dict[str, Any] | None]:
    """Run all processes of a plan; None for one that was killed or stopped. The others tell how long after the trouble."""
    size, folder = plan["size"], Path(plan["run"]).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for path in plan.get("removed", []):
        Path(path).unlink()
    reports, trouble = [folder / f"rank-{rank}.json" for rank in range(size)], folder / "trouble"
    trouble.unlink(missing_ok=True)
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
    stopped = {processes[int(rank)] for rank, (kind, _) in plan.get("trouble", {}).items() if kind in ("stopped", "stuck")}
    for pid in sorted(processes, key=lambda pid: pid in stopped):
        if pid in stopped:
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    ended = [json.loads(report.read_text()) if report.exists() else None for report in reports]
    began = float(trouble.read_text()) if trouble.exists() else None
    return [process and process | {"after": began and process["at"] - began} for process in ended]


if __name__ == "__main__":
    torch.set_num_threads(1)
    plans = json.loads(sys.argv[1])
    if any(plan["system"] == "pictures" for plan in plans):
        importlib.import_module("real_training")  # takes seconds: once here instead of in every fork
    print(json.dumps([together(plan) for plan in plans]))
