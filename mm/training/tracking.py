"""Everything a run tells: progress bar or plain lines, metrics.jsonl, ids.jsonl, nonfinite.jsonl, TensorBoard, events."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from mm.training.logs import JsonLines

PLAIN_LINE_SECONDS = 5.0
"""Least time between two plain progress lines where there is no terminal."""

EventKind = Literal["resume", "log", "validate", "checkpoint", "warning", "stop"]


@dataclass(frozen=True)
class Event:
    """Something worth knowing that happened in training.

    Args:
        kind: What happened.
        step: Steps done at that moment.
        message: One line for people.
        values: The numbers of it.
    """

    kind: EventKind
    step: int
    message: str
    values: Mapping[str, Any] = field(default_factory=dict)


OnEvent = Callable[[Event], None]


class Tracker:
    """Writes and shows what happens; on processes other than the main one it does neither.

    Args:
        run: The run folder.
        steps: Steps of the whole run.
        enabled: False on processes that must not write.
        log_ids: Whether to keep ``ids.jsonl``.
        tensorboard: Whether to write TensorBoard files.
        progress: Whether to show progress on the console.
        on_event: Receives every event.
        console: Where to show it; standard error by default.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        *,
        enabled: bool = True,
        log_ids: bool = True,
        tensorboard: bool = True,
        progress: bool = True,
        on_event: OnEvent | None = None,
        console: Console | None = None,
    ) -> None:
        self._run = run
        self._steps = steps
        self._enabled = enabled
        self._on_event = on_event
        self._console = (console or Console(stderr=True)) if progress and enabled else None
        self._with_tensorboard = tensorboard and enabled
        self._writer: Any = None
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0
        self._told_full = False
        self._shown: dict[str, str] = {}
        self.metrics = JsonLines(run / "metrics.jsonl")
        self.nonfinite = JsonLines(run / "nonfinite.jsonl")
        self.ids = JsonLines(run / "ids.jsonl") if log_ids else None

    @property
    def _logs(self) -> list[JsonLines]:
        return [log for log in (self.metrics, self.nonfinite, self.ids) if log is not None]

    def start(self, step: int, sizes: Mapping[str, int]) -> None:
        """Cut the files back to what a checkpoint at ``step`` recorded (nothing at step 0) and begin to show progress."""
        if not self._enabled:
            return
        for log in self._logs:
            log.truncate(sizes.get(log.path.name, 0))
        if self._with_tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self._run / "tensorboard"), purge_step=step + 1)
            except ImportError:
                self.say("no TensorBoard files: tensorboard is not installed", "yellow")
            except OSError as error:
                self.say(f"no TensorBoard files: {error}", "yellow")
        if self._console is not None and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]train"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=self._steps, completed=step, text="")
            self._bar.start()

    def close(self) -> None:
        """Stop showing progress, write what is buffered, close files."""
        if self._bar is not None:
            self._bar.stop()
        if self._enabled:
            self._guarded(self.flush)
        if self._writer is not None:
            self._guarded(self._writer.close)

    def flush(self, sync: bool = False) -> dict[str, int]:
        """Write what is buffered; returns the size of each file. Raises OSError."""
        for log in self._logs:
            log.flush(sync)
        return {log.path.name: log.size for log in self._logs}

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, record: Mapping[str, Any], seconds_left: float) -> None:
        """Record the training figures of the steps since the last call."""
        self._record("train/", step, record)
        self._shown["speed"] = f"{record['samples_per_second']:.0f} samples/s"
        if record["mfu"] is not None:
            self._shown["mfu"] = f"MFU {record['mfu']:.1%}"
        self._shown["left"] = f"ETA {timedelta(seconds=round(seconds_left))}"
        if record["loss"] is not None:
            self._shown["loss"] = f"loss {record['loss']:.3f}"
        self._show(step, urgent=step == self._steps)
        self.event("log", step, self._text(), record)
        if self._enabled:
            self._guarded(self.flush)

    def validated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the figures of a validation."""
        self._record("", step, {"step": step, "validation": dict(metrics)})
        for name in ("r1", "image_to_text_r1", "top1"):
            if name in metrics:
                self._shown["score"] = f"{'R@1' if name.endswith('r1') else name} {metrics[name]:.3f}"
                break
        self._show(step, urgent=True)
        self.event("validate", step, "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()), metrics)

    def warn(self, step: int, message: str) -> None:
        """Tell the user about something that should not pass unseen."""
        self.say(f"warning: {message}", "yellow")
        self.event("warning", step, message)

    def event(self, kind: EventKind, step: int, message: str, values: Mapping[str, Any] | None = None) -> None:
        """Pass something on to whoever listens."""
        if self._on_event is not None and self._enabled:
            self._on_event(Event(kind, step, message, values or {}))

    def say(self, message: str, style: str | None = None) -> None:
        """Show one line."""
        if self._console is not None:
            self._console.print(message, style=style, highlight=False, markup=False, soft_wrap=True)

    def _show(self, step: int, urgent: bool) -> None:
        """Bring the bar up to date, or print a line if the last one is old enough or this one must be seen."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text())
        elif urgent or time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"step {step}/{self._steps}  {self._text()}")

    def _text(self) -> str:
        return "  ".join(self._shown.values())

    def _record(self, prefix: str, step: int, record: Mapping[str, Any]) -> None:
        if not self._enabled:
            return
        self.metrics.append(record)
        self._guarded(lambda: self._write_scalars(prefix, step, record))

    def _write_scalars(self, prefix: str, step: int, record: Mapping[str, Any]) -> None:
        if self._writer is not None:
            for name, value in _flat(record).items():
                self._writer.add_scalar(prefix + name, value, step)

    def _guarded(self, write: Callable[[], object]) -> None:
        """Logs are not worth a training: a full disk is told once and writing is tried again later."""
        try:
            write()
        except OSError as error:
            if not self._told_full:
                self._told_full = True
                self.say(f"warning: logs cannot be written: {error}; training continues", "yellow")


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested record under slash-separated names."""
    result: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            result[prefix + name] = float(value)
    return result
