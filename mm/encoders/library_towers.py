"""Building and running the towers of open_clip and transformers without their registries, their hubs, or code from checkpoints.

Shapes: B batch, N tokens, T text positions, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mm.errors import UserError

Kind = Literal["image", "text"]

SECTIONS: Mapping[Kind, str] = {"image": "vision_config", "text": "text_config"}
PARTS: Mapping[Kind, str] = {"image": "vis", "text": "text"}
"""How the names of a tower's own modules begin in every dual tower of transformers (``vision_model``, ``text_projection``)."""

BLIP_RETRIEVAL = "BlipForImageTextRetrieval"
FAMILIES = frozenset(
    {
        "AlignModel",
        "AltCLIPModel",
        BLIP_RETRIEVAL,
        "BlipModel",
        "ChineseCLIPModel",
        "CLIPModel",
        "GroupViTModel",
        "MetaClip2Model",
        "SiglipModel",
    }
)
"""Dual towers of transformers whose two halves work alone."""

TEXT_ENCODERS = frozenset({"MT5EncoderModel", "T5EncoderModel", "UMT5EncoderModel"})
"""Text encoders of transformers that stand alone; a text's vector is the mean of its words'."""

SMALL: Mapping[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 16}
"""Of the half that is thrown away."""

HOW_TO_LOAD = ("dtype", "torch_dtype", "attn_implementation", "auto_map", "quantization_config")


def open_clip_image_tower(values: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """A module that open_clip builds from ``embed_dim``, ``quick_gelu`` and ``vision_cfg``, and its width; never pretrained."""
    from open_clip.model import _build_vision_tower

    vision = {**values["vision_cfg"], "timm_model_pretrained": False}
    tower: Any = _build_vision_tower(values["embed_dim"], cast(Any, vision), bool(values.get("quick_gelu", False)))
    if hasattr(tower, "output_tokens"):
        tower.output_tokens = True
    return tower, int(values["embed_dim"])


def open_clip_text_tower(values: Mapping[str, Any]) -> tuple[nn.Module, int]:
    """A module that open_clip builds from ``embed_dim``, ``quick_gelu``, ``text_cfg`` and ``hf_config``, and its width."""
    from open_clip.model import CLIPTextCfg, _build_text_tower

    text, width = dict(values["text_cfg"]), int(values["embed_dim"])
    CLIPTextCfg(**text)
    if takes_any_length(values):
        tower: Any = _hugging_face_text(text, values.get("hf_config"), width)
    else:
        tower = _build_text_tower(width, cast(Any, text), bool(values.get("quick_gelu", False)))
    tower.output_tokens = True
    return tower, width


def takes_any_length(values: Mapping[str, Any]) -> bool:
    """Whether open_clip's text tower masks padding itself; its own transformers have masks for the whole context only."""
    return bool(values["text_cfg"].get("hf_model_name"))


def text_model_config(hf_config: Mapping[str, Any]) -> Any:
    """transformers' own object for the ``config.json`` of a text model, because it fills in what the file leaves out."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**portable(hf_config))


def _hugging_face_text(text: Mapping[str, Any], hf_config: Mapping[str, Any] | None, width: int) -> nn.Module:
    """open_clip's adapter around a text model of transformers, from the model's own configuration instead of the network."""
    if hf_config is None:
        raise UserError(
            f"text tower: {text['hf_model_name']} of transformers is configured by its own config.json; give it as hf_config"
        )
    from open_clip.hf_model import HFTextEncoder
    from transformers import AutoModel

    model_config = text_model_config(hf_config)
    pooler = text.get("hf_pooler_type", "mean_pooler")
    tower: Any = HFTextEncoder(
        text["hf_model_name"],
        output_dim=width,
        config=model_config,
        pooler_type=pooler,
        proj_type=cast(str, text.get("hf_proj_type", "mlp")),
    )
    if getattr(model_config, "is_encoder_decoder", False):
        tower.transformer = tower.transformer.encoder
    elif pooler != "cls_pooler":  # no checkpoint has weights for a pooler that takes no part
        tower.transformer = AutoModel.from_config(model_config, add_pooling_layer=False)
    return tower


def transformers_tower(architecture: str, values: Mapping[str, Any], kind: Kind) -> tuple[nn.Module, int]:
    """A text encoder, or one half of a dual tower; the other half is built small and thrown away."""
    alone = TEXT_ENCODERS if kind == "text" else frozenset()
    if architecture not in FAMILIES | alone:
        raise UserError(
            f"{kind} tower '{architecture}' of transformers is not supported; there are {', '.join(sorted(FAMILIES | alone))}"
        )
    import transformers

    model_class = getattr(transformers, architecture)
    model = portable(values["model"])
    if architecture in alone:
        with quiet_transformers():
            config = model_class.config_class.from_dict(model)
            return model_class(config), int(config.d_model)
    other = SECTIONS["text" if kind == "image" else "image"]
    crossed = model[SECTIONS[kind]].get("encoder_hidden_size")  # BLIP's text tower could attend to pictures of this width
    with quiet_transformers():
        config = model_class.config_class.from_dict(
            {**model, other: {**SMALL, **({"hidden_size": crossed} if crossed else {})}}
        )
        tower = model_class(config)
    for name in {name.partition(".")[0] for name, _ in (*tower.named_parameters(), *tower.named_modules()) if name}:
        if not name.startswith(PARTS[kind]):
            delattr(tower, name)
    return tower, shared_width(architecture, config, kind)


def shared_width(architecture: str, config: Any, kind: Kind) -> int:
    """D of the shared space, from a configuration object of transformers."""
    if architecture == "SiglipModel":
        return int(config.vision_config.hidden_size if kind == "image" else config.text_config.projection_size)
    return int(config.image_text_hidden_size if architecture == BLIP_RETRIEVAL else config.projection_dim)


def portable(values: Any) -> Any:
    """The content of a ``config.json`` without what says how to load and compute: precision, attention kernels, remote code."""
    if not isinstance(values, Mapping):
        return values
    return {key: portable(value) for key, value in values.items() if key not in HOW_TO_LOAD and not key.startswith("_")}


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars, and its remarks about configurations, which are not the user's to change."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def image_features(tower: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled vectors ``(B, D)`` in the shared space and tokens ``(B, N, inner D)`` of a tower of transformers."""
    if hasattr(tower, "get_image_features"):
        output = tower.get_image_features(pixel_values=pixels)
        tokens = output.last_hidden_state
        return output.pooler_output, tokens.flatten(2).mT if tokens.ndim == 4 else tokens
    tokens = tower.vision_model(pixel_values=pixels).last_hidden_state
    return tower.vision_proj(tokens[:, 0]), tokens


def text_features(tower: Any, ids: Tensor, attended: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pooled vectors ``(B, D)`` in the shared space, where there is one, and tokens ``(B, T, inner D)``.

    ``attended`` ``(B, T)`` is None for all.
    """
    mask = None if attended is None else attended.long()
    if type(tower).__name__ in TEXT_ENCODERS:
        tokens = tower(input_ids=ids, attention_mask=mask).last_hidden_state
        counted = tokens.new_ones(ids.shape) if mask is None else mask.to(tokens.dtype)
        return torch.einsum("btd,bt->bd", tokens, counted) / counted.sum(1, keepdim=True).clamp(min=1), tokens
    if hasattr(tower, "get_text_features"):
        output = tower.get_text_features(input_ids=ids, attention_mask=mask)
        return output.pooler_output, output.last_hidden_state
    tokens = tower.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return tower.text_proj(tokens[:, 0]), tokens
