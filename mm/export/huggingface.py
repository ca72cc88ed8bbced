"""transformers: a folder that ``CLIPModel.from_pretrained`` or ``SiglipModel.from_pretrained`` loads, with equal features."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mm.encoders.image import ImageEncoderConfig
from mm.encoders.library import LibraryImageConfig, LibraryTextConfig
from mm.encoders.library_towers import image_features, portable, quiet_transformers, text_features
from mm.encoders.text import TextEncoderConfig
from mm.errors import UserError
from mm.export.text import open_clip_text_weights
from mm.export.tokenizer import padding, require_same_ids, write_transformers
from mm.export.towers import REPAIR, Towers, picture_deviations, require_equal, write_manifest
from mm.export.vit import VisionShape, clip_vision_weights, siglip_vision_weights, transformers_names, vision_shape
from mm.published.huggingface_processor import FILTERS
from mm.published.imported import put

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
PREPROCESSOR_FILE = "preprocessor_config.json"

TOLERANCE = 1e-4
"""Largest difference of a component of the unit vectors, fp32."""

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_pytorch_tanh"}

LEGACY_END = 2
"""CLIPModel takes an end token of this id for a sign of old files, and looks for the largest id instead."""


def write(towers: Towers, folder: Path) -> None:
    """Write configuration, weights and preparation, load them with transformers and compare.

    Raises:
        UserError: transformers' CLIPModel and SiglipModel cannot express the model, or compute something else.
    """
    try:
        import transformers  # noqa: F401 - only whether it is there
    except ImportError:
        raise UserError('export to huggingface needs transformers; install it with: pip install "mm-suite[hub]"') from None
    preprocessor = _preprocessor(towers)
    image, text = towers.config.image, towers.config.text
    if isinstance(image, LibraryImageConfig) and isinstance(text, LibraryTextConfig):
        config, weights, swapped = _library(towers, image, text)
    elif isinstance(image, LibraryImageConfig) or isinstance(text, LibraryTextConfig):
        raise _refusal("one tower is a library's own module and the other is not")
    elif text.causal:
        config, weights, swapped = _clip(towers, image, text)
    else:
        config, weights, swapped = _siglip(towers, image, text)
    _write_json(folder / CONFIG_FILE, config)
    _write_json(folder / PREPROCESSOR_FILE, preprocessor)
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    write_transformers(
        towers.processor.tokenizer, folder, towers.processor.context_length, pad=_padding(towers), swapped=swapped
    )
    agreement = _compare(towers, folder, config["architectures"][0], swapped)
    deviations = picture_deviations(towers.processor.image_spec, centre="down")
    if towers.processor.tokenizer.cleaning.repair:
        deviations.append(f"texts do not go through {REPAIR}")
    contents = {"architecture": config["architectures"][0], "agreement": agreement, "deviations": deviations}
    write_manifest(towers, folder, "huggingface", contents)


def _refusal(why: str) -> UserError:
    return UserError(f"export to huggingface: {why}; export to onnx or torch instead")


def _clip(
    towers: Towers, image: ImageEncoderConfig, text: TextEncoderConfig
) -> tuple[dict[str, Any], dict[str, Tensor], tuple[int, int] | None]:
    """CLIPModel: vision transformer with a class token, causal text pooled at its end token, projections without bias."""
    encoder: Any = towers.both.encoders["image"]
    shape = vision_shape(encoder)
    vision = None if shape is None or shape.pool != "token" or shape.layer_scale else clip_vision_weights(encoder.trunk)
    if shape is None or vision is None or not shape.pre_norm:
        raise _refusal(
            "CLIPModel's image tower is a vision transformer with a class token and a norm before its blocks, unlike this "
            f"{image.backbone}"
        )
    projections = {name: dict(towers.both.projections[name].state_dict()) for name in ("image", "text")}
    if any(projection.keys() != {"weight"} for projection in projections.values()):
        raise _refusal("CLIPModel's projections are linear without bias")
    tokenizer = towers.processor.tokenizer
    start, end, pad = tokenizer.start, tokenizer.end, padding(tokenizer)
    if text.pooling != "last" or end is None:
        raise _refusal(f"CLIPModel's text tower is pooled at the end token, not by pooling: {text.pooling}")
    swapped = None
    if end == LEGACY_END:
        if start is None:
            raise _refusal(f"CLIPModel cannot have {LEGACY_END} as the id of the end token")
        swapped = start, end
        start, end = end, start
    config = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": towers.config.embed_dim,
        "vision_config": {**_vision_config(image, shape), "projection_dim": towers.config.embed_dim},
        "text_config": {
            **text_config(text),
            "projection_dim": towers.config.embed_dim,
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": end if pad == tokenizer.end else pad,
        },
    }
    words = transformers_names(open_clip_text_weights(towers.both.encoders["text"].state_dict()))
    if swapped is not None:
        table = words["embeddings.token_embedding.weight"].clone()
        table[list(swapped)] = table[list(reversed(swapped))]
        words["embeddings.token_embedding.weight"] = table
    return (
        config,
        {
            **put(transformers_names(vision), "vision_model."),
            **put(words, "text_model."),
            "visual_projection.weight": projections["image"]["weight"],
            "text_projection.weight": projections["text"]["weight"],
            "logit_scale": towers.both.logit_scale,
        },
        swapped,
    )


def _siglip(
    towers: Towers, image: ImageEncoderConfig, text: TextEncoderConfig
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """SiglipModel: vision transformer with an attention pool and no projection, text that attends to its padding."""
    encoder: Any = towers.both.encoders["image"]
    shape = vision_shape(encoder)
    vision = siglip_vision_weights(encoder.trunk) if shape is not None and shape.pool == "map" else None
    if shape is None or vision is None or towers.both.projections["image"].state_dict():
        raise _refusal(
            f"SiglipModel's image tower is a vision transformer with pool: map and no projection, unlike {image.backbone}"
        )
    projection = dict(towers.both.projections["text"].state_dict())
    if not text.attend_padding or text.pooling != "final" or not projection:
        raise _refusal("SiglipModel's text tower attends to its padding (attend_padding), has pooling: final and a projection")
    config = {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "vision_config": _vision_config(image, shape),
        "text_config": {**text_config(text), "projection_size": towers.config.embed_dim, "pad_token_id": text.pad_id},
    }
    words = transformers_names(open_clip_text_weights(towers.both.encoders["text"].state_dict()))
    weight, bias = projection["weight"], towers.both.logit_bias
    return (
        config,
        {
            **put(vision, "vision_model."),
            **put(words, "text_model."),
            "text_model.head.weight": weight,
            "text_model.head.bias": projection.get("bias", torch.zeros(len(weight))),
            "logit_scale": towers.both.logit_scale.reshape(1),
            "logit_bias": torch.zeros(1) if bias is None else bias.reshape(1),
        },
        None,
    )


def _library(
    towers: Towers, image: LibraryImageConfig, text: LibraryTextConfig
) -> tuple[dict[str, Any], dict[str, Tensor], None]:
    """Towers that are transformers' own: their weights under their own names, the configuration as it came."""
    alike = image.architecture == text.architecture and image.config.get("model") == text.config.get("model")
    if image.library != "transformers" or text.library != "transformers" or not alike:
        raise _refusal("its towers are not those of one model of transformers")
    weights: dict[str, Tensor] = {"logit_scale": towers.both.logit_scale}
    if towers.both.logit_bias is not None:
        weights["logit_bias"] = towers.both.logit_bias
    for name in ("image", "text"):
        tower: Any = towers.both.encoders[name].tower
        weights |= tower.state_dict()
    return {**portable(image.config["model"]), "architectures": [image.architecture]}, weights, None


