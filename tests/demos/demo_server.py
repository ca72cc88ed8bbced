"""What the tests know of a running app."""

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

APP = Path(__file__).parents[2] / "demos" / "app.py"
CANARY = "this text is never served"
START_SECONDS = 300
"""Until the page answers, on a machine that others use, too."""


@dataclass(frozen=True)
class Server:
    """A running app.

    Args:
        url: Where it is.
        process: The process.
        canary: A file beside its working folder that holds `CANARY`.
        log: What it says.
        seconds: From its start to the first answer.
    """

    url: str
    process: "subprocess.Popen[bytes]"
    canary: Path
    log: Path
    seconds: float

    def resident(self) -> int:
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) << 10


Start = Callable[..., Server]
