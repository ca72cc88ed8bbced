"""Two processes with half of each batch equal one process with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import assert_same_run, lines, newest, weights

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("ddp")
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, prefix in (("one", []), ("two", launcher)):
        (folder / name).mkdir()
        command = [sys.executable, *prefix, str(HERE / "ddp_worker.py"), str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "one", folder / "two"


def tolerance(name: str) -> float:
    """A softmax ignores the bias of its keys, whose gradient is rounding alone, which Adam scales up to its step size."""
    return 1e-4 if name.endswith("key_value.bias") else 2e-6


@pytest.mark.parametrize("name", ["clip", "clip-accumulated", "regression", "poisoned", "tiny-clip", "tiny-clip-accumulated"])
def test_weights_and_story_are_equal(runs: tuple[Path, Path], name: str) -> None:
    one, two = weights(runs[0] / name), weights(runs[1] / name)
    for stem in one:
        assert one[stem].keys() == two[stem].keys()
        for key, tensor in one[stem].items():
            assert torch.allclose(tensor, two[stem][key], rtol=1e-4, atol=tolerance(key)), (stem, key)
    assert lines(runs[0] / name / "ids.jsonl") == lines(runs[1] / name / "ids.jsonl")
    for first, second in zip(lines(runs[0] / name / "metrics.jsonl"), lines(runs[1] / name / "metrics.jsonl"), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-3)


def test_exact_accumulation_equals_the_whole_batch(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        for name in ("clip", "tiny-clip"):
            accumulated = weights(folder / f"{name}-accumulated")["model"]
            for key, tensor in weights(folder / name)["model"].items():
                assert torch.allclose(tensor, accumulated[key], rtol=1e-4, atol=tolerance(key)), (name, key)


def test_resume_is_exact_with_two_processes(runs: tuple[Path, Path]) -> None:
    """The schedule is constant, so ten steps and ten more are the same bits as twenty."""
    assert_same_run(runs[1] / "straight", runs[1] / "resumed")
    state = json.loads((newest(runs[1] / "resumed") / "state.json").read_text())
    assert state["world_size"] == 2
    assert state["stream"]["ranks"] == 2, "the states of all processes were not merged"


def test_processes_end_with_the_same_weights_and_running_statistics(runs: tuple[Path, Path]) -> None:
    first, second = ((runs[1] / f"normalised-{rank}.json").read_text() for rank in range(2))
    assert first == second
    assert len(set(json.loads(first)["net.1.running_mean"])) > 1


def test_non_finite_on_one_process_skips_the_step_on_all(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        record = lines(folder / "poisoned" / "nonfinite.jsonl")
        assert [entry["step"] for entry in record] == [7]
        assert record[0]["ids"] == [f"6-{row}" for row in range(8)]


def test_all_processes_stop_after_too_many(runs: tuple[Path, Path]) -> None:
    for rank in range(2):
        message = (runs[1] / f"hopeless-{rank}.txt").read_text()
        assert message.startswith("step 6: 3 steps in a row")
        assert "nonfinite.jsonl" in message
    assert len(lines(runs[1] / "hopeless" / "nonfinite.jsonl")) == 3
    assert newest(runs[1] / "hopeless").name == "step-00000004"
