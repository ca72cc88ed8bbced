"""Flow: text to picture by flow matching with a diffusion transformer, in the pixels or in the latents of another model.

Papers: flow matching https://arxiv.org/abs/2210.02747, rectified flow https://arxiv.org/abs/2209.03003, its moments
https://arxiv.org/abs/2403.03206 (Stable Diffusion 3), latent diffusion https://arxiv.org/abs/2112.10752, diffusion transformers
https://arxiv.org/abs/2212.09748, guidance https://arxiv.org/abs/2207.12598 (``caption_dropout``), alignment of features
https://arxiv.org/abs/2410.06940 (``align``). ``path: {kind: diffusion}`` trains DDPM instead, with everything else the same.
``distil`` makes a generator of few steps of a trained one: reflow https://arxiv.org/abs/2209.03003, latent consistency
https://arxiv.org/abs/2310.04378.

A class is a text of one word: train on the captions ``{label}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from mm.config import TAG_PREFIX, StrictConfig
from mm.draws import Draws
from mm.encoders.image import ImageEncoder
from mm.encoders.text import TextEncoderConfig
from mm.errors import ConfigError, UserError
from mm.generators.denoiser import Compiled, Condition, repeated, without_padding, without_vector, without_words
from mm.generators.dit import Dit, DitConfig, build_dit
from mm.generators.few_steps import Network, Student, Teacher, consistency_loss, reflow_loss
from mm.generators.painting import Denoising, with_prompts
from mm.generators.schedulers import SchedulerConfig
from mm.generators.unet import Unet, UnetConfig, build_unet
from mm.losses.consistency import Distance
from mm.losses.diffusion import Betas, DiffusionPath, Path, Prediction, StraightPath, Weighting
from mm.nn.freeze import freeze
from mm.nn.momentum import Momentum
from mm.systems import kl, published_vae, vq
from mm.systems.kl import KlConfig
from mm.systems.prompted import (
    PromptEncoder,
    PromptEncoderConfig,
    build_prompt_network,
    text_limits,
    with_vocabulary,
)
from mm.systems.published_vae import PublishedVaeConfig
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
    Annotated[str, Tag(REFERENCE)]
    | Annotated[PixelsConfig, Tag(PIXELS)]
    | Annotated[VqConfig, Tag("vq")]
    | Annotated[KlConfig, Tag("kl")]
    | Annotated[PublishedVaeConfig, Tag("published-vae")],
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


def _kind(value: Any, field: str = "kind") -> str | None:
    """The ``kind`` of a part, where one is said."""
    return value.get(field) if isinstance(value, Mapping) else getattr(value, field, None)


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


class ReflowConfig(StrictConfig):
    """Straight lines are learned between noise and what the teacher makes of it, in place of noise and pictures.

    Pictures of the data are not looked at, their captions are. Every caption of a batch gets one solution of the teacher.

    Args:
        teacher: A MODEL of this kind, for training only.
        guidance: Of the teacher: the student needs none.
        steps: Of the teacher.
        solver: Of the teacher.
        moments: Moments that the student is asked at of each solution.
    """

    method: Literal["reflow"] = "reflow"
    teacher: str
    guidance: float = Field(default=3.0, ge=0)
    steps: int = Field(default=8, ge=1)
    solver: Literal["euler", "heun", "dpm++"] = "dpm++"
    moments: int = Field(default=4, ge=1)

    @property
    def sampling(self) -> Sampling:
        """How the teacher is sampled."""
        return Sampling(self.guidance, steps=self.steps, solver=self.solver)


class ConsistencyConfig(StrictConfig):
    """From every moment of the teacher's way the student learns to tell the data that its own average tells a step later.

    Args:
        teacher: A MODEL of this kind on the same path, for training only.
        guidance: Of the teacher: the student needs none.
        steps: That the teacher's way is cut into; the teacher takes one of them at a time, by DDIM.
        shift: Above 1 puts more of them where there is noise.
        decay: Share of the student's average that stays at each update; 0 for the student itself.
        distance: Between what is told at both moments, see `mm.losses.consistency.distance`.
    """

    method: Literal["consistency"] = "consistency"
    teacher: str
    guidance: float = Field(default=3.0, ge=0)
    steps: int = Field(default=32, ge=2)
    shift: float = Field(default=1.0, gt=0)
    decay: float = Field(default=0.95, ge=0, lt=1)
    distance: Distance = "huber"


DistilConfig = Annotated[
    Annotated[ReflowConfig, Tag("reflow")] | Annotated[ConsistencyConfig, Tag("consistency")],
    Discriminator(lambda value: _kind(value, "method") or "reflow"),
]


class FlowSettings(SystemSettings):
    """Of generators by flow matching or diffusion.

    Args:
        latents: Where it works: a MODEL that compresses pictures, or its configuration; ``{image_size: 64}`` for pixels.
        text: A MODEL with a text tower, held fixed, or the configuration of a text encoder that is trained along.
        denoiser: The network.
        path: How data becomes noise.
        prediction: What the network predicts, see `mm.losses.diffusion`.
        weighting: What its errors cost, see there.
        vector_condition: Whether the network is also told the prompt's vector; needed for variations of pictures.
        caption_dropout: Share of captions that are left out in training.
        empty_prompt: Ids of the text that stands for no prompt, start and end included, for text encoders with
            ``attend_padding``; by default a learned vector takes the place of the words.
        scheduler: How to sample where nobody says otherwise.
        align: Draws features towards another model's; none by default.
        distil: Learn from a teacher to need few steps; not by default. Begin with the teacher's weights (``init_from``).
        remember_latents: Number of pictures whose latents are kept in memory, for data that is not changed at random.
    """

    latents: LatentsConfig = "emoji-vq"
    text: PromptEncoderConfig = "emoji-clip"
    denoiser: DenoiserConfig = DitConfig()
    path: PathConfig = FlowPathConfig()
    prediction: Prediction = "velocity"
    weighting: Weighting = "uniform"
    vector_condition: bool = True
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    empty_prompt: tuple[int, ...] = ()
    scheduler: SchedulerConfig = SchedulerConfig()
    align: AlignConfig | None = None
    distil: DistilConfig | None = None
    remember_latents: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.latents, str), "known once the model is loaded"
        return self.latents.picture_side

    @property
    def text_limits(self) -> tuple[int, int]:
        return text_limits(self.text)

    def with_vocabulary(self, size: int) -> Self:
        return self.model_copy(update={"text": with_vocabulary(self.text, size)})

    def parts(self) -> dict[str, str]:
        return {name: part for name in ("latents", "text") if isinstance(part := getattr(self, name), str)}

    @property
    def readers(self) -> frozenset[str]:
        return frozenset({"text"})

    def training_parts(self) -> dict[str, str]:
        aligned = {} if self.align is None else {"align": self.align.model}
        return aligned if self.distil is None else aligned | {"teacher": self.distil.teacher}

    @property
    def encodable(self) -> frozenset[str]:
        if self.distil is not None:
            return frozenset()
        pictures = {"latents"} if self.align is None and not isinstance(self.latents, PixelsConfig) else set()
        return frozenset(pictures | (set() if isinstance(self.text, TextEncoderConfig) else {"text"}))

    def for_inference(self) -> Self:
        return self.model_copy(update={"align": None, "distil": None})

    @model_validator(mode="after")
    def _possible(self) -> Self:
        check_prediction(self.prediction, self.path)
        if self.align is not None and not (isinstance(self.denoiser, DitConfig) and self.align.layer <= self.denoiser.layers):
            raise ValueError(
                f"align.layer {self.align.layer}: the denoiser is no transformer of so many layers; take one, or less"
            )
        if self.empty_prompt and not (isinstance(self.text, TextEncoderConfig) and self.text.attend_padding):
            raise ValueError("empty_prompt: is for a text encoder with attend_padding; leave it out")
        if self.distil is not None and self.align is not None:
            raise ValueError("distil: a student has its teacher alone to learn from; set align: null")
        if isinstance(self.distil, ReflowConfig) and not isinstance(self.path, FlowPathConfig):
            raise ValueError("distil.method reflow: learns straight lines; take path: {kind: flow}, whatever the teacher's is")
        return self


class FlowConfig(FlowSettings):
    """See `FlowSettings`."""

    name: Literal["flow"] = "flow"


class Flow(System):
    """See above.

    Args:
        latents: Pictures to latents and back; held fixed.
        text: Reads prompts; held fixed or trained along.
        denoiser: The network.
        config: Sizes and weights.
        align: A system whose picture tower gives features to be drawn to; no part of the saved weights.
        teacher: To be distilled; no part of the saved weights.
    """

    def __init__(
        self,
        latents: Any,
        text: Any,
        denoiser: Dit | Unet,
        config: FlowSettings,
        align: nn.Module | None = None,
        teacher: "Flow | None" = None,
    ) -> None:
        super().__init__()
        self.latents = freeze(latents)
        self.text = text
        self.denoiser = denoiser
        self.config = config
        self.denoising = Denoising(config.path.build(), config.prediction, config.weighting, config.scheduler)
        self._encode = (
            TokenMemory(latents.to_latents, config.remember_latents) if config.remember_latents else latents.to_latents
        )
        self._reader = PromptEncoder(text)
        self._compiled: Compiled | None = None
        self.no_words = None if config.empty_prompt else nn.Parameter(torch.zeros(self._reader.words_width))
        self.alignment: nn.Module | None = None
        self._align: list[Any] = []
        if config.align is not None:
            assert isinstance(align, Embeds)
            assert isinstance(config.denoiser, DitConfig)
            tower: Any = freeze(align.encoders()["image"])
            self._align = [tower]  # in a list: not a child, so not saved
            self.alignment = _projector(config.denoiser.width, config.align.width, tower.token_width)
        self._teacher = [] if teacher is None else [freeze(teacher)]  # no child, either
        self.slow: Momentum[Dit | Unet] | None = None
        if isinstance(config.distil, ConsistencyConfig) and config.distil.decay:
            self.slow = Momentum(denoiser, config.distil.decay)

    @property
    def lacks(self) -> frozenset[str]:
        """See `mm.types.System`: pictures are varied by their vectors in the space of a dual tower."""
        return frozenset() if self.config.vector_condition and self._reader.knows_pictures else frozenset({"varies"})

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        of_text = self.text.only_for_training if isinstance(self.text, System) else ()
        return ("alignment.", "slow.", *(f"text.{name}" for name in of_text))

    @property
    def may_be_added(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("alignment.",)

    def _apply(self, fn: Any, recurse: bool = True) -> "Flow":
        """Take what is no child along to other devices."""
        for network in (*self._align, *self._teacher):
            network._apply(fn)
        return super()._apply(fn, recurse)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the networks in another floating type, for inference, except for the latents' if these must stay."""
        self.denoiser.to(dtype)
        self.text.cast_(dtype)
        if self.no_words is not None:
            self.no_words.data = self.no_words.data.to(dtype)
        if isinstance(self.latents, System):
            self.latents.cast_(dtype)

    def compile_sampling(self) -> None:
        """See `mm.types.CompilesSampling`."""
        self._compiled = Compiled(self.denoiser)  # pyright: ignore[reportArgumentType]

    def loss(self, batch: Batch, step: int) -> Losses:
        """Mean weighted squared error of the prediction at moments drawn at random, and of the alignment where configured.

        Of a student, what `ReflowConfig` or `ConsistencyConfig` says.
        """
        if self.config.distil is not None:
            assert batch.image is not None
            assert batch.text is not None
            return self._distilled(batch.image, batch.text, self.config.distil, batch.draws(batch.image.device))
        if batch.latents is None:
            assert batch.image is not None
            sample = self._encode(batch.image).contiguous()  # noise is drawn in the order of memory
        else:
            sample = batch.latents.float()
        condition, draws = self._told(batch), batch.draws(sample.device)
        if self.training and self.config.caption_dropout:
            condition = self._without(condition, draws.uniform() < self.config.caption_dropout)
        config = self.config
        options = {} if self.alignment is None or config.align is None else {"features": config.align.layer}
        losses, hidden = self.denoising.loss(self.denoiser, sample, condition, draws, **options)
        total, parts = losses.mean(), {"denoising": losses.detach().mean()}
        if hidden is not None and config.align is not None:
            assert batch.image is not None
            parts["alignment"] = alignment = self._alignment(hidden, batch.image)
            total = total + config.align.weight * alignment
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Move the average of a student."""
        if self.slow is not None:
            self.slow.update()

    def _distilled(self, image: Tensor, text: TextBatch, config: DistilConfig, draws: Draws) -> Losses:
        """What a student's answers cost. Where a caption is left out, teacher and student go without."""
        [system], condition = self._teacher, self.condition(text)
        dropped = torch.zeros_like(text.lengths, dtype=torch.bool)
        if self.training and self.config.caption_dropout:
            dropped = draws.uniform() < self.config.caption_dropout
            condition = self._without(condition, dropped)
        with torch.no_grad():
            told = system.condition(text)
            asked = with_prompts(system.denoiser, system._without(told, dropped), system._without(told))
        teacher = Teacher(asked, system.denoising.path, system.config.prediction)
        condition = without_padding(condition)
        if isinstance(config, ReflowConfig):
            pairs = teacher.pairs(self.latents.latent_shape, len(image), config.sampling, image.device)
            noise, sample = (part.repeat(config.moments, 1, 1, 1) for part in pairs)
            loss = reflow_loss(self._student(repeated(condition, config.moments)), noise, sample, self.config.weighting).mean()
            return Losses(loss, {"straightness": loss.detach()})
        student, moments = self._student(condition), self.denoising.path.schedule(config.steps, config.shift).to(image.device)
        follower = student.network if self.slow is None else _asked(self.slow.average.eval(), condition)
        sample = self._encode(image)
        losses = consistency_loss(student, follower, teacher, sample, moments, config.guidance, config.distance, draws)
        return Losses(losses.mean(), {"consistency": losses.detach().mean()})

    def _student(self, condition: Condition) -> Student:
        return Student(_asked(self.denoiser, condition), self.denoising.path, self.config.prediction)

    def condition(self, text: TextBatch) -> Condition:
        """What the network is told of prompts."""
        return self._fitting(self._reader(text))

    def _told(self, batch: Batch) -> Condition:
        """What the network is told of the captions of a batch, which may have been read before."""
        if batch.features is None:
            assert batch.text is not None
            return self.condition(batch.text)
        read = batch.features
        return self._fitting(Condition(read.tokens.float(), read.mask, read.pooled.float()))

    def _fitting(self, condition: Condition) -> Condition:
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
        assert self.no_words is not None, "a dual tower has no padding that is attended to"
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
            self._compiled or self.denoiser,
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
        vector; or the empty prompt takes the place of both."""
        if self.no_words is not None:
            return without_vector(without_words(condition, self.no_words, dropped), dropped)
        dropped = torch.ones_like(condition.known[:, 0]) if dropped is None else dropped
        ids = torch.tensor([self.config.empty_prompt], device=dropped.device)
        empty = self.condition(TextBatch(ids, torch.tensor([ids.shape[1]], device=dropped.device)))
        vector = condition.vector
        if vector is not None and empty.vector is not None:
            vector = torch.where(dropped[:, None], empty.vector, vector)
        return replace(condition, words=torch.where(dropped[:, None, None], empty.words, condition.words), vector=vector)

    def _alignment(self, hidden: Tensor, image: Tensor) -> Tensor:
        """1 minus the mean cosine between projected features and those of the tower at the same places."""
        assert isinstance(self.denoiser, Dit)
        grid, tower = self.denoiser.grid, self._align[0]
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


def _asked(denoiser: Dit | Unet, condition: Condition) -> Network:
    """The network with its prompts."""
    return lambda x, time: denoiser(x, time, condition)  # pyright: ignore[reportReturnType]


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
            raise ConfigError("latents: this model does not compress pictures; take emoji-vq or a run of configs/kl.yaml")
        return given
    if isinstance(config, str):
        raise ConfigError(f"latents: '{config}' names a model; give it as a part, or its configuration in its place")
    if isinstance(config, PixelsConfig):
        return Pixels(config.image_size)
    if isinstance(config, PublishedVaeConfig):
        return published_vae.build(config)
    return kl.build(config) if isinstance(config, KlConfig) else vq.build(config)


def _check_teacher(config: FlowSettings, teacher: Any) -> None:
    """Raises `ConfigError` where a student could not learn from it."""
    assert config.distil is not None
    name = f"distil.teacher: '{config.distil.teacher}'"
    if not isinstance(teacher, Flow):
        raise ConfigError(f"{name} is no generator by flow matching or diffusion; take a run of configs/flow.yaml")
    if (teacher.config.latents, teacher.config.text) != (config.latents, config.text):
        raise ConfigError(f"{name} has other latents or reads texts in another way; take its latents and text for the student")
    straight = isinstance(teacher.denoising.path, StraightPath) and isinstance(config.path, FlowPathConfig)
    if isinstance(config.distil, ConsistencyConfig) and not straight and teacher.denoising.path != config.path.build():
        raise ConfigError(f"{name} goes another way from noise to data; take its path for the student")


def _check_align(name: str, model: Any) -> None:
    """Raises `ConfigError` where a model's features of pictures have no places that others could be drawn to."""
    tower = model.encoders().get("image") if isinstance(model, Embeds) else None
    if tower is None:
        raise ConfigError(f"align.model: '{name}' has no picture tower; take a model such as emoji-clip")
    if not isinstance(tower, ImageEncoder):
        raise ConfigError(
            f"align.model: the picture tower of '{name}' is a library's own and does not tell where its features are; "
            "take a model whose tower is a backbone of timm, such as emoji-clip"
        )


def build(config: FlowSettings, parts: Mapping[str, Any] | None = None) -> Flow:
    """Build the generator with fresh weights; ``parts`` may hold ``latents``, ``text``, ``align`` and ``teacher``."""
    latents, text = build_latents(config.latents, parts), build_prompt_network(config.text, parts)
    shape = latents.latent_shape
    align: Any = (parts or {}).get("align")
    if config.align is not None:
        _check_align(config.align.model, align)
    teacher = (parts or {}).get("teacher")
    if config.distil is not None:
        _check_teacher(config, teacher)
    reader = PromptEncoder(text)
    widths = reader.words_width, reader.vector_width if config.vector_condition else None
    tower: Any = align  # a network with the capability that was asked for
    flow = Flow(latents, text, build_denoiser(config.denoiser, shape, *widths), config, tower, teacher)
    if flow.no_words is not None:
        nn.init.normal_(flow.no_words, std=0.02)
    return flow
