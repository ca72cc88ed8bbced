"""Flamingo: the words of a language model see the picture before them through gated layers between its own.

Paper: Flamingo https://arxiv.org/abs/2204.14198 (a Perceiver resampler gives each picture a fixed number of vectors; gated
cross-attention before every Nth block of a language model that is held fixed, whose gates start at 0; text attends to the
immediately preceding picture and text before any picture to none).

Deviations: the resampler is as wide as the words; each text's words are averaged before the texts are; the data sets of the
paper are not mixed by weighted losses. As in open_flamingo, a trained vector stands among the words where a picture is.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder, build_image_encoder
from mm.fusion.gated import gates, initialise_gates
from mm.fusion.interleaving import by_text, check_media, last_row, preceding_medium, stands
from mm.generators.language_model import LanguageModel
from mm.nn.resampler import Resampler
from mm.systems.interleaved import InterleavedSettings, InterleavedSystem, Reading
from mm.systems.language_model import Language, LanguageConfig, build_language_part
from mm.types import MEDIUM, Interleaved


class FlamingoConfig(InterleavedSettings):
    """A picture encoder, a resampler, and a language model with gated layers.

    Args:
        latents: Vectors that a picture becomes.
        resampler_layers: How often they read the picture's tokens.
        resampler_heads: Attention heads; divides the width of the language model.
        gate_every: Blocks of the language model from one gated layer to the next; 1 puts one before each.
    """

    name: Literal["flamingo"] = "flamingo"
    latents: int = Field(default=64, ge=1)
    resampler_layers: int = Field(default=6, ge=1)
    resampler_heads: int = Field(default=8, ge=1)
    gate_every: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _possible(self) -> "FlamingoConfig":
        if self.embed_dim:
            raise ValueError("embed_dim is of a pooled vector, and the resampler reads tokens; leave it out")
        return self


class Flamingo(InterleavedSystem):
    """Pictures as a context.

    Args:
        image: The picture encoder.
        resampler: Its tokens to vectors of the width of the words.
        language: Predicts words; the gated layers stand before its blocks.
        gated: These layers.
        config: What built it.
    """

    def __init__(
        self, image: ImageEncoder, resampler: Resampler, language: LanguageModel, gated: nn.ModuleList, config: FlamingoConfig
    ) -> None:
        super().__init__(image, language, config)
        self.resampler, self.gated, self.config = resampler, gated, config
        self.medium = nn.Parameter(torch.empty(language.width))
        nn.init.normal_(self.medium, std=0.02)

    @property
    def takes_tokens(self) -> bool:
        return True

    def embed(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Vectors of words, and of the places of pictures."""
        words = self.language.embed(ids.clamp(min=0))
        return torch.where((ids == MEDIUM)[..., None], self.medium.to(words.dtype), words)

    def read(self, prompt: Interleaved) -> Reading:
        """See `InterleavedSystem.read`."""
        places = stands(prompt.text)
        check_media(places, len(prompt.image))
        context = by_text(self.resampler(self.see(prompt.image)), places)
        mask = preceding_medium(places, len(self.resampler.latents), context.shape[1])
        return Reading(prompt.text, self.embed(prompt.text.ids), context, mask, last_row(mask, prompt.text.lengths))


def build(config: FlamingoConfig, parts: Mapping[str, Any] | None = None) -> Flamingo:
    """Build Flamingo with fresh weights; ``parts`` may hold a trained ``language`` model and a ready ``image`` encoder."""
    image = (parts or {}).get("image") or build_image_encoder(config.image)
    given = (parts or {}).get("language")
    known = given.config if isinstance(given, Language) else config.language
    width = known.network.width if isinstance(known, LanguageConfig) else 1  # a mere name is refused below
    gated, wrap = gates(width, config.gate_every)
    language = build_language_part(config.language, parts, wrap)
    initialise_gates(gated)
    resampler = Resampler(
        image.token_width,
        width,
        num_latents=config.latents,
        num_layers=config.resampler_layers,
        num_heads=config.resampler_heads,
    )
    return Flamingo(image, resampler, language, gated, config)
