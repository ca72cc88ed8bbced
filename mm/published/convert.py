"""Foreign weight files, pickled ones included, read once on the user's word and kept as safetensors from then on."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import CheckpointError, UserError
from mm.published.imported import Imported, read_safetensors
from mm.published.open_clip import import_checkpoint
from mm.published.openai import import_openai
from mm.published.resolve import model_config

WRAPPERS = ("state_dict", "model")
"""Keys below which training scripts keep the weights."""


def import_file(path: Path, *, architecture: str | None, trusted: bool) -> Imported:
    """A weight file of open_clip or of OpenAI's CLIP.

    Args:
        path: safetensors, a pickled ``state_dict``, or a TorchScript archive.
        architecture: One of open_clip's; None for OpenAI's files, whose shapes tell it.
        trusted: The user's word that whoever wrote a pickled file is trusted.

    Raises:
        UserError: The file is pickled and not trusted.
        CheckpointError: It cannot be read, or does not fit the architecture.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        state: Mapping[str, Tensor] = read_safetensors(path)
    elif trusted:
        state = _read_pickled(path)
    else:
        raise UserError(
            f"{path}: is not safetensors, and reading it can run code; if you trust whoever wrote it, add --i-trust-this-file"
        )
    state = {name.removeprefix("module."): tensor.float() for name, tensor in state.items() if tensor.is_floating_point()}
    if architecture is None:
        return import_openai(state, str(path))
    return import_checkpoint(model_config(architecture), state, preprocessing={}, folder=path.parent, where=str(path))


def _read_pickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file. torch's restricted unpickler reads plain ones; archives of TorchScript need its interpreter."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
        try:
            content = torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError as error:
            raise CheckpointError(f"{path}: holds no weights that can be read: {str(error).splitlines()[0]}") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no weights")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
