"""What a training will need, before it is paid for: parameters, FLOPs, memory and speed in each layout, data to keep it busy.

Nothing is trained: `mm.training.simulate` lets the run's own system, optimizer and data take one step without numbers.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mm.config import apply_overrides, read_layers
from mm.data.emoji import MIN_SIZE
from mm.data.sources import open_training_source
from mm.data.stream import StreamLoader
from mm.errors import ConfigError, UserError
from mm.hub import embed_parts, load_parts, shipped, with_parts
from mm.media.audio import AudioSpec
from mm.nn.parallel import divide
from mm.nn.tuning import tune
from mm.run.config import RunConfig
from mm.run.training import assemble, load_run_config
from mm.systems import build
from mm.training.config import TrainConfig
from mm.training.devices import choose_dtype
from mm.training.estimate import Estimate, Setting, estimate, reasons, recommended, sharings, structure
from mm.training.hardware import PRICES_OF, Device, find_device
from mm.training.parameters import count_parameters
from mm.training.simulate import Recompute, Simulated, simulate
from mm.types import AudioBatch, Batch, System, TextBatch

MAX_PROCESSES = 65_536
READ_SAMPLES = 256
"""Samples that are read at most; larger batches repeat them."""

TIMED_SECONDS = 1.5
"""How long reading is timed."""


@dataclass(frozen=True)
class InputPipeline:
    """What it takes to feed a training.

    Args:
        bytes_per_sample: As they are stored, mean.
        core_samples_per_second: Read, decoded, changed and joined into batches by one core of this machine.
        problem: Why nothing was measured, where nothing was.
    """

    bytes_per_sample: float | None
    core_samples_per_second: float | None
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Args:
        name: Of the configuration.
        system: Name of the system.
        parameters: As `mm.training.parameters.count_parameters`.
        train: Optimisation.
        processes: Accelerators.
        device: Their kind.
        dtype: Of the computations.
        forward_flops: Of a sample.
        backward_flops: Of a sample, without recomputation.
        optimizer_flops: Of a step.
        estimates: All layouts, the simplest first.
        recommended: One that fits, or None.
        reasons: Why that one.
        input: What it takes to feed it.
        price: Dollars an hour of one device; None where nobody knows.
        notes: What was assumed.
    """

    name: str
    system: str
    parameters: Mapping[str, Any]
    train: TrainConfig
    processes: int
    device: Device
    dtype: torch.dtype
    forward_flops: float
    backward_flops: float
    optimizer_flops: float
    estimates: tuple[Estimate, ...]
    recommended: Estimate | None
    reasons: tuple[str, ...]
    input: InputPipeline
    price: float | None
    notes: tuple[str, ...]

    @cached_property
    def best(self) -> Estimate:
        """The recommended layout, or the smallest where none fits."""
        return self.recommended or min(self.estimates, key=lambda one: one.memory.total)

    def hours(self, one: Estimate) -> float:
        """Of the whole run."""
        return self.train.steps * one.seconds / 3600

    def dollars(self, one: Estimate) -> float | None:
        """For the whole run."""
        return None if self.price is None else self.hours(one) * self.processes * self.price

    def kilowatt_hours(self, one: Estimate) -> float:
        """Of the whole run under full power."""
        return self.hours(one) * self.processes * self.device.watts / 1000

    def to_json(self) -> dict[str, Any]:
        """All of it; bytes, seconds, dollars."""
        return {
            "config": self.name,
            "system": self.system,
            "parameters": dict(self.parameters),
            "gpus": self.processes,
            "device": asdict(self.device) | {"price": self.price, "prices_of": PRICES_OF},
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch_size": self.train.batch_size,
            "steps": self.train.steps,
            "flops": {
                "forward_per_sample": self.forward_flops,
                "backward_per_sample": self.backward_flops,
                "optimizer_per_step": self.optimizer_flops,
            },
            "layouts": [self._layout(one) for one in self.estimates],
            "recommended": None if self.recommended is None else self.recommended.sharing.settings(),
            "reasons": list(self.reasons),
            "input": asdict(self.input)
            | {
                "samples_per_second": self.best.samples_per_second,
                "cores": self.cores,
                "bytes_per_second": self._times(self.best.samples_per_second, self.input.bytes_per_sample),
            },
            "notes": list(self.notes),
        }

    @property
    def cores(self) -> float | None:
        """Like one of this machine, to feed the best layout."""
        one = self.input.core_samples_per_second
        return None if not one else self.best.samples_per_second / one

    def _layout(self, one: Estimate) -> dict[str, Any]:
        return {
            "layout": one.sharing.name,
            "parallel": one.sharing.settings(),
            "memory": asdict(one.memory) | {"total": one.memory.total},
            "fits": one.fits,
            "step_seconds": one.seconds,
            "samples_per_second": one.samples_per_second,
            "mfu": one.mfu,
            "time": dict(one.shares),
            "hours": self.hours(one),
            "dollars": self.dollars(one),
            "kilowatt_hours": self.kilowatt_hours(one),
        }

    @staticmethod
    def _times(a: float, b: float | None) -> float | None:
        return None if b is None else a * b


