"""Batches for training and evaluation: exact order, exact resume, exact accounting, for any number of workers and ranks.

The batches are a pure function of (source, seed, epoch, sampling policy); workers only decide how fast they come. The state
counts batches that were handed out, never those that workers have prepared in advance.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from mm.data.accounting import Accounting
from mm.data.fetch import Fetched, Fetcher, Task, fetch
from mm.data.fields import field_codes
from mm.data.order import EpochOrder, Tail, epoch_order, rank_slice
from mm.errors import DataError, UserError
from mm.types import Batch, Sample, Source

Policy = Literal["plain", "distinct", "several"]


class Loader:
    """An endless, resumable stream of batches (a `BatchStream`).

    Args:
        source: What to read. A source with a ``shares`` attribute is drawn as a weighted mixture.
        prepare: ``(sample, visit) -> item``, decodes one sample in a worker; may raise `BadSample`. ``visit`` is the epoch, or
            another number, unique to that occurrence, for a sample that comes again in the same epoch: seed all randomness of
            the item with it, ``generator(seed, visit, sample.id, purpose)``.
        collate: ``(items, epoch) -> Batch``, joins the items of a batch, in the worker too.
        batch_size: Samples of a global batch, all ranks together.
        seed: Seed of the order and of substitutes.
        policy: Which samples may meet in a batch, see `mm.data.config.SamplingConfig`.
        field: Metadata field of the policies ``distinct`` and ``several``.
        per_concept: Samples of each chosen value with ``several``.
        workers: Loading processes; 0 loads in this one.
        rank, world_size: Rank r of W gets the slots ``r*b/W`` to ``(r+1)*b/W`` of each global batch of b.
        tail: Whether samples that fill no batch are dropped or come in short batches at the end of the epoch.
        shuffle: False visits the samples in the source's order.
        substitute: Put another sample into the slot of one that cannot be used (training); False leaves it out (evaluation).
        max_bad_fraction: Share of unusable samples above which iteration raises `DataError`.
        pin_memory: Copy pictures to page-locked memory, for a GPU.
        timeout_seconds: How long to wait for a worker before giving up; 0 waits for ever.

    Raises:
        UserError: The source is empty, too small for the batch size, or lacks the sampling field.
    """

    def __init__(
        self,
        source: Source,
        prepare: Callable[[Sample, int], Any],
        collate: Callable[[list[Any], int], Batch],
        *,
        batch_size: int,
        seed: int,
        policy: Policy = "plain",
        field: str | None = None,
        per_concept: int = 2,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tail: Tail = "drop",
        shuffle: bool = True,
        substitute: bool = True,
        max_bad_fraction: float = 0.2,
        pin_memory: bool = False,
        timeout_seconds: float = 600,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not in 0..{world_size - 1}")
        if policy != "plain" and field is None:
            raise ValueError(f"policy '{policy}' needs the field whose values are kept apart")
        if len(source) == 0:
            raise UserError(f"{source.name}: no samples in it")
        if batch_size < world_size:
            raise UserError(f"batch size {batch_size} is smaller than the number of processes {world_size}; raise it")
        self.source = source
        self.batch_size, self.seed = batch_size, seed
        self._codes = None if policy == "plain" or field is None else field_codes(source, field)
        self._per_value = per_concept if policy == "several" else 1
        self._field = field
        self._rank, self._world_size = rank, world_size
        self._tail: Tail = tail
        self._shuffle = shuffle
        self._max_bad_fraction = max_bad_fraction
        self._workers, self._pin_memory, self._timeout = workers, pin_memory, timeout_seconds
        self._fetcher = Fetcher(source, prepare, collate, seed=seed, codes=self._codes, substitute=substitute)
        self._orders: dict[int, EpochOrder] = {}
        self._epoch, self._cursor = 0, 0
        self.accounting = Accounting(indexed=len(source))
        self._finished = Accounting()
        self._order(0)

    @property
    def epoch(self) -> int:
        """Epoch of the last batch that was handed out."""
        return self._epoch

    @property
    def total(self) -> Accounting:
        """Counts of all epochs so far, the current one included."""
        total = Accounting()
        total.add(self._finished)
        total.add(self.accounting)
        return total

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on, for ever. A later iterator continues after the last batch handed out."""
        return self._batches(self._tasks(self._epoch, self._cursor, last_epoch=None))

    def one_epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """All batches of one epoch from its beginning; moves the position, and leaves its counts in `accounting`."""
        self._epoch, self._cursor = epoch, 0
        self.accounting, self._finished = Accounting(indexed=len(self.source)), Accounting()
        return self._batches(self._tasks(epoch, 0, last_epoch=epoch))

    def state(self) -> dict[str, Any]:
        """JSON position after the last batch that was handed out, with this rank's counts (see `merge_states`)."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "fingerprint": self.source.fingerprint,
            "order": self._order(self._epoch).digest,
            "accounting": self.accounting.to_dict(),
            "finished": self._finished.to_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the batch at which ``state`` was taken. Counts of all ranks go to rank 0, so that sums stay right.

        Raises:
            UserError: The state belongs to other data, another seed, batch size or sampling policy.
        """
        if state.get("inexact"):
            raise UserError(
                f"{self.source.name}: the checkpoint was made by reading a stream, which has no position; keep data.stream, or "
                "start a new run folder"
            )
        expected = {"seed": self.seed, "batch_size": self.batch_size, "fingerprint": self.source.fingerprint}
        names = {"seed": "seed", "batch_size": "batch size", "fingerprint": "data fingerprint"}
        for key, value in expected.items():
            if state[key] != value:
                raise UserError(
                    f"{self.source.name}: cannot resume, the checkpoint was made with {names[key]} {state[key]} "
                    f"and this run has {value}; restore the former setting or start a new run folder"
                )
        epoch, cursor = int(state["epoch"]), int(state["cursor"])
        order = self._order(epoch)
        if state["order"] != order.digest or not 0 <= cursor <= len(order):
            raise UserError(
                f"{self.source.name}: cannot resume, epoch {epoch} would come in another order than the checkpoint's; "
                "restore the former sampling and mixture settings (and NumPy version) or start a new run folder"
            )
        self._epoch, self._cursor = epoch, cursor
        self.accounting, self._finished = Accounting(indexed=len(self.source)), Accounting()
        if self._rank == 0:
            self.accounting = Accounting.from_dict(state["accounting"])
            self._finished = Accounting.from_dict(state["finished"])

    def _order(self, epoch: int) -> EpochOrder:
        """The order of an epoch; the last two are kept, because workers run ahead into the next epoch."""
        if epoch not in self._orders:
            order = epoch_order(
                len(self.source),
                self.batch_size,
                seed=self.seed,
                epoch=epoch,
                fingerprint=self.source.fingerprint,
                shuffle=self._shuffle,
                codes=self._codes,
                per_value=self._per_value,
                shares=getattr(self.source, "shares", None),
                tail=self._tail,
            )
            if len(order) == 0:
                raise UserError(self._too_small())
            self._orders = {key: value for key, value in self._orders.items() if abs(key - epoch) <= 1}
            self._orders[epoch] = order
        return self._orders[epoch]

    def _too_small(self) -> str:
        if self._codes is None:
            have = len(self.source)
            need = f"a batch of {self.batch_size}; set the batch size to {have} or less"
            return f"{self.source.name}: {have} samples do not fill {need}"
        have = (int(self._codes.max()) + 1) * self._per_value
        return (
            f"{self.source.name}: field '{self._field}' has too few different values to fill a batch of {self.batch_size}; "
            f"set the batch size to {have} or less, or the sampling policy to plain"
        )

    def _tasks(self, epoch: int, cursor: int, last_epoch: int | None) -> Iterator[Task]:
        while last_epoch is None or epoch <= last_epoch:
            order = self._order(epoch)
            for number in range(cursor, len(order)):
                slots = order.slots(number)
                last = number == len(order) - 1
                yield Task(
                    epoch=epoch,
                    number=number,
                    indices=order.indices[slots],
                    visits=order.visits[slots],
                    part=rank_slice(slots.stop - slots.start, self._rank, self._world_size),
                    tail=order.tail if last and self._rank == 0 else 0,
                )
            epoch, cursor = epoch + 1, 0

    def _batches(self, tasks: Iterator[Task]) -> Iterator[Batch]:
        for fetched in fetch(self._fetcher, tasks, self._workers, pin_memory=self._pin_memory, timeout_seconds=self._timeout):
            self._account(fetched)
            if fetched.batch is not None:
                yield fetched.batch

    def _account(self, fetched: Fetched) -> None:
        if fetched.epoch != self._epoch:
            self._finished.add(self.accounting)
            self.accounting = Accounting(indexed=len(self.source))
        self._epoch, self._cursor = fetched.epoch, fetched.number + 1
        counts = self.accounting
        counts.delivered += fetched.delivered
        counts.repeated += fetched.repeated
        counts.substituted += fetched.substituted
        counts.tail += fetched.tail
        for cause, where in fetched.bad:
            counts.skip(cause, where)
        seen = max(counts.delivered + counts.skipped, min(counts.indexed // self._world_size, 1000))
        if counts.skipped > self._max_bad_fraction * seen:
            raise DataError(
                f"{self.source.name}: too many samples cannot be used: {counts.describe()}; "
                f"for example {'; '.join(f'{cause}: {where}' for cause, where in counts.examples.items())}. "
                "Run `mm data check` on it; training takes more with data.max_bad_fraction"
            )
