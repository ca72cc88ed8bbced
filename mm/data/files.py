"""Reading one media file of a sample, so that nothing a table or folder names can hang or exhaust the process."""

import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from mm.errors import BadSample

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"})
AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".mp3", ".opus"})
MAX_MEDIA_BYTES = 1 << 30
MAX_CAPTION_BYTES = 1 << 20


def is_picture(name: str) -> bool:
    """True when a file name ends like a picture's."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_recording(name: str) -> bool:
    """True when a file name ends like a recording's."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES


def read_file(path: str | Path, max_bytes: int = MAX_MEDIA_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        BadSample: Cause ``missing file``, ``too many bytes`` or ``unreadable`` (a folder, a device, no permission).
    """
    try:
        # O_NONBLOCK: opening a named pipe would otherwise wait for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise BadSample("unreadable", f"{path}: not a regular file")
            if status.st_size > max_bytes:
                raise BadSample("too many bytes", str(path))
            return file.read(max_bytes)
    except (FileNotFoundError, NotADirectoryError):
        raise BadSample("missing file", str(path)) from None
    except (OSError, ValueError) as error:
        raise BadSample("unreadable", f"{path}: {error}") from None


def revision_of(paths: Iterable[str | Path]) -> str:
    """Hex digest of the sizes and times of files, in order; a change to any of them gives another, and so does copying them."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            digest.update(b"missing\n")
    return digest.hexdigest()


def read_captions(path: str | Path) -> tuple[str, ...]:
    """Captions in a text file, one a line; empty lines do not count. Raises `BadSample` as `read_file`, or ``bad text``."""
    try:
        text = read_file(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadSample("bad text", f"{path}: not UTF-8") from None
    return tuple(line.strip() for line in text.splitlines() if line.strip())
