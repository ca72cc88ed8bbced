"""Text encoders in transformers' layout that stand alone: T5 and its multilingual kin, of whole models the encoder alone.

Source: https://github.com/huggingface/transformers (formats of its configurations and weights).
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mm.config import read_json
from mm.encoders.library import LibraryTextConfig
from mm.encoders.library_towers import portable
from mm.errors import CheckpointError
from mm.processor import Processor
from mm.published.huggingface import CONFIG_FILE, TEXT_ENCODERS, configuration, prepared, read_weights, renamed
from mm.published.huggingface_processor import UNLIMITED, read_tokenizer
from mm.published.imported import Imported, one_line, pinned, put
from mm.systems.text_tower import TextTowerConfig

CONTEXT_LENGTH = 512
"""Longest text where the tokenizer's settings state none: T5's positions are relative, its training had so many."""


def is_text_encoder(folder: Path) -> bool:
    """Whether a folder holds a text encoder in transformers' layout."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") in TEXT_ENCODERS


def import_text_encoder(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported:
    """A folder with ``config.json``, safetensors and a tokenizer.

    Args:
        folder: Where they are.
        state: All weights, where they were read already; None reads the folder's safetensors.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    with one_line(folder):
        values = read_json(folder / CONFIG_FILE)
        architecture = TEXT_ENCODERS[values["model_type"]]
        config = configuration(architecture, values, folder)
        given = prepared(read_weights(folder) if state is None else state)
        tokenizer, limit = read_tokenizer(folder, siglip=False)
        if tokenizer.vocab_size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: tokenizer ({tokenizer.vocab_size} ids) and network ({config.vocab_size}) do not belong together"
            )
        length = CONTEXT_LENGTH if limit == UNLIMITED else limit
        left_out = sorted({name.partition(".")[0] for name in given if not name.startswith(("shared.", "encoder."))})
        return Imported(
            config=TextTowerConfig(
                text=LibraryTextConfig(
                    library="transformers",
                    architecture=architecture,
                    config={"model": portable(values), "pad_id": tokenizer.pad},
                    context_length=length,
                    vocab_size=config.vocab_size,
                )
            ),
            state=put(renamed(architecture, config, given, folder), "encoder.tower."),
            processor=Processor(tokenizer=tokenizer, context_length=length),
            card={
                "source": str(folder),
                "format": "transformers",
                "architecture": architecture,
                **pinned(folder),
                **({"left_out": left_out} if left_out else {}),
            },
        )
