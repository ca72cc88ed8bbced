"""Foreign weight files, pickled ones included, read once on the user's word and kept as safetensors from then on."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import CheckpointError, UserError
from mm.published.albef import import_albef, is_albef
from mm.published.bert_start import PictureEncoder, import_start, is_bert
from mm.published.image_tokenizers import import_tokenizer_folder
from mm.published.imported import Imported, read_safetensors, reason, widened
from mm.published.resolve import import_folder, import_weights, pickled_weights

WRAPPERS = ("state_dict", "model")
"""Keys below which training scripts keep the weights."""


ASKED = re.compile(r"GLOBAL (\S+)")
"""In torch's refusal of a pickle that holds more than tensors."""


@dataclass(frozen=True)
class Added:
    """What some checkpoints do not hold themselves.

    Args:
        vocab: For ALBEF: the ``vocab.txt`` of bert-base-uncased.
        image: For BERT: a picture encoder.
        image_size: For ALBEF and BERT: side of the pictures in pixels, where it is not that of the weights.
    """

    vocab: Path | None = None
    image: PictureEncoder | None = None
    image_size: int | None = None

    def only(self, path: Path, *wanted: str) -> None:
        """Raises `UserError` where there is more than is wanted."""
        given = [part.name for part in fields(self) if getattr(self, part.name) is not None and part.name not in wanted]
        if given:
            raise UserError(f"{path}: takes no --{given[0].replace('_', '-')}; leave it out")


def import_file(path: Path, *, architecture: str | None, trusted: bool, added: Added | None = None) -> Imported:
    """A weight file of open_clip, of OpenAI's CLIP or of ALBEF, or a folder of open_clip or transformers.

    Args:
        path: safetensors, a pickled ``state_dict``, or a TorchScript archive; or a folder whose weights are one of these.
        architecture: One of open_clip's, with ``/TAG`` where its published weights differ; None where an
            ``open_clip_config.json`` lies beside the file, for OpenAI's and ALBEF's, whose shapes tell it, and for folders.
        trusted: The user's word that whoever wrote a pickled file is trusted.
        added: What the checkpoint does not hold.

    Raises:
        UserError: The file is pickled and not trusted, a folder comes with an architecture, or something has to be added.
        CheckpointError: It cannot be read, or does not fit the architecture.
    """
    added = Added() if added is None else added
    if path.is_dir():
        return _import_folder(path, architecture, trusted, added)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    state = _read(path, trusted)
    if architecture is None and is_albef(state):
        added.only(path, "vocab", "image_size")
        return import_albef(state, vocabulary=added.vocab, image_size=added.image_size, where=str(path))
    added.only(path)
    return import_weights(architecture, path, state, where=str(path))


def _import_folder(path: Path, architecture: str | None, trusted: bool, added: Added) -> Imported:
    if architecture is not None:
        raise UserError(f"{path}: a folder states its own architecture; leave out --arch, or name the file in it")
    if is_bert(path):
        added.only(path, "image", "image_size")
        return import_start(path, added.image, added.image_size, _read_folder(path, trusted))
    added.only(path)
    tokenizer = import_tokenizer_folder(path, trusted=trusted)
    if tokenizer is not None:
        return tokenizer
    imported = import_folder(path, _read_folder(path, trusted))
    if imported is None:
        raise CheckpointError(f"{path}: no folder of open_clip or transformers; name the weight file in it")
    return imported


def _read_folder(path: Path, trusted: bool) -> dict[str, Tensor] | None:
    """The pickled weights of a folder; None where it has others."""
    return {name: tensor for file in pickled_weights(path) for name, tensor in _read(file, trusted).items()} or None


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
    except Exception as refusal:  # the unpickler raises anything for bytes that are no pickle
        if asked := ASKED.search(str(refusal)):
            raise CheckpointError(
                f"{path}: asks for '{asked[1]}', which is no weight, so it was not read; take a file with weights alone"
            ) from None
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
