"""Foreign weight files, pickled ones included, read once on the user's word and kept as safetensors from then on."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import CheckpointError, UserError
from mm.published.image_tokenizers import import_tokenizer_folder
from mm.published.imported import Imported, read_safetensors, reason, widened
from mm.published.resolve import import_folder, import_weights, pickled_weights

WRAPPERS = ("state_dict", "model")
"""Keys below which training scripts keep the weights."""


def import_file(path: Path, *, architecture: str | None, trusted: bool) -> Imported:
    """A weight file of open_clip or of OpenAI's CLIP, or a folder of open_clip or transformers.

    Args:
        path: safetensors, a pickled ``state_dict``, or a TorchScript archive; or a folder whose weights are one of these.
        architecture: One of open_clip's, with ``/TAG`` where its published weights differ; None where an
            ``open_clip_config.json`` lies beside the file, for OpenAI's files, whose shapes tell it, and for folders.
        trusted: The user's word that whoever wrote a pickled file is trusted.

    Raises:
        UserError: The file is pickled and not trusted, or a folder comes with an architecture.
        CheckpointError: It cannot be read, or does not fit the architecture.
    """
    if path.is_dir():
        if architecture is not None:
            raise UserError(f"{path}: a folder states its own architecture; leave out --arch, or name the file in it")
        tokenizer = import_tokenizer_folder(path, trusted=trusted)
        if tokenizer is not None:
            return tokenizer
        files = pickled_weights(path)
        state = {name: tensor for file in files for name, tensor in _read(file, trusted).items()}
        imported = import_folder(path, state or None)
        if imported is None:
            raise CheckpointError(f"{path}: no folder of open_clip or transformers; name the weight file in it")
        return imported
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    return import_weights(architecture, path, _read(path, trusted), where=str(path))


def _read(path: Path, trusted: bool) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        state: Mapping[str, Tensor] = read_safetensors(path)
    elif trusted:
        state = _read_pickled(path)
    else:
        raise UserError(
            f"{path}: is not safetensors, and reading it can run code; if you trust whoever wrote it, add --i-trust-this-file"
        )
    return widened({name.removeprefix("module."): tensor for name, tensor in state.items()})


def _read_pickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file. torch's restricted unpickler reads plain ones; archives of TorchScript need its interpreter."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises anything for bytes that are no pickle
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # there is no other reader for these archives
                content = torch.jit.load(path, map_location="cpu").state_dict()
        except Exception as error:
            sentence = reason(error).partition(". ")[0]
            raise CheckpointError(f"{path}: holds no weights that can be read: {sentence}; download it again") from None
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds no weights")
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
