"""Shards read once through, as their bytes come: for data that cannot be read by position, or not for long. Declared inexact.

What is given up, beside `mm.data.loader.Loader`: a resumed run sees samples in another order, some of them twice; an epoch is
not exact; the order depends on the number of processes and of workers; samples meet in a batch only where they lie near each
other; how many there are is not known before. What stays: bounded reading of tar files, samples that are left out are counted
by cause, and preparation seeded by the sample's id.

Shards are tar files here or in object storage, or what a command writes (``pipe:COMMAND``), which a configuration must allow,
because it runs on this machine with all rights of the user.
"""

import itertools
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

from pydantic import Field
from torch.utils.data import Dataset, get_worker_info

from mm.config import StrictConfig
from mm.data.accounting import Accounting
from mm.data.fetch import Fetched, fetch
from mm.data.index import EXTENSIONS, MODALITY, split_name
from mm.data.remote import CHUNK, Remote, find, is_remote
from mm.data.shards import MAX_MEDIA_BYTES, MAX_TEXT_BYTES, described, expand, expand_ranges
from mm.data.tar import Listing, TarError, list_members
from mm.errors import BadSample, DataError, UserError
from mm.seeding import generator
from mm.types import Batch, Sample

PIPE = "pipe:"
UNKNOWN_LENGTH = 1 << 60
INEXACT = (
    "data.stream: inexact by declaration: a resumed run sees samples in another order, some of them twice, and the order "
    "depends on the number of processes and workers"
)


class StreamConfig(StrictConfig):
    """Reading shards once through, in their own order.

    Args:
        buffer: Samples that are held, among which the next one is drawn.
        head: First samples of the first shard, from which the vocabulary and the list of answers are learned.
        commands: Run the commands of ``pipe:`` sources. They may do whatever the user may.
    """

    buffer: int = Field(default=1000, ge=1)
    head: int = Field(default=2000, ge=1)
    commands: bool = False


