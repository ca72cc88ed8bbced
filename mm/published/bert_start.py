"""What ALBEF's training begins with: BERT for the words, a trained picture encoder, a fresh fusion between them.

Source: ALBEF https://arxiv.org/abs/2107.07651, section 3.1: the lower half of BERT reads the words, the upper half becomes the
fusion, whose cross-attention is new.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.config import read_json
from mm.encoders.image import ImageEncoderConfig
from mm.errors import CheckpointError, UserError
from mm.media.geometry import ImageSpec
from mm.processor import Processor
from mm.published import bert
from mm.published.albef import CONTEXT_LENGTH, resized_positions
from mm.published.huggingface import CONFIG_FILE, read_weights
from mm.published.huggingface_processor import UNCHANGED, tokenizer_settings
from mm.published.imported import Imported, one_line, pinned, put, token_id, widened
from mm.systems.albef import AlbefConfig, build
from mm.tokenizers.text import TextTokenizer

ACTIVATION = "gelu"


@dataclass(frozen=True)
class PictureEncoder:
    """A trained picture encoder.

    Args:
        config: Builds it.
        state: Its weights.
        spec: Its preparation.
    """

    config: ImageEncoderConfig
    state: Mapping[str, Tensor]
    spec: ImageSpec

    def resized(self, image_size: int) -> "PictureEncoder":
        """The encoder for pictures of another side, with interpolated positions where it has some."""
        name, state = "trunk.pos_embed", dict(self.state)
        if name in state:
            patch_size = state["trunk.patch_embed.proj.weight"].shape[-1]
            state[name] = resized_positions(state[name], image_size // patch_size)
        return PictureEncoder(
            self.config.model_copy(update={"image_size": image_size}),
            state,
            self.spec.model_copy(update={"size": image_size, "resize_to": None}),
        )


def is_bert(folder: Path) -> bool:
    """Whether a folder holds BERT in transformers' layout."""
    path = folder / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") == "bert"


def import_start(
    folder: Path, picture: PictureEncoder | None, image_size: int | None = None, state: Mapping[str, Tensor] | None = None
) -> Imported:
    """ALBEF with BERT's words and a trained picture encoder, untrained where they meet.

    Args:
        folder: ``config.json``, weights, and ``tokenizer.json`` or ``vocab.txt``.
        picture: Sees the pictures.
        image_size: Their side in pixels; None for that of the picture encoder.
        state: BERT's weights, where they were read already; None reads the folder's safetensors.

    Raises:
        UserError: There is no picture encoder.
        CheckpointError: A file is missing or damaged, or this BERT is not of the usual kind.
    """
    if picture is None:
        raise UserError(
            f"{folder}: BERT, which reads no pictures; name a model whose picture encoder it is joined with: --image MODEL"
        )
    with one_line(folder):
        picture = picture if image_size is None else picture.resized(image_size)
        return _import_start(folder, picture, read_weights(folder) if state is None else state)


def _import_start(folder: Path, picture: PictureEncoder, state: Mapping[str, Tensor]) -> Imported:
    values = read_json(folder / CONFIG_FILE)
    if values.get("hidden_act", ACTIVATION) != ACTIVATION or values.get("position_embedding_type", "absolute") != "absolute":
        raise CheckpointError(f"{folder}: this BERT has another activation than {ACTIVATION}, or relative positions")
    words = bert.plain_names(widened(state))
    num_layers, num_words = len(bert.layer_numbers(words, "attention")), len(words["embeddings.word_embeddings.weight"])
    tokenizer = _tokenizer(folder)
    hidden = tokenizer.id_of(bert.HIDDEN)
    if hidden is None or tokenizer.vocab_size != num_words:
        raise CheckpointError(
            f"{folder}: its vocabulary holds {tokenizer.vocab_size} words, its weights {num_words}; download it again"
        )
    config = AlbefConfig(
        image=picture.config,
        feature_map="trunk.pos_embed" not in picture.state,
        vocab_size=num_words,
        context_length=len(words["embeddings.position_embeddings.weight"]),
        width=values["hidden_size"],
        text_layers=num_layers - num_layers // 2,
        fusion_layers=num_layers // 2,
        heads=values["num_attention_heads"],
        mlp_ratio=values["intermediate_size"] / values["hidden_size"],
        norm_eps=values.get("layer_norm_eps", bert.NORM_EPS),
        dropout=values.get("hidden_dropout_prob", 0.1),
    )
    system = build(config)
    fresh = {name: tensor for name, tensor in system.state_dict().items() if not name.startswith(system.only_for_training)}
    return Imported(
        config=config,
        state={
            **fresh,
            **put(picture.state, "network.towers.encoders.image."),
            **bert.bert_weights(words, text_layers=config.text_layers, hidden=hidden, where=str(folder)),
        },
        processor=Processor(image=picture.spec, tokenizer=tokenizer, context_length=min(CONTEXT_LENGTH, config.context_length)),
        card={"source": str(folder), "format": "bert", **pinned(folder)},
    )


def _tokenizer(folder: Path) -> TextTokenizer:
    """What is done to a text is all in ``tokenizer.json``, or for ``vocab.txt`` what BERT does."""
    settings: Mapping[str, Any] = tokenizer_settings(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return bert.word_pieces(folder / "vocab.txt", UNCHANGED, lowercase=settings.get("do_lower_case", True))
    pad = token_id(path, settings.get("pad_token", bert.PAD))
    if pad is None:
        raise CheckpointError(f"{path}: has no padding token; is it BERT's?")
    return TextTokenizer.from_file(path, pad=pad, cleaning=UNCHANGED)
