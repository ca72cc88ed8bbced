"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong model.

``RUN/checkpoints/step-00000100/`` is written under a temporary name, each file flushed to disk, described by size and sha256 in
``manifest.json``, and renamed when complete; then the file ``latest`` names it; only then older ones go. Loading verifies the
manifest and falls back to the next older complete folder. Files are safetensors and JSON: reading one never runs code.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor

from mm.errors import CheckpointError

MANIFEST = "manifest.json"
STATE_FILE = "state.json"
LATEST = "latest"
MAX_JSON_BYTES = 64 << 20

Report = Callable[[str], None]
_report_by_default = logging.getLogger("mm").warning


class SaveError(CheckpointError):
    """The last checkpoint of a run, or its card, could not be written. The command line exits with ``exit_code``."""

    exit_code = 74  # EX_IOERR of sysexits.h: distinct from a wrong configuration or a failed training


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder.

    Args:
        folder: Where it is.
        state: JSON part: step, data position, accounting, versions.
    """

    folder: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of ``NAME.safetensors``, on the CPU."""
        return read_tensors(self.folder / f"{name}.safetensors")

    def has(self, name: str) -> bool:
        """Whether there is a ``NAME.safetensors``."""
        return (self.folder / f"{name}.safetensors").is_file()


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    extra_files: Callable[[Path], None] | None = None,
    keep_last: int = 2,
) -> Path:
    """Write ``folder/step-XXXXXXXX`` completely or not at all, point ``latest`` at it, and delete all but ``keep_last``.

    Args:
        folder: The run's ``checkpoints`` folder. Only one process may write into it (see `mm.training.lock`).
        step: Optimizer steps done.
        tensors: File stem (``model``, ``ema``, ``optimizer``) to its tensors.
        state: Anything JSON.
        extra_files: Writes further files into the new folder (configuration, processor).
        keep_last: Complete checkpoints to keep, this one included.

    Raises:
        OSError: When it cannot be written; older checkpoints are as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    temporary.mkdir()
    try:
        for stem, named in tensors.items():
            _write(temporary / f"{stem}.safetensors", serialize(_plain(named)))
        _write(temporary / STATE_FILE, _json(state))
        if extra_files is not None:
            extra_files(temporary)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
        }
        _write(temporary / MANIFEST, _json({"step": step, "files": manifest}))
        for path in (*temporary.rglob("*"), temporary):
            _sync(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():  # left by a longer history whose later checkpoints were damaged
        final.rename(folder / f".old-{final.name}")
    temporary.rename(final)
    _sync(folder)
    _point(folder, final.name)
    for later in (path for path in _candidates(folder) if path.name > final.name):  # damaged ones of a longer history
        later.rename(folder / f".old-{later.name}")
    prune(folder, keep_last)
    return final


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints, each by a rename first so that none is ever seen half deleted."""
    for old in _candidates(folder)[keep_last:]:
        old.rename(folder / f".old-{old.name}")
    clean(folder)


def clean(folder: Path) -> None:
    """Remove what an interrupted save or deletion left behind."""
    for pattern in (".tmp-*", ".old-*"):
        for path in folder.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def latest_checkpoint(folder: Path, report: Report = _report_by_default) -> Checkpoint | None:
    """The newest complete checkpoint in a ``checkpoints`` folder, or None where there never was one.

    Args:
        folder: The folder that `save_checkpoint` writes into.
        report: Receives one line for each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: When there are checkpoints but none is complete: better than starting again in silence.
    """
    candidates = _candidates(folder)
    pointer = folder / LATEST
    if pointer.is_file():
        named = pointer.read_text(encoding="utf-8", errors="replace").strip()
        if named not in {path.name for path in candidates}:
            report(f"{pointer}: names '{named[:40]}', which is not there")
    for candidate in candidates:
        try:
            return open_checkpoint(candidate)
        except CheckpointError as error:
            report(f"{error}; trying the one before")
    if candidates:
        raise CheckpointError(
            f"{folder}: none of its {len(candidates)} checkpoints is complete; move the folder away to start again"
        )
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verify one checkpoint folder against its manifest.

    Raises:
        CheckpointError: Naming the first file that is missing, of another size or of another content.
    """
    manifest = _read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict) or STATE_FILE not in files:
        raise CheckpointError(f"{folder / MANIFEST}: is not the manifest of a checkpoint")
    for name, expected in files.items():
        path = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute() or not isinstance(expected, dict):
            raise CheckpointError(f"{folder / MANIFEST}: names a file outside its folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing; the checkpoint is incomplete")
        if path.stat().st_size != expected.get("bytes"):
            raise CheckpointError(f"{path}: has {path.stat().st_size} bytes instead of {expected.get('bytes')}; it is damaged")
        if _sha256(path) != expected.get("sha256"):
            raise CheckpointError(f"{path}: its sha256 differs from the manifest's; it is damaged")
    return Checkpoint(folder, _read_json(folder / STATE_FILE))


def find_checkpoint(folder: Path, report: Report = _report_by_default) -> Path | None:
    """Folder of the newest complete checkpoint, or None; ``folder`` may be the run, its ``checkpoints`` or one checkpoint."""
    if (folder / MANIFEST).is_file():
        return open_checkpoint(folder).folder
    inner = folder / "checkpoints"
    found = latest_checkpoint(inner if inner.is_dir() else folder, report)
    return None if found is None else found.folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU. Raises `CheckpointError`."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def _candidates(folder: Path) -> list[Path]:
    """Finished checkpoint folders, newest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)), key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _plain(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as the format asks for."""
    seen: set[int] = set()
    plain = {}
    for name, tensor in named.items():
        own = tensor.detach().to("cpu").contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        plain[name] = own
    return plain


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MiB; it is damaged")
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}; the checkpoint is incomplete") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__} instead of a mapping; it is damaged")
    return value


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


def _sync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(folder: Path, name: str) -> None:
    temporary = folder / ".tmp-latest"
    _write(temporary, f"{name}\n".encode())
    _sync(temporary)
    temporary.replace(folder / LATEST)
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
