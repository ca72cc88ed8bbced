"""open_clip: a folder that ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads, computing the same vectors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mm.encoders.image import PYRAMID, ImageEncoderConfig
from mm.encoders.library_towers import quiet_transformers
from mm.encoders.text import TextEncoderConfig
from mm.errors import UserError
from mm.export.text import open_clip_text_weights
from mm.export.tokenizer import is_clip, padding, require_same_ids, write_transformers
from mm.export.towers import REPAIR, Towers, picture_deviations, require_equal, write_manifest
from mm.export.vit import clip_vision_weights, vision_shape
from mm.published.imported import put
from mm.published.open_clip import CONFIG_FILE, FITS, WEIGHT_FILES

TOLERANCE = 1e-4
"""Largest difference of a component of the unit vectors, fp32."""

DEFAULT_EPS = 1e-5
HERE = "tokenizer.json of this folder"
"""Stands where open_clip wants a tokenizer's name; for a local folder it takes the folder's own whatever the name."""


@dataclass(frozen=True)
class _Tower:
    """A tower in open_clip's terms; ``quick_gelu`` is None where its activation is not the model's."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    quick_gelu: bool | None
    custom_text: bool = False


def write(towers: Towers, folder: Path) -> None:
    """Write configuration, weights and tokenizer, load them with open_clip and compare.

    Raises:
        UserError: open_clip cannot express the model, or computes something else.
    """
    try:
        import open_clip  # noqa: F401 - only whether it is there
    except ImportError:
        raise UserError('export to open_clip needs it; install it with: pip install "mm-suite[hub]"') from None
    image, text = _image_tower(towers), _text_tower(towers)
    wanted = {tower.quick_gelu for tower in (image, text)} - {None}
    if len(wanted) > 1:
        raise _refusal("one tower was trained with quick_gelu and the other was not, for which it has one switch only")
    bias = towers.both.logit_bias
    model_config = {
        "embed_dim": towers.config.embed_dim,
        "quick_gelu": True in wanted,
        "vision_cfg": image.config,
        "text_cfg": text.config,
        **({} if bias is None else {"init_logit_bias": float(bias.detach())}),
        **({"custom_text": True} if text.custom_text else {}),
    }
    contents = {"model_cfg": model_config, "preprocess_cfg": _preprocessing(towers)}
    (folder / CONFIG_FILE).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    scale = {"logit_scale": towers.both.logit_scale} | ({} if bias is None else {"logit_bias": bias})
    weights = put(image.weights, "visual.") | put(text.weights, "text." if text.custom_text else "") | scale
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, folder / WEIGHT_FILES[0])
    if "hf_tokenizer_name" in text.config:
        pad = _padding(towers)
        write_transformers(towers.processor.tokenizer, folder, towers.processor.context_length, pad=pad)
    agreement = _compare(towers, folder)
    deviations = picture_deviations(towers.processor.image_spec, centre="nearest")
    if "hf_tokenizer_name" in text.config and not towers.processor.tokenizer.cleaning.repair:
        deviations.append(f"texts go through {REPAIR} first, which also straightens quotation marks")
    write_manifest(towers, folder, "open_clip", {"agreement": agreement, "deviations": deviations})


def _refusal(why: str) -> UserError:
    return UserError(f"export to open_clip: {why}; export to onnx or torch instead")


def _preprocessing(towers: Towers) -> dict[str, Any]:
    spec = towers.processor.image_spec
    modes = {ours: theirs for theirs, ours in FITS.items()}
    if spec.fit not in modes:
        raise _refusal(f"it has no preparation of pictures like fit: {spec.fit}")
    if spec.resize_to not in (None, spec.size):
        raise _refusal(f"it resizes pictures to the {spec.size} px that its tower takes, not to {spec.resize_to} px")
    mean, std = towers.normalisation
    return {"mean": list(mean), "std": list(std), "interpolation": spec.interpolation, "resize_mode": modes[spec.fit]}


