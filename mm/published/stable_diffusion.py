"""Folders in the format of Stable Diffusion, as diffusers writes them, and folders of their autoencoder alone.

Only safetensors and JSON are read, and every class is one that is known here: a folder cannot bring code.
Source (format): https://github.com/huggingface/diffusers.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.config import read_json, validate
from mm.encoders.text import TextEncoderConfig, from_open_clip
from mm.errors import CheckpointError, UserError
from mm.generators.schedulers import NAMES as PREDICTIONS
from mm.generators.schedulers import SchedulerConfig, scheduler_for
from mm.generators.unet import FIXED as FIXED_IN_UNET
from mm.losses.diffusion import Prediction
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.published.huggingface import PIPELINE_INDEX
from mm.published.huggingface_processor import read_tokenizer, tokenizer_settings
from mm.published.huggingface_towers import ACTIVATIONS, hidden_ratio
from mm.published.huggingface_weights import open_clip_names
from mm.published.image_tokenizers import NO_SIDE, USUAL_SIDE, attention_name
from mm.published.imported import Imported, one_line, put, read_safetensors, widened
from mm.systems.flow import DiffusionPathConfig
from mm.systems.latent_diffusion import LatentDiffusionConfig
from mm.systems.published_vae import PublishedVaeConfig
from mm.tokenizers.library_vae import FIXED as FIXED_IN_VAE
from mm.tokenizers.text import TextTokenizer
from mm.types import Sampling

INDEX_FILE, CONFIG_FILE = PIPELINE_INDEX, "config.json"
SCHEDULER_FILE = "scheduler_config.json"
PIPELINE = "StableDiffusionPipeline"
VAE, UNET, TEXT_ENCODER = "AutoencoderKL", "UNet2DConditionModel", "CLIPTextModel"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
PARTS: Mapping[str, tuple[str, ...]] = {
    "unet": (UNET,),
    "vae": (VAE,),
    "text_encoder": (TEXT_ENCODER,),
    "tokenizer": TOKENIZERS,
}
"""The classes that each part may have; a scheduler may be any of diffusers'."""

WEIGHTS = {"text_encoder": "model"}
"""Name of a part's weights, where it is not diffusers' usual one."""

USUAL_WEIGHTS = "diffusion_pytorch_model"
HALF = ".fp16"
"""In the names of weights that were stored in half precision."""

MORE_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)
"""Options of a UNet that is told more than a text."""

OF_THE_VAES_PRECISION = "force_upcast"

BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
OF_THE_PATH = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
"""Of a scheduler's configuration: what was trained, not how it is sampled."""

PATH_ALONE: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}
"""The only values of these options that are supported."""


def import_pipeline_folder(folder: Path) -> Imported | None:
    """A folder with ``model_index.json``, or one of an AutoencoderKL alone; None for any other.

    Raises:
        CheckpointError: A part is missing, pickled, damaged or of another class, or has options that are not supported.
    """
    with one_line(folder):
        if (folder / INDEX_FILE).is_file():
            return _import_pipeline(folder)
        if (folder / CONFIG_FILE).is_file() and read_json(folder / CONFIG_FILE).get("_class_name") == VAE:
            return _import_vae(folder)
        return None


def _import_vae(folder: Path) -> Imported:
    stated = read_json(folder / CONFIG_FILE).get("sample_size", NO_SIDE)
    config, state = _vae(folder, folder, USUAL_SIDE if stated == NO_SIDE else stated)
    return Imported(config, state, Processor(image=ImageSpec(size=config.picture_side)), _card(folder))


def _import_pipeline(folder: Path) -> Imported:
    index = read_json(folder / INDEX_FILE)
    if index.get("_class_name") != PIPELINE:
        raise CheckpointError(
            f"{folder}: is a {index.get('_class_name')}; of diffusers' pipelines only {PIPELINE} is supported"
        )
    for part, classes in PARTS.items():
        named = _class(index, part)
        if named not in classes:
            raise CheckpointError(f"{folder}: its {part} is a {named}; only {' or '.join(classes)} is supported")
        if not (folder / part).is_dir():
            raise CheckpointError(f"{folder}: has no folder {part}; it is incomplete, download it again")
    tokenizer, text, words = _text(folder)
    unet = _values(folder / "unet", UNET)
    vae_values = _values(folder / "vae", VAE)
    side = _side(unet, folder) * 2 ** (len(vae_values["block_out_channels"]) - 1)
    vae, latents = _vae(folder, folder / "vae", side)
    if vae.vae.shift_factor:
        raise CheckpointError(f"{folder / 'vae'}: shift_factor {vae.vae.shift_factor} is not known to a {PIPELINE}")
    _check_unet(unet, text.width, int(vae_values["latent_channels"]), folder / "unet")
    path, prediction, scheduler = _scheduler(folder / "scheduler", _class(index, "scheduler"))
    config = validate(
        LatentDiffusionConfig,
        {
            "latents": vae.model_dump(),
            "text": text.model_dump(),
            "denoiser": {"kind": "unet", "options": _own(unet, FIXED_IN_UNET, _defaults(_unet_class()))},
            "path": path.model_dump(),
            "prediction": prediction,
            "empty_prompt": [tokenizer.start, tokenizer.end],
            "scheduler": scheduler.model_dump(),
        },
        str(folder),
    )
    state = {
        **put(latents, "latents."),
        **put(words, "text."),
        **put(_weights(folder, "unet"), "denoiser.network."),
    }
    processor = Processor(image=ImageSpec(size=side), tokenizer=tokenizer, context_length=text.context_length)
    left_out = [part for part in ("safety_checker", "image_encoder") if _class(index, part) is not None]
    return Imported(config, state, processor, _card(folder) | ({"left_out": left_out} if left_out else {}))


