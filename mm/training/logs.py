"""Append-only JSON lines that can be cut back to where a checkpoint left them."""

import json
import os
from pathlib import Path
from typing import Any


class JsonLines:
    """A ``.jsonl`` file with a buffer in memory.

    Args:
        path: Created when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        self._buffer: list[bytes] = []

    def append(self, record: Any) -> None:
        """Add one line; it reaches the file at the next `flush`."""
        self._buffer.append(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")

    def flush(self, sync: bool = False) -> None:
        """Write the buffer, with ``sync`` force it to disk. After an OSError the file is as before and the buffer is kept."""
        if not self._buffer and not (sync and self.path.exists()):
            return
        data = b"".join(self._buffer)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            written = 0
            while written < len(data):
                written += os.write(descriptor, data[written:])
            if sync:
                os.fsync(descriptor)
        except OSError:
            os.ftruncate(descriptor, self.size)
            raise
        finally:
            os.close(descriptor)
        self.size += len(data)
        self._buffer.clear()

    def truncate(self, size: int) -> None:
        """Forget everything after the first ``size`` bytes, written or not."""
        self._buffer.clear()
        if self.path.exists():
            self.size = min(size, self.path.stat().st_size)
            os.truncate(self.path, self.size)