def _vision_config(image: ImageEncoderConfig, shape: VisionShape) -> dict[str, Any]:
    return {
        "image_size": image.image_size,
        "patch_size": shape.patch_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden_width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "hidden_act": ACTIVATIONS[shape.activation],
        "layer_norm_eps": shape.norm_eps,
    }


def text_config(text: TextEncoderConfig) -> dict[str, Any]:
    """The suite's text encoder in transformers' terms."""
    return {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "hidden_size": text.width,
        "intermediate_size": int(text.width * text.mlp_ratio),
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "hidden_act": ACTIVATIONS[text.activation],
        "layer_norm_eps": text.norm_eps,
    }


def _preprocessor(towers: Towers) -> dict[str, Any]:
    spec, size = towers.processor.image_spec, towers.image_size
    if spec.fit == "content":
        raise _refusal("transformers has no preparation of pictures like fit: content")
    side, cuts = spec.resize_to or size, spec.fit == "crop" or spec.resize_to is not None
    resized = {"shortest_edge": side} if spec.fit == "crop" else {"height": side, "width": side}
    mean, std = towers.normalisation
    return {
        "image_processor_type": "CLIPImageProcessor" if cuts else "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": resized,
        "do_center_crop": cuts,
        **({"crop_size": {"height": size, "width": size}} if cuts else {}),
        "resample": next(code for code, name in FILTERS.items() if name == spec.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _padding(towers: Towers) -> int:
    """Id that transformers' tokenizer is told to fill up with."""
    return padding(towers.processor.tokenizer) if towers.seen_padding is None else towers.seen_padding


@torch.no_grad()
def _compare(towers: Towers, folder: Path, architecture: str, swapped: tuple[int, int] | None) -> dict[str, dict[str, float]]:
    """Load the folder as transformers does and compare vectors and ids."""
    import transformers

    with quiet_transformers():
        model, report = getattr(transformers, architecture).from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
        odd = sorted({*report["missing_keys"], *report["unexpected_keys"]})
        if odd:
            raise _refusal(f"{architecture} has other weights ({', '.join(odd[:3])})")
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    exchange = {} if swapped is None else dict(zip(swapped, reversed(swapped), strict=True))
    require_same_ids(towers, lambda text: tokenizer(text, truncation=True).input_ids, "huggingface", exchange)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in towers.normalisation)
    pixels, text = towers.pixels(3), towers.text(3, towers.context_length)
    mask = torch.arange(towers.context_length) < text.lengths[:, None]
    ids = text.ids.where(mask, _padding(towers)).apply_(lambda i: exchange.get(i, i))
    seen = mask if towers.seen_padding is None else torch.ones_like(mask)
    images, _ = image_features(model.eval(), (pixels / 255 - mean) / std)
    texts, _ = text_features(model, ids, seen)
    unit = torch.nn.functional.normalize
    return {
        "image": require_equal(towers.embed("image", pixels), unit(images), f"{architecture}'s image tower", TOLERANCE),
        "text": require_equal(towers.embed("text", text), unit(texts), f"{architecture}'s text tower", TOLERANCE),
    }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
