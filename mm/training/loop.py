"""The one training loop: draws batches, steps, watches, saves, and resumes as if nothing had happened."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mm
from mm.config import to_dict
from mm.errors import BadSample, CheckpointError, UserError
from mm.ranks import alone
from mm.training.checkpoint import Checkpoint, SaveError, latest_checkpoint, open_checkpoint, save_checkpoint
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.consumed import ConsumedIds, everyones_ids
from mm.training.efficiency import Efficiency, Totals
from mm.training.feed import Feed
from mm.training.guard import Collapse, FlatLoss, NonFinite, StopSignals
from mm.training.layout import Divide, Layout
from mm.training.lock import run_lock
from mm.training.parallel import World, gather_bytes, gather_json, open_world, sum_over_ranks
from mm.training.parameters import count_parameters, parameter_lines
from mm.training.step import Stepper, StepReport, compile_parts
from mm.training.tracking import OnEvent, Tracker
from mm.training.watch import Watch
from mm.training.window import Window
from mm.types import BatchStream, System

HABITS = {"checkpoint_every_steps", "checkpoint_every_minutes", "keep_last", "log_every", "validate_every", "max_nonfinite"}
DECISIVE = frozenset(TrainConfig.model_fields) - HABITS - {"log_ids", "tensorboard", "energy", "carbon_intensity"}
"""Settings whose change makes a resumed run differ from one that had them from the start."""

FORMAT = 1
"""Version of what ``state.json`` holds."""

Validate = Callable[[System], Mapping[str, float]]
ExtraFiles = Callable[[Path], None]
MergeStates = Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """How a training ended.

    Args:
        step: Steps done.
        metrics: Figures of the last validation; empty without one.
        accounting: What the stream counted: delivered, skipped by cause, substitutes.
        seconds: Time spent in training, earlier sessions of the same run included.
        checkpoint: The last checkpoint that was saved.
        stopped_by: ``"SIGTERM"`` or ``"SIGINT"`` when a signal ended it before the last step.
        skipped_steps: Steps skipped because loss or gradient were not finite.
    """

    step: int
    metrics: dict[str, float]
    accounting: Mapping[str, Any]
    seconds: float
    checkpoint: Path | None
    stopped_by: str | None = None
    skipped_steps: int = 0


def train(
    system: System,
    stream: BatchStream,
    config: TrainConfig,
    run: Path,
    *,
    validate: Validate | None = None,
    extra_files: ExtraFiles | None = None,
    merge_states: MergeStates | None = None,
    on_event: OnEvent | None = None,
    parallel: ParallelConfig | None = None,
    divide: Divide | None = None,
    progress: bool = True,
    console: Console | None = None,
) -> TrainResult:
    """Train ``system`` for ``config.steps`` steps, resuming by itself what ``run`` already holds.

    What is drawn for a sample in a step (noise, hidden words, negatives) is a function of (seed, step, sample id), dropout one
    of (seed, step, part of the batch), data one of its position: so a resumed run ends in the same bits as an uninterrupted
    one, neither validation nor checkpoints change it, and without dropout as many processes as you like train alike.

    Args:
        system: Built network; moved to the device and trained in place. It ends with its last weights, not the averaged ones.
        stream: This process's part of each global batch; `mm.training.parallel.environment` tells which process this is.
        config: Optimisation, precision, checkpoints.
        run: Folder for checkpoints and logs.
        validate: Figures of the system on held-out data; called on the main process with averaged weights, in evaluation mode
            and without gradients.
        extra_files: Writes what belongs beside the weights (configuration, processor) into the folder it is given.
        merge_states: Joins the stream states of all processes, in rank order, into the one that a checkpoint holds; without it
            the main process's own is taken.
        parallel: How processes share the training; each has the whole network by default.
        divide: Cuts a network as ``parallel`` says, see `mm.nn.parallel.divide`.
        on_event: Receives an `mm.training.tracking.Event` at each log line, validation, checkpoint and warning.
        progress: Show progress on the console.
        console: Where to show it, standard error by default.

    Raises:
        UserError: When another trainer works in ``run``, the loss stays non-finite, or what ``run`` holds does not fit.
        SaveError: When the last checkpoint could not be written.
        LostProcessError: When another process died, or did not answer within ``parallel.timeout_seconds``.
    """
    with ExitStack() as stack:
        parallel = parallel or ParallelConfig()
        world = stack.enter_context(open_world(config.device, parallel))
        watch = Watch(world.store, world.rank, world.size)
        stack.enter_context(watch.beating())
        stack.enter_context(run_lock(run) if world.is_main else nullcontext())
        signals = stack.enter_context(StopSignals())
        tracker = Tracker(
            run,
            config.steps,
            enabled=world.is_main,
            log_ids=config.log_ids,
            tensorboard=config.tensorboard,
            progress=progress,
            on_event=on_event,
            console=console,
        )
        stack.callback(tracker.close)
        parameters = count_parameters(system)
        stepper = Stepper(system, config, world, Layout(world, parallel, divide), validates=validate is not None)
        trainer = _Trainer(stepper, Feed(stream, world.device), config, run, world, signals, tracker)
        trainer.parameters, trainer.parallel, trainer.watch = parameters, parallel, watch
        stack.callback(trainer.efficiency.close)
        trainer.validate, trainer.extra_files, trainer.merge_states = validate, extra_files, merge_states
        return trainer.run()


class _Trainer:
    """State of one training session; `run` is its only entry."""

    validate: Validate | None = None
    extra_files: ExtraFiles | None = None
    merge_states: MergeStates | None = None
    parameters: dict[str, Any]
    parallel: ParallelConfig
    watch: Watch

    def __init__(
        self, stepper: Stepper, feed: Feed, config: TrainConfig, run: Path, world: World, signals: StopSignals, tracker: Tracker
    ) -> None:
        self.stepper, self.feed, self.config, self.world = stepper, feed, config, world
        self.signals, self.tracker = signals, tracker
        self.folder, self.nonfinite_path = run / "checkpoints", run / "nonfinite.jsonl"
        self.nonfinite, self.window = NonFinite(), Window()
        self.watchers = FlatLoss(config.warmup_steps), Collapse()
        self.efficiency = Efficiency(config, world, stepper.dtype)
        self.step = 0
        self.metrics: dict[str, float] = {}
        self.consumed = ConsumedIds(tracker.ids, world)
        self.earlier_seconds = 0.0
        self.started = self.last_save = time.monotonic()
        self.saved_step = -1
        self.saved: Path | None = None

    @property
    def seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started

    def run(self) -> TrainResult:
        """Resume or start, train to the last step or to a signal, save."""
        self._resume()
        for line in parameter_lines(self.parameters):
            self.tracker.say(line)
        if self.config.compile:
            compile_parts(self.stepper.system, by_block=self.config.compile == "blocks" or self.parallel.by_block)
        self.stepper.system.train()
        stopped = False
        while self.step < self.config.steps and not stopped:
            stopped = self._one_step()
        if self.saved_step != self.step:
            self._save(final=True)
        if stopped:
            message = f"stopped by {self.signals.requested or 'another process'} at step {self.step}; the same command resumes"
            self.tracker.say(message)
            self.tracker.event("stop", self.step, message)
        return TrainResult(
            step=self.step,
            metrics=self.metrics,
            accounting=self._stream_state().get("accounting", {}),
            seconds=self.seconds,
            checkpoint=self.saved,
            stopped_by=(self.signals.requested or "SIGTERM") if stopped else None,
            skipped_steps=self.nonfinite.total,
        )

    def _one_step(self) -> bool:
        """Take a batch, step, and do what is due. Returns whether all processes agreed to stop."""
        begun = time.monotonic()
        self.watch.tell(self.step + 1, "taking a batch")
        try:
            batch = self.feed.take()
        except Exception:
            if self.signals.requested and self.world.size == 1:  # the signal also ended the loader's workers
                return True
            raise
        minutes = self.config.checkpoint_every_minutes
        due = self.world.is_main and 0 < minutes * 60 <= begun - self.last_save
        self.watch.tell(self.step + 1, "computing")
        with self.efficiency.counting(self.stepper.optimizer):
            report = self.stepper.step(batch, self.step, (self.signals.requested is not None, due), self.feed.look_ahead)
        self.step += 1
        self.nonfinite.record(report.finite)
        seconds = time.monotonic() - begun
        self.window.add(report, seconds)
        self.efficiency.add(report.num_samples, seconds)
        self.consumed.note(batch.ids)
        if not report.finite:
            self._skipped(batch.ids, report)
        else:
            for watcher in self.watchers:
                if message := watcher.message(self.step, report.parts):
                    self.tracker.warn(self.step, message)
        stop, save = report.requests
        self._do_what_is_due(stop, save)
        return stop and self.step < self.config.steps

    def _do_what_is_due(self, stop: bool, save: bool) -> None:
        """Log, validate and save, in this order, so that a checkpoint holds the figures of its own step."""
        config, last = self.config, self.step == self.config.steps
        self.tracker.advance(self.step)
        if self.step % config.log_every == 0 or last:
            self.consumed.collect(self.step)
            left = self.window.seconds / self.window.steps * (config.steps - self.step)
            record = self.window.record(self.step, self.stepper.lr(self.step - 1), self.seconds)
            self.tracker.log(self.step, record | self.efficiency.figures(record["samples_per_second"]), left)
            self.window = Window()
        if last or (config.validate_every and self.step % config.validate_every == 0 and not stop):
            self._validate()
        if save or last or stop or (config.checkpoint_every_steps and self.step % config.checkpoint_every_steps == 0):
            self._save(final=last or stop)

    def _validate(self) -> None:
        if self.validate is None:
            return
        figures = None
        with torch.no_grad(), self.stepper.evaluated() as system, alone():
            try:
                figures = None if system is None else self.validate(system)
            except (UserError, BadSample) as error:  # training must not be lost to what it is measured with
                self.tracker.warn(self.step, f"no validation at step {self.step}: {error}")
        if figures is None:
            return
        self.metrics = {name: float(value) for name, value in figures.items()}
        self.tracker.validated(self.step, self.metrics)

    def _skipped(self, ids: tuple[str, ...], report: StepReport) -> None:
        """Write down the samples of a step whose loss or gradient is not finite; stop when there were too many in a row."""
        [everyone] = everyones_ids([ids], self.world)
        count = self.nonfinite.consecutive
        what = f"loss {report.loss}, gradient norm {report.grad_norm}"
        self.tracker.nonfinite.append({"step": self.step, "problem": what, "ids": everyone})
        self.tracker.warn(self.step, f"step {self.step} was skipped: {what}; its samples are in {self.nonfinite_path}")
        if count >= self.config.max_nonfinite:
            self.consumed.collect(self.step)
            raise UserError(
                f"step {self.step}: {count} steps in a row without a finite loss and gradient ({what}); their sample ids are "
                f"in {self.nonfinite_path}; lower train.lr, use train.precision=fp32, or look at these samples"
            )

    def _save(self, final: bool) -> None:
        """Save on the main process. A failure costs a warning, except at the end, where all processes raise."""
        self.consumed.collect(self.step)
        stream_state, tensors = self._stream_state(), self.stepper.tensors()
        problem: OSError | None = None
        if self.world.is_main:
            try:
                logs = self.tracker.flush(sync=True)
                self.saved = save_checkpoint(
                    self.folder,
                    self.step,
                    tensors,
                    self._state(stream_state, logs),
                    extra_files=self.extra_files,
                    keep_last=self.config.keep_last,
                )
                self.saved_step = self.step
                self.tracker.event("checkpoint", self.step, f"saved {self.saved}", {"folder": str(self.saved)})
            except OSError as error:
                problem = error
                self.tracker.warn(self.step, f"no checkpoint at step {self.step}: {error}; earlier ones are intact")
        self.last_save = time.monotonic()
        if final and sum_over_ranks([float(problem is not None)], self.world)[0]:
            raise SaveError(
                f"{self.folder}: the last checkpoint (step {self.step}) could not be written"
                + (f": {problem.strerror or problem}" if problem else "")
                + "; free some space, then the same command resumes from the one before"
            )
        if final:
            self.saved_step = self.step

    def _stream_state(self) -> dict[str, Any]:
        """Position and accounting of the data, all processes taken together."""
        own = self.feed.state()
        if self.merge_states is None or self.world.size == 1:
            return own
        return self.merge_states(gather_json(own, self.world)[:: self.world.model_size])

    def _state(self, stream_state: Mapping[str, Any], logs: Mapping[str, int]) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "stream": stream_state,
            "ema_updates": self.stepper.ema.num_updates if self.stepper.ema else 0,
            "nonfinite": self.nonfinite.state(),
            "window": asdict(self.window),
            "metrics": self.metrics,
            "seconds": self.seconds,
            "logs": logs,
            "world_size": self.world.size,
            "parameters": self.parameters,
            "totals": self.efficiency.state(),
            "efficiency": self.efficiency.summary(),
            "train": to_dict(self.config),
            "versions": {"mm": mm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _resume(self) -> None:
        """Continue where the newest complete checkpoint stands; the main process chooses it."""
        found: Checkpoint | None = None
        if self.world.is_main:
            found = latest_checkpoint(self.folder, lambda message: self.tracker.warn(0, message))
        chosen = gather_bytes(found.folder.name.encode() if found else b"", self.world)[0].decode()
        if chosen and found is None:
            found = open_checkpoint(self.folder / chosen)
        if found is None:
            self.tracker.start(0, {})
            return
        state = found.state
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{found.folder}: was written by another version of mm; start a new run folder")
        self.stepper.load(found)
        self.feed.restore(state["stream"])
        self.step = self.saved_step = int(state["step"])
        self.saved = found.folder
        self.nonfinite.restore(state["nonfinite"])
        self.window = Window(**state["window"])
        self.metrics, self.earlier_seconds = dict(state["metrics"]), float(state["seconds"])
        self.efficiency.totals = Totals(**state.get("totals", {}))
        self.tracker.start(self.step, state["logs"])
        self.tracker.say(f"resuming at step {self.step} of {self.config.steps} from {found.folder}")
        self.tracker.event("resume", self.step, f"resumed from {found.folder}")
        before, now = state["train"], to_dict(self.config)
        changed = [f"{key} {before.get(key)} -> {now[key]}" for key in now if key in DECISIVE and before.get(key) != now[key]]
        if changed:
            self.tracker.warn(self.step, f"train settings changed since that checkpoint: {', '.join(changed)}")
