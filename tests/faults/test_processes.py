"""Faults of one process of several: all agree what happened, nobody waits for ever, and who is to blame is named."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_training import lines, newest

HERE = Path(__file__).parent
STEPS = 12
CONSTANT = {"schedule": "constant", "checkpoint_every_steps": 0, "log_every": 1}


def run(*plans: dict[str, Any]) -> list[list[dict[str, Any] | None]]:
    """How each process of each training ended, one training after the other."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "several_processes.py"), json.dumps(plans)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def plan(folder: Path, name: str = "run", *, size: int = 2, system: str = "clip", **more: Any) -> dict[str, Any]:
    train = {"steps": STEPS, **CONSTANT, **more.pop("train", {})}
    return {"run": str(folder / name), "size": size, "system": system, "train": train, **more}


def ids(folder: Path) -> list[Any]:
    return [(record["step"], record["ids"]) for record in lines(folder / "ids.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(folder) / "model.safetensors")


def test_as_many_processes_as_there_happen_to_be(tmp_path: Path) -> None:
    """2, then 1, then 2 processes see what one sees, and learn the same."""
    parts = [
        plan(tmp_path, "elastic", size=size, train={"steps": steps})
        for size, steps in ((2, STEPS // 3), (1, 2 * STEPS // 3), (2, STEPS))
    ]
    ended = run(plan(tmp_path, "whole", size=1), *parts)
    assert all(process["code"] == 0 for processes in ended for process in processes)
    assert ids(tmp_path / "elastic") == ids(tmp_path / "whole")
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "elastic")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
    first, last = (load_file(newest(tmp_path / name) / "ema.safetensors") for name in ("whole", "elastic"))
    assert all((first[name] - last[name]).abs().max() < 1e-6 for name in first)


@pytest.mark.parametrize(
    ("trouble", "words"), [("killed", "no sign of life of process 1"), ("stopped", "no sign of life of process 1")]
)
def test_a_lost_process_is_named(tmp_path: Path, trouble: str, words: str) -> None:
    [[first, second]] = run(plan(tmp_path, trouble={"1": [trouble, 7]}, timeout=3.0, train={"checkpoint_every_steps": 5}))
    assert second is None
    assert first is not None
    assert first["code"] == 75
    assert words in first["told"]
    assert "process 1 (step 7, taking a batch)" in first["told"]
    assert "\n" not in first["told"]
    assert newest(tmp_path / "run").name == "step-00000005"
    if trouble == "killed":
        assert first["seconds"] < 3.0 + 2.0  # the connection tells at once; the time-out is not waited for
    [[again, other]] = run(plan(tmp_path))
    assert again is not None
    assert other is not None
    assert (again["code"], other["code"]) == (0, 0)
    assert [step for step, _ in ids(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_a_process_that_lives_but_is_stuck_is_named_too(tmp_path: Path) -> None:
    [[first, _]] = run(plan(tmp_path, trouble={"1": ["stuck", 4]}, timeout=2.0))
    assert first is not None
    assert first["code"] == 75
    assert "the others live, but do not answer: process 1 (step 4, taking a batch)" in first["told"]


def test_a_number_that_is_none_on_one_process_stops_no_other_and_changes_nothing(tmp_path: Path) -> None:
    """The last process alone draws NaN in step 6; all skip it, and go on with equal weights."""
    [both, alone] = run(
        plan(tmp_path, poison=[5], system="regression"), plan(tmp_path, "short", train={"steps": 5}, system="regression")
    )
    assert [process["code"] for process in both] == [0, 0]
    assert both[0]["weights"] == both[1]["weights"] != alone[0]["weights"]
    [skipped] = lines(tmp_path / "run" / "nonfinite.jsonl")
    assert skipped["step"] == 6
    assert skipped["ids"] == [f"5-{row}" for row in range(8)]

    [stopped] = run(plan(tmp_path, "stop", poison=[5, 6, 7], train={"max_nonfinite": 3}, system="regression"))
    assert [process["code"] for process in stopped] == [1, 1]
    assert all("3 steps in a row" in process["told"] for process in stopped)
    assert stopped[0]["weights"] == stopped[1]["weights"] == alone[0]["weights"], "the optimizer was touched"


def test_a_full_disk_is_everybodys_business(tmp_path: Path) -> None:
    """A save on the way costs a warning; the last one ends all processes alike, with the checkpoint before intact."""
    [ended] = run(plan(tmp_path, full_disk_from=2, train={"checkpoint_every_steps": 5}))
    assert [process["code"] for process in ended] == [74, 74]
    assert newest(tmp_path / "run").name == "step-00000005"
    assert ended[0]["weights"] == ended[1]["weights"]
    [again] = run(plan(tmp_path, train={"checkpoint_every_steps": 5}))
    assert [process["code"] for process in again] == [0, 0]
    assert [step for step, _ in ids(tmp_path / "run")] == list(range(1, STEPS + 1))
