"""A run that is killed at random moments ends in the same bits as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_training import assert_same_run, lines, newest

HERE = Path(__file__).parent


def run_campaign(script: str, folder: Path, seed: int) -> list[dict]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / script), str(folder), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_ten_kills_change_nothing(tmp_path: Path, seed: int) -> None:
    kills = run_campaign("kill_campaign.py", tmp_path, seed)
    assert [kill["where"] for kill in kills] == ["step", "save"] * 5
    assert any(name.startswith(".tmp-") for kill in kills for name in kill["left"]), "no kill hit a half-written checkpoint"
    assert newest(tmp_path / "killed").name == "step-00000200"
    assert [record["step"] for record in lines(tmp_path / "killed" / "ids.jsonl")] == list(range(1, 201))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    left = {path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left == {"latest", "step-00000187", "step-00000200"}
