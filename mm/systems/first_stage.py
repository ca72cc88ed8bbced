"""What picture autoencoders are trained with, whatever lies between encoder and decoder: distances and a discriminator.

Papers: VQGAN https://arxiv.org/abs/2012.09841, latent diffusion https://arxiv.org/abs/2112.10752.

Deviations: the discriminator learns in the same backward pass as the rest (each side's gradient is kept from the other's
parameters) and has group norms; perceptual distances come from one of the suite's own picture encoders, named by
``perceptual``, because the network of LPIPS cannot be had everywhere; the discriminator is trained before ``adversarial_from``
too, so that it knows something when it is first listened to.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.losses.reconstruction import adaptive_weight, frozen_call, hinge_loss, logit_laplace, perceptual_distance
from mm.nn.discriminator import PatchDiscriminator
from mm.nn.freeze import freeze
from mm.systems.settings import SystemSettings
from mm.tokenizers.image import PictureCoder
from mm.types import Embeds, System

DISCRIMINATOR_BETAS = (0.5, 0.9)
PERFECT = 1e-4
"""Mean squared error, in pixels of -1..1, below which ``reconstruction: psnr`` asks for little more (46 dB)."""


class FirstStageSettings(SystemSettings):
    """What reconstructions are judged by.

    Args:
        reconstruction: Distance of pixels in -1..1: ``l2``, ``l1``, or ``psnr``, the logarithm of each picture's ``l2``, by
            which simple pictures count like rich ones; ``pixels: laplace`` has its own likelihood.
        perceptual: MODEL whose picture encoder gives perceptual distances; none by default.
        perceptual_weight: Of that distance.
        adversarial_weight: Of deceiving a patch discriminator, on top of the adaptive weight; 0 leaves it out.
        adversarial_from: First step at which the discriminator counts.
        discriminator_width: Channels of its first layer.
    """

    reconstruction: Literal["l2", "l1", "psnr"] = "l2"
    perceptual: str | None = None
    perceptual_weight: float = Field(default=1.0, gt=0)
    adversarial_weight: float = Field(default=0.0, ge=0)
    adversarial_from: int = Field(default=0, ge=0)
    discriminator_width: int = Field(default=64, ge=1)

    @property
    def text_limits(self) -> None:
        return None

    def training_parts(self) -> dict[str, str]:
        return {} if self.perceptual is None else {"perceptual": self.perceptual}


@runtime_checkable
class Stages(Protocol):
    """What perceptual distances need of a picture encoder."""

    def stages(self, image: Tensor) -> list[Tensor]:
        """Feature maps, fine to coarse, of pictures in 0..1."""
        ...


class FirstStage(System):
    """A picture autoencoder in training.

    Args:
        config: Weights of the losses.
        perceptual: Gives feature maps (`Stages`); held fixed and no part of the saved weights.
    """

    discriminator: PatchDiscriminator | None

    def __init__(self, config: FirstStageSettings, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self._judging = config
        self._perceptual = [] if perceptual is None else [freeze(perceptual)]  # in a list: not a child, so not saved

    @property
    def coder(self) -> PictureCoder:
        """Encoder and decoder."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Take what is no child along to other devices."""
        for network in self._perceptual:
            network._apply(fn)
        return super()._apply(fn, recurse)

    def cast_(self, dtype: torch.dtype) -> None:
        """Stays in fp32: rounded, neighbouring codes merge and latents are no longer those that a generator learned."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The discriminator has its own averaging rates."""
        groups = super().parameter_groups()
        if self.discriminator is None:
            return groups
        own = {id(parameter) for parameter in self.discriminator.parameters()}
        split = [
            {**group, "params": [p for p in group["params"] if (id(p) in own) == of_discriminator]}
            | ({"betas": DISCRIMINATOR_BETAS} if of_discriminator else {})
            for group in groups
            for of_discriminator in (False, True)
        ]
        return [group for group in split if group["params"]]

    def judged(self, output: Tensor, pixels: Tensor, image: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of reconstructions and its parts.

        Args:
            output: Of the decoder.
            pixels: What it should be, as `PictureCoder.normalise` gives it.
            image: The same as pixels uint8 ``(B, 3, H, W)``.
            step: Number of the step.
        """
        distance = self._distance(output, pixels)
        parts = {"reconstruction": distance, "psnr": self._psnr(output, image)}
        if self._perceptual:
            parts["perceptual"] = self._perceptual_distance(output, image)
            distance = distance + self._judging.perceptual_weight * parts["perceptual"]
        total = distance
        if self.discriminator is not None:
            adversarial = self._adversarial(output, image, distance, step)
            parts |= adversarial
            total = total + adversarial["discriminator"] + adversarial["deception"]
        return total, parts

    def _distance(self, output: Tensor, pixels: Tensor) -> Tensor:
        if self.coder.laplace:
            return logit_laplace(output, pixels)
        if self._judging.reconstruction == "psnr":
            return ((output.float() - pixels).square().mean((1, 2, 3)) + PERFECT).log().mean()
        measure = F.mse_loss if self._judging.reconstruction == "l2" else F.l1_loss
        return measure(output.float(), pixels)

    def _psnr(self, output: Tensor, image: Tensor) -> Tensor:
        """Mean over pictures, in decibels."""
        made = self.coder.to_pixels(output.detach())
        error = ((made.float() - image.float()) / 255).square().mean((1, 2, 3))
        return (-10 * torch.log10(error.clamp(min=1e-10))).mean()

    def _perceptual_distance(self, output: Tensor, image: Tensor) -> Tensor:
        [network] = self._perceptual
        assert isinstance(network, Stages)
        with torch.no_grad():
            target = network.stages(image.float() / 255)
        return perceptual_distance(network.stages(self.coder.shares(output)), target)

    def _adversarial(self, output: Tensor, image: Tensor, distance: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's own loss, and the decoder's from what it makes of the reconstruction; pixels in -1..1."""
        assert self.discriminator is not None
        made, real = 2 * self.coder.shares(output) - 1, image.float() / 127.5 - 1
        losses = {"discriminator": hinge_loss(self.discriminator(real), self.discriminator(made.detach()))}
        deception = -frozen_call(self.discriminator, made).mean()
        weight = self._judging.adversarial_weight if step >= self._judging.adversarial_from else 0.0
        if weight and torch.is_grad_enabled():
            deception = deception * adaptive_weight(distance, deception, self.coder.decoder.output.weight)
        return losses | {"deception": weight * deception}


def build_discriminator(config: FirstStageSettings) -> PatchDiscriminator | None:
    """With fresh weights, where it counts."""
    return PatchDiscriminator(config.discriminator_width) if config.adversarial_weight else None


def perceptual_network(config: FirstStageSettings, parts: Mapping[str, Any] | None) -> nn.Module | None:
    """The picture encoder of ``parts["perceptual"]``, if any. Raises `ConfigError` where it has no feature maps."""
    if not parts or "perceptual" not in parts:
        return None
    system = parts["perceptual"]
    network = system.encoders().get("image") if isinstance(system, Embeds) else None
    if not isinstance(network, Stages):
        raise ConfigError(
            f"perceptual: '{config.perceptual}' has no picture encoder with feature maps; take a model such as emoji-clip"
        )
    return network  # pyright: ignore[reportReturnType]
