"""open_clip checkpoints, as the suite's own towers where those are the same network, else as open_clip's modules.

Source: https://github.com/mlfoundations/open_clip (formats of its configurations and weights).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import read_json
from mm.encoders.image import ImageEncoderConfig, build_image_encoder
from mm.encoders.library import LibraryImageConfig, LibraryTextConfig
from mm.encoders.library_towers import text_model_config
from mm.encoders.text import TextEncoderConfig, from_open_clip
from mm.errors import CheckpointError
from mm.media.geometry import ImageSpec
from mm.processor import Processor
from mm.published.huggingface import resolve_file
from mm.published.imported import (
    PROMPTS,
    Imported,
    no_safetensors,
    one_line,
    pinned,
    put,
    read_safetensors,
    take,
    token_id,
    triple,
)
from mm.published.timm_vit import clip_vit_config, clip_vit_weights, is_plain
from mm.systems.clip import ClipConfig, ImageTower, Projection, TextTower
from mm.tokenizers.text import Cleaning, TextTokenizer

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
PICKLED = ("open_clip_pytorch_model.bin", "*.bin", "*.pt")
TEXT_AT_THE_TOP = ("positional_embedding", "token_embedding.", "ln_final.", "text_projection", "transformer.", "attn_mask")
"""Names of the text tower in checkpoints of open_clip's first model class, which has no ``text.`` before them."""

FITS = {"shortest": "crop", "squash": "squash"}
PREPROCESSING: Mapping[str, Any] = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
"""open_clip's defaults, which are those of OpenAI's CLIP."""


