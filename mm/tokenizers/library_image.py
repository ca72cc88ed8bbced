"""Published picture tokenizers behind the interface of the suite's own: diffusers' VQModel and OpenAI's dVAE.

VQModel also holds the VQGANs of taming-transformers and latent diffusion, whose network it is under other names.
Shapes: B batch, H and W pixels, h x w tokens of a picture, N = h * w in raster order, D width of a code, K codes.
Sources: VQGAN https://arxiv.org/abs/2012.09841, DALL-E https://arxiv.org/abs/2102.12092 (appendix A).
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn.precision import full_precision
from mm.tokenizers.image import LAPLACE_EPS
from mm.tokenizers.limits import check_ids, check_pictures

BUILD_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError)
"""What diffusers raises for sizes and options that a network cannot have."""

DVAE_MULTIPLES = (1, 2, 4, 8)
"""Channels of the dVAE's four groups, fine to coarse, in multiples of its width."""

DVAE_STRIDE = 2 ** (len(DVAE_MULTIPLES) - 1)


class VqModelConfig(StrictConfig):
    """A network of diffusers' class VQModel, with its names for sizes.

    Args:
        image_size: Side of the square picture in pixels.
        scored: Whether a 1 x 1 convolution scores the codes, as in taming's GumbelVQ, instead of their distance to the latent.
        num_vq_embeddings: K.
        vq_embed_dim: D.
        latent_channels: Width of what the encoder gives and the decoder takes.
        block_out_channels: Channels of the stages, fine to coarse; the grid halves between two of them.
        down_block_types: Of the encoder's stages.
        up_block_types: Of the decoder's stages, coarse to fine.
        layers_per_block: Residual blocks of a stage of the encoder; the decoder's have one more.
        norm_num_groups: Of the group norms.
        norm_type: ``spatial`` scales the decoder's norms by the codes, as in MoVQ.
        act_fn: Activation.
        mid_block_add_attention: Whether there is attention between the two halves of the coarsest stage.
    """

    kind: Literal["vq_model"] = "vq_model"
    image_size: int = Field(ge=1)
    scored: bool = False
    num_vq_embeddings: int = Field(ge=2)
    vq_embed_dim: int = Field(ge=1)
    latent_channels: int = Field(ge=1)
    block_out_channels: tuple[int, ...] = Field(min_length=1, max_length=16)
    down_block_types: tuple[Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], ...]
    up_block_types: tuple[Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], ...]
    layers_per_block: int = Field(ge=1, le=64)
    norm_num_groups: int = Field(default=32, ge=1)
    norm_type: Literal["group", "spatial"] = "group"
    act_fn: str = "silu"
    mid_block_add_attention: bool = True

    @property
    def stride(self) -> int:
        """Pixels of a token's side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @model_validator(mode="after")
    def _possible(self) -> "VqModelConfig":
        if not len(self.block_out_channels) == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError("block_out_channels, down_block_types and up_block_types must have one entry a stage each")
        if self.norm_type == "spatial" and self.vq_embed_dim != self.latent_channels:
            raise ValueError("norm_type spatial needs a vq_embed_dim equal to latent_channels")
        _check_side(self.image_size, self.stride)
        return self


class DvaeConfig(StrictConfig):
    """OpenAI's dVAE; the defaults are those of the published weights.

    Args:
        image_size: Side of the square picture in pixels.
        vocab_size: K.
        width: Channels of the finest of the four groups.
        code_width: D, channels of a code in the decoder.
        num_blocks: Residual blocks of a group.
    """

    kind: Literal["dvae"] = "dvae"
    image_size: int = Field(default=256, ge=1)
    vocab_size: int = Field(default=8192, ge=2)
    width: int = Field(default=256, ge=4)
    code_width: int = Field(default=128, ge=1)
    num_blocks: int = Field(default=2, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> "DvaeConfig":
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4")
        _check_side(self.image_size, DVAE_STRIDE)
        return self


LibraryImageTokenizerConfig = VqModelConfig | DvaeConfig


class VqModel(nn.Module):
    """Runs diffusers' VQModel between pixels in 0..1 and ids.

    Args:
        model: diffusers' module.
        scores: Latents ``(B, D, h, w)`` to logits ``(B, K, h, w)``; None takes the nearest code.
    """

    def __init__(self, model: nn.Module, scores: nn.Conv2d | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self.scores = scores

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.model.quantize.embedding.num_embeddings

    def latents(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """What is quantized."""
        return self.model.quant_conv(self.model.encoder(2 * pixels - 1))

    def ids(self, pixels: Float[Tensor, "b 3 H W"]) -> Int64[Tensor, "b h w"]:
        """Ids of pictures; of the nearest code by diffusers' own quantizer."""
        latents = self.latents(pixels)
        if self.scores is not None:
            return self.scores(latents).argmax(1)
        _, _, (_, _, ids) = self.model.quantize(latents)
        return ids.view(len(latents), *latents.shape[2:])

    def pixels(self, ids: Int64[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures of ids; values may lie outside of 0..1.

        Codes go straight to the decoder: what VQModel's own ``decode`` takes, latents, codes or ids, and whether it quantizes
        them again, depends on an argument and on an option of the checkpoint.
        """
        codes = rearrange(self.model.quantize.embedding(ids), "b h w d -> b d h w")
        spatial = codes if self.model.config.norm_type == "spatial" else None
        return (self.model.decoder(self.model.post_quant_conv(codes), spatial) + 1) / 2


class Dvae(nn.Module):
    """OpenAI's dVAE between pixels in 0..1 and ids.

    Args:
        config: Sizes.
    """

    def __init__(self, config: DvaeConfig) -> None:
        super().__init__()
        widths = [config.width * multiple for multiple in DVAE_MULTIPLES]
        self.stem = _convolution(3, config.width, 7)
        self.encoder = DvaeHalf(config.width, widths, config.vocab_size, num_blocks=config.num_blocks, decodes=False)
        self.codes = nn.Embedding(config.vocab_size, config.code_width)
        self.decoder = DvaeHalf(config.code_width, widths[::-1], 6, num_blocks=config.num_blocks, decodes=True)

    @property
    def vocab_size(self) -> int:
        """K."""
        return self.codes.num_embeddings

    def logits(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b k h w"]:
        """Of the codes at each position."""
        return self.encoder(self.stem((1 - 2 * LAPLACE_EPS) * pixels + LAPLACE_EPS))

    def ids(self, pixels: Float[Tensor, "b 3 H W"]) -> Int64[Tensor, "b h w"]:
        """Ids of pictures."""
        return self.logits(pixels).argmax(1)

    def pixels(self, ids: Int64[Tensor, "b h w"]) -> Float[Tensor, "b 3 H W"]:
        """Pictures of ids: where the logit-Laplace distributions lie; values may lie outside of 0..1."""
        output = self.decoder(rearrange(self.codes(ids), "b h w d -> b d h w"))
        return (output[:, :3].sigmoid() - LAPLACE_EPS) / (1 - 2 * LAPLACE_EPS)


class DvaeHalf(nn.Module):
    """Groups of residual blocks, from whose first to last the grid halves three times, or doubles.

    Args:
        width: Channels of the input.
        widths: Channels of the groups.
        out_width: Channels of the result.
        num_blocks: Residual blocks of a group.
        decodes: Whether the grid doubles, and the kernels are the decoder's.
    """

    def __init__(self, width: int, widths: list[int], out_width: int, *, num_blocks: int, decodes: bool) -> None:
        super().__init__()
        self.decodes = decodes
        gain = 1 / (len(widths) * num_blocks) ** 2
        kernels = (1, 3, 3, 3) if decodes else (3, 3, 3, 1)
        self.groups = nn.ModuleList(
            nn.Sequential(*(DvaeBlock(before if i == 0 else after, after, kernels, gain) for i in range(num_blocks)))
            for before, after in pairwise([width, *widths])
        )
        self.head = _convolution(widths[-1], out_width, 1)

    def forward(self, hidden: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        for i, group in enumerate(self.groups):
            if i > 0:
                hidden = F.interpolate(hidden, scale_factor=2.0) if self.decodes else F.max_pool2d(hidden, 2)
            hidden = group(hidden)
        return self.head(hidden.relu())


class DvaeBlock(nn.Module):
    """Four convolutions behind ReLUs, scaled by a constant and added to their input.

    Args:
        width: Channels of the input.
        out_width: Channels of the result.
        kernels: Sides of the convolutions' kernels.
        gain: Of what is added.
    """

    def __init__(self, width: int, out_width: int, kernels: tuple[int, ...], gain: float) -> None:
        super().__init__()
        self.gain = gain
        hidden = out_width // 4
        self.shortcut = nn.Identity() if width == out_width else _convolution(width, out_width, 1)
        channels = pairwise((width, hidden, hidden, hidden, out_width))
        self.convolutions = nn.ModuleList(
            _convolution(before, after, kernel) for (before, after), kernel in zip(channels, kernels, strict=True)
        )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        hidden = x
        for convolution in self.convolutions:
            hidden = convolution(hidden.relu())
        return self.shortcut(x) + self.gain * hidden


class LibraryImageTokenizer(nn.Module):
    """A published tokenizer with the interface of `mm.tokenizers.image.ImageTokenizer`.

    Args:
        network: Between pixels in 0..1 and ids.
        image_size: Side of the square picture in pixels.
        grid: Rows and columns of tokens.
    """

    def __init__(self, network: VqModel | Dvae, *, image_size: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.network, self.image_size, self.grid = network, image_size, grid

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.network.vocab_size

    @torch.no_grad()
    @full_precision
    def encode(self, image: UInt8[Tensor, "b 3 H W"]) -> Int64[Tensor, "b n"]:
        """Token ids of pictures, uint8 in 0..255. Raises `UserError` for pictures of another size."""
        check_pictures(image, self.image_size)
        return self.network.ids(image.float() / 255).flatten(1)

    @torch.no_grad()
    @full_precision
    def decode(self, ids: Int64[Tensor, "b n"]) -> UInt8[Tensor, "b 3 H W"]:
        """Pictures of token ids, uint8 in 0..255. Raises `UserError` for another number of tokens, or unknown ids."""
        check_ids(ids, self.grid, self.vocab_size)
        pixels = self.network.pixels(ids.view(-1, *self.grid)).float()
        return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)


def build_library_image_tokenizer(config: LibraryImageTokenizerConfig) -> LibraryImageTokenizer:
    """A published tokenizer with fresh weights. Raises `UserError` where diffusers is missing or cannot build it."""
    stride = DVAE_STRIDE if isinstance(config, DvaeConfig) else config.stride
    network = Dvae(config) if isinstance(config, DvaeConfig) else _vq_model(config)
    side = config.image_size // stride
    return LibraryImageTokenizer(network, image_size=config.image_size, grid=(side, side))


def _vq_model(config: VqModelConfig) -> VqModel:
    try:
        from diffusers.models.autoencoders.vq_model import VQModel
    except ImportError:
        raise UserError('a tokenizer of kind vq_model needs diffusers; pip install "mm-suite[diffusion]"') from None
    try:
        model: Any = VQModel(**config.model_dump(exclude={"kind", "image_size", "scored"}))
    except BUILD_FAILURES as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"diffusers cannot build this VQModel: {reason}; correct its config") from None
    return VqModel(model, nn.Conv2d(config.vq_embed_dim, config.num_vq_embeddings, 1) if config.scored else None)


def _convolution(width: int, out_width: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(width, out_width, kernel, padding=kernel // 2)


def _check_side(image_size: int, stride: int) -> None:
    if image_size % stride:
        raise ValueError(f"image_size {image_size} must be a multiple of the token's side of {stride} pixels")
