"""A run that is stopped at random moments, rudely or politely, ends in the same bits as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_training import assert_same_run, lines, newest

HERE = Path(__file__).parent
STOPS = int(os.environ.get("MM_KILLS", "50"))
SLOW = pytest.mark.slow


def run_campaign(folder: Path, seed: int, kind: str, stops: int, signal: str) -> list[dict]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "kill_campaign.py"), str(folder), str(seed), kind, str(stops), signal]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 30 * stops, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_nothing_lost(folder: Path, steps: int) -> None:
    whole, stopped = folder / "whole", folder / "stopped"
    assert newest(stopped).name == f"step-{steps:08d}"
    assert [record["step"] for record in lines(stopped / "ids.jsonl")] == list(range(1, steps + 1))
    assert_same_run(whole, stopped)
    first, second = (json.loads((newest(run) / "state.json").read_text()) for run in (whole, stopped))
    assert first["stream"] == second["stream"], "position or accounting of the data differ"


@pytest.mark.fault(1)
@pytest.mark.parametrize(
    ("seed", "kind", "kills"),
    [
        pytest.param(0, "toy", 10, id="toy"),
        pytest.param(1, "toy", STOPS, marks=SLOW, id="toy, all kills"),
        pytest.param(0, "0", STOPS, marks=SLOW, id="clip on pictures, no workers"),
        pytest.param(0, "2", STOPS, marks=SLOW, id="clip on pictures, two workers"),
    ],
)
def test_kills_change_nothing(tmp_path: Path, seed: int, kind: str, kills: int) -> None:
    """Half of the kills hit a save between any two of its writes; workers of a killed trainer may live on for a while."""
    told = run_campaign(tmp_path, seed, kind, kills, "SIGKILL")
    assert [kill["where"] for kill in told] == (["step", "save"] * kills)[:kills]
    assert any(name.startswith(".tmp-") for kill in told for name in kill["left"]), "no kill hit a half-written checkpoint"
    steps = 20 * kills
    assert_nothing_lost(tmp_path, steps)
    last = {f"step-{step:08d}" for step in (steps, (steps - 1) // 17 * 17)}
    assert {path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()} == {"latest", *last}


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("kind", "stops"), [pytest.param("toy", 6, id="toy"), pytest.param("2", 10, marks=SLOW, id="clip on pictures, two workers")]
)
def test_polite_stops_change_nothing(tmp_path: Path, kind: str, stops: int) -> None:
    """SIGTERM at any moment of a step, and between any two writes of a save: exit code 0 in seconds, nothing lost."""
    told = run_campaign(tmp_path, 0, kind, stops, "SIGTERM")
    assert 0 < max(stop["seconds_to_end"] for stop in told) < 10
    assert all(not name.startswith(".tmp-") for stop in told for name in stop["left"]), "a save was not finished"
    assert_nothing_lost(tmp_path, 20 * stops)
