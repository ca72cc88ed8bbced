"""Pictures to token ids and back: an encoder, a quantizer, a decoder.

Shapes: B batch, H and W pixels, N = rows x columns tokens of a picture in raster order, D width of a code.
Sources: VQ-VAE https://arxiv.org/abs/1711.00937, dVAE https://arxiv.org/abs/2102.12092, VQGAN https://arxiv.org/abs/2012.09841,
FSQ https://arxiv.org/abs/2309.15505.
"""

from typing import Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn.conv import PictureDecoder, PictureEncoder
from mm.nn.precision import full_precision
from mm.nn.quantize import FiniteScalarQuantizer, GumbelQuantizer, Quantized, VectorQuantizer
from mm.tokenizers.limits import check_ids, check_pictures
from mm.types import Sampling

USUAL = Sampling()
LAPLACE_EPS = 0.1
"""Pixels are squeezed into (eps, 1 - eps) for logit-Laplace distributions (https://arxiv.org/abs/2102.12092, A.3)."""


class FsqConfig(StrictConfig):
    """Finite scalar quantization: each channel of a code is rounded to one of a few values.

    Args:
        levels: Values of each channel; their product is the number of codes.
    """

    kind: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @model_validator(mode="after")
    def _possible(self) -> "FsqConfig":
        if not self.levels or min(self.levels) < 2:
            raise ValueError("levels: each channel needs at least 2 values")
        return self


class CodebookConfig(StrictConfig):
    """Vector quantization: the nearest of a codebook's vectors, which follow the features by moving averages.

    Args:
        codebook_size: Number of codes.
        width: D.
        commitment: Weight of the loss that keeps features near their code.
        ema_decay: Of the moving averages; 0 learns the codebook by gradient.
        unit_length: Compare directions instead of vectors.
        dead_after: Codes that were used less than so often per step on average are started anew; 0 leaves them.
    """

    kind: Literal["vq"] = "vq"
    codebook_size: int = Field(default=1024, ge=2)
    width: int = Field(default=8, ge=1)
    commitment: float = Field(default=0.25, ge=0)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    unit_length: bool = False
    dead_after: float = Field(default=0.05, ge=0)


class GumbelConfig(StrictConfig):
    """Gumbel-softmax relaxation of a categorical code, DALL-E's dVAE.

    Args:
        codebook_size: Number of codes.
        width: D.
        temperature: First and last temperature, annealed over ``anneal_steps``.
        kl_weight: Largest weight of the divergence from the uniform prior, reached linearly after ``kl_steps``. The divergence
            is a mean over tokens, the reconstruction one over pixels and channels: DALL-E's 6.6, of a sum over tokens, is
            0.034 here (6.6 times 1,024 tokens over 3 x 256 x 256).
        anneal_steps: Steps until the last temperature (cosine).
        kl_steps: Steps until the largest weight.
    """

    kind: Literal["gumbel"] = "gumbel"
    codebook_size: int = Field(default=1024, ge=2)
    width: int = Field(default=64, ge=1)
    temperature: tuple[PositiveFloat, PositiveFloat] = (1.0, 1 / 16)
    kl_weight: float = Field(default=0.0, ge=0)
    anneal_steps: int = Field(default=1000, ge=1)
    kl_steps: int = Field(default=1000, ge=1)


class PictureNetworkConfig(StrictConfig):
    """Encoder and decoder of a picture autoencoder.

    Args:
        image_size: Side of the square picture in pixels; at least the window of SSIM.
        patch: Side of the patch that becomes one cell of the first stage, pixels.
        widths: Channels of the stages, fine to coarse; the grid halves between two of them.
        num_blocks: Residual blocks of a stage.
        num_heads: Attention heads between the blocks of the coarsest stage; 0 for none.
        refinement: Further blocks in each stage of the decoder, which a trained one may be given.
    """

    image_size: int = Field(default=64, ge=11)
    patch: int = Field(default=4, ge=1)
    widths: tuple[int, ...] = (96, 192)
    num_blocks: int = Field(default=1, ge=1)
    num_heads: int = Field(default=0, ge=0)
    refinement: int = Field(default=0, ge=0)

    @property
    def stride(self) -> int:
        """Pixels of a cell's side in the coarsest grid."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the coarsest grid."""
        side = self.image_size // self.stride
        return side, side

    def encoder(self, out_width: int) -> PictureEncoder:
        """With fresh weights."""
        return PictureEncoder(self.patch, self.widths, self.num_blocks, out_width, self.num_heads)

    def decoder(self, in_width: int, out_channels: int = 3) -> PictureDecoder:
        """With fresh weights."""
        stages = self.patch, self.widths, self.num_blocks
        return PictureDecoder(in_width, *stages, out_channels, self.num_heads, self.refinement)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.widths:
            raise ValueError("widths: at least one stage is needed")
        if self.image_size % self.stride:
            raise ValueError(f"image_size {self.image_size} must be a multiple of the token's side of {self.stride} pixels")
        if self.num_heads and self.num_blocks == 1:
            raise ValueError("num_heads: attention stands between blocks, take num_blocks 2 or more")
        if self.num_heads and self.widths[-1] % self.num_heads:
            raise ValueError(f"the last of widths, {self.widths[-1]}, must be a multiple of num_heads {self.num_heads}")
        return self


