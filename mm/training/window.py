"""Training figures between two lines of metrics.jsonl."""

import math
from dataclasses import dataclass, field
from typing import Any

from mm.training.step import StepReport


@dataclass
class Window:
    """Sums over the steps since the last line; part of a checkpoint, so that a resumed run writes the lines of an unbroken one.

    Args:
        steps: All steps.
        finite_steps: Those that were applied, of which the figures below are sums.
        samples: Samples of all steps.
        seconds: Time of all steps, waiting for data included.
    """

    steps: int = 0
    finite_steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    grad_norm: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def add(self, report: StepReport, seconds: float) -> None:
        """Count a step."""
        self.steps += 1
        self.samples += report.num_samples
        self.seconds += seconds
        if not report.finite:
            return
        self.finite_steps += 1
        self.loss += report.loss
        self.grad_norm += report.grad_norm
        for name, value in report.parts.items():
            if math.isfinite(value):
                self.parts[name] = self.parts.get(name, 0.0) + value

    def record(self, step: int, lr: float, seconds: float) -> dict[str, Any]:
        """A line of metrics.jsonl: means over the window, null where no step was applied."""
        count = self.finite_steps
        return {
            "step": step,
            "loss": self.loss / count if count else None,
            "parts": {name: value / count for name, value in self.parts.items()},
            "lr": lr,
            "grad_norm": self.grad_norm / count if count else None,
            "samples_per_second": round(self.samples / max(self.seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
        }
