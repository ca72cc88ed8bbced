"""The app as a person starts it: a process of its own, on a free port, with a canary beside its working folder."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_server import APP, CANARY, START_SECONDS, Server, Start


@pytest.fixture(scope="session")
def start(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start the app with further arguments; stopped at the end."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(*arguments: str) -> Server:
        folder = tmp_path_factory.mktemp("app")
        canary = folder / "canary.txt"
        canary.write_text(CANARY)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        begun = time.monotonic()
        with (folder / "log").open("wb") as log:
            command = [sys.executable, str(APP), "--port", str(port), *arguments]
            environment = {**os.environ, "TMPDIR": str(folder), "MM_CACHE": str(cache)}
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
        running.append(process)
        while True:
            said = (folder / "log").read_text()
            assert process.poll() is None, f"the app ended: {said}"
            assert time.monotonic() - begun < START_SECONDS, f"no answer in {START_SECONDS} s: {said}"
            if "open http" in said:
                return Server(f"http://127.0.0.1:{port}", process, canary, folder / "log", time.monotonic() - begun)
            time.sleep(0.1)

    yield begin
    for process in running:
        process.terminate()
    for process in running:
        process.wait(30)


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """The app with its defaults."""
    return start()