class ImageTokenizerConfig(PictureNetworkConfig):
    """The network of a picture tokenizer.

    Args:
        quantizer: What makes features discrete.
        pixels: What the decoder predicts of a pixel: its value, or the location and scale of a logit-Laplace distribution.
    """

    quantizer: FsqConfig | CodebookConfig | GumbelConfig = Field(default=FsqConfig(), discriminator="kind")
    pixels: Literal["value", "laplace"] = "value"


class PictureCoder(nn.Module):
    """What autoencoders of pictures have in common: how pixels go in and come out.

    Args:
        image_size: Side of the square picture in pixels.
        grid: Rows and columns of what the encoder makes of it.
        laplace: Whether the decoder gives a logit-Laplace distribution.
    """

    encoder: nn.Module
    decoder: PictureDecoder

    def __init__(self, *, image_size: int, grid: tuple[int, int], laplace: bool = False) -> None:
        super().__init__()
        self.image_size, self.grid, self.laplace = image_size, grid, laplace

    def normalise(self, image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 H W"]:
        """uint8 pixels to -1..1, or into (eps, 1 - eps) for the logit-Laplace distribution."""
        share = image.float() / 255
        return (1 - 2 * LAPLACE_EPS) * share + LAPLACE_EPS if self.laplace else 2 * share - 1

    def to_pixels(self, output: Float[Tensor, "b c H W"]) -> UInt8[Tensor, "b 3 H W"]:
        """The decoder's output to uint8 pixels: the inverse of `normalise`."""
        return (255 * self.shares(output).clamp(0, 1)).round().to(torch.uint8)

    def shares(self, output: Float[Tensor, "b c H W"]) -> Float[Tensor, "b 3 H W"]:
        """The decoder's output as pixels in 0..1, differentiable; values may lie outside."""
        output = output.float()
        if self.laplace:
            return (output[:, :3].sigmoid() - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS)
        return (output + 1) / 2


class ImageTokenizer(PictureCoder):
    """Makes token ids of pictures and pictures of token ids.

    Args:
        encoder: Pixels in -1..1 to the quantizer's input, ``(B, D', h, w)``.
        quantizer: Of `mm.nn.quantize`.
        decoder: Codes ``(B, D, h, w)`` to pixels in -1..1, ``(B, 3, H, W)``, or to location and log scale in logit space,
            ``(B, 6, H, W)``.
        image_size: Side of the square picture in pixels.
        grid: Rows and columns of tokens.
        laplace: Whether the decoder gives a logit-Laplace distribution.
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: FiniteScalarQuantizer | VectorQuantizer | GumbelQuantizer,
        decoder: PictureDecoder,
        *,
        image_size: int,
        grid: tuple[int, int],
        laplace: bool = False,
    ) -> None:
        super().__init__(image_size=image_size, grid=grid, laplace=laplace)
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.quantizer.codebook_size

    @torch.no_grad()
    @full_precision
    def encode(self, image: UInt8[Tensor, "b 3 H W"]) -> Int64[Tensor, "b n"]:
        """Token ids of pictures, uint8 in 0..255. Raises `UserError` for pictures of another size."""
        check_pictures(image, self.image_size)
        return self.quantize(self.normalise(image)).ids

    @torch.no_grad()
    @full_precision
    def decode(self, ids: Int64[Tensor, "b n"]) -> UInt8[Tensor, "b 3 H W"]:
        """Pictures of token ids, uint8 in 0..255. Raises `UserError` for another number of tokens, or unknown ids."""
        check_ids(ids, self.grid, self.vocab_size)
        return self.to_pixels(self.reconstruct(self.quantizer.lookup(ids)))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, rows and columns of `to_latents`."""
        return (self.quantizer.width, *self.grid)

    @torch.no_grad()
    @full_precision
    def to_latents(self, image: UInt8[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """The codes of pictures, brought to zero mean and unit spread over the codebook."""
        codes = self.quantizer.lookup(self.encode(image))
        mean, spread = self._code_statistics()
        return rearrange((codes - mean) / spread, "b (h w) d -> b d h w", h=self.grid[0])

    @torch.no_grad()
    @full_precision
    def from_latents(self, latents: Float[Tensor, "b d h w"]) -> UInt8[Tensor, "b 3 H W"]:
        """Pictures of the codes that are nearest to latents."""
        mean, spread = self._code_statistics()
        codes = rearrange(latents.float(), "b d h w -> b (h w) d") * spread + mean
        every = self._codebook()
        ids = torch.stack([torch.cdist(row, every).argmin(1) for row in codes])
        return self.decode(ids)

    def _codebook(self) -> Float[Tensor, "k d"]:
        place = next(self.decoder.parameters()).device
        return self.quantizer.lookup(torch.arange(self.vocab_size, device=place)[None])[0].float()

    def _code_statistics(self) -> tuple[Tensor, Tensor]:
        codes = self._codebook()
        return codes.mean(0), codes.std(0).clamp(min=1e-6)

    def quantize(self, pixels: Float[Tensor, "b 3 H W"]) -> Quantized:
        """Codes and ids of pixels that `normalise` gave."""
        features = self.encoder(pixels.contiguous(memory_format=torch.channels_last))  # the layout of fast convolutions
        return self.quantizer(rearrange(features, "b d h w -> b (h w) d"))

    def reconstruct(self, codes: Float[Tensor, "b n d"]) -> Float[Tensor, "b c H W"]:
        """The decoder's output for codes: pixels as `normalise` gives them, or the parameters of their distribution."""
        features = rearrange(codes, "b (h w) d -> b d h w", h=self.grid[0])
        return self.decoder(features.contiguous(memory_format=torch.channels_last))


def build_image_tokenizer(config: ImageTokenizerConfig) -> ImageTokenizer:
    """A picture tokenizer with fresh weights."""
    quantizer, in_width = _quantizer(config.quantizer)
    laplace = config.pixels == "laplace"
    return ImageTokenizer(
        config.encoder(in_width),
        quantizer,
        config.decoder(quantizer.width, out_channels=6 if laplace else 3),
        image_size=config.image_size,
        grid=config.grid,
        laplace=laplace,
    )


def _quantizer(
    config: FsqConfig | CodebookConfig | GumbelConfig,
) -> tuple[FiniteScalarQuantizer | VectorQuantizer | GumbelQuantizer, int]:
    """The quantizer and the width of its input."""
    if isinstance(config, FsqConfig):
        return FiniteScalarQuantizer(config.levels), len(config.levels)
    if isinstance(config, CodebookConfig):
        options = config.model_dump(exclude={"kind", "codebook_size", "width"})
        return VectorQuantizer(config.codebook_size, config.width, **options), config.width
    return GumbelQuantizer(config.codebook_size, config.width, temperature=config.temperature[0]), config.codebook_size


def kept_tokens(keep: Bool[Tensor, "b H W"], grid: tuple[int, int]) -> Bool[Tensor, "b n"]:
    """Tokens all of whose pixels are kept, in raster order."""
    share = F.adaptive_avg_pool2d(keep.float()[:, None], grid)
    return (share == 1).flatten(1)


NOISE_OPTIONS = ("solver", "rescale", "threshold", "strength", "shift")
"""Of `mm.types.Sampling`: they mean nothing to painters with tokens."""


def check_token_sampling(sampling: Sampling) -> None:
    """Raises `UserError` for settings that are for generators from noise."""
    for name in NOISE_OPTIONS:
        if getattr(sampling, name) != getattr(USUAL, name):
            raise UserError(
                f"{name}: is for generators from noise, not for painters with tokens; leave it out, or take emoji-flow"
            )


def check_kept(image: Tensor | None, keep: Tensor | None) -> None:
    """Raises `UserError` where a picture is given without a part to keep: tokens are kept or made anew, none are changed."""
    if image is not None and keep is None:
        raise UserError("pictures made of tokens are not changed as a whole; say which part to keep, or take emoji-flow")
