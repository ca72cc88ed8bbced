"""Loads the batches that a loader asks for, here or in workers, and puts substitutes into the slots of bad samples."""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mm.data.order import Indices
from mm.errors import BadSample, DataError, UserError
from mm.seeding import generator
from mm.types import Batch, Sample, Source

VISIT_STRIDE = 1 << 32
"""The n-th further visit of a sample in an epoch is numbered ``epoch + n * VISIT_STRIDE``, which no epoch reaches."""

MAX_SAME_VALUE_TRIES = 16
MAX_OTHER_TRIES = 64
SUBSTITUTE_DRAWS = 512

GRACE_SECONDS = 1.0
"""Torch's time-out does not see a worker that stops while it hands a tensor over: so long after it the workers are ended."""

_ending = threading.Event()
"""Set while workers are ended on purpose, whose deaths are no news."""

_OF_THE_JOB = {signal.SIGINT, signal.SIGTERM}


@dataclass(frozen=True)
class Task:
    """One batch to load: global batch ``number`` of ``epoch``, of which this rank loads the slots ``part``."""

    epoch: int
    number: int
    indices: Indices
    visits: Indices
    part: slice
    tail: int


@dataclass(frozen=True)
class Fetched:
    """A loaded batch with what became of its slots. ``batch`` is None when nothing is usable; ``error`` is to be raised."""

    epoch: int
    number: int
    tail: int
    batch: Batch | None = None
    delivered: int = 0
    repeated: int = 0
    substituted: int = 0
    bad: tuple[tuple[str, str], ...] = ()
    error: UserError | None = None

    def pin_memory(self) -> "Fetched":
        """The same with its pictures or latents in page-locked memory; torch's DataLoader calls it."""
        if self.batch is None:
            return self
        large = {name: tensor for name in ("image", "latents") if (tensor := getattr(self.batch, name)) is not None}
        return replace(self, batch=replace(self.batch, **{name: tensor.pin_memory() for name, tensor in large.items()}))


@dataclass
class _Slots:
    """The items of a batch while it is being loaded, and the counts that go into `Fetched`."""

    items: list[Any] = field(default_factory=list)
    delivered: int = 0
    repeated: int = 0
    substituted: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


class Fetcher(Dataset[Fetched]):
    """Turns a `Task` into a `Fetched`: read, prepare, substitute, collate. Its result depends on the task only."""

    def __init__(
        self,
        source: Source,
        prepare: Callable[[Sample, int], Any],
        collate: Callable[[list[Any], int], Batch],
        *,
        seed: int,
        codes: Indices | None,
        substitute: bool,
    ) -> None:
        self._source = source
        self._prepare = prepare
        self._collate = collate
        self._seed = seed
        self._codes = codes
        self._substitute = substitute

    def __getitem__(self, task: Task) -> Fetched:
        """Load a batch. A `UserError` is returned, not raised, so that it comes through a worker as it is."""
        position = Fetched(task.epoch, task.number, task.tail)
        try:
            slots = self._load(task)
            batch = self._collate(slots.items, task.epoch) if slots.items else None
        except UserError as error:
            return replace(position, error=error)
        return replace(
            position,
            batch=batch,
            delivered=slots.delivered,
            repeated=slots.repeated,
            substituted=slots.substituted,
            bad=tuple(slots.bad),
        )

    def _load(self, task: Task) -> _Slots:
        slots = _Slots()
        for slot in range(task.part.start, task.part.stop):
            index, occurrence = int(task.indices[slot]), int(task.visits[slot])
            visit = task.epoch + occurrence * VISIT_STRIDE
            repeated = occurrence > 0
            slots.repeated += repeated
            try:
                slots.items.append(self._item(index, visit))
                slots.delivered += not repeated
            except BadSample as bad:
                if not repeated:
                    slots.bad.append((bad.cause, bad.where or self._source.key(index)))
                if self._substitute:
                    slots.items.append(self._substitute_for(task, slot, visit))
                    slots.substituted += 1
        return slots

    def _item(self, index: int, visit: int) -> Any:
        return self._prepare(self._source.read(index), visit)

    def _substitute_for(self, task: Task, slot: int, visit: int) -> Any:
        """The first usable candidate. Bad candidates are not counted here: they have slots of their own."""
        candidates = self._candidates(task, slot)
        for index in candidates:
            with contextlib.suppress(BadSample):
                return self._item(int(index), visit)
        raise DataError(
            f"{self._source.name}: no usable sample found after {len(candidates) + 1} tries, "
            f"the first one: {self._source.key(int(task.indices[slot]))}. Run `mm data check` on it"
        )

    def _candidates(self, task: Task, slot: int) -> Indices:
        """Substitutes for a slot: samples of the same value first, then any that the batch lacks, then any at all."""
        rng = generator(self._seed, task.epoch, task.number, slot, "substitute")
        draws = rng.integers(len(self._source), size=SUBSTITUTE_DRAWS)
        if self._codes is None:
            fresh = ~np.isin(draws, task.indices)
            same = draws[:0]
        else:
            fresh = ~np.isin(self._codes[draws], self._codes[task.indices])
            same = np.flatnonzero(self._codes == self._codes[task.indices[slot]])
            same = rng.permutation(same[~np.isin(same, task.indices)])
        return np.concatenate([same[:MAX_SAME_VALUE_TRIES], draws[fresh][:MAX_OTHER_TRIES], draws[~fresh][:MAX_OTHER_TRIES]])


