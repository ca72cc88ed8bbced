"""Die at every operation of a save, one fork each; run as a script, it prints what was left and what was found as JSON."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mm.errors import CheckpointError
from mm.training import checkpoint

PHASES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
"""Python's audit events of everything that changes a folder; each is raised before it happens."""


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((50,), float(step))}, "optimizer": {"m": torch.full((9,), float(step))}}


def save(folder: Path, step: int) -> None:
    checkpoint.save_checkpoint(folder, step, tensors(step), {"step": step}, keep_last=1)


def write_in_halves(path: Path, data: bytes) -> None:
    """In place of the function that writes a file: there is a moment in the middle."""
    for mode, part in (("wb", data[: len(data) // 2]), ("ab", data[len(data) // 2 :])):
        with path.open(mode) as file:
            file.write(part)


def die_at(count: int, folder: Path) -> list[str]:
    """Kill this process at an operation on the folder; the list holds those that came before."""
    met: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in PHASES and str(arguments[0]).startswith(str(folder)):
            met.append(event)
            if len(met) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return met


def forked(work: Callable[[], None]) -> bool:
    """Whether a fork of this process did its work to the end, rather than being killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def loaded(folder: Path) -> tuple[int, list[str]]:
    """The step that would be resumed, and the warnings. Raises where its tensors are not those that were saved."""
    told: list[str] = []
    found = checkpoint.latest_checkpoint(folder, told.append)
    assert found is not None
    step = found.state["step"]
    for stem, named in tensors(step).items():
        for name, tensor in found.tensors(stem).items():
            if not torch.equal(tensor, named[name]):
                raise CheckpointError(f"{found.folder}: holds tensors of another step")
    return step, told


def main(root: Path) -> None:
    checkpoint._write = write_in_halves
    results = []
    for count in range(1, 1000):
        folder = root / str(count)
        save(folder, 1)

        def doomed(folder: Path = folder, count: int = count) -> None:
            die_at(count, folder)
            save(folder, 2)

        complete = forked(doomed)
        left = sorted(path.name for path in folder.iterdir())
        before = loaded(folder)
        save(folder, 2)
        after = loaded(folder)
        results.append({"complete": complete, "left": left, "before": before, "after": after})
        results[-1]["swept"] = sorted(path.name for path in folder.iterdir())
        shutil.rmtree(folder)
        if complete:
            break
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