def _projection(towers: Towers, name: str) -> dict[str, Tensor]:
    """``weight`` and perhaps ``bias``; empty where the encoder ends in the shared space."""
    return dict(towers.both.projections[name].state_dict())


def _image_tower(towers: Towers) -> _Tower:
    config, encoder = towers.config.image, towers.both.encoders["image"]
    if not isinstance(config, ImageEncoderConfig):
        if config.library != "open_clip":
            raise _refusal(f"its image tower is {config.architecture} of {config.library}")
        values: Any = config.config
        tower: Any = encoder.tower
        return _Tower(dict(values["vision_cfg"]), tower.state_dict(), bool(values.get("quick_gelu", False)))
    return _clip_vit(towers, config) or _timm_tower(towers, config)


def _clip_vit(towers: Towers, config: ImageEncoderConfig) -> _Tower | None:
    encoder: Any = towers.both.encoders["image"]
    shape, projection = vision_shape(encoder), _projection(towers, "image")
    if shape is None or shape.pool not in ("token", "avg") or projection.keys() != {"weight"}:
        return None
    weights = clip_vision_weights(encoder.trunk)
    if weights is None or shape.activation == "gelu_tanh":
        return None
    values: dict[str, Any] = {
        "image_size": config.image_size,
        "layers": shape.layers,
        "width": shape.width,
        "head_width": shape.width // shape.heads,
        "mlp_ratio": shape.hidden_width / shape.width,
        "patch_size": shape.patch_size,
    }
    if not shape.pre_norm:
        values["no_ln_pre"] = True
    if shape.pool == "avg":
        values |= {"pool_type": "avg", "final_ln_after_pool": True}
    if shape.layer_scale:
        values["ls_init_value"] = 1.0
    if shape.norm_eps != DEFAULT_EPS:
        values["norm_kwargs"] = {"eps": shape.norm_eps}
    return _Tower(values, weights | {"proj": projection["weight"].T}, shape.activation == "quick_gelu")


def _timm_tower(towers: Towers, config: ImageEncoderConfig) -> _Tower:
    """open_clip makes timm models by name, with nothing but a pooling."""
    if config.pool == PYRAMID:
        raise _refusal(f"it has no pool: {PYRAMID}")
    options = sorted(config.options) + (["patch_size"] if config.patch_size is not None else [])
    if options:
        raise _refusal(f"it makes timm's {config.backbone} without options, this one has {', '.join(options)}")
    projection = _projection(towers, "image")
    values = {
        "timm_model_name": config.backbone,
        "timm_model_pretrained": False,
        "timm_pool": config.pool or "",
        "timm_proj": "linear" if projection else "none",
        "timm_proj_bias": "bias" in projection,
        "image_size": config.image_size,
    }
    trunk: Any = towers.both.encoders["image"].trunk
    return _Tower(values, put(trunk.state_dict(), "trunk.") | put(projection, "head.proj."), None)


def _text_tower(towers: Towers) -> _Tower:
    config, encoder = towers.config.text, towers.both.encoders["text"]
    if not isinstance(config, TextEncoderConfig):
        values: Any = config.config
        if config.library != "open_clip" or values["text_cfg"].get("hf_model_name"):
            raise _refusal(f"its text tower is {config.architecture} of {config.library}, which it would take from the hub")
        tower: Any = encoder.tower
        text = {**values["text_cfg"], **_tokenizer_config(towers)}
        return _Tower(text, tower.state_dict(), bool(values.get("quick_gelu", False)), custom_text=True)
    projection = _projection(towers, "text")
    values = {
        "context_length": config.context_length,
        "vocab_size": config.vocab_size,
        "width": config.width,
        "heads": config.heads,
        "layers": config.layers,
        "mlp_ratio": int(config.width * config.mlp_ratio) / config.width,
        **_pooling(towers, config),
        **_tokenizer_config(towers),
        **({"norm_kwargs": {"eps": config.norm_eps}} if config.norm_eps != DEFAULT_EPS else {}),
        **({"act_kwargs": {"approximate": "tanh"}} if config.activation == "gelu_tanh" else {}),
        **({} if projection else {"proj_type": "none"}),
        **({"proj_bias": True} if "bias" in projection else {}),
    }
    weights = open_clip_text_weights(encoder.state_dict())
    if "bias" in projection:
        weights |= put(projection, "text_projection.")
    elif projection:
        weights["text_projection"] = projection["weight"].T
    return _Tower(values, weights, config.activation == "quick_gelu")


