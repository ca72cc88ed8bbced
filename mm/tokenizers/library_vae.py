"""diffusers' AutoencoderKL: the latents of Stable Diffusion, SDXL, SD3 and their like.

Shapes: B pictures, H and W pixels, C channels of a latent, h x w its grid.
Sources: https://arxiv.org/abs/2112.10752; scale and shift as in https://github.com/huggingface/diffusers.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, UInt8
from pydantic import Field, JsonValue
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import ConfigError, UserError
from mm.nn.precision import full_precision
from mm.tokenizers.library_image import BUILD_FAILURES
from mm.tokenizers.limits import check_pictures

FIXED = ("in_channels", "out_channels", "sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Options that are said elsewhere, or that no picture or latent here has."""


class LibraryVaeConfig(StrictConfig):
    """An AutoencoderKL in diffusers' terms.

    Args:
        image_size: Side of the square picture in pixels.
        scaling_factor: What the encoder's latents are multiplied by, the inverse of their standard deviation.
        shift_factor: What is taken from them before, their mean.
        options: Arguments of ``AutoencoderKL``, such as ``{block_out_channels: [128, 256, 512, 512], latent_channels: 4}``.
    """

    image_size: int = Field(ge=1)
    scaling_factor: float = Field(default=0.18215, gt=0)
    shift_factor: float = 0.0
    options: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it


class LibraryVae(nn.Module):
    """See above.

    Args:
        model: diffusers' module.
        config: Sizes, scale and shift.
    """

    def __init__(self, model: nn.Module, config: LibraryVaeConfig) -> None:
        super().__init__()
        self.model: Any = model
        self.config = config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """C, h and w."""
        side = self.config.image_size // stride(self.model)
        return self.model.config.latent_channels, side, side

    @torch.no_grad()
    @full_precision
    def to_latents(self, image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        """Shifted and scaled means of the posteriors. Raises `UserError` for pictures of another size."""
        check_pictures(image, self.config.image_size)
        means = self.model.encode(image.float() / 127.5 - 1).latent_dist.mode()
        return (means - self.config.shift_factor) * self.config.scaling_factor

    @torch.no_grad()
    @full_precision
    def from_latents(self, latents: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b 3 H W"]:
        """Pixels, clipped and rounded."""
        [pixels] = self.model.decode(latents.float() / self.config.scaling_factor + self.config.shift_factor, return_dict=False)
        return ((pixels + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)


def stride(model: Any) -> int:
    """Pixels of a latent's side."""
    return 2 ** (len(model.config.block_out_channels) - 1)


def measured(
    config: LibraryVaeConfig, latents: Iterable[Float[Tensor, "b c h w"]], *, shifted: bool = False
) -> LibraryVaeConfig:
    """The configuration with scale, and shift where asked, that give these pictures' latents unit spread (and zero mean).

    Args:
        config: Of the autoencoder that gave them.
        latents: What its `LibraryVae.to_latents` made of pictures, any number of batches.
        shifted: Also take their mean away; Stable Diffusion 1 and 2 do not.

    Raises:
        UserError: There are no latents, or they are all the same.
    """
    count, total, squares = 0, 0.0, 0.0
    for part in latents:
        raw = part.double() / config.scaling_factor + config.shift_factor
        count, total, squares = count + raw.numel(), total + float(raw.sum()), squares + float(raw.square().sum())
    mean = total / count if count else 0.0
    variance = squares / count - mean**2 if count else 0.0
    if variance <= 0:
        raise UserError("scale of latents: there is no picture to measure it on, or all are alike; give more pictures")
    return config.model_copy(update={"scaling_factor": variance**-0.5, "shift_factor": mean if shifted else 0.0})


def build_library_vae(config: LibraryVaeConfig) -> LibraryVae:
    """The network with fresh weights. Raises `ConfigError` for options that it cannot have."""
    try:
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    except ImportError:
        raise UserError('a KL autoencoder needs diffusers; pip install "mm-suite[diffusion]"') from None
    for name in FIXED:
        if name in config.options:
            raise ConfigError(f"vae.options.{name}: is said elsewhere or fixed; leave it out")
    try:
        model: Any = AutoencoderKL(**config.options)  # pyright: ignore[reportArgumentType]
    except BUILD_FAILURES as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"vae.options: diffusers cannot make this AutoencoderKL: {reason}") from None
    if config.image_size % stride(model):
        raise ConfigError(
            f"vae.image_size {config.image_size} must be a multiple of the latent's side of {stride(model)} pixels"
        )
    return LibraryVae(model, config)
