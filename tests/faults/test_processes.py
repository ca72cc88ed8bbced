"""Faults of one process of several: all agree what happened, nobody waits for ever, and who is to blame is named."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from real_training import BATCH_SIZE, draw_pictures, write_uneven_shards
from safetensors.torch import load_file
from toy_training import assert_same_run, lines, newest

from mm.training.lock import run_lock

HERE = Path(__file__).parent
STEPS = 12
LONGEST = 240  # seconds; nothing here may wait for ever
CONSTANT = {"schedule": "constant", "checkpoint_every_steps": 0, "log_every": 1}

Ended = list[dict[str, Any]]


def run(*plans: dict[str, Any], within: tuple[str, ...] = ()) -> list[Any]:
    """How each process of each training ended, one training after the other."""
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*within, sys.executable, str(HERE / "several_processes.py"), json.dumps(plans)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            told, problems = process.communicate(timeout=LONGEST)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, problems
    return json.loads(told)


def plan(folder: Path, name: str = "run", *, size: int = 2, system: str = "clip", **more: Any) -> dict[str, Any]:
    train = {"steps": STEPS, **CONSTANT, **more.pop("train", {})}
    return {"run": str(folder / name), "size": size, "system": system, "train": train, **more}


def at_most(seconds: float) -> float:
    """A limit, longer on a machine that has more to do than processors to do it."""
    return seconds * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def codes(ended: Ended) -> list[int]:
    return [process["code"] for process in ended]


def ids(folder: Path) -> list[Any]:
    return [(record["step"], record["ids"]) for record in lines(folder / "ids.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest(folder) / "model.safetensors")


def stream_state(folder: Path) -> dict[str, Any]:
    return json.loads((newest(folder) / "state.json").read_text())["stream"]


def elastic(folder: Path, *, train: dict[str, Any], **more: Any) -> list[Ended]:
    """One process all the way, and 2, then 1, then 2."""
    sizes = ((2, STEPS // 3), (1, 2 * STEPS // 3), (2, STEPS))
    parts = [plan(folder, "elastic", size=size, train=train | {"steps": steps}, **more) for size, steps in sizes]
    return run(plan(folder, "whole", size=1, train=train, **more), *parts)


@pytest.mark.fault(3)
def test_as_many_processes_as_there_happen_to_be(tmp_path: Path) -> None:
    """2, then 1, then 2 processes see what one sees, and learn the same."""
    assert not any(map(any, map(codes, elastic(tmp_path, train={}))))
    assert ids(tmp_path / "elastic") == ids(tmp_path / "whole")
    for stem in ("model", "ema"):
        whole, found = (load_file(newest(tmp_path / name) / f"{stem}.safetensors") for name in ("whole", "elastic"))
        assert max((found[name] - whole[name]).abs().max().item() for name in whole) < 1e-6


@pytest.mark.slow
@pytest.mark.fault(3)
def test_as_many_processes_with_workers_as_there_happen_to_be(tmp_path: Path) -> None:
    """The same on pictures, two of them damaged, with two workers a process: position and counts belong to no process.

    The biases of keys have no gradient but rounding, which AdamW would blow up without its eps.
    """
    pictures = draw_pictures(tmp_path / "pictures")
    more = {"system": "pictures", "data": str(pictures), "reading": {"workers": 2}}
    assert not any(map(any, map(codes, elastic(tmp_path, train={"lr": 1e-3, "eps": 1e-4}, **more))))
    assert ids(tmp_path / "elastic") == ids(tmp_path / "whole")
    assert stream_state(tmp_path / "elastic") == stream_state(tmp_path / "whole")
    assert stream_state(tmp_path / "whole")["finished"]["skipped"] > 0
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "elastic")
    assert max((found[name] - whole[name]).abs().max().item() for name in whole) < 1e-6


@pytest.mark.fault(10)
@pytest.mark.parametrize("trouble", ["killed", "stopped"])
def test_a_lost_process_is_named(tmp_path: Path, trouble: str) -> None:
    timeout = 60.0 if trouble == "killed" else at_most(3.0)
    [[first, second]] = run(plan(tmp_path, trouble={"1": [trouble, 7]}, timeout=timeout, train={"checkpoint_every_steps": 5}))
    assert second is None
    assert first["code"] == 75
    assert "no sign of life of process 1 (step 7, taking a batch)" in first["told"]
    assert "\n" not in first["told"]
    assert newest(tmp_path / "run").name == "step-00000005"
    if trouble == "killed":
        assert first["after"] < at_most(2)  # the connection tells at once; the time-out is not waited for
    else:
        assert timeout - 0.1 < first["after"] < at_most(timeout + 2)
    [again] = run(plan(tmp_path))
    assert codes(again) == [0, 0]
    assert [step for step, _ in ids(tmp_path / "run")] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.fault(10)
def test_the_main_process_may_be_the_one_that_is_lost(tmp_path: Path) -> None:
    timeout = at_most(2.0)
    killed, stopped = run(
        plan(tmp_path, trouble={"0": ["killed", 4]}, timeout=60.0),
        plan(tmp_path, "other", trouble={"0": ["stopped", 4]}, timeout=timeout),
    )
    for [first, second], longest in ((killed, 2), (stopped, timeout + 2)):
        assert first is None
        assert second["code"] == 75
        assert "process 0" in second["told"]
        assert second["after"] < at_most(longest)


@pytest.mark.fault(10)
def test_a_process_that_lives_but_is_stuck_is_named_too(tmp_path: Path) -> None:
    timeout = at_most(2.0)
    [[first, _]] = run(plan(tmp_path, trouble={"1": ["stuck", 4]}, timeout=timeout))
    assert first["code"] == 75
    assert "the others live, but do not answer: process 1 (step 4, taking a batch)" in first["told"]
    assert timeout - 0.1 < first["after"] < at_most(timeout + 2)


@pytest.mark.slow
@pytest.mark.fault(10)
def test_a_lost_worker_of_one_process_ends_all(tmp_path: Path) -> None:
    """A killed one is told at once, a stopped one after the configured time; its process says what, the other says who."""
    shards = write_uneven_shards(tmp_path, (1, 20, 11))
    ways = {"killed": ("a data worker died", 2.0), "stopped": ("no data worker answered in time", 2 + 3.0)}
    plans = [
        plan(
            tmp_path,
            way,
            system="pictures",
            data=str(shards),
            reading={"workers": 2, "timeout_seconds": 2},
            trouble={"1": [f"worker {way}", 3]},
            train={"steps": 1000},
        )
        for way in ways
    ]
    for [first, second], (words, longest) in zip(run(*plans), ways.values(), strict=True):
        assert words in second["told"]
        assert second["after"] < at_most(longest)
        assert first["code"] == 75
        assert "process 1 (step " in first["told"]
        assert first["after"] < at_most(longest + 2)


@pytest.mark.slow
@pytest.mark.fault(9)
def test_uneven_shards_fewer_than_readers(tmp_path: Path) -> None:
    """2 processes of 2 workers on 3 shards of 1, 20 and 11 samples: equal steps, each sample once an epoch."""
    shards, epoch = write_uneven_shards(tmp_path, (1, 20, 11)), 32 // BATCH_SIZE
    reading = {"workers": 2, "timeout_seconds": 20}
    exact, streamed = run(
        plan(tmp_path, system="pictures", data=str(shards), train={"steps": 2 * epoch}, reading=reading),
        plan(
            tmp_path,
            "streamed",
            system="pictures",
            data=str(shards),
            train={"steps": 2 * epoch},
            reading=reading | {"stream": {"buffer": 4}},
        ),
    )
    for ended in (exact, streamed):
        assert codes(ended) == [0, 0]
        assert [len(process["digests"]) for process in ended] == [2 * epoch] * 2
    names = {f"{number:02d}" for number in range(32)}
    steps = ids(tmp_path / "run")
    for half in (steps[:epoch], steps[epoch:]):
        assert Counter(name for _, step in half for name in step) == dict.fromkeys(names, 1)
    accounting = stream_state(tmp_path / "run")["accounting"]
    assert (accounting["delivered"], accounting["skipped"], accounting["tail"], accounting["indexed"]) == (32, 0, 0, 32)
    assert {name for _, step in ids(tmp_path / "streamed") for name in step} <= names


@pytest.mark.fault(11)
def test_a_number_that_is_none_on_one_process_stops_no_other_and_changes_nothing(tmp_path: Path) -> None:
    """The last process alone draws NaN or infinity: weights, statistics, optimizer and average of all stay as they are."""
    skipped, stopped = run(
        plan(tmp_path, poison=[5], system="regression"),
        plan(tmp_path, "stop", poison=[5, 6, 7], poison_with="inf", train={"max_nonfinite": 3}, system="regression"),
    )
    assert codes(skipped) == [0, 0]
    first, second = (process["digests"] for process in skipped)
    assert first == second
    assert [step for step in range(1, STEPS) if first[step] == first[step - 1]] == [5]
    [record] = lines(tmp_path / "run" / "nonfinite.jsonl")
    assert (record["step"], record["ids"]) == (6, [f"5-{row}" for row in range(8)])

    assert codes(stopped) == [1, 1]
    assert all("3 steps in a row" in process["told"] for process in stopped)
    for process in stopped:
        assert process["digests"] == [*first[:5], *[first[4]] * 3]
    assert [record["step"] for record in lines(tmp_path / "stop" / "nonfinite.jsonl")] == [6, 7, 8]


@pytest.mark.fault(7)
def test_a_full_disk_is_everybodys_business(tmp_path: Path) -> None:
    """A save on the way costs a warning; the last one ends all processes alike, with the checkpoint before intact."""
    often = {"checkpoint_every_steps": 5}
    whole, ended, again = run(
        plan(tmp_path, "whole", train=often), plan(tmp_path, full_disk_from=2, train=often), plan(tmp_path, train=often)
    )
    assert (codes(whole), codes(ended), codes(again)) == ([0, 0], [74, 74], [0, 0])
    assert len(ended[0]["digests"]) == STEPS, "the save on the way ended the training"
    assert ended[0]["digests"] == ended[1]["digests"] == whole[0]["digests"]
    assert again[0]["digests"] == whole[0]["digests"][5:], "the checkpoint before was not the one resumed from"
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(7)
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A small file system that checkpoints and logs share: the first checkpoint fits, no other does until there is room."""
    disk, kept = tmp_path / "run", tmp_path / "kept"
    disk.mkdir()
    mount = 'mount -t tmpfs -o size=1m none "$0"'
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount, str(disk)], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no file system of one's own")
    script = f'{mount} && head -c 976K /dev/zero > "$0/ballast" && "$@" && cp -a "$0" {kept}'
    often = {"checkpoint_every_steps": 5}
    whole, ended, again = run(
        plan(tmp_path, "whole", train=often),
        plan(tmp_path, train=often),
        plan(tmp_path, train=often, removed=[str(disk / "ballast")]),
        within=("unshare", "-Urm", "sh", "-c", script, str(disk)),
    )
    assert (codes(whole), codes(ended), codes(again)) == ([0, 0], [74, 74], [0, 0])
    assert "No space left on device" in ended[0]["told"]
    assert again[0]["digests"] == whole[0]["digests"][5:], "the first checkpoint was not the one resumed from"
    assert_same_run(tmp_path / "whole", kept)


@pytest.mark.fault(8)
def test_a_polite_stop_of_one_process_stops_all_at_the_same_step(tmp_path: Path) -> None:
    whole, stopped, again = run(plan(tmp_path, "whole"), plan(tmp_path, trouble={"1": ["terminated", 7]}), plan(tmp_path))
    assert (codes(whole), codes(stopped), codes(again)) == ([0, 0], [0, 0], [0, 0])
    assert [process["step"] for process in stopped] == [7, 7]
    assert max(process["after"] for process in stopped) < 10
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.fault(15)
def test_a_second_trainer_of_two_processes_is_refused(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        [[first, second]] = run(plan(tmp_path))
    assert "another trainer is at work here" in first["told"]
    assert second["code"] != 0
    assert abs(first["at"] - second["at"]) < 10
    assert not (tmp_path / "run" / "checkpoints").exists()
