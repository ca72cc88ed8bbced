"""Which network holds a tower of a checkpoint in transformers' layout, and its weights under that network's names."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mm.encoders.image import ImageEncoderConfig
from mm.encoders.library import LibraryImageConfig, LibraryTextConfig
from mm.encoders.library_towers import PARTS, SECTIONS, Kind, portable
from mm.encoders.text import TextEncoderConfig, from_open_clip
from mm.errors import CheckpointError
from mm.published.huggingface_processor import Pixels
from mm.published.huggingface_weights import open_clip_names, siglip_vit_weights
from mm.published.imported import put, take
from mm.published.timm_vit import clip_vit_config, clip_vit_weights
from mm.systems.clip import ImageTower, Projection, TextTower
from mm.tokenizers.text import TextTokenizer

CLIP_FAMILY = ("CLIPModel", "MetaClip2Model")
SIGLIP = "SiglipModel"
OWN_NAMES = (*CLIP_FAMILY, SIGLIP)
"""Architectures whose files name the weights as the modules do; the others' need transformers' renaming."""

LEGACY_END = 2
"""The ``eos_token_id`` that CLIP's first configurations hold by mistake: the text's vector is then that of its largest id."""

ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
SIGLIP_BACKBONE = "vit_base_patch16_siglip_224"
"""The member of timm's family that all others are made from by options."""

CLIP_EPS, SIGLIP_EPS = 1e-5, 1e-6
"""Added to the variance in the norms of timm's transformers, which offer no choice."""


@dataclass(frozen=True)
class Picture:
    """A picture tower.

    Args:
        config: Builds the encoder.
        state: Weights of encoder and projection, under the names of `mm.fusion.dual_tower.DualTower`.
        projection: Kind of the projection behind it.
    """

    config: ImageTower
    state: dict[str, Tensor]
    projection: Projection


@dataclass(frozen=True)
class Words:
    """A text tower; see `Picture`."""

    config: TextTower
    state: dict[str, Tensor]
    projection: Projection


def image_tower(architecture: str, config: Any, state: Mapping[str, Tensor], pixels: Pixels) -> Picture:
    """timm's transformer where it is the same network, else transformers' module; arguments as for `text_tower`.

    Raises:
        KeyError: A weight is missing.
    """
    own = None
    if architecture in CLIP_FAMILY:
        own = _clip_vit(config.vision_config, state, pixels)
    elif architecture == SIGLIP:
        own = _siglip_vit(config.vision_config, state, pixels)
    if own is not None:
        return own
    library = LibraryImageConfig(
        library="transformers",
        architecture=architecture,
        config={"model": _half(config, "image")},
        image_size=pixels.spec.size,
        mean=pixels.mean,
        std=pixels.std,
    )
    return Picture(library, _library_state(state, "image"), "none")


def _clip_vit(vision: Any, state: Mapping[str, Tensor], pixels: Pixels) -> Picture | None:
    if (
        vision.hidden_act not in ("quick_gelu", "gelu")
        or vision.layer_norm_eps != CLIP_EPS
        or vision.image_size % vision.patch_size
    ):
        return None
    config = clip_vit_config(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        heads=vision.num_attention_heads,
        mlp_ratio=hidden_ratio(vision),
        quick_gelu=vision.hidden_act == "quick_gelu",
        mean=pixels.mean,
        std=pixels.std,
    )
    weights = clip_vit_weights(open_clip_names(take(state, "vision_model.")))
    projection = {"projections.image.weight": state["visual_projection.weight"]}
    return Picture(config, put(weights, "encoders.image.trunk.") | projection, "linear")


def _siglip_vit(vision: Any, state: Mapping[str, Tensor], pixels: Pixels) -> Picture | None:
    activation = ACTIVATIONS.get(vision.hidden_act)
    if activation is None or vision.layer_norm_eps != SIGLIP_EPS or vision.image_size % vision.patch_size:
        return None
    config = ImageEncoderConfig(
        backbone=SIGLIP_BACKBONE,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        options={
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": hidden_ratio(vision),
            "act_layer": activation,
        },
        pool="map",
        mean=pixels.mean,
        std=pixels.std,
    )
    return Picture(config, put(siglip_vit_weights(take(state, "vision_model.")), "encoders.image.trunk."), "none")


def text_tower(architecture: str, config: Any, state: Mapping[str, Tensor], tokenizer: TextTokenizer, where: str) -> Words:
    """The suite's text encoder where it is the same network, else transformers' module.

    Args:
        architecture: Model class of transformers.
        config: Its configuration object.
        state: All weights, under that class' names.
        tokenizer: Of the same checkpoint.
        where: Name for messages.

    Raises:
        CheckpointError: Tokenizer and tower do not belong together.
        KeyError: A weight is missing.
    """
    text, siglip = config.text_config, architecture == SIGLIP
    if tokenizer.vocab_size > text.vocab_size:
        raise CheckpointError(
            f"{where}: tokenizer ({tokenizer.vocab_size} ids) and text tower ({text.vocab_size}) do not belong together"
        )
    legacy = architecture == "CLIPModel" and text.eos_token_id == LEGACY_END
    if architecture in CLIP_FAMILY and not legacy and text.eos_token_id != tokenizer.end:
        raise CheckpointError(
            f"{where}: text tower (end token {text.eos_token_id}) and tokenizer ({tokenizer.end}) do not belong together"
        )
    at_end = siglip or not legacy or tokenizer.end == text.vocab_size - 1
    if architecture not in OWN_NAMES or text.hidden_act not in ACTIVATIONS or not at_end:
        library = LibraryTextConfig(
            library="transformers",
            architecture=architecture,
            config={"model": _half(config, "text"), "pad_id": tokenizer.pad, "attend_padding": siglip},
            context_length=_positions(text),
            vocab_size=text.vocab_size,
        )
        return Words(library, _library_state(state, "text"), "none")
    own = TextEncoderConfig.model_validate(
        {
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "mlp_ratio": hidden_ratio(text),
            "causal": not siglip,
            "attend_padding": siglip,
            "pad_id": tokenizer.pad if siglip else 0,
            "pooling": "final" if siglip else "last",
            "activation": ACTIVATIONS[text.hidden_act],
            "norm_eps": text.layer_norm_eps,
        }
    )
    weights = put(from_open_clip(open_clip_names(take(state, "text_model."))), "encoders.text.")
    head = take(state, "text_model.head." if siglip else "text_projection.")
    return Words(own, weights | put(head, "projections.text."), "affine" if siglip else "linear")


def _positions(text: Any) -> int:
    """Longest text; RoBERTa's positions begin behind the number of its padding token."""
    reserved = text.pad_token_id + 1 if text.model_type == "altclip_text_model" else 0
    return int(text.max_position_embeddings) - reserved


def hidden_ratio(section: Any) -> float:
    """Hidden width of the feed-forward over the width, so that rounding their product down gives the hidden width again."""
    ratio = section.intermediate_size / section.hidden_size
    return ratio if int(section.hidden_size * ratio) == section.intermediate_size else math.nextafter(ratio, math.inf)


def _half(config: Any, kind: Kind) -> dict[str, Any]:
    """The content of ``config.json`` for one tower, complete, as JSON values."""
    other = SECTIONS["text" if kind == "image" else "image"]
    values = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in portable(values).items() if key != other}


def _library_state(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    return {f"encoders.{kind}.tower.{name}": tensor for name, tensor in state.items() if name.startswith(PARTS[kind])}
