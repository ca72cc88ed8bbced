"""DALL-E 2 (unCLIP): a prior imagines the vector that a dual tower would give the picture of a text, a decoder paints it.

Paper: https://arxiv.org/abs/2204.06125.

Both are trained in one run: they read the same words and vectors of the same batch, share no weights, and their losses are
added, so that each learns what it would learn alone. The decoder is that of `mm.systems.flow`, told the picture's own vector in
training. Vectors have length one in the space of the dual tower; both networks are given them times the root of their width, so
that their components are about one.

Deviations from DALL-E 2: one resolution (`mm.systems.imagen` has upscalers); transformers, straight paths and predicted
velocities in the decoder by default; the vector is added to the moment's, not also given as words; one guidance for both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.errors import ConfigError, UserError
from mm.fusion.dual_tower import unit
from mm.generators.denoiser import Condition, without_vector, without_words
from mm.generators.dit import Dit, DitConfig
from mm.generators.painting import Denoising
from mm.generators.prior import Prior, PriorConfig
from mm.generators.unet import Unet
from mm.losses.diffusion import Prediction, Weighting
from mm.nn.freeze import freeze
from mm.seeding import derive_seed
from mm.systems.flow import (
    DenoiserConfig,
    FlowPathConfig,
    LatentsConfig,
    PathConfig,
    build_denoiser,
    build_latents,
    check_prediction,
)
from mm.systems.prompted import PromptEncoder, PromptEncoderConfig, build_prompt_network, text_limits, with_vocabulary
from mm.systems.settings import SystemSettings
from mm.tokenizers.memory import TokenMemory
from mm.tokenizers.pixels import Pixels
from mm.types import Batch, Losses, OnPicture, Sampling, System, TextBatch


class Dalle2Config(SystemSettings):
    """A prior and a decoder around a dual tower.

    Args:
        latents: Where the decoder works, see `mm.systems.flow.FlowConfig`.
        text: A MODEL with a picture and a text tower, held fixed.
        prior: The network that imagines vectors.
        denoiser: The decoder's network.
        path: How data becomes noise, for both.
        prediction: What the decoder predicts, see `mm.losses.diffusion`; the prior predicts the vector.
        weighting: What the decoder's errors cost, see there.
        candidates: Vectors that are imagined for each picture; the one nearest to the text is painted.
        caption_dropout: Share of captions that are left out in training the prior.
        words_dropout: Share of captions that are left out in training the decoder.
        vector_dropout: Share of pictures whose vectors are left out in training the decoder.
        remember_latents: Number of pictures whose latents are kept in memory, for data that is not changed at random.
    """

    name: Literal["dalle2"] = "dalle2"
    latents: LatentsConfig = "emoji-vq"
    text: PromptEncoderConfig = "emoji-clip"
    prior: PriorConfig = PriorConfig()
    denoiser: DenoiserConfig = DitConfig()
    path: PathConfig = FlowPathConfig()
    prediction: Prediction = "velocity"
    weighting: Weighting = "uniform"
    candidates: int = Field(default=2, ge=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    words_dropout: float = Field(default=0.5, ge=0, lt=1)
    vector_dropout: float = Field(default=0.1, ge=0, lt=1)
    remember_latents: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.latents, str), "known once the model is loaded"
        return self.latents.picture_side

    @property
    def text_limits(self) -> tuple[int, int]:
        return text_limits(self.text)

    def with_vocabulary(self, size: int) -> "Dalle2Config":
        return self.model_copy(update={"text": with_vocabulary(self.text, size)})

    def parts(self) -> dict[str, str]:
        return {name: part for name in ("latents", "text") if isinstance(part := getattr(self, name), str)}

    @model_validator(mode="after")
    def _possible(self) -> "Dalle2Config":
        check_prediction(self.prediction, self.path)
        return self


class Dalle2(System):
    """See above.

    Args:
        latents: Pictures to latents and back; held fixed.
        text: Reads prompts and sees pictures; held fixed.
        prior: Imagines vectors.
        denoiser: The decoder's network.
        config: Sizes and weights.
    """

    def __init__(self, latents: Any, text: Any, prior: Prior, denoiser: Dit | Unet, config: Dalle2Config) -> None:
        super().__init__()
        self.latents, self.text = freeze(latents), freeze(text)
        self.prior, self.denoiser = prior, denoiser
        self.config = config
        path = config.path.build()
        self.imagining, self.decoding = Denoising(path, "sample"), Denoising(path, config.prediction, config.weighting)
        self._encode = (
            TokenMemory(latents.to_latents, config.remember_latents) if config.remember_latents else latents.to_latents
        )
        self._reader = PromptEncoder(text)
        self.no_words = nn.Parameter(0.02 * torch.randn(self._reader.words_width))
        self.no_prompt = nn.Parameter(0.02 * torch.randn(self._reader.words_width))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the networks in another floating type, for inference, except for the latents' if these must stay."""
        for part in (self.prior, self.denoiser):
            part.to(dtype)
        for parameter in (self.no_words, self.no_prompt):
            parameter.data = parameter.data.to(dtype)
        for part in (self.text, self.latents):
            if isinstance(part, System):
                part.cast_(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """The prior's mean squared error of vectors, and the decoder's of latents, at moments drawn at random."""
        assert batch.image is not None
        assert batch.text is not None
        condition, vector = self._read(batch.text), self._scale * self._reader.of_picture(batch.image)
        asked, told = condition, replace(condition, vector=vector)
        draws = batch.draws(vector.device)
        if self.training:
            asked = self._nothing(asked, draws.uniform() < self.config.caption_dropout)
            told = without_words(told, self.no_words, draws.uniform() < self.config.words_dropout)
            told = without_vector(told, draws.uniform() < self.config.vector_dropout)
        imagined, _ = self.imagining.loss(self.prior, vector, asked, draws)
        decoded, _ = self.decoding.loss(self.denoiser, self._encode(batch.image), told, draws)
        parts = {"prior": imagined.mean(), "decoder": decoded.mean()}
        return Losses(parts["prior"] + parts["decoder"], {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def imagine(
        self, text: TextBatch, seeds: Sequence[int], sampling: Sampling, *, negative: TextBatch | None = None
    ) -> Tensor:
        """Unit vectors ``(B, E)``, fp32, of pictures that the texts might belong to, of several the one nearest to its text.

        Args:
            text: What to imagine.
            seeds: One a text.
            sampling: Steps, solver, guidance.
            negative: What guidance leads away from, one a text; nothing in particular if None.
        """
        condition = self._read(text)
        other = self._nothing(condition) if negative is None else self._read(negative)
        assert condition.vector is not None
        found, settings = [], replace(sampling, threshold=0.0, strength=1.0)
        for number in range(self.config.candidates):
            own = [derive_seed(seed, "vector", number) for seed in seeds]
            *_, last = self.imagining.steps(self.prior, condition.vector.shape[1:], condition, other, own, settings)
            found.append(unit(last.sample))
        vectors = torch.stack(found, 1)
        nearest = torch.einsum("bne,be->bn", vectors, condition.vector.float()).argmax(1)
        return vectors[torch.arange(len(vectors), device=vectors.device), nearest]

    @torch.no_grad()
    def paint(
        self,
        text: TextBatch,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        on_picture: OnPicture | None = None,
        negative: TextBatch | None = None,
    ) -> Tensor:
        """See `mm.types.Paints` and `mm.systems.flow.Flow.paint`. The decoder is led away from the words of ``negative``."""
        told = replace(self._read(text), vector=self._scale * self.imagine(text, seeds, sampling, negative=negative))
        away = None if negative is None else self._read(negative)
        return self._decode(told, away, seeds, sampling, image=image, keep=keep, on_picture=on_picture)

    @torch.no_grad()
    def vary(self, image: Tensor, seeds: Sequence[int], sampling: Sampling, *, on_picture: OnPicture | None = None) -> Tensor:
        """See `mm.types.Varies`: the picture's own vector, and no words."""
        vector = self._scale * self._reader.of_picture(image)
        words = self.no_words.expand(len(image), 1, -1)
        told = Condition(words, torch.ones(words.shape[:2], dtype=torch.bool, device=words.device), vector)
        return self._decode(told, None, seeds, sampling, on_picture=on_picture)

    def _decode(
        self, told: Condition, away: Condition | None, seeds: Sequence[int], sampling: Sampling, **options: Any
    ) -> Tensor:
        if sampling.threshold and not isinstance(self.latents, Pixels):
            raise UserError("threshold: is for pixels, this model works in latents; leave it out")
        other = without_vector(without_words(told, self.no_words) if away is None else away)
        return self.decoding.paint(self.denoiser, self.latents, told, other, seeds, sampling, **options)

    def _read(self, text: TextBatch) -> Condition:
        """Words, and the text's vector times the root of its width."""
        condition = self._reader(text)
        assert condition.vector is not None
        return replace(condition, vector=self._scale * condition.vector.float())

    def _nothing(self, condition: Condition, dropped: Tensor | None = None) -> Condition:
        """What the prior is told where there is no text."""
        return without_vector(without_words(condition, self.no_prompt, dropped), dropped)

    @property
    def _scale(self) -> float:
        return self._reader.vector_width**0.5


def build(config: Dalle2Config, parts: Mapping[str, Any] | None = None) -> Dalle2:
    """Build prior and decoder with fresh weights; ``parts`` may hold ``latents`` and ``text``.

    Raises:
        ConfigError: The text's model has no picture tower.
    """
    latents, text = build_latents(config.latents, parts), build_prompt_network(config.text, parts)
    reader = PromptEncoder(text)
    if not reader.knows_pictures:
        raise ConfigError("text: the prior needs vectors of texts and of pictures; take a dual tower such as emoji-clip")
    widths = reader.words_width, reader.vector_width
    denoiser = build_denoiser(config.denoiser, latents.latent_shape, *widths)
    return Dalle2(latents, text, Prior(config.prior, *widths), denoiser, config)
