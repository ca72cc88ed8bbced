"""VQ: pictures become a grid of tokens and come back. The first stage of token-based generators.

Papers: VQ-VAE https://arxiv.org/abs/1711.00937 (``quantizer: {kind: vq}``), DALL-E's dVAE https://arxiv.org/abs/2102.12092
(``kind: gumbel`` with ``pixels: laplace``), VQGAN https://arxiv.org/abs/2012.09841 (``adversarial_weight``, ``perceptual``),
FSQ https://arxiv.org/abs/2309.15505 (the default).

What reconstructions are judged by, and the deviations there: `mm.systems.first_stage`.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.nn.discriminator import PatchDiscriminator
from mm.nn.freeze import freeze
from mm.nn.quantize import CodeUsage, GumbelQuantizer, VectorQuantizer
from mm.systems.first_stage import FirstStage, FirstStageSettings, build_discriminator, perceptual_network
from mm.tokenizers.image import GumbelConfig, ImageTokenizer, ImageTokenizerConfig, build_image_tokenizer
from mm.types import Batch, Losses


class VqConfig(FirstStageSettings):
    """A picture tokenizer and what it is trained with.

    Args:
        tokenizer: The network.
        fixed_tokens: Train the decoder alone: pictures keep their tokens, so that what was trained on these remains valid.
    """

    name: Literal["vq"] = "vq"
    tokenizer: ImageTokenizerConfig = ImageTokenizerConfig()
    fixed_tokens: bool = False

    @property
    def picture_side(self) -> int:
        return self.tokenizer.image_size


class Vq(FirstStage):
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
        super().__init__(config, perceptual)
        self.tokenizer, self.config = tokenizer, config
        if config.fixed_tokens:
            freeze(tokenizer.encoder)
            freeze(tokenizer.quantizer)
        self.discriminator = discriminator

    @property
    def coder(self) -> ImageTokenizer:
        """See `FirstStage`."""
        return self.tokenizer

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
        total, parts = self.judged(output, pixels, batch.image, step)
        parts |= _usage(quantized.ids, tokenizer.vocab_size) | {"quantizer": quantized.loss}
        total = total + self._quantizer_weight(step) * quantized.loss
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Move the codebook."""
        if isinstance(self.tokenizer.quantizer, VectorQuantizer):
            self.tokenizer.quantizer.update_()

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
    if config.tokenizer.pixels == "laplace" and config.reconstruction != "l2":
        raise ConfigError(
            f"reconstruction: {config.reconstruction} does not go with pixels: laplace, which has its own likelihood"
        )
    return Vq(
        build_image_tokenizer(config.tokenizer),
        config,
        discriminator=build_discriminator(config),
        perceptual=perceptual_network(config, parts),
    )
