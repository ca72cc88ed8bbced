"""KL: pictures become a small grid of numbers and come back. The first stage of generators that work in latents.

Paper: latent diffusion https://arxiv.org/abs/2112.10752 (section 3.1, ``KL-reg``). The encoder gives a normal distribution for
each number, the decoder sees a draw from it, and a slight pull towards the standard normal distribution (``kl_weight``) keeps
the numbers small and their neighbourhoods meaningful.

A generator learns the means, shifted and scaled to zero mean and unit spread in each channel. Shift and scale are averages over
the last training batches, which follow the encoder as it changes, and are saved with the weights. They need not be exact: what
`to_latents` divides by `from_latents` multiplies by, so that reconstructions are the same for any values, and a generator only
needs the spread to be near 1. The paper's 0.18215 is one over the spread of the latents of its own encoder, and wrong for any
other.

What reconstructions are judged by, and the deviations there: `mm.systems.first_stage`. Another deviation: the scale of the
reconstruction's likelihood is not learned.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mm.nn.discriminator import PatchDiscriminator
from mm.nn.quantize import sum_over_processes
from mm.systems.first_stage import FirstStage, FirstStageSettings, build_discriminator, perceptual_network
from mm.tokenizers.kl import KlAutoencoder, KlAutoencoderConfig, build_kl_autoencoder
from mm.types import Batch, Losses


class KlConfig(FirstStageSettings):
    """An autoencoder and what it is trained with.

    Args:
        autoencoder: The network.
        kl_weight: Of the divergence of a picture's latents from the standard normal distribution, summed over latents, beside
            a reconstruction summed over pixels and channels, as in the paper's code. Both are divided by the number of pixels
            times channels here, so that the reconstruction is a mean.
        statistics_decay: Share of the shift and the scale of latents that stays at each step.
    """

    name: Literal["kl"] = "kl"
    autoencoder: KlAutoencoderConfig = KlAutoencoderConfig()
    kl_weight: float = Field(default=1e-6, ge=0)
    statistics_decay: float = Field(default=0.99, ge=0, lt=1)

    @property
    def picture_side(self) -> int:
        return self.autoencoder.image_size


class Kl(FirstStage):
    """An autoencoder in training.

    Args:
        autoencoder: Encoder and decoder.
        config: Weights of the losses.
        discriminator: Judges reconstructions, where ``adversarial_weight`` is above 0.
        perceptual: Gives feature maps; held fixed and no part of the saved weights.
    """

    def __init__(
        self,
        autoencoder: KlAutoencoder,
        config: KlConfig,
        *,
        discriminator: PatchDiscriminator | None = None,
        perceptual: nn.Module | None = None,
    ) -> None:
        super().__init__(config, perceptual)
        self.autoencoder, self.config = autoencoder, config
        self.discriminator = discriminator
        self._seen: list[Tensor] = []

    @property
    def coder(self) -> KlAutoencoder:
        """See `FirstStage`."""
        return self.autoencoder

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("autoencoder.decoder.refinement.",)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `mm.types.Compresses`."""
        return self.autoencoder.latent_shape

    def to_latents(self, image: Tensor) -> Tensor:
        """See `mm.types.Compresses`: means."""
        return self.autoencoder.to_latents(image)

    def from_latents(self, latents: Tensor) -> Tensor:
        """See `mm.types.Compresses`."""
        return self.autoencoder.from_latents(latents)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Reconstruction of a draw, the divergence, and where configured perceptual and adversarial losses."""
        assert batch.image is not None
        pixels = self.autoencoder.normalise(batch.image)
        mean, log_variance = self.autoencoder.posterior(pixels)
        if self.training and torch.is_grad_enabled():
            self._note(mean.detach())
        drawn = mean + (log_variance / 2).exp() * batch.draws(mean.device).normal(*mean.shape[1:])
        total, parts = self.judged(self.autoencoder.reconstruct(drawn), pixels, batch.image, step)
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean() / 2
        total = total + self.config.kl_weight * divergence / pixels[0].numel()
        parts["divergence"] = divergence
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Move shift and scale towards those of the pictures of this step, of all processes."""
        if not self._seen:
            return
        sums = torch.stack(self._seen).sum(0)
        self._seen = []
        sum_over_processes(sums)
        count, total, squares = sums
        apart = total / count
        variance = (squares / count - apart.square()).clamp(min=0)
        self.autoencoder.measure(self.autoencoder.mean + apart, variance, self.config.statistics_decay)

    def _note(self, mean: Tensor) -> None:
        """Number, sum and sum of squares of each channel, counted from the present shift, where little is lost to rounding."""
        apart = mean - self.autoencoder.mean[:, None, None]
        counts = torch.full_like(self.autoencoder.mean, mean.numel() / mean.shape[1])
        self._seen.append(torch.stack([counts, apart.sum((0, 2, 3)), apart.square().sum((0, 2, 3))]))


def build(config: KlConfig, parts: Mapping[str, Any] | None = None) -> Kl:
    """Build an autoencoder with fresh weights; ``parts["perceptual"]`` is a system with a picture encoder."""
    return Kl(
        build_kl_autoencoder(config.autoencoder),
        config,
        discriminator=build_discriminator(config),
        perceptual=perceptual_network(config, parts),
    )
