"""How well a training uses its devices: speed, share of the peak, memory, energy; in each log line and in the card."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mm.training.config import TrainConfig
from mm.training.energy import JOULES_PER_KWH, EnergyMeter, energy_meter
from mm.training.hardware import Device, recognise
from mm.training.meter import Meter
from mm.training.parallel import World, sum_over_ranks


@dataclass
class Totals:
    """Of a whole run; part of a checkpoint.

    Args:
        samples: That were learned from.
        step_seconds: Time of all steps, waiting for data included.
        flops_per_sample: Of forward and backward pass as they were computed; None where they cannot be counted.
        peak_memory: Most bytes: allocated on the accelerator, or resident of the main process.
        energy_kwh: Of all processes; None where nothing is known.
    """

    samples: int = 0
    step_seconds: float = 0.0
    flops_per_sample: float | None = None
    peak_memory: int = 0
    energy_kwh: float | None = None


class Efficiency:
    """Watches a training session, on every process alike.

    Args:
        config: Compilation, energy.
        world: This process among all.
        dtype: Of the computations.
        totals: Of earlier sessions of the run.
    """

    def __init__(self, config: TrainConfig, world: World, dtype: torch.dtype, totals: Totals | None = None) -> None:
        self.totals = totals or Totals()
        self._config, self._world, self._dtype = config, world, dtype
        self._device: Device | None = recognise(world.device)
        self._energy: EnergyMeter | None = None
        if world.is_main:
            watts = None if self._device is None else self._device.watts * world.size
            self._energy = energy_meter(config.energy, watts, accelerated=world.device.type != "cpu")
        self._joules_before = 0.0
        self._session_seconds = 0.0
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(world.device)

    @contextmanager
    def counting(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Count the FLOPs of the step inside, if nobody has done so; compiled parts show none, so theirs stay unknown."""
        if self.totals.flops_per_sample is not None or self._config.compile:
            yield
            return
        meter = Meter()
        hooks = (
            optimizer.register_step_pre_hook(lambda *_: meter.begin_update()),
            optimizer.register_step_post_hook(lambda *_: meter.end_update()),
        )
        try:
            with meter:
                yield
        finally:
            for hook in hooks:
                hook.remove()
        self._counted = float(meter.cost.flops("forward", "backward"))

    _counted: float | None = None

    def add(self, samples: int, seconds: float) -> None:
        """Count a step of the global batch; all processes call this together."""
        if self._counted is not None:
            [flops] = sum_over_ranks([self._counted], self._world)
            self.totals.flops_per_sample, self._counted = flops / max(1, samples), None
        self.totals.samples += samples
        self.totals.step_seconds += seconds
        self._session_seconds += seconds

    def figures(self, samples_per_second: float) -> dict[str, Any]:
        """For a log line: ``mfu`` (None where FLOPs or peak are unknown), ``peak_memory`` in bytes, ``energy_kwh`` so far."""
        self._look()
        return {
            "mfu": self._mfu(samples_per_second),
            "peak_memory": self.totals.peak_memory,
            "energy_kwh": self.totals.energy_kwh,
        }

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the `Totals`."""
        self._look()
        return asdict(self.totals)

    def summary(self) -> dict[str, Any]:
        """For people: the totals with what follows from them."""
        totals, energy = self.totals, self.totals.energy_kwh
        speed = totals.samples / max(totals.step_seconds, 1e-9)
        return asdict(totals) | {
            "samples_per_second": speed,
            "mfu": self._mfu(speed),
            "co2_kg": None if energy is None else energy * self._config.carbon_intensity,
            "energy_method": None if self._energy is None else self._energy.method,
            "device": self._world.device.type if self._device is None else self._device.name,
            "processes": self._world.size,
            "precision": str(self._dtype).removeprefix("torch."),
        }

    def close(self) -> None:
        """Stop what counts in the background."""
        if self._energy is not None:
            self._energy.close()

    def _mfu(self, samples_per_second: float) -> float | None:
        if self._device is None or self.totals.flops_per_sample is None:
            return None
        peak = self._device.peak(self._dtype) * self._world.size
        return round(samples_per_second * self.totals.flops_per_sample / peak, 4)

    def _look(self) -> None:
        """Bring memory and energy up to date."""
        device = self._world.device
        used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _most_resident()
        self.totals.peak_memory = max(self.totals.peak_memory, used)
        if self._energy is not None:
            joules = self._energy.joules(self._session_seconds)
            self.totals.energy_kwh = (self.totals.energy_kwh or 0.0) + (joules - self._joules_before) / JOULES_PER_KWH
            self._joules_before = joules


def _most_resident() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