def import_folder(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported:
    """A folder that open_clip wrote: ``open_clip_config.json``, weights, and a tokenizer where it is not CLIP's.

    Args:
        folder: Where they are.
        state: All weights, where they were read already; None reads the folder's safetensors.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint needs what is not supported.
    """
    model_cfg, preprocessing = read_config(folder)
    if state is None:
        weights = find_weights(folder)
        if weights is None:
            raise no_safetensors(folder, WEIGHT_FILES[0], pickled_weights(folder))
        state = read_safetensors(weights)
    return import_checkpoint(model_cfg, state, preprocessing=preprocessing, folder=folder, where=str(folder))


def read_config(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Configuration and picture preparation of a folder that open_clip wrote. Raises `CheckpointError`."""
    path = folder / CONFIG_FILE
    values = read_json(path)
    return _section(values, "model_cfg", path), _section({"preprocess_cfg": {}} | values, "preprocess_cfg", path)


def find_weights(folder: Path) -> Path | None:
    """The safetensors of a folder that open_clip wrote."""
    return next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)


def pickled_weights(folder: Path) -> list[Path]:
    """The file with the pickled weights of such a folder, if it has one."""
    return [path for pattern in PICKLED for path in sorted(folder.glob(pattern))][:1]


def import_checkpoint(
    model_cfg: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    preprocessing: Mapping[str, Any],
    folder: Path | None,
    where: str,
) -> Imported:
    """A checkpoint in open_clip's terms.

    Args:
        model_cfg: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and options, as in open_clip's model configurations.
        state: All weights.
        preprocessing: What differs from open_clip's default preparation of pictures.
        folder: Where a tokenizer is found, if it is not CLIP's.
        where: Name for messages.

    Raises:
        CheckpointError: Settings or weights are missing, damaged, or not supported.
    """
    with one_line(where):
        return _import_checkpoint(model_cfg, state, preprocessing, folder, where)


def _import_checkpoint(
    model_cfg: Mapping[str, Any],
    state: Mapping[str, Tensor],
    preprocessing: Mapping[str, Any],
    folder: Path | None,
    where: str,
) -> Imported:
    vision_cfg, text_cfg = _section(model_cfg, "vision_cfg", where), _section(model_cfg, "text_cfg", where)
    embed_dim, quick_gelu = int(model_cfg["embed_dim"]), bool(model_cfg.get("quick_gelu", False))
    picture = {**PREPROCESSING, **{key: value for key, value in preprocessing.items() if value is not None}}
    visual, text = take(state, "visual."), _text_state(state)
    hf_config = _text_model(text_cfg["hf_model_name"], folder, where) if text_cfg.get("hf_model_name") else None
    tokenizer = _tokenizer(text_cfg, hf_config, folder, where)
    image_config, image_state, image_projection = _image_tower(vision_cfg, visual, embed_dim, quick_gelu, picture, where)
    text_config, text_state, text_projection = _text_tower(text_cfg, hf_config, text, embed_dim, quick_gelu, tokenizer.pad)
    bias = state.get("logit_bias")
    config = ClipConfig(
        image=image_config,
        text=text_config,
        embed_dim=embed_dim,
        image_projection=image_projection,
        text_projection=text_projection,
        loss="infonce" if bias is None else "siglip",
    )
    left_out = sorted({name.partition(".")[0] for name in state} - {"visual", "text", "logit_scale", "logit_bias"})
    left_out = [name for name in left_out if not name.startswith(tuple(top.rstrip(".") for top in TEXT_AT_THE_TOP))]
    return Imported(
        config=config,
        state={
            **put(image_state, "towers."),
            **put(text_state, "towers."),
            "towers.logit_scale": state["logit_scale"].float().reshape(()),
            **({} if bias is None else {"towers.logit_bias": bias.float().reshape(())}),
        },
        processor=Processor(
            image=_image_spec(picture, image_config.image_size, where),
            tokenizer=tokenizer,
            context_length=text_config.context_length,
            templates=PROMPTS,
        ),
        card={"source": where, "format": "open_clip", **pinned(folder), **({"left_out": left_out} if left_out else {})},
    )


def _section(values: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    if not isinstance(values.get(key), Mapping):
        raise CheckpointError(f"{where}: has no section '{key}'; is it a configuration of open_clip?")
    return values[key]


def _image_spec(picture: Mapping[str, Any], size: int, where: str) -> ImageSpec:
    if picture["resize_mode"] not in FITS or picture["interpolation"] not in ("bicubic", "bilinear"):
        raise CheckpointError(
            f"{where}: prepares pictures by resize_mode '{picture['resize_mode']}', {picture['interpolation']}; only "
            f"{', '.join(FITS)} with bicubic or bilinear can be honoured exactly"
        )
    return ImageSpec.model_validate(
        {"size": size, "fit": FITS[picture["resize_mode"]], "interpolation": picture["interpolation"], "background": (0, 0, 0)}
    )


def _image_tower(
    vision: Mapping[str, Any],
    state: Mapping[str, Tensor],
    embed_dim: int,
    quick_gelu: bool,
    picture: Mapping[str, Any],
    where: str,
) -> tuple[ImageTower, dict[str, Tensor], Projection]:
    """Configuration, weights below ``towers.``, and the kind of projection."""
    size = vision.get("image_size", 224)
    side = size if isinstance(size, int) else size[0]
    if not isinstance(size, int) and size[0] != size[1]:
        raise CheckpointError(f"{where}: takes pictures of {size[0]} x {size[1]} pixels; only square ones are supported")
    mean, std = (triple(picture[key]) for key in ("mean", "std"))
    own = (
        _timm_tower(vision, state, embed_dim, side, mean, std)
        if vision.get("timm_model_name")
        else _vit_tower(vision, state, side, quick_gelu, mean, std)
    )
    if own is not None:
        return own
    library = LibraryImageConfig(
        library="open_clip",
        architecture="vision",
        config={"embed_dim": embed_dim, "quick_gelu": quick_gelu, "vision_cfg": dict(vision)},
        image_size=side,
        mean=mean,
        std=std,
    )
    return library, put(state, "encoders.image.tower."), "none"


def _vit_tower(
    vision: Mapping[str, Any],
    state: Mapping[str, Tensor],
    size: int,
    quick_gelu: bool,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[ImageTower, dict[str, Tensor], Projection] | None:
    if not is_plain(vision):
        return None
    average = vision.get("pool_type", "tok") == "avg"
    width = vision.get("width", 768)
    config = clip_vit_config(
        image_size=size,
        patch_size=vision.get("patch_size", 16),
        width=width,
        layers=vision.get("layers", 12),
        heads=width // vision.get("head_width", 64),
        mlp_ratio=vision.get("mlp_ratio", 4.0),
        quick_gelu=quick_gelu,
        mean=mean,
        std=std,
        average=average,
        pre_norm=not vision.get("no_ln_pre", False),
        layer_scale=vision.get("ls_init_value"),
    )
    weights = put(clip_vit_weights(state, average=average), "encoders.image.trunk.")
    return config, weights | {"projections.image.weight": state["proj"].T}, "linear"


def _timm_tower(
    vision: Mapping[str, Any],
    state: Mapping[str, Tensor],
    embed_dim: int,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> tuple[ImageTower, dict[str, Tensor], Projection] | None:
    """A timm backbone with a linear projection, with its own classifier as projection, or with none; None for other heads."""
    kind = vision.get("timm_proj", "linear")
    if kind == "mlp" or vision.get("timm_pool", "avg") in ("abs_attn", "rot_attn"):
        return None
    config = ImageEncoderConfig(
        backbone=vision["timm_model_name"], image_size=size, pool=vision.get("timm_pool", "avg") or None, mean=mean, std=std
    )
    trunk = take(state, "trunk.")
    with torch.device("meta"):
        encoder = build_image_encoder(config)
    expected = encoder.trunk.state_dict().keys()
    projection: dict[str, Tensor] = {}
    if kind == "linear":
        projection = take(state, "head.proj.")
    elif not kind:
        import timm

        classifier = str(timm.get_pretrained_cfg_value(config.backbone.partition(".")[0], "classifier")) + "."
        projection = take(trunk, classifier)
        trunk = {name: tensor for name, tensor in trunk.items() if not name.startswith(classifier)}
    if trunk.keys() != expected or (not projection and encoder.width != embed_dim):
        return None
    weights = put(trunk, "encoders.image.trunk.") | put(projection, "projections.image.")
    return config, weights, _projection_kind(projection)


def _text_tower(
    text: Mapping[str, Any],
    hf_config: Mapping[str, Any] | None,
    state: Mapping[str, Tensor],
    embed_dim: int,
    quick_gelu: bool,
    pad_id: int,
) -> tuple[TextTower, dict[str, Tensor], Projection]:
    own = _own_text_config(text, quick_gelu, pad_id)
    if own is None:
        values: dict[str, Any] = {"embed_dim": embed_dim, "quick_gelu": quick_gelu, "text_cfg": dict(text), "pad_id": pad_id}
        library = LibraryTextConfig(
            library="open_clip",
            architecture="text",
            config=values if hf_config is None else values | {"hf_config": dict(hf_config)},
            context_length=text.get("context_length", 77),
            vocab_size=text.get("vocab_size", 49408) if hf_config is None else text_model_config(hf_config).vocab_size,
        )
        return library, put(state, "encoders.text.tower."), "none"
    projection: dict[str, Tensor] = {}
    if "text_projection" in state:
        projection = {"weight": state["text_projection"].T}
    elif "text_projection.weight" in state:
        projection = take(state, "text_projection.")
    weights = put(from_open_clip(state), "encoders.text.") | put(projection, "projections.text.")
    return own, weights, _projection_kind(projection)


def _own_text_config(text: Mapping[str, Any], quick_gelu: bool, pad_id: int) -> TextEncoderConfig | None:
    """The suite's text encoder, where it is the same network."""
    handled = {"context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "width", "heads"}
    handled |= {"layers", "mlp_ratio", "pad_id", "eos_id", "no_causal_mask", "pool_type", "proj_bias", "proj_type"}
    handled |= {"act_kwargs", "norm_kwargs", "output_tokens", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"}
    if any(value not in (None, False) for key, value in text.items() if key not in handled):
        return None
    activations = {"{}": "quick_gelu" if quick_gelu else "gelu", "{'approximate': 'tanh'}": "gelu_tanh"}
    activation = activations.get(str(text.get("act_kwargs") or {}))
    norm = dict(text.get("norm_kwargs") or {})
    pooling = {"argmax": "last", "eos": "last", "first": "first", "last": "final"}.get(text.get("pool_type", "argmax"))
    causal = not text.get("no_causal_mask", False)
    unusual = norm.keys() - {"eps"} or activation is None or pooling is None or (quick_gelu and activation == "gelu_tanh")
    if unusual or (causal and pooling in ("first", "final")):
        return None
    return TextEncoderConfig.model_validate(
        {
            "width": text.get("width", 512),
            "layers": text.get("layers", 12),
            "heads": text.get("heads", 8),
            "context_length": text.get("context_length", 77),
            "vocab_size": text.get("vocab_size", 49408),
            "mlp_ratio": text.get("mlp_ratio", 4.0),
            "causal": causal,
            "attend_padding": not causal,
            "pad_id": 0 if causal else pad_id,
            "pooling": pooling,
            "activation": activation,
            "norm_eps": norm.get("eps", 1e-5),
        }
    )


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    below = take(state, "text.")
    if below:
        return {name: tensor for name, tensor in below.items() if not name.endswith(("attn_mask", "position_ids"))}
    return {name: tensor for name, tensor in state.items() if name.startswith(TEXT_AT_THE_TOP) and name != "attn_mask"}


def _text_model(name: str, folder: Path | None, where: str) -> Mapping[str, Any]:
    """The ``config.json`` of a text model of transformers: beside the weights, else from the hub."""
    from open_clip.hf_configs import arch_dict

    beside = None if folder is None else folder / "config.json"
    if beside is not None and beside.is_file() and (values := read_json(beside)).get("model_type") in arch_dict:
        return values
    published = resolve_file(name, "config.json")
    if published is None:
        raise CheckpointError(
            f"{where}: its text tower is {name} of transformers, whose config.json is neither beside the weights nor to be had "
            "from the hub; put it beside them"
        )
    return read_json(published)


def _tokenizer(text: Mapping[str, Any], hf_config: Mapping[str, Any] | None, folder: Path | None, where: str) -> TextTokenizer:
    """CLIP's own vocabulary, or the ``tokenizer.json`` that comes with the checkpoint or is published as its tokenizer."""
    name = text.get("hf_tokenizer_name") or text.get("hf_model_name")
    if not name:
        return TextTokenizer.clip_bpe()
    path = None if folder is None else folder / "tokenizer.json"
    settings = None if folder is None else folder / "tokenizer_config.json"
    if path is None or not path.is_file():
        path, settings = resolve_file(name, "tokenizer.json"), resolve_file(name, "tokenizer_config.json")
    if path is None:
        raise CheckpointError(
            f"{where}: its texts need the tokenizer.json of {name}, which is neither beside the weights nor to be had from the "
            "hub; put it beside them"
        )
    options = dict(text.get("tokenizer_kwargs") or {})
    clean, strip_end = options.pop("clean", "whitespace"), bool(options.pop("strip_sep_token", False))
    cleanings = {
        "canonicalize": Cleaning(repair=True, nfc=False, punctuation=False),
        "lower": Cleaning(repair=True, nfc=False),
        "whitespace": Cleaning(repair=True, nfc=False, lowercase=False),
    }
    if options or clean not in cleanings or text.get("tokenizer_mode"):
        raise CheckpointError(f"{where}: prepares texts by {text.get('tokenizer_kwargs')}, which is not supported")
    pad = _pad_id(path, settings, text) if hf_config is None else text_model_config(hf_config).pad_token_id
    return TextTokenizer.from_file(path, pad=pad, cleaning=cleanings[clean], end=0 if strip_end else None)


def _pad_id(path: Path, settings: Path | None, text: Mapping[str, Any]) -> int:
    """The id of the pad token that ``tokenizer_config.json`` names; open_clip pads with it."""
    named = read_json(settings).get("pad_token") if settings is not None and settings.is_file() else None
    found = token_id(path, named)
    return int(text.get("pad_id", 0)) if found is None else found


def _projection_kind(projection: Mapping[str, Tensor]) -> Projection:
    if not projection:
        return "none"
    return "affine" if "bias" in projection else "linear"
