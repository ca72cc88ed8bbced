"""Imagen: small pictures of a text by diffusion in pixels, then larger and larger ones of the text and the smaller picture.

Paper: https://arxiv.org/abs/2205.11487; noise on the smaller picture https://arxiv.org/abs/2106.15282.

The stages of a cascade are trained one after the other, each in a run of its own that begins with the cascade so far
(``init_from``) and adds an upscaler: the last stage learns, those before it and the text encoder are held fixed. A stage learns
from true pictures made small, so it does not depend on how well the stages before it paint.

Deviations from Imagen: transformers in place of UNets by default; straight paths and predicted velocities (``path`` and
``prediction`` of a stage choose others); the level of the noise on the smaller picture is a moment of the stage's own path.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.draws import Draws
from mm.generators.denoiser import Condition, without_vector, without_words
from mm.generators.diffusion import gaussian_noise
from mm.generators.dit import DitConfig
from mm.generators.painting import Denoising, whole_cells
from mm.generators.sampling import sample_generators
from mm.losses.diffusion import Prediction, Weighting, mixed
from mm.nn.embeddings import TimeEmbedding
from mm.nn.freeze import freeze
from mm.seeding import derive_seed
from mm.systems.flow import DenoiserConfig, FlowPathConfig, PathConfig, build_denoiser, check_prediction
from mm.systems.prompted import PromptEncoder, PromptEncoderConfig, build_prompt_network, text_limits, with_vocabulary
from mm.systems.settings import SystemSettings
from mm.tokenizers.pixels import Pixels
from mm.types import Batch, Losses, OnPicture, Sampling, System, TextBatch


class StageConfig(StrictConfig):
    """One stage of a cascade.

    Args:
        image_size: Side of the square pictures that it makes, in pixels.
        denoiser: The network.
        path: How data becomes noise.
        prediction: What the network predicts, see `mm.losses.diffusion`.
        weighting: What its errors cost, see there.
    """

    image_size: int = Field(default=32, ge=1)
    denoiser: DenoiserConfig = DitConfig(patch=4)
    path: PathConfig = FlowPathConfig()
    prediction: Prediction = "velocity"
    weighting: Weighting = "uniform"

    @model_validator(mode="after")
    def _possible(self) -> "StageConfig":
        check_prediction(self.prediction, self.path)
        return self


class ImagenConfig(SystemSettings):
    """A cascade with its text encoder.

    Args:
        text: A MODEL that reads texts (a dual tower, a language model, T5), held fixed, or the configuration of a text encoder
            that is trained along with the base.
        base: The first stage.
        upscalers: Those behind it, each for larger pictures; the last one learns.
        noise: Level of the noise on the smaller picture in sampling, 0 to 1.
        caption_dropout: Share of captions that are left out in training.
    """

    name: Literal["imagen"] = "imagen"
    text: PromptEncoderConfig = "emoji-clip"
    base: StageConfig = StageConfig()
    upscalers: tuple[StageConfig, ...] = ()
    noise: float = Field(default=0.2, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)

    @property
    def stages(self) -> tuple[StageConfig, ...]:
        """From the smallest pictures to the largest."""
        return self.base, *self.upscalers

    @property
    def picture_side(self) -> int:
        return self.stages[-1].image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return text_limits(self.text)

    def with_vocabulary(self, size: int) -> "ImagenConfig":
        return self.model_copy(update={"text": with_vocabulary(self.text, size)})

    def parts(self) -> dict[str, str]:
        return {"text": self.text} if isinstance(self.text, str) else {}

    @property
    def readers(self) -> frozenset[str]:
        return frozenset({"text"})

    @model_validator(mode="after")
    def _possible(self) -> "ImagenConfig":
        sides = [stage.image_size for stage in self.stages]
        if sides != sorted(set(sides)):
            raise ValueError(f"upscalers: pictures must grow from stage to stage, these are of {', '.join(map(str, sides))} px")
        return self


class Stage(nn.Module):
    """Pictures of one size.

    Args:
        config: Sizes and objective.
        reader: Tells how wide words and vectors are.
        smaller: Side of the pictures of the stage before; None for the first stage.
    """

    def __init__(self, config: StageConfig, reader: PromptEncoder, smaller: int | None) -> None:
        super().__init__()
        self.pixels = Pixels(config.image_size)
        self.smaller = None if smaller is None else Pixels(smaller)
        self.denoising = Denoising(config.path.build(), config.prediction, config.weighting)
        shape, width = self.pixels.latent_shape, reader.vector_width
        beside, told = (0, width) if smaller is None else (shape[0], 2 * width)
        self.denoiser = build_denoiser(config.denoiser, shape, reader.words_width, told, beside)
        self.level = None if smaller is None else TimeEmbedding(width)
        self.no_words = nn.Parameter(0.02 * torch.randn(reader.words_width))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the weights in another floating type, for inference."""
        self.to(dtype)

    def loss(self, image: Tensor, condition: Condition, dropout: float, draws: Draws) -> Tensor:
        """The mean error, the smaller picture noised by a random amount.

        Args:
            image: Pixels uint8 ``(B, 3, H, W)``.
            condition: Of the captions.
            dropout: Share of them that is left out.
            draws: Random numbers.
        """
        if self.training and dropout:
            condition = self.without(condition, draws.uniform() < dropout)
        if self.smaller is not None:
            level = draws.uniform()
            small = self.smaller.to_latents(shrunk(image, self.smaller.image_size))
            condition = self.given(condition, small, draws.normal(*small.shape[1:]), level)
        losses, _ = self.denoising.loss(self.denoiser, self.pixels.to_latents(image), condition, draws)
        return losses.mean()

    def given(self, condition: Condition, small: Tensor, noise: Tensor, level: Tensor) -> Condition:
        """The condition with a smaller picture in -1..1 under noise of a level ``(B,)`` in 0..1, which is told, too."""
        assert self.level is not None
        assert condition.vector is not None
        path = self.denoising.path
        beside = enlarged(mixed(path, small, noise, level), self.pixels.image_size)
        told = self.level(path.read(level))
        return replace(condition, vector=torch.cat([condition.vector.to(told.dtype), told], 1), beside=beside)

    def without(self, condition: Condition, dropped: Tensor | None = None) -> Condition:
        """In the rows that are dropped, all if None, one learned vector takes the place of the words, nothing that of the
        vector."""
        return without_vector(without_words(condition, self.no_words, dropped), dropped)


