"""VQ: pictures become a grid of tokens and come back. The first stage of token-based generators.

Papers: VQ-VAE https://arxiv.org/abs/1711.00937 (``quantizer: {kind: vq}``), DALL-E's dVAE https://arxiv.org/abs/2102.12092
(``kind: gumbel`` with ``pixels: laplace``), VQGAN https://arxiv.org/abs/2012.09841 (``adversarial_weight``, ``perceptual``),
FSQ https://arxiv.org/abs/2309.15505 (the default).

Deviations: the discriminator learns in the same backward pass as the rest (each side's gradient is kept from the other's
parameters) and has group norms; perceptual distances come from one of the suite's own picture encoders, named by
``perceptual``, because the network of LPIPS cannot be had everywhere; the discriminator is trained before ``adversarial_from``
too, so that it knows something when it is first listened to.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.losses.reconstruction import adaptive_weight, frozen_call, hinge_loss, logit_laplace, perceptual_distance
from mm.nn.discriminator import PatchDiscriminator
from mm.nn.freeze import freeze
from mm.nn.quantize import CodeUsage, GumbelQuantizer, VectorQuantizer
from mm.systems.settings import SystemSettings
from mm.tokenizers.image import GumbelConfig, ImageTokenizer, ImageTokenizerConfig, build_image_tokenizer
from mm.types import Batch, Embeds, Losses, System

DISCRIMINATOR_BETAS = (0.5, 0.9)
PERFECT = 1e-4
"""Mean squared error, in pixels of -1..1, below which ``reconstruction: psnr`` asks for little more (46 dB)."""


class VqConfig(SystemSettings):
    """A picture tokenizer and what it is trained with.

    Args:
        tokenizer: The network.
        fixed_tokens: Train the decoder alone: pictures keep their tokens, so that what was trained on these remains valid.
        reconstruction: Distance of pixels in -1..1: ``l2``, ``l1``, or ``psnr``, the logarithm of each picture's ``l2``, by
            which simple pictures count like rich ones; ``pixels: laplace`` has its own likelihood.
        perceptual: MODEL whose picture encoder gives perceptual distances; none by default.
        perceptual_weight: Of that distance.
        adversarial_weight: Of deceiving a patch discriminator, on top of the adaptive weight; 0 leaves it out.
        adversarial_from: First step at which the discriminator counts.
        discriminator_width: Channels of its first layer.
    """

    name: Literal["vq"] = "vq"
    tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    fixed_tokens: bool = False
    reconstruction: Literal["l2", "l1", "psnr"] = "l2"
    perceptual: str | None = None
    perceptual_weight: float = Field(default=1.0, gt=0)
    adversarial_weight: float = Field(default=0.0, ge=0)
    adversarial_from: int = Field(default=0, ge=0)
    discriminator_width: int = Field(default=64, ge=1)

    @property
    def picture_side(self) -> int:
        return self.tokenizer.image_size

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


class Vq(System):
    """A picture tokenizer in training.

    Args:
        tokenizer: Encoder, quantizer and decoder.
        config: Weights of the losses.
        discriminator: Judges reconstructions, where `VqConfig.adversarial_weight` is above 0.
        perceptual: Gives feature maps (`Stages`); held fixed and no part of the saved weights.
    """

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        config: VqConfig,
        *,
        discriminator: PatchDiscriminator | None = None,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.config = tokenizer, config
        if config.fixed_tokens:
            freeze(tokenizer.encoder)
            freeze(tokenizer.quantizer)
        self.discriminator = discriminator
        self._perceptual = [] if perceptual is None else [freeze(perceptual)]  # in a list: not a child, so not saved

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Vq":
        """Take what is no child along to other devices."""
        for network in self._perceptual:
            network._apply(fn)
        return super()._apply(fn, recurse)

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("tokenizer.decoder.refinement.",)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.tokenizer.grid

    def encode(self, image: Tensor) -> Tensor:
        """Pixels uint8 ``(B, 3, H, W)`` to token ids ``(B, N)``."""
        return self.tokenizer.encode(image)

    def decode(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, N)`` to pixels uint8 ``(B, 3, H, W)``."""
        return self.tokenizer.decode(ids)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `mm.types.Compresses`."""
        return self.tokenizer.latent_shape

    def to_latents(self, image: Tensor) -> Tensor:
        """See `mm.types.Compresses`: the codes."""
        return self.tokenizer.to_latents(image)

    def from_latents(self, latents: Tensor) -> Tensor:
        """See `mm.types.Compresses`: pictures of the nearest codes."""
        return self.tokenizer.from_latents(latents)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Reconstruction, the quantizer's own loss, and where configured perceptual and adversarial losses."""
        assert batch.image is not None
        tokenizer = self.tokenizer
        if isinstance(tokenizer.quantizer, GumbelQuantizer):
            tokenizer.quantizer.temperature = _annealed(self._gumbel, step)
        pixels = tokenizer.normalise(batch.image)
        quantized = tokenizer.quantize(pixels)
        output = tokenizer.reconstruct(quantized.codes)
        distance = self._distance(output, pixels)
        parts = {"reconstruction": distance, "psnr": self._psnr(output, batch.image)}
        parts |= _usage(quantized.ids, tokenizer.vocab_size)
        if self._perceptual:
            parts["perceptual"] = self._perceptual_distance(output, batch.image)
            distance = distance + self.config.perceptual_weight * parts["perceptual"]
        total = distance + self._quantizer_weight(step) * quantized.loss
        parts["quantizer"] = quantized.loss
        if self.discriminator is not None:
            adversarial = self._adversarial(output, batch.image, distance, step)
            parts |= adversarial
            total = total + adversarial["discriminator"] + adversarial["deception"]
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def cast_(self, dtype: torch.dtype) -> None:
        """Stays in fp32: in bf16 neighbouring codes merge."""

    def after_step(self, step: int) -> None:
        """Move the codebook."""
        if isinstance(self.tokenizer.quantizer, VectorQuantizer):
            self.tokenizer.quantizer.update_()

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

    @property
    def _gumbel(self) -> GumbelConfig:
        config = self.config.tokenizer.quantizer
        assert isinstance(config, GumbelConfig)
        return config

    def _quantizer_weight(self, step: int) -> float:
        """Of the quantizer's own loss: 1, or the divergence's weight on its way up."""
        if not isinstance(self.config.tokenizer.quantizer, GumbelConfig):
            return 1.0
        return self._gumbel.kl_weight * min(1.0, (step + 1) / self._gumbel.kl_steps)

    def _distance(self, output: Tensor, pixels: Tensor) -> Tensor:
        if self.tokenizer.laplace:
            return logit_laplace(output, pixels)
        if self.config.reconstruction == "psnr":
            return ((output.float() - pixels).square().mean((1, 2, 3)) + PERFECT).log().mean()
        measure = F.mse_loss if self.config.reconstruction == "l2" else F.l1_loss
        return measure(output.float(), pixels)

    def _psnr(self, output: Tensor, image: Tensor) -> Tensor:
        """Mean over pictures, in decibels."""
        made = self.tokenizer.to_pixels(output.detach())
        error = ((made.float() - image.float()) / 255).square().mean((1, 2, 3))
        return (-10 * torch.log10(error.clamp(min=1e-10))).mean()

    def _perceptual_distance(self, output: Tensor, image: Tensor) -> Tensor:
        [network] = self._perceptual
        assert isinstance(network, Stages)
        with torch.no_grad():
            target = network.stages(image.float() / 255)
        return perceptual_distance(network.stages(self.tokenizer.shares(output)), target)

    def _adversarial(self, output: Tensor, image: Tensor, distance: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's own loss, and the decoder's from what it makes of the reconstruction; pixels in -1..1."""
        assert self.discriminator is not None
        made, real = 2 * self.tokenizer.shares(output) - 1, image.float() / 127.5 - 1
        losses = {"discriminator": hinge_loss(self.discriminator(real), self.discriminator(made.detach()))}
        deception = -frozen_call(self.discriminator, made).mean()
        weight = self.config.adversarial_weight if step >= self.config.adversarial_from else 0.0
        if weight and torch.is_grad_enabled():
            deception = deception * adaptive_weight(distance, deception, self.tokenizer.decoder.output.weight)
        return losses | {"deception": weight * deception}


def _usage(ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """How many codes a batch uses, over the number that random tokens would, and the perplexity of their distribution."""
    counter = CodeUsage(vocab_size)
    counter.update(ids)
    random = 1 - math.exp(-ids.numel() / vocab_size)
    return {"batch_usage": torch.tensor(counter.usage / random), "perplexity": torch.tensor(counter.perplexity)}


def _annealed(config: GumbelConfig, step: int) -> float:
    """Temperature at a step: half a cosine from the first to the last."""
    first, last = config.temperature
    progress = min(1.0, step / config.anneal_steps)
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))


def build(config: VqConfig, parts: Mapping[str, Any] | None = None) -> Vq:
    """Build a tokenizer with fresh weights; ``parts["perceptual"]`` is a system with a picture encoder."""
    perceptual = None
    if parts and "perceptual" in parts:
        system = parts["perceptual"]
        perceptual = system.encoders()["image"] if isinstance(system, Embeds) else None
        if not isinstance(perceptual, Stages):
            raise ConfigError(
                f"perceptual: '{config.perceptual}' has no picture encoder with feature maps; take a model such as emoji-clip"
            )
    if config.tokenizer.pixels == "laplace" and config.reconstruction != "l2":
        raise ConfigError(
            f"reconstruction: {config.reconstruction} does not go with pixels: laplace, which has its own likelihood"
        )
    return Vq(
        build_image_tokenizer(config.tokenizer),
        config,
        discriminator=PatchDiscriminator(config.discriminator_width) if config.adversarial_weight else None,
        perceptual=perceptual,
    )