def plan(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    processes: int = 1,
    device: str = "h100",
    mfu: float | None = None,
    price: float | None = None,
    read_data: bool = True,
) -> Plan:
    """Find out what the training of a configuration needs.

    Args:
        config: A YAML file.
        overrides: ``key.path=value`` changes to it.
        processes: Accelerators, a process each.
        device: One of `mm.training.hardware.DEVICES`, or ``cpu``: this machine.
        mfu: Share of the device's peak to reckon with; default: an estimate kernel by kernel.
        price: Dollars an hour of one device; default: its usual one.
        read_data: False plans by the shapes of the largest batch, without opening the data.

    Raises:
        UserError: Configuration, device or number of processes cannot be used.
    """
    kind = find_device(device)
    if not 1 <= processes <= MAX_PROCESSES:
        raise UserError(f"--gpus {processes}: take 1 to {MAX_PROCESSES:,}")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"--mfu {mfu}: is a share of the peak, above 0 and at most 1")
    run, notes = run_config(Path(config), overrides)
    train = run.train
    if train.batch_size % processes:
        raise UserError(
            f"--gpus {processes}: train.batch_size {train.batch_size} cannot be shared evenly; take a divisor of it "
            "as number of GPUs, or a multiple of that as batch size"
        )
    dtype = torch.bfloat16 if kind.cuda and train.precision == "auto" else choose_dtype(train.precision, torch.device("cpu"))
    ready = prepared(run, read_data, notes)
    batch = resized(ready.batch, train.batch_size // processes)

    def step(recompute: Recompute) -> Simulated:
        options = {"like_cuda": kind.cuda, "remembers": remembers(run)}
        return simulate(ready.system, batch, train, dtype, recompute=recompute, divide=divide, **options)

    parts = structure(ready.system, processes, divide)
    layouts = sharings(processes, train.batch_size, parts)
    ways: list[Recompute] = list(dict.fromkeys(sharing.recompute for sharing in layouts))
    steps: dict[Recompute, Simulated] = {way: step(way) for way in ways}
    plain = steps["none"]
    setting = Setting(
        steps=steps,
        structure=parts,
        device=kind,
        processes=processes,
        batch_size=train.batch_size,
        dtype=dtype,
        mfu=mfu,
        offload=run.parallel.offload,
    )
    found = [estimate(sharing, setting) for sharing in layouts]
    return Plan(
        name=Path(config).stem,
        system=run.system.name,
        parameters=count_parameters(ready.system),
        train=train,
        processes=processes,
        device=kind,
        dtype=dtype,
        forward_flops=plain.cost.flops("forward") / plain.samples,
        backward_flops=plain.cost.flops("backward") / plain.samples,
        optimizer_flops=plain.cost.flops("update"),
        estimates=tuple(found),
        recommended=recommended(found),
        reasons=tuple(reasons(found, kind)),
        input=ready.input,
        price=kind.price if price is None else price,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Prepared:
    """A system with a batch that it learns from."""

    system: System
    batch: Batch
    input: InputPipeline


def remembers(config: RunConfig) -> bool:
    """Whether the system keeps what it made of each picture, so that it makes it once and not in every epoch."""
    return any(key.startswith("remember_") and value for key, value in vars(config.system).items())


def run_config(path: Path, overrides: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The configuration without what a plan does not need, and what that leaves out."""
    values = apply_overrides(read_layers(path), overrides)
    begins, notes = values.get("init_from"), []
    changes = ["data.workers=0", "data.validation=null"]
    named = isinstance(values.get("system"), dict) and "name" in values["system"]
    if begins and named and begins not in shipped() and not Path(str(begins)).exists():
        changes.append("init_from=null")
        notes.append(f"'{begins}', which the run begins with, is not here: a new network of the same kind stands in for it")
    return load_run_config(path, [*overrides, *changes]), notes


def prepared(config: RunConfig, read_data: bool, notes: list[str]) -> Prepared:
    """The run's own system and batch; where its data cannot be read, a new system and the largest batch it may meet."""
    problem = None if read_data else "the data were not to be read"
    if read_data:
        try:
            side = with_parts(config.system, load_parts(config.system.parts())).picture_side
            open_training_source(config.data, image_size=side or MIN_SIZE)
        except UserError as error:
            problem = str(error)
    if problem is not None:
        notes.append(f"the largest batch stands in for the data: {problem}")
        system, batch = _imagined(config)
        return Prepared(system, batch, InputPipeline(None, None, problem))
    size = min(config.train.batch_size, READ_SAMPLES)
    reading = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": size, "accumulate": 1})})
    run = assemble(reading)
    batches = iter(run.stream)
    batch = next(batches)
    begun, samples = time.process_time(), 0
    while time.process_time() - begun < TIMED_SECONDS:
        samples += len(next(batches))
    seconds = time.process_time() - begun
    if isinstance(run.stream, StreamLoader):  # whose samples cannot be asked for again
        return Prepared(run.system, batch, InputPipeline(None, samples / seconds))
    source = run.stream.source
    rows = range(0, len(source), max(1, len(source) // READ_SAMPLES))
    stored = [sum(map(len, source.read(row).media.values())) for row in rows]
    return Prepared(run.system, batch, InputPipeline(sum(stored) / len(stored), samples / seconds))


def _imagined(config: RunConfig) -> tuple[System, Batch]:
    """A new system and a batch of the largest pictures, texts and recordings that it takes."""
    settings = config.system
    if settings.learns_answers or config.data.episodes is not None:
        raise ConfigError(f"'{settings.name}' learns what only its data can tell: make them readable, see `mm data check`")
    parts = load_parts(settings.parts() | settings.training_parts())
    settings = embed_parts(settings, parts)
    whole = with_parts(settings, parts)
    system = build(settings, {name: part.system for name, part in parts.items()})
    if config.tune is not None:
        tune(system, config.tune)
    size, side, limits = min(config.train.batch_size, READ_SAMPLES), whole.picture_side, whole.text_limits
    text = None
    if limits is not None:
        vocab_size, length = limits
        text = TextBatch(torch.randint(4, vocab_size, (size, length)), torch.full((size,), length))
    return system, Batch(
        ids=tuple(map(str, range(size))),
        image=None if side is None else torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        text=text,
        groups=None if text is None else torch.arange(size),
        audio=_waves(size, config.processor.audio) if settings.hears else None,
    )


def _waves(count: int, spec: AudioSpec) -> AudioBatch:
    length = round(spec.rate * spec.max_seconds)
    return AudioBatch(torch.randn(count, length), torch.full((count,), length))


def resized(batch: Batch, size: int) -> Batch:
    """A batch of so many samples, which come again in turn where it has fewer. Raises `ConfigError` for texts with pictures."""
    if size <= len(batch):
        return batch[:size]
    if batch.interleaved is not None:
        raise ConfigError(f"train.batch_size: texts with pictures are planned for at most {READ_SAMPLES} samples a process")
    rows = torch.arange(size) % len(batch)
    tensors = {name: getattr(batch, name) for name in ("image", "text", "latents", "features", "audio")}
    return replace(
        batch,
        ids=tuple(f"{batch.ids[row]} {number}" for number, row in enumerate(rows.tolist())),
        groups=None if batch.groups is None else torch.arange(size),
        answers=tuple(batch.answers[row] for row in rows.tolist()) if batch.answers else (),
        **{name: None if value is None else value[rows] for name, value in tensors.items()},
    )
