"""One trainer a run folder: a lock that the kernel releases however the process ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mm.errors import UserError

_held: set[tuple[int, Path]] = set()


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold ``run/lock`` exclusively.

    A POSIX record lock: it belongs to this process alone, so loader workers that outlive a killed trainer by a few seconds do
    not keep it, as they would an inherited ``flock``.

    Raises:
        UserError: When another trainer, here or in another process, works in this folder, or it cannot be written.
    """
    owner = (os.getpid(), run.resolve())
    if owner in _held:  # a record lock never conflicts within its own process
        raise UserError(f"{run}: this process already trains in this folder; give the second run another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise UserError(f"{run}: cannot be written: {error.strerror}; make room or choose another --out") from None
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            other = os.read(descriptor, 64).decode(errors="replace").strip()
            raise UserError(
                f"{run}: another trainer is at work here (process {other}); wait for it or choose another --out"
            ) from None
        with suppress(OSError):  # on a full disk a second trainer is not told which process the first one is
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {os.uname().nodename}\n".encode())
        _held.add(owner)
        yield
    finally:
        _held.discard(owner)
        os.close(descriptor)
