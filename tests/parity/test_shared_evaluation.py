"""Two processes that share an evaluation give the figures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {
    "zero-shot": ["zero-shot", "emoji-clip", "--data", "emoji:validation/novel", "--baseline", "none"],
    "retrieval": ["retrieval", "emoji-clip", "--data", "emoji:validation/novel"],
}


def figures(command: list[str], folder: Path, processes: int) -> dict[str, dict[str, float]]:
    """Metrics of the command line, run by one or by several processes, none of which may use the other's cache of vectors."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    output = folder / f"{processes}.json"
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "mm.cli", "eval", *command, "--no-cache", "--json", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("95% interval") == 1, "only the first process shows the table"
    content = json.loads(output.read_text())
    assert content["protocol"]["samples"].startswith("43 delivered"), content["protocol"]["samples"]
    return content["metrics"]


@pytest.mark.parametrize("task", COMMANDS)
def test_figures_do_not_depend_on_the_number_of_processes(task: str, tmp_path: Path) -> None:
    one, two = (figures(COMMANDS[task], tmp_path, processes) for processes in (1, 2))
    assert one == two