class StreamLoader:
    """An endless stream of batches (a `mm.types.BatchStream`), with as little state as it has exactness.

    Args:
        spec: Shards: a folder, a pattern, an address, or ``pipe:COMMAND``, each with ranges ``{000..010}``.
        config: How to read them.
        prepare, collate: As for `mm.data.loader.Loader`; a visit is the pass over the shards.
        batch_size: Samples of a global batch, all ranks together.
        seed: Of the order, as far as there is one.
        workers: Loading processes; 0 loads in this one.
        rank, world_size: Shards are divided over ranks and workers, samples where there are fewer shards.
        max_bad_fraction: Share of unusable samples above which iteration raises `DataError`.
        timeout_seconds: How long to wait for a worker before giving up; 0 waits for ever.

    Raises:
        UserError: A command that is not allowed, or no shard.
    """

    def __init__(
        self,
        spec: str,
        config: StreamConfig,
        prepare: Callable[[Sample, int], Any],
        collate: Callable[[list[Any], int], Batch],
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_fraction: float = 0.2,
        timeout_seconds: float = 600,
    ) -> None:
        self._name, self._workers, self._timeout, self._max_bad_fraction = spec, workers, timeout_seconds, max_bad_fraction
        self._reader = _Reader(
            stream_shards(spec, config), config, prepare, collate, batch_size // world_size, seed, (rank, world_size)
        )
        self._taken = 0
        self.accounting = Accounting()

    def __iter__(self) -> Iterator[Batch]:
        """Batches, for ever. Raises `DataError` where a shard or a command fails, or too many samples cannot be used."""
        reader, tasks = cast(Any, self._reader), cast(Any, itertools.count(self._taken))
        for fetched in fetch(reader, tasks, self._workers, timeout_seconds=self._timeout):
            self._taken += 1
            counts = self.accounting
            counts.delivered += fetched.delivered
            counts.indexed += fetched.delivered + len(fetched.bad)
            for cause, where in fetched.bad:
                counts.skip(cause, where)
            if counts.skipped > self._max_bad_fraction * max(counts.indexed, 1000):
                raise DataError(f"{self._name}: too many samples cannot be used: {counts.describe()}")
            if fetched.batch is not None:
                yield fetched.batch

    def state(self) -> dict[str, Any]:
        """How many batches were taken, and the counts; not a position."""
        return {
            "inexact": True,
            "taken": self._taken,
            "accounting": self.accounting.to_dict(),
            "finished": Accounting().to_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Begin the shards anew, in an order of its own. Raises `UserError` for the state of an exact loader."""
        if not state.get("inexact"):
            raise UserError(
                f"{self._name}: the checkpoint was made by exact reading; leave data.stream out, or begin a new run"
            )
        self._taken = int(state["taken"])
        self._reader.resumed_at = self._taken
        self.accounting = Accounting.from_dict(state["accounting"]) if self._reader.rank == 0 else Accounting()


class HeadSource:
    """The first samples of a stream, a `mm.types.Source` for what must be known before training.

    Args:
        spec: As for `StreamLoader`.
        config: How many, and what is allowed.
    """

    def __init__(self, spec: str, config: StreamConfig) -> None:
        self.name, self.fingerprint = spec, "inexact"
        readable = (one for shard in stream_shards(spec, config) for one in read_stream(shard) if isinstance(one, Sample))
        self._samples = list(itertools.islice(readable, config.head))
        if not self._samples:
            raise DataError(f"{spec}: no sample could be read")

    def __len__(self) -> int:
        return len(self._samples)

    def key(self, index: int) -> str:
        return self._samples[index].id

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._samples[index].fields

    def read(self, index: int) -> Sample:
        return self._samples[index]


def stream_shards(spec: str, config: StreamConfig) -> list[str]:
    """The shards that a stream reads. Raises `UserError` for a command that is not allowed, `DataError` where there is none."""
    if spec.startswith(PIPE):
        if not config.commands:
            raise UserError(f"{spec}: runs a command on this machine; if you trust it, allow it by data.stream.commands=true")
        return expand_ranges(spec)
    return [str(path) for path in expand(spec)]


def read_stream(shard: str) -> Iterator[Sample | BadSample]:
    """The samples of one shard in their order, those that cannot be used as what is wrong with them.

    Raises:
        DataError: The shard is damaged, cannot be read, or its command failed.
    """
    key, members = "", {}
    try:
        with _opened(shard) as read:
            forward = _Forward(read)
            for member in list_members(forward.read_at, UNKNOWN_LENGTH, Listing()):
                name, extension = split_name(member.name)
                if extension not in EXTENSIONS or not name:
                    continue
                if members and (name != key or extension in members):
                    yield _sample(shard, key, members)
                    members = {}
                key = name
                limit = MAX_MEDIA_BYTES if extension in MODALITY else MAX_TEXT_BYTES
                members[extension] = forward.read_at(member.offset, member.size) if member.size <= limit else None
                if members[extension] is not None and len(members[extension]) < member.size:
                    raise TarError(member.offset, "member that is cut off")
            if members:
                yield _sample(shard, key, members)
    except TarError as damage:
        raise DataError(f"{shard}: {damage}") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read: {error.strerror or error}") from None


def _sample(shard: str, key: str, members: Mapping[str, bytes | None]) -> Sample | BadSample:
    if None in members.values():
        return BadSample("too many bytes", f"{shard}: {key}")
    try:
        texts, fields = described(members.get, lambda extension: f"{shard}: {key}.{extension}")
    except BadSample as bad:
        return bad
    media: dict[str, bytes] = {}
    for extension in EXTENSIONS:
        data = members.get(extension)
        if extension in MODALITY and data is not None:
            media.setdefault(MODALITY[extension], data)
    return Sample(key, media, texts, fields)


class _Forward:
    """Reading by position from what can only be read on and on; what has gone by is empty."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read, self._position = read, 0

    def read_at(self, offset: int, count: int) -> bytes:
        while self._position < offset:
            skipped = self._take(min(offset - self._position, CHUNK))
            if not skipped:
                return b""
        return self._take(count) if offset == self._position else b""

    def _take(self, count: int) -> bytes:
        pieces = []
        while count and (piece := self._read(min(count, CHUNK))):
            pieces.append(piece)
            count -= len(piece)
            self._position += len(piece)
        return b"".join(pieces)


@contextmanager
def _opened(shard: str) -> Iterator[Callable[[int], bytes]]:
    """A function that reads the next bytes of a shard, at most so many."""
    if shard.startswith(PIPE):
        with subprocess.Popen(shard.removeprefix(PIPE), shell=True, stdout=subprocess.PIPE) as process:  # noqa: S602 - allowed
            assert process.stdout is not None
            try:
                yield process.stdout.read
                _check_end(shard, process)
            except TarError:
                _check_end(shard, process)
                raise
            finally:
                process.kill()
    elif is_remote(shard):
        (remote,) = find([shard])
        yield _RemoteFile(remote).read
    else:
        with open(shard, "rb") as file:
            yield file.read


def _check_end(shard: str, process: subprocess.Popen[bytes]) -> None:
    """Raises `DataError` where a command that has ended, or does so at once, has failed."""
    with suppress(subprocess.TimeoutExpired):
        if process.wait(1):
            raise DataError(f"{shard}: the command ended with exit code {process.returncode}")


class _RemoteFile:
    """Reads on and on, by ranges, so that a failed request is repeated alone."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._position, self._ahead = remote, 0, b""

    def read(self, count: int) -> bytes:
        if not self._ahead:
            self._ahead = self._remote.read_at(self._position, CHUNK) if self._position < self._remote.size else b""
            self._position += len(self._ahead)
        piece, self._ahead = self._ahead[:count], self._ahead[count:]
        return piece


class _Reader(Dataset[Fetched]):
    """The batches of this process; asked for any number, it gives its next one."""

    def __init__(
        self,
        shards: list[str],
        config: StreamConfig,
        prepare: Callable[[Sample, int], Any],
        collate: Callable[[list[Any], int], Batch],
        batch_size: int,
        seed: int,
        ranks: tuple[int, int],
    ) -> None:
        self._shards, self._config, self._prepare, self._collate = shards, config, prepare, collate
        self._batch_size, self._seed = batch_size, seed
        self.rank, self._world_size = ranks
        self.resumed_at = 0
        self._batches: Iterator[Fetched] | None = None

    def __getitem__(self, number: int) -> Fetched:
        try:
            if self._batches is None:
                self._batches = self._read()
            return next(self._batches)
        except UserError as error:
            return Fetched(0, number, 0, error=error)

    def _read(self) -> Iterator[Fetched]:
        items: list[Any] = []
        bad: list[tuple[str, str]] = []
        for visit, sample in self._shuffled():
            try:
                if isinstance(sample, BadSample):
                    raise sample
                items.append(self._prepare(sample, visit))
            except BadSample as found:
                bad.append((found.cause, found.where or self._shards[0]))
            if len(items) == self._batch_size or len(bad) > self._batch_size:
                batch = self._collate(items, visit) if len(items) == self._batch_size else None
                yield Fetched(visit, 0, 0, batch, delivered=len(items) if batch is not None else 0, bad=tuple(bad))
                items, bad = items if batch is None else [], []

    def _shuffled(self) -> Iterator[tuple[int, Sample | BadSample]]:
        """Samples, each drawn from a buffer that the shards fill."""
        buffer: list[tuple[int, Sample | BadSample]] = []
        rng = generator(self._seed, self.rank, self._worker()[0], self.resumed_at, "stream")
        for one in self._passes():
            if len(buffer) < self._config.buffer:
                buffer.append(one)
                continue
            place = int(rng.integers(len(buffer)))
            drawn, buffer[place] = buffer[place], one
            yield drawn

    def _passes(self) -> Iterator[tuple[int, Sample | BadSample]]:
        worker, workers = self._worker()
        reader, readers = self.rank * workers + worker, self._world_size * workers
        shared = len(self._shards) < readers
        for visit in itertools.count():
            order = generator(self._seed, visit, self.resumed_at, "shards of a stream").permutation(len(self._shards))
            seen = 0
            for shard in order if shared else order[reader::readers]:
                for number, sample in enumerate(read_stream(self._shards[shard])):
                    seen += 1
                    if not shared or number % readers == reader:
                        yield visit, sample
            if not seen:
                raise DataError(f"{self._shards[0]}: no samples in the shards that reader {reader + 1} of {readers} has")

    def _worker(self) -> tuple[int, int]:
        info = get_worker_info()
        return (0, 1) if info is None else (info.id, info.num_workers)
