"""Tar shards in object storage, through fsspec: listed, read by range or kept in a bounded local cache, with patience.

Where all shards of a source together fit the cache, a shard is fetched whole when it is first read; else samples are read by
range and not kept. Several processes share the cache: each file is fetched by one of them, into a temporary file that is
renamed when it is whole. What was used longest ago makes room. An attempt that fails is repeated, each time after twice the
wait; when the last one has failed the error names the shard.
"""

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from mm.errors import DataError, UserError
from mm.paths import cache_folder

PROTOCOLS = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "file", "memory")
"""Of fsspec's, those that name a place; none that wraps another one or runs a program."""

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "http": "aiohttp", "https": "aiohttp"}

TRIES = 5
FIRST_WAIT_SECONDS = 0.5
REQUESTS = 32
"""Questions for sizes and indexes that are asked at once."""

DEFAULT_CACHE_GB = 50.0
CHUNK = 8 << 20

_VERSION_KEYS = ("ETag", "etag", "md5", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "created")

R = TypeVar("R")


@dataclass(frozen=True)
class Remote:
    """A file in object storage.

    Args:
        url: Its address.
        size: In bytes.
        version: Hex digest of the address, the size and what the storage says of the content: another file has another one.
        whole: Whether it is fetched into the cache when it is read, instead of range by range.
    """

    url: str
    size: int
    version: str
    whole: bool = True

    def __str__(self) -> str:
        return self.url

    @property
    def cached(self) -> Path:
        """Where the cache has it, or would."""
        return shard_cache() / f"{self.version[:24]}-{self.url.rsplit('/', 1)[-1]}"

    def read_at(self, offset: int, count: int) -> bytes:
        """Bytes by range, fewer at the end of the file. Raises `DataError` after the last attempt."""
        return tried(self.url, lambda fs, path: fs.cat_file(path, start=offset, end=min(offset + count, self.size)))


def is_remote(spec: object) -> bool:
    """Whether a path is an address."""
    return isinstance(spec, str) and "://" in spec


def shard_cache() -> Path:
    """The folder of fetched shards and of their indexes."""
    return cache_folder() / "shards"


def cache_limit() -> int:
    """Bytes that fetched shards may take: ``MM_SHARD_CACHE_GB`` gigabytes, 50 by default."""
    given = os.environ.get("MM_SHARD_CACHE_GB", str(DEFAULT_CACHE_GB))
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UserError(f"MM_SHARD_CACHE_GB is '{given}'; give a number of gigabytes, such as 50")
    return int(limit * 1e9)


def tried(url: str, action: Callable[[Any, str], R]) -> R:
    """``action(filesystem, path)``, repeated while it fails.

    Raises:
        DataError: There is no such file, no permission, or the last attempt failed.
    """
    for attempt in range(TRIES):
        try:
            return action(*_filesystem(url))
        except FileNotFoundError:
            raise DataError(f"{url}: not there") from None
        except PermissionError:
            raise DataError(f"{url}: no permission to read it; are the credentials of the storage set?") from None
        except UserError:
            raise
        except Exception as error:  # clients of storages raise errors of their own kinds for what may pass
            if attempt + 1 == TRIES:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise DataError(f"{url}: cannot be read after {TRIES} tries: {reason}; try again later") from None
            time.sleep(FIRST_WAIT_SECONDS * 2**attempt)
    raise AssertionError


def find(urls: Sequence[str]) -> list[Remote]:
    """The files that addresses with ``*`` and folders mean, sorted within each; ranges are expanded before.

    Raises:
        DataError: One is not there, or says no size.
    """
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = [remote for remotes in pool.map(_found, urls) for remote in remotes]
    fits = sum(remote.size for remote in found) <= cache_limit()
    return [replace(remote, whole=fits) for remote in found]


def local_copy(remote: Remote) -> Path:
    """The file in the cache, fetched if it is not there. Raises `DataError` after the last attempt."""
    path = remote.cached
    if _touched(path):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")):
        if not _touched(path):
            _make_room(remote.size)
            _fetch(remote, path)
    return path


def small_file(url: str, max_bytes: int) -> bytes | None:
    """The content of a file beside a shard; None where there is none, or too much. Raises `DataError` as `tried`."""

    def read(fs: Any, path: str) -> bytes | None:
        try:
            return fs.cat_file(path) if fs.info(path)["size"] <= max_bytes else None
        except (FileNotFoundError, PermissionError):
            return None

    return tried(url, read)


def put(url: str, content: bytes) -> None:
    """Write a file. Raises `DataError` after the last attempt."""
    tried(url, lambda fs, path: fs.pipe_file(path, content))


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem, which knows by itself what process it is in, and the path there."""
    import fsspec

    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{url}: shards are read from {', '.join(PROTOCOLS)} addresses; download others first")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError(f"{url}: needs the package {PACKAGES.get(protocol, protocol)}; install it") from None


def _found(url: str) -> list[Remote]:
    protocol = url.partition("://")[0]

    def listed(fs: Any, path: str) -> list[Mapping[str, Any]]:
        if "*" in path:
            return [entry for _, entry in sorted(fs.glob(path, detail=True).items())]
        if not path.endswith(".tar") and fs.isdir(path):
            return sorted(
                (entry for entry in fs.ls(path, detail=True) if entry["name"].endswith(".tar")), key=lambda e: e["name"]
            )
        return [fs.info(path)]

    return [_described(protocol, entry) for entry in tried(url, listed)]


def _described(protocol: str, entry: Mapping[str, Any]) -> Remote:
    name = str(entry["name"])
    url = name if "://" in name else f"{protocol}://{name}"
    if entry.get("size") is None:
        raise DataError(f"{url}: the server does not tell its size, which reading by range needs; download it first")
    told = [url, str(entry["size"]), *(f"{key}={entry[key]}" for key in _VERSION_KEYS if key in entry)]
    return Remote(url, int(entry["size"]), hashlib.sha256("\n".join(told).encode()).hexdigest())


def _fetch(remote: Remote, path: Path) -> None:
    """Range by range, so that a failed attempt costs one range."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            while (done := file.tell()) < remote.size:
                piece = remote.read_at(done, CHUNK)
                if not piece:
                    raise DataError(f"{remote}: ends after {done} of {remote.size} bytes; was it replaced just now?")
                file.write(piece)
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{remote}: cannot be kept in {path.parent}: {error.strerror}; set MM_CACHE elsewhere") from None
    finally:
        part.unlink(missing_ok=True)


def _make_room(size: int) -> None:
    """Remove what was used longest ago, until ``size`` more bytes are within the limit. Files in use stay readable to users."""
    folder = shard_cache()
    with _locked(folder / ".room.lock"):
        kept, total = [], size
        for file in [*folder.glob("*.tar"), *folder.glob(".*.part")]:
            with contextlib.suppress(FileNotFoundError):
                stat = file.stat()
                total += stat.st_size
                if file.suffix == ".tar":
                    kept.append((stat.st_mtime_ns, stat.st_size, file))
        for _, bytes_there, file in sorted(kept):
            if total <= cache_limit():
                return
            file.unlink(missing_ok=True)
            total -= bytes_there


def _touched(path: Path) -> bool:
    """Whether a file is there, which counts as a use of it."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
