"""What every importer returns, and the reading of foreign weight files that they share."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from mm.errors import CheckpointError, UserError
from mm.processor import Processor
from mm.systems import SystemConfig

PROMPTS = ("a photo of a {}.",)
"""The prompt of a class name where a checkpoint's publisher states none (https://arxiv.org/abs/2103.00020, section 3.1.4)."""

COMMIT = re.compile(r"[0-9a-f]{40}")
UNUSABLE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError)
"""What code raises that meets a list for a mapping, a word for a number, a width of 0."""


@dataclass(frozen=True)
class Imported:
    """A published checkpoint in the suite's terms.

    Args:
        config: Builds the network.
        state: Weights, under the names of that network; complete.
        processor: The preparation that the weights were trained with.
        card: Where it came from, and what was left out.
    """

    config: SystemConfig
    state: Mapping[str, Tensor]
    processor: Processor
    card: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def one_line(where: object) -> Iterator[None]:
    """What foreign settings or weights make the reading code raise becomes a `CheckpointError`; for whole importers."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{where}: has no {error}; it is incomplete or of another kind, download it again") from None
    except UNUSABLE as error:
        raise CheckpointError(f"{where}: damaged or of another kind: {reason(error)}; download it again") from None


def reason(error: Exception) -> str:
    """Its message in one line."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        return f"{key}: {message}" if key else message
    return " ".join(str(error).split()) or type(error).__name__


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises `CheckpointError`, for pickled files with the way out."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: pickled weights can run code when they are read; if you trust whoever wrote the file: "
            f"mm convert {path} --arch ARCHITECTURE/TAG --i-trust-this-file -o DIR (OpenAI's own files need no --arch)"
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def no_safetensors(folder: Path, expected: str, pickled: Sequence[Path]) -> CheckpointError:
    """Why a folder's weights cannot be used, with the way out."""
    found = f"only pickled weights ({pickled[0].name})" if pickled else f"no weights; expected {expected}, or pickled ones"
    return CheckpointError(
        f"{folder}: holds {found}, which can run code when they are read; if you trust whoever wrote them: "
        f"mm convert {folder} --i-trust-this-file -o DIR"
    )


def pinned(folder: Path | None) -> dict[str, str]:
    """The commit of a snapshot in the hub's cache, which its folder is named after, for the card."""
    return {} if folder is None or not COMMIT.fullmatch(folder.name) else {"revision": folder.name}


def widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating values in fp32; counters stay what they are."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def token_id(path: Path, token: Any) -> int | None:
    """The id in a ``tokenizer.json`` of a special token, as its settings name it (a string, or a mapping with it)."""
    name = token.get("content") if isinstance(token, dict) else token
    try:
        return Tokenizer.from_file(str(path)).token_to_id(name) if isinstance(name, str) else None
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise CheckpointError(f"{path}: cannot be read as a tokenizer: {reason(error)}; download it again") from None


def triple(value: Any) -> tuple[float, float, float]:
    """A value for each colour channel, from three or from one for all."""
    first, second, third = value if isinstance(value, list | tuple) else (value,) * 3
    return float(first), float(second), float(third)


def take(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def put(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same entries below a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}
