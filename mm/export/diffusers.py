"""diffusers: a folder that ``StableDiffusionPipeline.from_pretrained`` loads, with equal outputs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import mm
from mm.encoders.library_towers import quiet_transformers
from mm.encoders.text import TextEncoderConfig
from mm.errors import UserError
from mm.export.huggingface import text_config
from mm.export.text import open_clip_text_weights
from mm.export.tokenizer import SAMPLES, write_transformers
from mm.export.towers import MANIFEST_FILE, MANIFEST_FORMAT, sha256
from mm.export.vit import transformers_names
from mm.generators.schedulers import LAST_WORD
from mm.generators.schedulers import NAMES as PREDICTIONS
from mm.generators.unet import Unet
from mm.hub import Model
from mm.losses.diffusion import NUM_STEPS
from mm.published.imported import put
from mm.published.stable_diffusion import (
    BETAS,
    CONFIG_FILE,
    INDEX_FILE,
    PIPELINE,
    SCHEDULER_FILE,
    TEXT_ENCODER,
    UNET,
    USUAL_WEIGHTS,
    VAE,
    WEIGHTS,
)
from mm.systems.flow import DiffusionPathConfig, Flow
from mm.systems.latent_diffusion import LatentDiffusionConfig
from mm.systems.published_vae import PublishedVae
from mm.types import Solver

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest value."""

TOKENIZER = "PreTrainedTokenizerFast"
OWN_SOLVER = "DDIMScheduler"
"""What stands for the suite's own solvers; it is their first-order one."""


def write(model: Model, folder: Path) -> None:
    """Write all parts, load them with diffusers and compare.

    Raises:
        UserError: The model is no latent diffusion, has parts that the format does not know, or diffusers computes something
            else of what was written.
    """
    config, system = model.config, model.system
    if not isinstance(config, LatentDiffusionConfig) or not isinstance(system, Flow):
        raise _refusal(f"{model.name} is no latent diffusion but of system {config.name}")
    vae, unet = system.latents, system.denoiser
    if not isinstance(vae, PublishedVae) or not isinstance(unet, Unet) or not isinstance(config.text, TextEncoderConfig):
        raise _refusal(f"{model.name} has other parts than an AutoencoderKL, a UNet and a text encoder like CLIP's")
    if vae.vae.config.shift_factor:
        raise _refusal(f"{PIPELINE} knows no shift_factor")
    if not isinstance(config.path, DiffusionPathConfig):
        raise _refusal(f"{model.name} goes a straight path, which {PIPELINE} cannot sample")
    if config.prediction not in PREDICTIONS:
        known = " or ".join(PREDICTIONS)
        raise _refusal(f"{model.name} predicts the {config.prediction}, which not all schedulers know, only {known}")
    scaling = {"scaling_factor": vae.vae.config.scaling_factor, "sample_size": vae.vae.config.image_size}
    _write_network(vae.vae.model, folder / "vae", scaling)
    _write_network(unet.network, folder / "unet", {"sample_size": vae.latent_shape[1]})
    _write_text(config.text, system.text, model, folder)
    scheduler = _scheduler(config, config.path)
    _write_json(folder / "scheduler" / SCHEDULER_FILE, scheduler)
    _write_json(folder / INDEX_FILE, _index(scheduler["_class_name"]))
    contents = {
        "format": MANIFEST_FORMAT,
        "to": "diffusers",
        "model": model.name,
        "agreement": _compare(model, system, vae, unet, folder),
        "versions": {"mm": mm.__version__, "torch": torch.__version__},
        "sha256": {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*.*")) if file.is_file()},
    }
    _write_json(folder / MANIFEST_FILE, contents)


def _refusal(why: str) -> UserError:
    return UserError(
        f"export to diffusers: {why}; it takes a model that began as such a folder, or configs/latent_diffusion.yaml"
    )


def _write_network(network: Any, folder: Path, values: Mapping[str, Any]) -> None:
    """Configuration and weights of a module of diffusers."""
    _write_json(folder / CONFIG_FILE, json.loads(network.to_json_string()) | dict(values))
    _write_weights(network.state_dict(), folder / f"{USUAL_WEIGHTS}.safetensors")


def _write_text(config: TextEncoderConfig, encoder: nn.Module, model: Model, folder: Path) -> None:
    """CLIP's text encoder and the tokenizer."""
    tokenizer, place = model.processor.tokenizer, folder / "text_encoder"
    special = {"bos_token_id": tokenizer.start, "eos_token_id": tokenizer.end, "pad_token_id": config.pad_id}
    values = {"architectures": [TEXT_ENCODER], "model_type": "clip_text_model", **text_config(config), **special}
    _write_json(place / CONFIG_FILE, values)
    weights = transformers_names(open_clip_text_weights(encoder.state_dict()))
    _write_weights(put(weights, "text_model."), place / f"{WEIGHTS['text_encoder']}.safetensors")
    (folder / "tokenizer").mkdir()
    write_transformers(tokenizer, folder / "tokenizer", model.processor.context_length, pad=config.pad_id)


def _scheduler(config: LatentDiffusionConfig, path: DiffusionPathConfig) -> dict[str, Any]:
    solver = config.scheduler.solver
    own = solver in get_args(Solver)
    name = OWN_SOLVER if own else solver.removesuffix(LAST_WORD) + LAST_WORD
    return {
        "_class_name": name,
        "clip_sample": False,
        **config.scheduler.options,
        "num_train_timesteps": NUM_STEPS,
        "beta_schedule": next(theirs for theirs, ours in BETAS.items() if ours == path.betas),
        "beta_start": path.beta_start,
        "beta_end": path.beta_end,
        "prediction_type": PREDICTIONS[config.prediction],
    }


def _index(scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": PIPELINE,
        "unet": ["diffusers", UNET],
        "vae": ["diffusers", VAE],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", TEXT_ENCODER],
        "tokenizer": ["transformers", TOKENIZER],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


@torch.no_grad()
def _compare(model: Model, system: Flow, vae: PublishedVae, unet: Unet, folder: Path) -> dict[str, float]:
    """Load the folder as diffusers does; largest differences of texts, of the UNet's answers and of pictures' values."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    with quiet_transformers(), _quiet_diffusers():
        pipeline: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    length = model.processor.context_length
    ids = pipeline.tokenizer(list(SAMPLES), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    condition = system.condition(model.processor.text(SAMPLES))
    [words] = pipeline.text_encoder(ids.input_ids, return_dict=False)[:1]
    generator = torch.Generator().manual_seed(0)
    latents, time = torch.randn(1, *vae.latent_shape, generator=generator), torch.tensor(500.0)
    [answer] = pipeline.unet(latents, time, words[:1], return_dict=False)
    [pixels] = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor, return_dict=False)
    [own_pixels] = vae.vae.model.decode(latents / vae.vae.config.scaling_factor, return_dict=False)
    return {
        "text_encoder": _difference(condition.words, words, "text encoder"),
        "unet": _difference(unet(latents, time, condition[:1]), answer, "UNet"),
        "vae": _difference(own_pixels, pixels, "autoencoder"),
    }


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without diffusers' progress bars."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _difference(ours: Tensor, theirs: Tensor, what: str) -> float:
    """Largest difference as a share of the largest value. Raises `UserError` where it is more than rounding."""
    found = float((ours - theirs).abs().max() / ours.abs().max())
    if not found <= TOLERANCE:
        raise UserError(
            f"export to diffusers: its {what} computes something else (difference {found:.1e}); nothing was written"
        )
    return found


def _write_weights(state: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in state.items()}, path, {"format": "pt"})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
