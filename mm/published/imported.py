"""What every importer returns, and the reading of foreign weight files that they share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mm.errors import CheckpointError
from mm.processor import Processor
from mm.systems import SystemConfig

PROMPTS = ("a photo of a {}.",)
"""The prompt of a class name where a checkpoint's publisher states none (https://arxiv.org/abs/2103.00020, section 3.1.4)."""


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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises `CheckpointError`, for pickled files with the way out."""
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: pickled weights can run code when they are read; if you trust whoever wrote the file: "
            "mm convert FILE --arch ARCHITECTURE --i-trust-this-file -o DIR"
        )
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None


def take(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def put(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same entries below a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}
