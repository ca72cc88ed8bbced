"""Frozen: a picture is a prefix of vectors among the words of a language model, so that examples may be shown in a prompt.

Paper: Frozen https://arxiv.org/abs/2106.13884 (a picture encoder and one linear layer to the prefix learn through a language
model that is held fixed; rotary positions are relative, so that pictures may stand where training had none).

Deviations: a small language model that never met episodes cannot learn a name in a prompt, so ``train_language`` lets it
learn, too; the picture's vector may be that of a dual tower (``embed_dim``); the prefix may be the picture's tokens, or what a
Perceiver resampler makes of them; each text's words are averaged before the texts are.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from mm.encoders.image import ImageEncoder, build_image_encoder
from mm.fusion.interleaving import spread
from mm.fusion.prefix import PooledPrefix, PrefixSource, ResampledPrefix, TokenPrefix
from mm.generators.language_model import LanguageModel
from mm.nn.resampler import Resampler
from mm.systems.interleaved import InterleavedSettings, InterleavedSystem, Reading
from mm.systems.language_model import build_language_part
from mm.types import Interleaved


class FrozenConfig(InterleavedSettings):
    """A picture encoder, its prefix and a language model.

    Args:
        prefix: What of a picture becomes its prefix: its ``pooled`` vector by one linear layer, its ``tokens`` by one, or
            latents that have read the tokens (``resampled``).
        prefix_length: Vectors of a prefix; as many as there are tokens for ``tokens``.
        resampler_layers: How often the latents read.
        resampler_heads: Attention heads; divides the width of the language model.
    """

    name: Literal["frozen"] = "frozen"
    prefix: PrefixSource = "pooled"
    prefix_length: int = Field(default=2, ge=1)
    resampler_layers: int = Field(default=2, ge=1)
    resampler_heads: int = Field(default=4, ge=1)

    @property
    def picture_positions(self) -> int:
        return 1 if self.prefix == "tokens" else self.prefix_length

    @model_validator(mode="after")
    def _possible(self) -> "FrozenConfig":
        if self.embed_dim and self.prefix != "pooled":
            raise ValueError(f"embed_dim is of a pooled vector, and prefix: {self.prefix} takes tokens; set it to 0")
        return self


class Frozen(InterleavedSystem):
    """Pictures as prefixes.

    Args:
        image: The picture encoder.
        prefix: What it gives, to vectors of the width of the words.
        language: Predicts words.
        config: Which prefix.
    """

    def __init__(self, image: ImageEncoder, prefix: nn.Module, language: LanguageModel, config: FrozenConfig) -> None:
        self._pooled = config.prefix == "pooled"
        super().__init__(image, language, config)
        self.prefix, self.config = prefix, config

    @property
    def takes_tokens(self) -> bool:
        return not self._pooled

    def read(self, prompt: Interleaved) -> Reading:
        """See `InterleavedSystem.read`."""
        text, vectors = spread(prompt.text, self.language.embed, *self.prefix(self.see(prompt.image)))
        return Reading(text, vectors)


def build(config: FrozenConfig, parts: Mapping[str, Any] | None = None) -> Frozen:
    """Build Frozen with fresh weights; ``parts`` may hold a trained ``language`` model and a ready ``image`` encoder."""
    image = (parts or {}).get("image") or build_image_encoder(config.image)
    language = build_language_part(config.language, parts)
    if config.prefix == "pooled":
        prefix = PooledPrefix(config.embed_dim or image.width, language.width, config.prefix_length)
    elif config.prefix == "tokens":
        prefix = TokenPrefix(image.token_width, language.width)
    else:
        prefix = ResampledPrefix(
            Resampler(
                image.token_width,
                language.width,
                num_latents=config.prefix_length,
                num_layers=config.resampler_layers,
                num_heads=config.resampler_heads,
            )
        )
    return Frozen(image, prefix, language, config)
