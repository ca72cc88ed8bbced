"""What watches over a run: polite stopping, a loss that is not a number, a contrastive loss that does not move."""

import math
import signal
import threading
from collections import deque
from collections.abc import Mapping
from types import FrameType
from typing import Any

FLAT_TOLERANCE = 0.01
"""A contrastive loss this close to that of guessing, relatively, has learned nothing."""

COLLAPSED_BELOW = 0.25
"""A batch that uses fewer codes than this share of what random tokens would use comes from a collapsing codebook."""

FLAT_STEPS = 100
"""Steps after warm-up before a flat loss is worth a word, and the number of steps averaged for it."""


class StopSignals:
    """Context that turns the first SIGTERM or Ctrl-C into a request; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python delivers signals there only
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested == "SIGINT":
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class FlatLoss:
    """Notices that a loss stays at that of guessing.

    Args:
        warmup_steps: Steps of the learning rate's warm-up, in which a flat loss is normal.
    """

    def __init__(self, warmup_steps: int) -> None:
        self._first_step = warmup_steps + FLAT_STEPS
        self._recent: deque[float] = deque(maxlen=FLAT_STEPS)
        self._told = False

    def message(self, step: int, parts: Mapping[str, float]) -> str | None:
        """Record a step's loss; the text of the warning the first time that it is due, otherwise None.

        Args:
            step: Number of the step.
            parts: Named parts of the loss; ``contrastive`` and ``guessing``, what it costs to guess, are looked at.
        """
        if "guessing" not in parts or "contrastive" not in parts:
            return None
        self._recent.append(parts["contrastive"])
        guess = parts["guessing"]
        full = len(self._recent) == FLAT_STEPS
        if self._told or not guess or not full or step < self._first_step:
            return None
        mean = math.fsum(self._recent) / FLAT_STEPS
        if abs(mean / guess - 1) > FLAT_TOLERANCE:
            return None
        self._told = True
        return (
            f"after {step} steps the contrastive loss is {mean:.3f}, that of guessing among {math.exp(guess):.0f} candidates: "
            "lower train.lr or lengthen train.warmup_steps, and see with `mm data check` whether captions differ and fit"
        )


class Collapse:
    """Notices that a quantizer uses few of its codes."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=FLAT_STEPS)
        self._told = False

    def message(self, step: int, parts: Mapping[str, float]) -> str | None:
        """Record a step; the text of the warning the first time that it is due, otherwise None.

        Args:
            step: Number of the step.
            parts: Named parts of the loss; ``batch_usage`` is looked at, codes used over those that random tokens would use.
        """
        if "batch_usage" not in parts:
            return None
        self._recent.append(parts["batch_usage"])
        mean = math.fsum(self._recent) / len(self._recent)
        if self._told or len(self._recent) < FLAT_STEPS or step <= 2 * FLAT_STEPS or mean > COLLAPSED_BELOW:
            return None
        self._told = True
        return (
            f"after {step} steps a batch uses {mean:.0%} of the codes that random tokens would: the codebook is collapsing; "
            "take the quantizer {kind: fsq}; else lower train.lr, for kind: vq raise dead_after or shrink codebook_size, for "
            "kind: gumbel lower kl_weight"
        )


class NonFinite:
    """Counts steps that were skipped because loss or gradient were NaN or infinite."""

    def __init__(self) -> None:
        self.total = 0
        self.consecutive = 0

    def record(self, finite: bool) -> None:
        """Count a step."""
        self.total += not finite
        self.consecutive = 0 if finite else self.consecutive + 1

    def state(self) -> dict[str, int]:
        return {"total": self.total, "consecutive": self.consecutive}

    def restore(self, state: Mapping[str, int]) -> None:
        self.total, self.consecutive = int(state["total"]), int(state["consecutive"])
