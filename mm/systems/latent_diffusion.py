"""Latent diffusion as Stable Diffusion has it: a UNet denoises the latents of a KL autoencoder, led by CLIP's text encoder.

Paper: https://arxiv.org/abs/2112.10752. It is `mm.systems.flow` on a diffusion's path: loss, solvers and guidance are the same
code. A folder in diffusers' format is such a model (`mm.published.stable_diffusion`): autoencoder and text encoder are held
fixed, all positions of a text are attended to, padding included, and the empty prompt stands for none.

Deviation: latents are the mean of the autoencoder's posterior, not drawn from it, so that they can be kept.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from mm.generators.unet import UnetConfig
from mm.losses.diffusion import Prediction
from mm.nn.freeze import freeze
from mm.systems import flow
from mm.systems.flow import DenoiserConfig, DiffusionPathConfig, Flow, FlowSettings, PathConfig

STABLE_DIFFUSION = DiffusionPathConfig(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)


class LatentDiffusionConfig(FlowSettings):
    """See `mm.systems.flow.FlowSettings`, with Stable Diffusion's defaults. ``text`` is held fixed."""

    name: Literal["latent-diffusion"] = "latent-diffusion"
    denoiser: DenoiserConfig = UnetConfig()
    path: PathConfig = STABLE_DIFFUSION
    prediction: Prediction = "noise"
    vector_condition: bool = False
    empty_prompt: tuple[int, ...] = Field(min_length=1)


def build(config: LatentDiffusionConfig, parts: Mapping[str, Any] | None = None) -> Flow:
    """Build the generator with fresh weights; ``parts`` may hold ``latents``."""
    system = flow.build(config, parts)
    freeze(system.text)
    return system
