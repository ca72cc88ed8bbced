"""Which process is to blame: each tells the others where it is and that it lives, so that a lost or stuck one can be named.

Collectives only say that a connection was closed or that time ran out. What each process told beforehand stands in the store
through which the processes found each other.
"""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] - documented, but not exported

from mm.errors import UserError

BEAT_SECONDS = 0.25
SILENT_SECONDS = 1.0
"""A process whose beats stand still for so long is gone or stopped."""

ANSWER_SECONDS = 0.5
"""A store that takes longer than this is gone or stopped, too."""

BEATS, PLACES = "mm/beats", "mm/place"
COLLECTIVE_ERRORS = ("gloo", "connection closed by peer", "timed out waiting", "nccl")
"""Words of the errors of collectives, which gloo raises as plain runtime errors."""


class LostProcessError(UserError):
    """Another process of the training died or hangs. The command line exits with ``exit_code``."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes


class Watch:
    """What this process tells the others, and what they told.

    Args:
        store: Through which the processes met; None where it is not known, or for a single process.
        rank: Of this process.
        size: Number of processes.
    """

    def __init__(self, store: Store | None, rank: int, size: int) -> None:
        self._store = store.clone() if store is not None and size > 1 else None  # pyright: ignore[reportAttributeAccessIssue]
        self._rank, self._size = rank, size
        self._ended = threading.Event()
        self._place = ""

    def tell(self, step: int, doing: str) -> None:
        """Say what this process does, such as ``taking a batch``, in which step."""
        self._place = f"step {step}, {doing}"
        if self._store is not None:
            self._store.set(f"{PLACES}/{self._rank}", self._place)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Show the others that this process lives; an error of a collective becomes one that names who is missing.

        Raises:
            LostProcessError: A collective failed because another process is gone, stopped or stuck.
        """
        if self._size == 1:
            yield
            return
        if self._store is not None:
            clone = self._store.clone()  # pyright: ignore[reportAttributeAccessIssue] - missing in torch's stubs
            threading.Thread(target=self._beat, args=(clone,), daemon=True).start()
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, dist.DistError) and not any(words in str(error).lower() for words in COLLECTIVE_ERRORS):
                raise
            raise LostProcessError(
                f"process {self._rank} of {self._size} ({self._place}) was left alone: {self._missing()}; the other processes "
                "end, too, and the same command resumes at the newest checkpoint"
            ) from error
        finally:
            self._ended.set()

    def _beat(self, store: Store) -> None:
        try:
            while not self._ended.wait(BEAT_SECONDS):
                store.add(f"{BEATS}/{self._rank}", 1)
        except RuntimeError:  # the store is gone with the process that held it
            return

    def _missing(self) -> str:
        """Who is to blame. The store is asked by a thread, because whoever holds it may be stopped and never answer."""
        if self._store is None:
            return "another process died or hangs"
        answers: list[str] = []

        def ask() -> None:
            with suppress(RuntimeError):  # the store is gone with the process that held it
                answers.append(self._silent_or_stuck())

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(SILENT_SECONDS + ANSWER_SECONDS)
        holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "process 0"
        return answers[0] if answers else f"no sign of life of {holder}, through which the processes met"

    def _silent_or_stuck(self) -> str:
        """Who does not live, else who else there is."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        before = self._beats(others)
        time.sleep(SILENT_SECONDS)
        silent = [rank for rank, beats in self._beats(others).items() if beats == before[rank]]
        places = "; ".join(f"process {rank} ({self._where(rank)})" for rank in silent or others)
        return f"no sign of life of {places}" if silent else f"the others live, but do not answer: {places}"

    def _beats(self, ranks: list[int]) -> dict[int, int]:
        assert self._store is not None
        return {rank: self._store.add(f"{BEATS}/{rank}", 0) for rank in ranks}

    def _where(self, rank: int) -> str:
        assert self._store is not None
        key = f"{PLACES}/{rank}"
        return self._store.get(key).decode() if self._store.check([key]) else "not yet in a step"
