"""What became of every sample: delivered, skipped with its cause, or left in the tail."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mm.errors import UserError


@dataclass
class Accounting:
    """Counts of one epoch, or of several added up.

    After a whole epoch ``delivered + skipped + tail == indexed``. Under several ranks each counts its own part, and the sums
    over ranks of delivered, skipped and tail fulfil it.

    Args:
        indexed: Samples in the source.
        delivered: Samples that were handed out.
        skipped: Samples that could not be used.
        tail: Samples that the epoch leaves out because they fill no batch; counted with its last batch, by rank 0.
        repeated: Further deliveries of samples that were already visited in the epoch (mixtures, ``several``).
        substituted: Slots that were filled by another sample because their own could not be used.
        causes: Skipped samples by cause; adds up to ``skipped``.
        examples: The first sample skipped for each cause.
    """

    indexed: int = 0
    delivered: int = 0
    skipped: int = 0
    tail: int = 0
    repeated: int = 0
    substituted: int = 0
    causes: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def balanced(self) -> bool:
        """True when every sample is accounted for; false in the middle of an epoch."""
        return self.delivered + self.skipped + self.tail == self.indexed

    def skip(self, cause: str, where: str) -> None:
        """Count one sample that cannot be used."""
        self.skipped += 1
        self.causes[cause] = self.causes.get(cause, 0) + 1
        self.examples.setdefault(cause, where)

    def add(self, other: "Accounting") -> None:
        """Add the counts of another epoch or of another rank, ``indexed`` included."""
        for name in ("indexed", "delivered", "skipped", "tail", "repeated", "substituted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for cause, count in other.causes.items():
            self.causes[cause] = self.causes.get(cause, 0) + count
        for cause, where in other.examples.items():
            self.examples.setdefault(cause, where)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Accounting":
        """Read the form of `to_dict`."""
        counts = {name: int(values[name]) for name in ("indexed", "delivered", "skipped", "tail", "repeated", "substituted")}
        causes = {str(cause): int(count) for cause, count in values["causes"].items()}
        return cls(**counts, causes=causes, examples={str(cause): str(where) for cause, where in values["examples"].items()})

    def describe(self) -> str:
        """One line such as ``285 delivered, 15 skipped (truncated 9, empty 6), 0 tail of 300``."""
        causes = ", ".join(
            f"{cause} {count}" for cause, count in sorted(self.causes.items(), key=lambda item: (-item[1], item[0]))
        )
        skipped = f"{self.skipped} skipped" + (f" ({causes})" if causes else "")
        return f"{self.delivered} delivered, {skipped}, {self.tail} tail of {self.indexed}"


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the loader states of all ranks, rank 0 first, into the one that a checkpoint holds: same position, counts added up.

    Any number of ranks may continue from it.

    Raises:
        UserError: The ranks are not at the same position.
    """
    merged = dict(states[0])
    for name in ("accounting", "finished"):
        accounts = [Accounting.from_dict(state[name]) for state in states]
        indexed = accounts[0].indexed
        for account in accounts[1:]:
            accounts[0].add(account)
        if not merged.get("inexact"):  # a stream only knows what each rank has met
            accounts[0].indexed = indexed
        merged[name] = accounts[0].to_dict()
    for rank, state in enumerate(states):
        if any(state[name] != merged[name] for name in merged if name not in ("accounting", "finished")):
            raise UserError(
                f"data state of rank {rank} is at another position than that of rank 0; every rank must take the same steps"
            )
    return merged