def fetch(
    fetcher: Fetcher, tasks: Iterator[Task], workers: int, *, pin_memory: bool = False, timeout_seconds: float = 600
) -> Iterator[Fetched]:
    """Load ``tasks`` in order, ``workers`` processes working ahead.

    Raises:
        DataError: A worker died or did not answer in time, or the source cannot be read.
        UserError: What `read`, ``prepare`` or ``collate`` raised, at the batch where it happened.
    """
    stream = _in_workers(fetcher, tasks, workers, pin_memory, timeout_seconds) if workers else map(fetcher.__getitem__, tasks)
    for fetched in stream:
        if fetched.error is not None:
            raise fetched.error
        yield fetched


def _in_workers(
    fetcher: Fetcher, tasks: Iterator[Task], workers: int, pin_memory: bool, timeout_seconds: float
) -> Iterator[Fetched]:
    loader = DataLoader(
        fetcher,
        sampler=tasks,  # pyright: ignore[reportArgumentType] - any iterable of indices will do
        batch_size=None,
        collate_fn=_as_it_is,  # pyright: ignore[reportArgumentType] - gets one element where batch_size is None
        num_workers=workers,
        pin_memory=pin_memory,
        timeout=timeout_seconds,
        worker_init_fn=_start_worker,
        generator=torch.Generator().manual_seed(0),  # else each start would draw from, and so change, the global random stream
    )
    import torchvision.transforms.v2  # noqa: F401 - decoders and filters, which each forked worker would import for itself

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        before = {child.pid for child in multiprocessing.active_children()}
        with _signals_held():
            stream = iter(loader)
        own = {child.pid for child in multiprocessing.active_children()} - before
    _report_deaths_clearly()
    late: list[bool] = []

    def kill() -> None:
        for worker in multiprocessing.active_children():
            if worker.pid in own:
                worker.kill()

    def give_up() -> None:
        late.append(True)
        kill()

    try:
        while True:
            try:
                with _alarm(timeout_seconds and timeout_seconds + GRACE_SECONDS, give_up):
                    fetched = next(stream)
            except StopIteration:
                return
            except (RuntimeError, EOFError, OSError, DataError) as error:
                _ending.set()
                kill()  # one that was stopped would keep this process from ending
                cast(Any, stream)._shutdown_workers()
                _ending.clear()
                raise _explained(error, bool(late)) from error
            yield fetched
    finally:
        del stream


@contextlib.contextmanager
def _alarm(seconds: float, ring: Callable[[], None]) -> Iterator[None]:
    """Call ``ring`` in a thread if the block takes longer than this; 0 never does."""
    timer = threading.Timer(seconds, ring)
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _as_it_is(fetched: Fetched) -> Fetched:
    return fetched


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Workers start with these signals blocked: one that arrives before `_start_worker` waits for it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(_: int) -> None:
    """Leave signals sent to all processes of a training job (Ctrl-C, a scheduler's SIGTERM) to the training process."""
    with contextlib.suppress(AttributeError, OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _let_pass_once)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_THE_JOB)


def _let_pass_once(number: int, _: FrameType | None) -> None:
    """The first SIGTERM may be everybody's; the second is meant for this worker, which does not end by itself."""
    signal.signal(number, signal.SIG_DFL)


def _explained(error: Exception, late: bool = False) -> Exception:
    """A `DataError` for a worker that died or hangs; any other error as it is."""
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if late or message.startswith("DataLoader timed out"):
        return DataError(
            f"no data worker answered in time ({message}); is the storage reachable? data.timeout_seconds gives it longer, "
            "data.workers=0 loads without workers"
        )
    cut_off = isinstance(error, EOFError | ConnectionError | FileNotFoundError) and not message.startswith("Caught ")
    if message.startswith("DataLoader worker") or cut_off:
        return DataError(
            f"a data worker died ({message}); usually memory is short (or /dev/shm too small in a container): "
            "lower data.workers, or load without workers by data.workers=0"
        )
    return error


def _report_deaths_clearly() -> None:
    """Torch raises RuntimeError wherever the main thread is when a worker dies; turn it into a `DataError` there too."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    torch_handler = signal.getsignal(signal.SIGCHLD)
    if not callable(torch_handler) or getattr(torch_handler, "explains_deaths", False):
        return

    def on_child_exit(signum: int, frame: FrameType | None) -> None:
        if _ending.is_set():
            return
        try:
            torch_handler(signum, frame)
        except RuntimeError as error:
            raise _explained(error) from error

    on_child_exit.explains_deaths = True  # pyright: ignore[reportFunctionMemberAccess]
    signal.signal(signal.SIGCHLD, on_child_exit)
