"""A polite stop finishes the step, saves, exits with 0, and the run goes on later as if nothing had happened."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_training import ToyClip, ToyStream, assert_same_run, lines, make, newest, toy_config

from mm.training import checkpoint
from mm.training.guard import StopSignals
from mm.training.loop import train
from mm.types import Batch


class SignallingStream(ToyStream):
    """Sends a signal to this process when a batch is drawn, as a scheduler would in the middle of a step."""

    def __init__(self, at: int, number: signal.Signals, fails: bool = False) -> None:
        super().__init__()
        self.at, self.number, self.fails = at, number, fails

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            if self.cursor == self.at:
                os.kill(os.getpid(), self.number)
                if self.fails:
                    self.cursor -= 1
                    raise RuntimeError("a loader worker was ended by the same signal")
            yield batch


@pytest.mark.fault(8)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_saves_and_resumes_exactly(tmp_path: Path, number: signal.Signals) -> None:
    train(make(ToyClip), ToyStream(), toy_config(), tmp_path / "whole", progress=False)
    handler = signal.getsignal(number)
    result = train(make(ToyClip), SignallingStream(7, number), toy_config(), tmp_path / "stopped", progress=False)
    assert (result.step, result.stopped_by) == (7, number.name)
    assert newest(tmp_path / "stopped").name == "step-00000007"
    assert signal.getsignal(number) is handler
    result = train(make(ToyClip), ToyStream(), toy_config(), tmp_path / "stopped", progress=False)
    assert (result.step, result.stopped_by) == (20, None)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.fault(8)
def test_signal_that_also_ends_the_loader(tmp_path: Path) -> None:
    """A signal to the whole process group kills loader workers first: the steps done so far are saved all the same."""
    train(make(ToyClip), ToyStream(), toy_config(), tmp_path / "whole", progress=False)
    stream = SignallingStream(7, signal.SIGTERM, fails=True)
    result = train(make(ToyClip), stream, toy_config(), tmp_path / "stopped", progress=False)
    assert (result.step, result.stopped_by) == (6, "SIGTERM")
    train(make(ToyClip), ToyStream(), toy_config(), tmp_path / "stopped", progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_failing_loader_without_a_signal_is_an_error(tmp_path: Path) -> None:
    class Failing(ToyStream):
        def __iter__(self) -> Iterator[Batch]:
            yield self.batch(0)
            raise RuntimeError("no such shard")

    with pytest.raises(RuntimeError, match="no such shard"):
        train(make(ToyClip), Failing(), toy_config(), tmp_path, progress=False)


@pytest.mark.fault(8)
def test_signal_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save that is at work completes, the next step sees the request."""
    original = checkpoint._point

    def point(folder: Path, name: str) -> None:
        if name == "step-00000005":
            os.kill(os.getpid(), signal.SIGTERM)
        original(folder, name)

    monkeypatch.setattr(checkpoint, "_point", point)
    result = train(make(ToyClip), ToyStream(), toy_config(), tmp_path, progress=False)
    assert (result.step, result.stopped_by) == (6, "SIGTERM")
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == ["step-00000005", "step-00000006"]


ENDLESS = """
import sys
from pathlib import Path
from toy_training import ToyClip, ToyStream, make, toy_config
from mm.training.loop import train
train(make(ToyClip), ToyStream(), toy_config(steps=1_000_000, log_every=1), Path(sys.argv[1]))
"""


@pytest.mark.fault(8)
def test_exit_code_of_a_terminated_process(tmp_path: Path) -> None:
    """From outside, with no help of the stream: SIGTERM at any time, exit code 0, in seconds, and a word about it."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        sent = time.monotonic()
        process.terminate()
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert time.monotonic() - sent < 10
    assert "stopped by SIGTERM at step" in told
    assert len(lines(tmp_path / "ids.jsonl")) == int(newest(tmp_path).name[-8:])


def test_second_interrupt_is_immediate_and_threads_have_no_signals() -> None:
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    entered: list[bool] = []

    def work() -> None:
        with StopSignals():
            entered.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [True]
