"""A save may die anywhere: what is loaded afterwards is complete, and the same save can be made again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.fault(2)
def test_a_save_may_die_at_any_of_its_operations(tmp_path: Path) -> None:
    """Before each creation, second half of a write, flush, rename and deletion."""
    command = [sys.executable, str(HERE / "save_phases.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    *killed, last = json.loads(done.stdout)
    assert last["complete"]
    assert len(killed) > 20
    for result in killed:
        step, warnings = result["before"]
        finished = "step-00000002" in result["left"]
        assert step == (2 if finished else 1), result
        assert result["after"] == [2, []], result
        assert result["swept"] == ["latest", "step-00000002"], result
        if not finished:
            assert warnings == [], result
    stages = {tuple(result["left"]) for result in killed}
    torn, renamed = ("latest", "step-00000001"), ("latest", "step-00000001", "step-00000002")
    assert {torn, (".tmp-step-00000002", *torn), renamed, (".tmp-latest", *renamed)} <= stages