class Imagen(System):
    """See above.

    Args:
        text: Reads prompts.
        stages: From the smallest pictures to the largest.
        config: Sizes and weights.
    """

    def __init__(self, text: Any, stages: Sequence[Stage], config: ImagenConfig) -> None:
        super().__init__()
        self.text = freeze(text) if config.upscalers else text
        for stage in stages[:-1]:
            freeze(stage)
        self._stages = list(stages)  # the same modules as below, with their type
        self.stages = nn.ModuleList(stages)
        self.config = config
        self._reader = PromptEncoder(text)

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """See `mm.types.System`: a cascade goes on with a further stage."""
        return (f"stages.{len(self._stages) - 1}.",) if self.config.upscalers else ()

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the networks in another floating type, for inference."""
        self.text.cast_(dtype)
        for stage in self._stages:
            stage.cast_(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Mean weighted squared error of the last stage's prediction at moments drawn at random."""
        assert batch.image is not None
        assert batch.text is not None
        condition, draws = self._reader(batch.text), batch.draws(batch.image.device)
        loss = self._stages[-1].loss(batch.image, condition, self.config.caption_dropout, draws)
        return Losses(loss, {"denoising": loss.detach()})

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
        """See `mm.types.Paints`. What is kept is kept by every stage; an ``image`` alone is changed by the first one, and the
        others make the result larger. Pictures in the making are shown in the final size."""
        read, away = self._reader(text), None if negative is None else self._reader(negative)
        made = None
        for number, stage in enumerate(self._stages):
            condition = read
            other = stage.without(read) if away is None else away
            if made is not None and stage.smaller is not None:
                small = stage.smaller.to_latents(made)
                own = sample_generators([derive_seed(seed, "stage", number) for seed in seeds])
                noise = gaussian_noise(own, small.shape[1:], small.device)
                level = torch.full((len(small),), self.config.noise, device=small.device)
                condition, other = (stage.given(one, small, noise, level) for one in (condition, other))
            known = keep is not None
            made = stage.denoising.paint(
                stage.denoiser,
                stage.pixels,
                condition,
                other,
                seeds if number == 0 else [derive_seed(seed, number) for seed in seeds],
                sampling if number == 0 or known else replace(sampling, strength=1.0),
                image=None if image is None or not (known or number == 0) else shrunk(image, stage.pixels.image_size),
                keep=None if keep is None else whole_cells(keep, stage.pixels.latent_shape[1:]),
                on_picture=None if on_picture is None else functools.partial(self._show, on_picture, number),
            )
        assert made is not None, "there is at least one stage"
        return made

    def _show(self, on_picture: OnPicture, number: int, pictures: Tensor, progress: float) -> None:
        """Pictures of a stage in the final size, and the progress of all stages."""
        largest = self._stages[-1].pixels
        shown = enlarged(self._stages[number].pixels.to_latents(pictures), largest.image_size)
        on_picture(largest.from_latents(shown), (number + progress) / len(self._stages))


def shrunk(image: Tensor, side: int) -> Tensor:
    """Pictures uint8 averaged over areas, ``(B, 3, side, side)`` uint8."""
    return image if image.shape[-1] == side else F.interpolate(image.float(), (side, side), mode="area").round().to(torch.uint8)


def enlarged(pictures: Tensor, side: int) -> Tensor:
    """Pictures interpolated to ``(B, 3, side, side)``."""
    if pictures.shape[-1] == side:
        return pictures
    return F.interpolate(pictures, (side, side), mode="bilinear", align_corners=False)


def build(config: ImagenConfig, parts: Mapping[str, Any] | None = None) -> Imagen:
    """Build the cascade with fresh weights; ``parts["text"]`` may hold a trained model that reads texts."""
    text = build_prompt_network(config.text, parts)
    reader = PromptEncoder(text)
    sides = [None, *(stage.image_size for stage in config.stages)]
    stages = [Stage(stage, reader, smaller) for stage, smaller in zip(config.stages, sides, strict=False)]
    return Imagen(text, stages, config)
