"""Pictures to a grid of normal distributions and back: the first stage of latent diffusion (https://arxiv.org/abs/2112.10752).

Shapes: B batch, H and W pixels, D channels of a latent, h and w its grid.
"""

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn

from mm.nn.conv import PictureDecoder
from mm.nn.precision import full_precision
from mm.tokenizers.image import PictureCoder, PictureNetworkConfig
from mm.tokenizers.limits import check_pictures

MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0
"""As in the paper's code."""

MIN_SPREAD = 1e-6


class KlAutoencoderConfig(PictureNetworkConfig):
    """The network of an autoencoder.

    Args:
        channels: D.
    """

    channels: int = Field(default=4, ge=1)


class KlAutoencoder(PictureCoder):
    """Makes latents of pictures and pictures of latents.

    Args:
        encoder: Pixels in -1..1 to means and log variances, ``(B, 2 D, h, w)``.
        decoder: Latents ``(B, D, h, w)`` to pixels in -1..1, ``(B, 3, H, W)``.
        channels: D.
        image_size: Side of the square picture in pixels.
        grid: h and w.

    Attributes:
        mean, variance: Of each channel over the means of training pictures, ``(D,)``: the shift and squared scale of what
            generators work with. Saved with the weights, 0 and 1 until the first `measure`.
        measured: Number of calls of `measure`.
    """

    mean: Tensor
    variance: Tensor
    measured: Tensor

    def __init__(
        self, encoder: nn.Module, decoder: PictureDecoder, channels: int, *, image_size: int, grid: tuple[int, int]
    ) -> None:
        super().__init__(image_size=image_size, grid=grid)
        self.encoder, self.decoder = encoder, decoder
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("measured", torch.zeros((), dtype=torch.int64))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """D, h and w."""
        return (len(self.mean), *self.grid)

    def posterior(self, pixels: Float[Tensor, "b 3 H W"]) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h w"]]:
        """Means and clamped log variances of pixels that `normalise` gave, fp32."""
        features = self.encoder(pixels.contiguous(memory_format=torch.channels_last)).float().contiguous()
        mean, log_variance = features.chunk(2, 1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def reconstruct(self, latents: Float[Tensor, "b d h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pixels in -1..1 of latents as `posterior` gives them."""
        return self.decoder(latents.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def measure(self, mean: Float[Tensor, " d"], variance: Float[Tensor, " d"], decay: float) -> None:
        """Move the statistics towards those of a batch, by ``1 - decay``, and by ``10 / (10 + n)`` behind n calls where that is
        more, so that what an encoder gave at first fades quickly, as in `mm.training.ema.Ema`."""
        rate = (10 / (10 + self.measured)).clamp(min=1 - decay)
        self.measured += 1
        apart = mean - self.mean
        self.mean += rate * apart
        self.variance += rate * (variance - self.variance + (1 - rate) * apart.square())

    @torch.no_grad()
    @full_precision
    def to_latents(self, image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Means of pictures, brought to about zero mean and unit spread. Raises `UserError` for pictures of another size."""
        check_pictures(image, self.image_size)
        mean, _ = self.posterior(self.normalise(image))
        return (mean - self._shift) / self._scale

    @torch.no_grad()
    @full_precision
    def from_latents(self, latents: Float[Tensor, "b d h w"]) -> UInt8[Tensor, "b 3 H W"]:
        """Pictures of what `to_latents` gives."""
        return self.to_pixels(self.reconstruct(latents.float() * self._scale + self._shift))

    @property
    def _shift(self) -> Tensor:
        return self.mean[:, None, None]

    @property
    def _scale(self) -> Tensor:
        return self.variance.sqrt().clamp(min=MIN_SPREAD)[:, None, None]


def build_kl_autoencoder(config: KlAutoencoderConfig) -> KlAutoencoder:
    """An autoencoder with fresh weights."""
    return KlAutoencoder(
        config.encoder(2 * config.channels),
        config.decoder(config.channels),
        config.channels,
        image_size=config.image_size,
        grid=config.grid,
    )
