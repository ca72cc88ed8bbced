"""Which samples went into which step, over all processes: the proof that a resumed run saw what an unbroken one would have."""

from collections.abc import Sequence

from mm.training.logs import JsonLines
from mm.training.parallel import World, gather_json


class ConsumedIds:
    """Collects the ids of each step on every process and writes those of the global batches on the main one.

    Args:
        log: ``ids.jsonl``, or None to keep no ids.
        world: This process among all.
    """

    def __init__(self, log: JsonLines | None, world: World) -> None:
        self._log, self._world = log, world
        self._pending: list[Sequence[str]] = []

    def note(self, ids: Sequence[str]) -> None:
        """Remember this process's ids of a step."""
        if self._log is not None:
            self._pending.append(ids)

    def collect(self, step: int) -> None:
        """Move what was noted up to ``step`` into the log's buffer. Every process calls it at the same steps."""
        if self._log is None or not self._pending:
            return
        first = step - len(self._pending) + 1
        everyone = everyones_ids(self._pending, self._world)
        if self._world.is_main:
            for offset, ids in enumerate(everyone):
                self._log.append({"step": first + offset, "ids": ids})
        self._pending.clear()


def everyones_ids(steps: Sequence[Sequence[str]], world: World) -> list[list[str]]:
    """The ids of each global batch, in rank order, from this process's ids of the same steps."""
    shares = gather_json(steps, world)[:: world.model_size]
    return [[name for part in parts for name in part] for parts in zip(*shares, strict=True)]
