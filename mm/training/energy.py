"""Electrical energy of a training and the CO2 that comes with it: measured where the machine tells, else estimated.

| Method      | What it covers                                                                         |
|-------------|----------------------------------------------------------------------------------------|
| rapl        | The processor packages of the machine, by Intel's and AMD's counters, whoever uses them |
| estimate    | The device's full power (`mm.training.hardware`) times the time: an upper bound for it  |
| codecarbon  | What that library measures or assumes (`train.energy: codecarbon`)                     |

With an accelerator its estimate is added to what the processors' counters say. Cooling and losses of the building are left out.
The world's mean was 0.445 kg of CO2 a kilowatt hour in 2024 (International Energy Agency, Electricity 2025).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from mm.errors import UserError

JOULES_PER_KWH = 3.6e6
POWERCAP = Path("/sys/class/powercap")


class EnergyMeter(Protocol):
    """Counts energy from its construction on."""

    @property
    def method(self) -> str:
        """How it knows, for a card."""
        ...

    def joules(self, seconds: float) -> float:
        """Energy so far, of which ``seconds`` have passed."""
        ...

    def close(self) -> None:
        """Stop counting."""
        ...


def energy_meter(kind: str, watts: float | None, *, accelerated: bool) -> EnergyMeter | None:
    """The best meter that there is; None where nothing is known.

    Args:
        kind: ``auto`` or ``codecarbon``.
        watts: Full power of all devices together; None for unknown ones.
        accelerated: Whether they are something else than the processors.

    Raises:
        UserError: codecarbon is asked for and not installed.
    """
    if kind == "codecarbon":
        return CodeCarbon()
    rapl = Rapl.find()
    if rapl is not None and not accelerated:
        return rapl
    if watts is None:
        return None
    estimate = Estimate(watts)
    return Sum([rapl, estimate]) if rapl is not None else estimate


class Estimate:
    """Full power times time."""

    def __init__(self, watts: float) -> None:
        self._watts = watts

    @property
    def method(self) -> str:
        return f"estimated: {self._watts:g} W of full power times the time"

    def joules(self, seconds: float) -> float:
        return self._watts * seconds

    def close(self) -> None:
        pass


class Rapl:
    """Counters of the processor packages, which begin anew when they are full.

    Args:
        counters: Their folders.
    """

    method = "measured: the processors' counters (RAPL), all programs of the machine"

    def __init__(self, counters: Sequence[Path]) -> None:
        self._counters = counters
        self._ranges = [int((counter / "max_energy_range_uj").read_text()) for counter in counters]
        self._last = self._read()
        self._total = 0

    @classmethod
    def find(cls, folder: Path = POWERCAP) -> "Rapl | None":
        """The counters of this machine; None where there are none that may be read."""
        try:
            packages = [part for part in sorted(folder.glob("*rapl:?")) if (part / "name").read_text().startswith("package")]
            return cls(packages) if packages else None
        except (OSError, ValueError):
            return None

    def joules(self, seconds: float) -> float:
        now = self._read()
        for before, after, largest in zip(self._last, now, self._ranges, strict=True):
            self._total += (after - before) % (largest + 1)
        self._last = now
        return self._total / 1e6

    def close(self) -> None:
        pass

    def _read(self) -> list[int]:
        return [int((counter / "energy_uj").read_text()) for counter in self._counters]


class Sum:
    """What several meters count."""

    def __init__(self, meters: Sequence[EnergyMeter]) -> None:
        self._meters = meters

    @property
    def method(self) -> str:
        return "; and ".join(meter.method for meter in self._meters)

    def joules(self, seconds: float) -> float:
        return sum(meter.joules(seconds) for meter in self._meters)

    def close(self) -> None:
        for meter in self._meters:
            meter.close()


class CodeCarbon:
    """The library of that name (https://github.com/mlco2/codecarbon), offline; it hands its figures to outputs, such as this.

    Raises:
        UserError: It is not installed, or measures nothing on this machine.
    """

    method = "codecarbon"

    def __init__(self) -> None:
        try:
            from codecarbon import OfflineEmissionsTracker  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError(
                'train.energy: codecarbon is not installed; pip install "mm-suite[energy]", or take train.energy=auto'
            ) from None
        self._kilowatt_hours: float | None = None
        self._tracker: Any = OfflineEmissionsTracker(
            country_iso_code="USA",  # it wants one; its CO2 is not asked for
            save_to_file=False,
            log_level="error",
            allow_multiple_runs=True,
            output_handlers=[self],
        )
        self._tracker.start()
        self._tracker.flush()
        if self._kilowatt_hours is None:  # what goes wrong inside it only logs
            self._tracker.stop()
            raise UserError("train.energy: codecarbon measures nothing on this machine; take train.energy=auto")

    def joules(self, seconds: float) -> float:
        self._tracker.flush()
        assert self._kilowatt_hours is not None
        return self._kilowatt_hours * JOULES_PER_KWH

    def close(self) -> None:
        self._tracker.stop()

    def out(self, total: Any, delta: Any) -> None:
        """Called by the tracker, see `codecarbon.output_methods.base_output.BaseOutput`."""
        self._kilowatt_hours = float(total.energy_consumed)

    live_out = out

    def task_out(self, data: Any, experiment_name: Any) -> None:
        """Tasks are not used."""

    def exit(self) -> None:
        """Nothing is open."""
