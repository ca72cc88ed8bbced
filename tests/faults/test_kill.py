"""A run that is killed at random moments ends in the same bits as one that is not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_training import assert_same_run, lines, newest

HERE = Path(__file__).parent


def run_campaign(folder: Path, seed: int, kind: str) -> list[dict]:
    paths = [str(HERE), str(HERE.parent), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "kill_campaign.py"), str(folder), str(seed), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("seed", "kind"),
    [
        (0, "toy"),
        pytest.param(1, "toy", marks=SLOW),
        pytest.param(2, "toy", marks=SLOW),
        pytest.param(0, "0", marks=SLOW, id="clip on pictures, no workers"),
        pytest.param(0, "2", marks=SLOW, id="clip on pictures, two workers"),
    ],
)
def test_ten_kills_change_nothing(tmp_path: Path, seed: int, kind: str) -> None:
    """Half of the kills hit a save between any two of its writes; workers of a killed trainer may live on for a while."""
    kills = run_campaign(tmp_path, seed, kind)
    assert [kill["where"] for kill in kills] == ["step", "save"] * 5
    assert any(name.startswith(".tmp-") for kill in kills for name in kill["left"]), "no kill hit a half-written checkpoint"
    killed = tmp_path / "killed"
    assert newest(killed).name == "step-00000200"
    assert [record["step"] for record in lines(killed / "ids.jsonl")] == list(range(1, 201))
    assert_same_run(tmp_path / "whole", killed)
    assert {path.name for path in (killed / "checkpoints").iterdir()} == {"latest", "step-00000187", "step-00000200"}
    first, second = (json.loads((newest(run) / "state.json").read_text()) for run in (tmp_path / "whole", killed))
    assert first["stream"] == second["stream"], "position or accounting of the data differ"
