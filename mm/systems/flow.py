"""Flow: text to picture by flow matching with a diffusion transformer, in the pixels or in the latents of another model.

Papers: flow matching https://arxiv.org/abs/2210.02747, rectified flow https://arxiv.org/abs/2209.03003, its moments
https://arxiv.org/abs/2403.03206 (Stable Diffusion 3), latent diffusion https://arxiv.org/abs/2112.10752, diffusion transformers
https://arxiv.org/abs/2212.09748, guidance https://arxiv.org/abs/2207.12598 (``caption_dropout``), alignment of features
https://arxiv.org/abs/2410.06940 (``align``). ``path: {kind: diffusion}`` trains DDPM instead, with everything else the same.

A class is a text of one word: train on the captions ``{label}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from mm.config import TAG_PREFIX, StrictConfig
from mm.errors import ConfigError, UserError
from mm.generators.denoiser import Condition, without_vector, without_words
from mm.generators.dit import Dit, DitConfig, build_dit
from mm.generators.painting import Denoising
from mm.generators.unet import Unet, UnetConfig, build_unet
from mm.losses.diffusion import Betas, DiffusionPath, Path, Prediction, StraightPath, Weighting
from mm.nn.freeze import freeze
from mm.systems import vq
from mm.systems.prompted import (
    PromptEncoder,
    PromptEncoderConfig,
    build_prompt_network,
    text_limits,
    with_vocabulary,
)
from mm.systems.settings import SystemSettings
from mm.systems.vq import VqConfig
from mm.tokenizers.memory import TokenMemory
from mm.tokenizers.pixels import Pixels
from mm.types import Batch, Compresses, Embeds, Losses, OnPicture, Sampling, System, TextBatch

REFERENCE, PIXELS = TAG_PREFIX + "reference", TAG_PREFIX + "pixels"


class PixelsConfig(StrictConfig):
    """Pictures as they are.

    Args:
        image_size: Side of the square picture in pixels.
    """

    image_size: int = Field(default=64, ge=1)

    @property
    def picture_side(self) -> int:
        """Side of the square picture in pixels."""
        return self.image_size


def _latents_kind(value: Any) -> str:
    if isinstance(value, str):
        return REFERENCE
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return PIXELS if name is None else str(name)


LatentsConfig = Annotated[
    Annotated[str, Tag(REFERENCE)] | Annotated[PixelsConfig, Tag(PIXELS)] | Annotated[VqConfig, Tag("vq")],
    Discriminator(_latents_kind),
]
"""Where a generator works: in the latents of a MODEL, held fixed, or of the configuration of one, or in pixels."""


class FlowPathConfig(StrictConfig):
    """Straight paths, see `mm.losses.diffusion.StraightPath`."""

    kind: Literal["flow"] = "flow"
    mean: float = 0.0
    std: float = Field(default=1.0, ge=0)
    shift: float = Field(default=1.0, gt=0)

    def build(self) -> Path:
        """The path."""
        return StraightPath(self.mean, self.std, self.shift)


class DiffusionPathConfig(StrictConfig):
    """A variance-preserving diffusion, see `mm.losses.diffusion.DiffusionPath`."""

    kind: Literal["diffusion"] = "diffusion"
    betas: Betas = "cosine"
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)

    def build(self) -> Path:
        """The path."""
        return DiffusionPath(self.betas, self.beta_start, self.beta_end)


def _kind(value: Any) -> str | None:
    """The ``kind`` of a part, where one is said."""
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


DenoiserConfig = Annotated[
    Annotated[DitConfig, Tag("dit")] | Annotated[UnetConfig, Tag("unet")], Discriminator(lambda value: _kind(value) or "dit")
]
PathConfig = Annotated[
    Annotated[FlowPathConfig, Tag("flow")] | Annotated[DiffusionPathConfig, Tag("diffusion")],
    Discriminator(lambda value: _kind(value) or "flow"),
]


def check_prediction(prediction: Prediction, path: FlowPathConfig | DiffusionPathConfig) -> None:
    """Raises `ValueError` for a prediction that tells nothing on a path."""
    ends_in_noise = not isinstance(path, DiffusionPathConfig) or path.betas == "cosine"
    if prediction == "noise" and ends_in_noise:
        raise ValueError(
            "prediction: noise tells nothing at the start, where straight paths and cosine betas have noise alone; "
            "take velocity, or path: {kind: diffusion, betas: scaled_linear}"
        )


class AlignConfig(StrictConfig):
    """Features of a layer are drawn towards those of another model's picture encoder.

    Args:
        model: A MODEL with a picture tower, for training only.
        layer: Blocks that have been run.
        weight: Of the alignment.
        width: Hidden width of the projection.
    """

    model: str
    layer: int = Field(default=3, ge=1)
    weight: float = Field(default=0.5, gt=0)
    width: int = Field(default=256, ge=1)


class FlowConfig(SystemSettings):
    """A generator by flow matching or diffusion.

    Args:
        latents: Where it works: a MODEL that compresses pictures, or its configuration; ``{image_size: 64}`` for pixels.
        text: A MODEL with a text tower, held fixed, or the configuration of a text encoder that is trained along.
        denoiser: The network.
        path: How data becomes noise.
        prediction: What the network predicts, see `mm.losses.diffusion`.
        weighting: What its errors cost, see there.
        vector_condition: Whether the network is also told the prompt's vector; needed for variations of pictures.
        caption_dropout: Share of captions that are left out in training.
        align: Draws features towards another model's; none by default.
        remember_latents: Number of pictures whose latents are kept in memory, for data that is not changed at random.
    """

    name: Literal["flow"] = "flow"
    latents: LatentsConfig = "emoji-vq"
    text: PromptEncoderConfig = "emoji-clip"
    denoiser: DenoiserConfig = DitConfig()
    path: PathConfig = FlowPathConfig()
    prediction: Prediction = "velocity"
    weighting: Weighting = "uniform"
    vector_condition: bool = True
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    align: AlignConfig | None = None
    remember_latents: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.latents, str), "known once the model is loaded"
        return self.latents.picture_side

    @property
    def text_limits(self) -> tuple[int, int]:
        return text_limits(self.text)

    def with_vocabulary(self, size: int) -> "FlowConfig":
        return self.model_copy(update={"text": with_vocabulary(self.text, size)})

    def parts(self) -> dict[str, str]:
        return {name: part for name in ("latents", "text") if isinstance(part := getattr(self, name), str)}

    def training_parts(self) -> dict[str, str]:
        return {} if self.align is None else {"align": self.align.model}

    def for_inference(self) -> "FlowConfig":
        return self.model_copy(update={"align": None})

    @model_validator(mode="after")
    def _possible(self) -> "FlowConfig":
        check_prediction(self.prediction, self.path)
        if self.align is not None and not (isinstance(self.denoiser, DitConfig) and self.align.layer <= self.denoiser.layers):
            raise ValueError(
                f"align.layer {self.align.layer}: the denoiser is no transformer of so many layers; take one, or less"
            )
        return self


class Flow(System):
    """See above.

    Args:
        latents: Pictures to latents and back; held fixed.
        text: Reads prompts; held fixed or trained along.
        denoiser: The network.
        config: Sizes and weights.
        align: A system whose picture tower gives features to be drawn to; no part of the saved weights.
    """

    def __init__(
        self, latents: Any, text: Any, denoiser: Dit | Unet, config: FlowConfig, align: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.latents = freeze(latents)
        self.text = text
        self.denoiser = denoiser
        self.config = config
        self.denoising = Denoising(config.path.build(), config.prediction, config.weighting)
        self._encode = (
            TokenMemory(latents.to_latents, config.remember_latents) if config.remember_latents else latents.to_latents
        )
        self._reader = PromptEncoder(text)
        self.no_words = nn.Parameter(torch.zeros(self._reader.words_width))
        self.alignment: nn.Module | None = None
        self._align: list[nn.Module] = []
        if config.align is not None:
            assert isinstance(align, Embeds)
            assert isinstance(config.denoiser, DitConfig)
            tower = freeze(align.encoders()["image"])
            self._align = [tower]  # in a list: not a child, so not saved
            self.alignment = _projector(config.denoiser.width, config.align.width, tower.token_width)

    @property
    def lacks(self) -> frozenset[str]:
        """See `mm.types.System`: pictures are varied by their vectors in the space of a dual tower."""
        return frozenset() if self.config.vector_condition and self._reader.knows_pictures else frozenset({"varies"})

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("alignment.",)

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("alignment.",)

    def _apply(self, fn: Any, recurse: bool = True) -> "Flow":
        """Take what is no child along to other devices."""
        for network in self._align:
            network._apply(fn)
        return super()._apply(fn, recurse)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the networks in another floating type, for inference, except for the latents' if these must stay."""
        self.denoiser.to(dtype)
        self.text.cast_(dtype)
        self.no_words.data = self.no_words.data.to(dtype)
        if isinstance(self.latents, System):
            self.latents.cast_(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Mean weighted squared error of the prediction at moments drawn at random, and of the alignment where configured."""
        assert batch.image is not None
        assert batch.text is not None
        sample = self._encode(batch.image)
        condition = self.condition(batch.text)
        if self.training and self.config.caption_dropout:
            condition = self._without(condition, torch.rand(len(sample), device=sample.device) < self.config.caption_dropout)
        config = self.config
        options = {} if self.alignment is None or config.align is None else {"features": config.align.layer}
        losses, hidden = self.denoising.loss(self.denoiser, sample, condition, **options)
        total, parts = losses.mean(), {"denoising": losses.detach().mean()}
        if hidden is not None and config.align is not None:
            parts["alignment"] = alignment = self._alignment(hidden, batch.image)
            total = total + config.align.weight * alignment
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def condition(self, text: TextBatch) -> Condition:
        """What the network is told of prompts."""
        condition = self._reader(text)
        return condition if self.config.vector_condition else replace(condition, vector=None)

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
        """See `mm.types.Paints`. With an ``image`` alone it is changed, by `Sampling.strength`; with ``keep``, what is not kept
        is made anew."""
        condition = self.condition(text)
        other = self._without(condition) if negative is None else self.condition(negative)
        return self._paint(condition, other, seeds, sampling, image, keep, on_picture)

    @torch.no_grad()
    def vary(self, image: Tensor, seeds: Sequence[int], sampling: Sampling, *, on_picture: OnPicture | None = None) -> Tensor:
        """See `mm.types.Varies`: the vector of a picture stands in for that of a text, and there are no words."""
        if "varies" in self.lacks:
            raise UserError("this model does not know vectors of pictures; train with text: emoji-clip, vector_condition: true")
        vector = self._reader.of_picture(image)
        words = self.no_words.expand(len(image), 1, -1)
        known = torch.ones(words.shape[:2], dtype=torch.bool, device=words.device)
        condition = Condition(words, known, vector.to(words.dtype))
        return self._paint(condition, self._without(condition), seeds, sampling, None, None, on_picture)

    def _paint(
        self,
        condition: Condition,
        other: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        image: Tensor | None,
        keep: Tensor | None,
        on_picture: OnPicture | None,
    ) -> Tensor:
        if sampling.threshold and not isinstance(self.latents, Pixels):
            raise UserError("threshold: is for pixels, this model works in latents; leave it out")
        return self.denoising.paint(
            self.denoiser,
            self.latents,
            condition,
            other,
            seeds,
            sampling,
            image=image,
            keep=keep,
            on_picture=on_picture,
        )

    def _without(self, condition: Condition, dropped: Tensor | None = None) -> Condition:
        """In the rows that are dropped, all if None, one learned vector takes the place of the words, nothing that of the
        vector."""
        return without_vector(without_words(condition, self.no_words, dropped), dropped)

    def _alignment(self, hidden: Tensor, image: Tensor) -> Tensor:
        """1 minus the mean cosine between projected features and those of the tower at the same places."""
        [tower], grid = self._align, self.denoiser.grid  # pyright: ignore[reportAssignmentType]
        side = tower.image_size
        with torch.no_grad():
            pixels = image if image.shape[-1] == side else F.interpolate(image.float(), (side, side), mode="area") / 255
            seen = tower(pixels)
            rows, columns = seen.extras["grid"]
            wanted = seen.tokens[:, seen.extras.get("prefix", 0) :]
        assert self.alignment is not None
        cells = hidden.float().transpose(1, 2).unflatten(2, grid)
        cells = F.adaptive_avg_pool2d(cells, (rows, columns)).flatten(2).transpose(1, 2)
        return 1 - F.cosine_similarity(self.alignment(cells), wanted.float(), dim=-1).mean()


def _projector(width: int, hidden: int, out_width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, out_width)
    )


def build_denoiser(
    config: DitConfig | UnetConfig,
    shape: tuple[int, int, int],
    words_width: int,
    vector_width: int | None,
    beside: int = 0,
) -> Dit | Unet:
    """The configured network with fresh weights, see `mm.generators.dit.Dit`. Raises `ConfigError` for one that cannot be."""
    build = build_unet if isinstance(config, UnetConfig) else build_dit
    return build(config, shape, words_width, vector_width, beside)  # pyright: ignore[reportArgumentType]


def build_latents(config: Any, parts: Mapping[str, Any] | None) -> Any:
    """The latents of a generator: ``parts["latents"]``, or a network with fresh weights, or pixels.

    Raises:
        ConfigError: A mere name without the part, or a part without latents.
    """
    given = (parts or {}).get("latents")
    if given is not None:
        if not isinstance(given, Compresses):
            raise ConfigError("latents: this model does not compress pictures; take emoji-vq or a run of configs/vq.yaml")
        return given
    if isinstance(config, str):
        raise ConfigError(f"latents: '{config}' names a model; give it as a part, or its configuration in its place")
    return Pixels(config.image_size) if isinstance(config, PixelsConfig) else vq.build(config)


def build(config: FlowConfig, parts: Mapping[str, Any] | None = None) -> Flow:
    """Build the generator with fresh weights; ``parts`` may hold ``latents``, ``text`` and ``align``."""
    latents, text = build_latents(config.latents, parts), build_prompt_network(config.text, parts)
    shape = latents.latent_shape
    align = (parts or {}).get("align")
    if config.align is not None and not isinstance(align, Embeds):
        raise ConfigError(f"align.model: '{config.align.model}' has no picture tower; take a model such as emoji-clip")
    reader = PromptEncoder(text)
    widths = reader.words_width, reader.vector_width if config.vector_condition else None
    flow = Flow(latents, text, build_denoiser(config.denoiser, shape, *widths), config, align)  # pyright: ignore[reportArgumentType]
    nn.init.normal_(flow.no_words, std=0.02)
    return flow