def _card(folder: Path) -> dict[str, Any]:
    return {"source": str(folder), "format": "diffusers"}


def _class(index: Mapping[str, Any], part: str) -> str | None:
    """The class that ``model_index.json`` names for a part."""
    found = index.get(part)
    return found[1] if isinstance(found, list) and len(found) == 2 else None


def _values(folder: Path, expected: str) -> dict[str, Any]:
    """``config.json`` of a network of diffusers."""
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG_FILE}; it is incomplete, download it again")
    values = read_json(file)
    if values.get("_class_name") != expected:
        raise CheckpointError(f"{file}: is of a {values.get('_class_name')}; only {expected} is supported")
    return values


def _weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The safetensors of a part in fp32; of two precisions the full one."""
    place, name = folder / part, WEIGHTS.get(part, USUAL_WEIGHTS)
    for file in (place / f"{name}.safetensors", place / f"{name}{HALF}.safetensors"):
        if file.is_file():
            return widened(read_safetensors(file))
    pickled = sorted(place.glob("*.bin"))
    found = f"only pickled weights ({pickled[0].name}), which can run code when they are read" if pickled else "no weights"
    raise CheckpointError(f"{place}: holds {found}; download {name}.safetensors")


def _vae(folder: Path, place: Path, image_size: int) -> tuple[PublishedVaeConfig, dict[str, Tensor]]:
    values = _values(place, VAE)
    for name, only in (("in_channels", 3), ("out_channels", 3), ("latents_mean", None), ("latents_std", None)):
        if values.get(name, only) != only:
            raise CheckpointError(f"{place / CONFIG_FILE}: {name} is {values[name]}; only {only} is supported")
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    options = _own(values, (*FIXED_IN_VAE, OF_THE_VAES_PRECISION), _defaults(AutoencoderKL))
    defaults = _defaults(AutoencoderKL)
    vae = {
        "image_size": image_size,
        "scaling_factor": values.get("scaling_factor", defaults["scaling_factor"]),
        "shift_factor": values.get("shift_factor") or 0.0,
        "options": options,
    }
    config = validate(PublishedVaeConfig, {"vae": vae}, str(place / CONFIG_FILE))
    weights = dict(attention_name(name, tensor) for name, tensor in _weights(place.parent, place.name).items())
    return config, put(weights, "vae.model.")


def _own(values: Mapping[str, Any], fixed: tuple[str, ...], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a network that are not its class' defaults, or unknown to it."""
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in fixed and (name not in defaults or _listed(defaults[name]) != value)
    }