def _pooling(towers: Towers, config: TextEncoderConfig) -> dict[str, Any]:
    """Which token stands for the text, and what sees what."""
    tokenizer = towers.processor.tokenizer
    if config.pooling == "mean" or not (config.causal or config.attend_padding):
        raise _refusal("it has no text tower that averages tokens or hides the padding from them (causal: false)")
    seen = {} if config.causal else {"no_causal_mask": True, "pad_id": config.pad_id}
    if config.pooling == "last":
        if tokenizer.end is None:
            raise _refusal("its tokenizer has no end token, by which pooling: last is found")
        if tokenizer.end == tokenizer.vocab_size - 1:
            return {**seen, "pool_type": "argmax"}
        return {**seen, "pool_type": "eos", "eos_id": tokenizer.end}
    return {**seen, "pool_type": {"first": "first", "final": "last"}[config.pooling]}


def _tokenizer_config(towers: Towers) -> dict[str, Any]:
    """Nothing for CLIP's vocabulary, which open_clip brings itself; else that the tokenizer is in the folder."""
    return {} if is_clip(towers.processor.tokenizer) else {"hf_tokenizer_name": HERE}


def _padding(towers: Towers) -> int:
    """What open_clip fills texts up with: what the tower was trained with, where it sees that."""
    config = towers.config.text
    if not isinstance(config, TextEncoderConfig):
        values: Any = config.config
        return int(values.get("pad_id", 0))
    return padding(towers.processor.tokenizer) if towers.seen_padding is None else towers.seen_padding


def _real(ids: list[int], end: int | None, pad: int) -> list[int]:
    """A row without the padding behind it, which may have the id of the end token."""
    if end is not None and end in ids:
        return ids[: ids.index(end) + 1]
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


@torch.no_grad()
def _compare(towers: Towers, folder: Path) -> dict[str, dict[str, float]]:
    """Load the folder as open_clip does and compare vectors and ids."""
    import open_clip

    name = f"local-dir:{folder}"
    with quiet_transformers():
        try:
            model: Any = open_clip.create_model(name).eval()
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            _, _, mismatch = str(error).partition("size mismatch for ")
            reason = f"{mismatch.partition(':')[0]} has another shape there" if mismatch else str(error).splitlines()[0]
            raise _refusal(f"it makes another architecture from these names ({reason})") from None
        tokenize: Any = open_clip.get_tokenizer(name)
    tokenizer = towers.processor.tokenizer
    require_same_ids(towers, lambda text: _real(tokenize([text])[0].tolist(), tokenizer.end, _padding(towers)), "open_clip")
    if towers.seen_padding is not None and tokenize([""])[0, -1] != towers.seen_padding:
        raise _refusal(f"it would not fill texts up with {towers.seen_padding}, which this text tower sees")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in towers.normalisation)
    pixels, text = towers.pixels(3), towers.text(3, towers.context_length)
    images = model.encode_image((pixels / 255 - mean) / std, normalize=True)
    inside = torch.arange(towers.context_length) < text.lengths[:, None]
    texts = model.encode_text(text.ids.where(inside, _padding(towers)), normalize=True)
    return {
        "image": require_equal(towers.embed("image", pixels), images, "open_clip's image tower", TOLERANCE),
        "text": require_equal(towers.embed("text", text), texts, "open_clip's text tower", TOLERANCE),
    }