def _listed(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _defaults(kind: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}


def _unet_class() -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel


def _side(unet: Mapping[str, Any], folder: Path) -> int:
    """Side of the latents."""
    side = unet["sample_size"]
    rows, columns = side if isinstance(side, list) else (side, side)
    if rows != columns:
        raise CheckpointError(f"{folder / 'unet'}: sample_size {side} is no square; only square pictures are supported")
    return int(rows)


def _check_unet(unet: Mapping[str, Any], width: int, channels: int, where: Path) -> None:
    """Raises `CheckpointError` where the UNet does not belong to the text encoder or the autoencoder, or needs more."""
    for name in MORE_CONDITIONS:
        if unet.get(name) is not None:
            raise CheckpointError(f"{where}: {name} {unet[name]} is not supported; take a UNet that is told a text alone")
    for name, belongs in (("in_channels", channels), ("out_channels", channels), ("cross_attention_dim", width)):
        if unet[name] != belongs:
            raise CheckpointError(
                f"{where}: {name} is {unet[name]}, not {belongs}; only UNets from latents and text to latents are supported"
            )


def _text(folder: Path) -> tuple[TextTokenizer, TextEncoderConfig, dict[str, Tensor]]:
    """Tokenizer, text encoder and its weights."""
    place = folder / "text_encoder"
    with one_line(place):
        values = read_json(place / CONFIG_FILE)
        if (named := values.get("architectures") or [TEXT_ENCODER]) != [TEXT_ENCODER]:
            raise CheckpointError(f"{place}: is a {named[0]}; only {TEXT_ENCODER} is supported")
        from transformers import CLIPTextConfig

        text: Any = CLIPTextConfig.from_dict(values)
    if text.hidden_act not in ACTIVATIONS:
        raise CheckpointError(f"{place}: hidden_act '{text.hidden_act}' is not supported; there are {', '.join(ACTIVATIONS)}")
    if getattr(text, "use_attention_mask", False):
        raise CheckpointError(f"{place}: use_attention_mask is not supported; all positions of a text are attended to")
    tokenizer, limit = read_tokenizer(folder / "tokenizer", siglip=False)
    if tokenizer.start is None or tokenizer.end is None or tokenizer.vocab_size > text.vocab_size:
        raise CheckpointError(f"{folder}: tokenizer and text encoder do not belong together")
    if limit != text.max_position_embeddings:
        raise CheckpointError(
            f"{folder}: its tokenizer fills texts up to {limit} tokens, its text encoder takes {text.max_position_embeddings}"
        )
    config = TextEncoderConfig.model_validate(
        {
            "width": text.hidden_size,
            "layers": text.num_hidden_layers,
            "heads": text.num_attention_heads,
            "context_length": text.max_position_embeddings,
            "vocab_size": text.vocab_size,
            "mlp_ratio": hidden_ratio(text),
            "attend_padding": True,
            "pad_id": _padding(folder / "tokenizer", tokenizer),
            "activation": ACTIVATIONS[text.hidden_act],
            "norm_eps": text.layer_norm_eps,
        }
    )
    weights = {name.removeprefix("text_model."): tensor for name, tensor in _weights(folder, "text_encoder").items()}
    return tokenizer, config, from_open_clip(open_clip_names(weights))


def _padding(folder: Path, tokenizer: TextTokenizer) -> int:
    """Id that texts are filled up with: the end token in Stable Diffusion 1, an exclamation mark in 2."""
    settings = tokenizer_settings(folder)
    names = {key: _name(settings.get(key)) for key in ("pad_token", "eos_token", "bos_token")}
    assert tokenizer.end is not None
    if names["pad_token"] in (None, names["eos_token"]):
        return tokenizer.end
    found = tokenizer.start if names["pad_token"] == names["bos_token"] else tokenizer.id_of(str(names["pad_token"]))
    if found is None:
        raise CheckpointError(f"{folder}: its pad_token {names['pad_token']!r} is not in its vocabulary; download it again")
    return found


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _scheduler(folder: Path, named: str | None) -> tuple[DiffusionPathConfig, Prediction, SchedulerConfig]:
    """What was trained, and how it is sampled; outdated options are put right as StableDiffusionPipeline does."""
    file = folder / SCHEDULER_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder}: has no {SCHEDULER_FILE}; it is incomplete, download it again")
    values = read_json(file)
    name = str(values.get("_class_name") or named)
    from diffusers import schedulers

    kind = getattr(schedulers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise CheckpointError(f"{file}: diffusers has no scheduler '{name}'; the newest version may")
    values = {key: value for key, value in (_defaults(kind) | values).items() if key != "self" and not key.startswith("_")}
    for key, only in PATH_ALONE.items():
        if values.get(key, only) != only:
            raise CheckpointError(f"{file}: {key} {values[key]} is not supported; only {only} is")
    predictions: dict[Any, Prediction] = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    prediction, betas = values.get("prediction_type"), values.get("beta_schedule")
    if prediction not in predictions or betas not in BETAS:
        raise CheckpointError(f"{file}: prediction_type {prediction} with beta_schedule {betas} is not supported")
    path = validate(
        DiffusionPathConfig,
        {"betas": BETAS[betas], **{key: values[key] for key in ("beta_start", "beta_end")}},
        str(file),
    )
    right = {"steps_offset": 1, "clip_sample": False}
    options = values | {key: value for key, value in right.items() if key in values}
    scheduler = validate(
        SchedulerConfig,
        {"solver": name, "options": {key: value for key, value in options.items() if key not in OF_THE_PATH}},
        str(file),
    )
    try:
        scheduler_for(Sampling(solver=name), path.build(), predictions[prediction], scheduler.options)
    except UserError as error:
        raise CheckpointError(f"{file}: {error}") from None
    return path, predictions[prediction], scheduler
