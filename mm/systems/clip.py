"""CLIP: a picture tower and a text tower trained to agree on which caption belongs to which picture.

Papers: CLIP https://arxiv.org/abs/2103.00020, SigLIP https://arxiv.org/abs/2303.15343 (``loss: siglip``), LiT
https://arxiv.org/abs/2111.07991 (``lock``), supervised contrastive https://arxiv.org/abs/2004.11362 (``image_image_weight``).

Deviations from the CLIP paper: a picture may have several positive captions and a caption several positive pictures
(`Batch.groups`); the queue of past features (``queue_size``) holds those of the towers themselves, not of a momentum copy.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from mm.config import TAG_PREFIX
from mm.encoders.image import ImageEncoderConfig, build_image_encoder
from mm.encoders.library import (
    LibraryImageConfig,
    LibraryTextConfig,
    build_library_image_encoder,
    build_library_text_encoder,
)
from mm.encoders.text import TextEncoderConfig, build_text_encoder
from mm.errors import ConfigError
from mm.fusion.dual_tower import INITIAL_LOGIT_SCALE, DualTower
from mm.losses.contrastive import info_nce, siglip, supervised_contrastive
from mm.losses.gather import Gather, current_gather
from mm.losses.groups import lasting_groups
from mm.losses.queue import FeatureQueue
from mm.systems.settings import SystemSettings
from mm.systems.two_towers import TwoTowers, projection
from mm.types import Batch, Losses

TOWERS = ("image", "text")

SIGLIP_LOGIT_SCALE = math.log(10)
SIGLIP_LOGIT_BIAS = -10.0
"""SigLIP's initial values: with them the many negatives of a fresh model cost next to nothing (section 3.2)."""


OWN, LIBRARY = TAG_PREFIX + "own", TAG_PREFIX + "library"


def _kind(value: Any) -> str:
    """Whether a tower is of the suite's own parts or a published library's module: the latter names its ``library``."""
    named = "library" in value if isinstance(value, Mapping) else hasattr(value, "library")
    return LIBRARY if named else OWN


ImageTower = Annotated[
    Annotated[ImageEncoderConfig, Tag(OWN)] | Annotated[LibraryImageConfig, Tag(LIBRARY)], Discriminator(_kind)
]
TextTower = Annotated[Annotated[TextEncoderConfig, Tag(OWN)] | Annotated[LibraryTextConfig, Tag(LIBRARY)], Discriminator(_kind)]
Projection = Literal["linear", "affine", "none"]


class ClipConfig(SystemSettings):
    """CLIP with its two encoders.

    Args:
        image: The picture encoder.
        text: The text encoder.
        embed_dim: Width of the shared space.
        image_projection: From the picture encoder's pooled vector to the shared space: ``linear``, ``affine`` (with a bias) or
            ``none`` where the encoder ends there.
        text_projection: The same for the text encoder.
        loss: ``infonce`` (softmax over the global batch) or ``siglip`` (a sigmoid for each pair).
        chunk_size: Rows of the similarity matrix in memory at once; null chooses by size, 0 keeps all of it. Same loss.
        label_smoothing: Share of InfoNCE's target that is spread evenly over the batch, in 0..1.
        image_image_weight: Weight of the supervised contrastive loss between pictures of the same group; 0 leaves it out.
        queue_size: Past features of each tower kept as further negatives of InfoNCE; 0 for none. ``Batch.groups`` must then
            number things alike in all batches.
        lock: Towers whose encoders keep their weights; their projections are trained.
    """

    name: Literal["clip"] = "clip"
    image: ImageTower = ImageEncoderConfig()
    text: TextTower = TextEncoderConfig()
    embed_dim: int = Field(default=512, ge=1)
    image_projection: Projection = "linear"
    text_projection: Projection = "linear"
    loss: Literal["infonce", "siglip"] = "infonce"
    chunk_size: int | None = Field(default=None, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    image_image_weight: float = Field(default=0.0, ge=0)
    queue_size: int = Field(default=0, ge=0)
    lock: tuple[Literal["image", "text"], ...] = ()

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length

    def with_vocabulary(self, size: int) -> "ClipConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})

    def for_inference(self) -> "ClipConfig":
        return self.model_copy(update={"queue_size": 0})

    @model_validator(mode="after")
    def _possible(self) -> "ClipConfig":
        if self.loss == "siglip" and (self.label_smoothing or self.queue_size):
            option = "label_smoothing" if self.label_smoothing else "queue_size"
            raise ValueError(f"{option} belongs to loss: infonce; set it to 0 for loss: siglip")
        if len(set(self.lock)) < len(self.lock):
            raise ValueError(f"lock names a tower twice: {', '.join(self.lock)}")
        return self


class Clip(TwoTowers):
    """A dual tower with a contrastive loss.

    Args:
        towers: The ``image`` and ``text`` towers, their scale, and their bias for SigLIP.
        queues: Past features by tower name, or None.
        chunk_size: See `ClipConfig`.
        label_smoothing: See `ClipConfig`.
        image_image_weight: See `ClipConfig`.
    """

    modalities = TOWERS

    def __init__(
        self,
        towers: DualTower,
        *,
        queues: Mapping[str, FeatureQueue] | None = None,
        chunk_size: int | None = None,
        label_smoothing: float = 0.0,
        image_image_weight: float = 0.0,
    ) -> None:
        super().__init__(towers)
        self._queues = dict(queues or {})  # the same modules as below, with their type
        self.queues = nn.ModuleDict(self._queues)
        self.chunk_size = chunk_size
        self.label_smoothing = label_smoothing
        self.image_image_weight = image_image_weight

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("queues.",)

    @property
    def left_out(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        absent = [name for name in TOWERS if name not in self.towers.encoders]
        return tuple(f"towers.{kind}.{name}." for kind in ("encoders", "projections") for name in absent)

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        """The contrastive loss of the whole batch given its unit vectors."""
        scale, gather = self.towers.scale(), current_gather()
        total = contrastive = self._contrastive(representations, batch, step, scale, gather)
        parts = {"contrastive": contrastive, "logit_scale": scale}
        if self.towers.logit_bias is None:
            parts["guessing"] = torch.tensor(math.log(self._candidates(len(batch), gather)), device=scale.device)
        if self.image_image_weight:
            parts["image_image"] = supervised_contrastive(
                representations["image"], scale, lasting_groups(batch, scale.device), chunk_size=self.chunk_size, gather=gather
            )
            total = total + self.image_image_weight * parts["image_image"]
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Clamp the scale; queue the features of the step that was applied."""
        super().after_step(step)
        for queue in self._queues.values():
            queue.commit(current_gather())

    def embed_image(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` to unit vectors ``(B, D)``, fp32."""
        return self.towers.embed("image", image)

    def _candidates(self, rows: int, gather: Gather | None) -> int:
        """How many the right one is sought among: the global batch and the queue."""
        queued = len(self._queues["image"]) if self._queues else 0
        return rows * (1 if gather is None else gather.world_size) + queued

    def _contrastive(
        self, representations: Mapping[str, Tensor], batch: Batch, step: int, scale: Tensor, gather: Gather | None
    ) -> Tensor:
        image, text = representations["image"], representations["text"]
        groups, bias = batch.groups, self.towers.logit_bias
        if bias is not None:
            return siglip(image, text, scale, bias, groups=groups, chunk_size=self.chunk_size, gather=gather)
        negatives = None
        if self._queues:
            groups = lasting_groups(batch, image.device)
            negatives = self._queues["image"].content(), self._queues["text"].content()
            if self.training and torch.is_grad_enabled():
                for name, queue in self._queues.items():
                    queue.stage(representations[name], groups, step)
        return info_nce(
            image,
            text,
            scale,
            groups=groups,
            chunk_size=self.chunk_size,
            label_smoothing=self.label_smoothing,
            negatives=negatives,
            gather=gather,
        )


def build(config: ClipConfig, parts: Mapping[str, Any] | None = None) -> Clip:
    """Build CLIP with fresh weights; ``parts`` may hold ready ``image`` and ``text`` encoders for the configured ones, or None
    where a tower is to be left out."""
    parts = parts or {}
    image = parts["image"] if "image" in parts else _image_encoder(config.image)
    text = parts["text"] if "text" in parts else _text_encoder(config.text)
    built = {name: encoder for name, encoder in (("image", image), ("text", text)) if encoder is not None}
    projections: dict[str, Projection] = {"image": config.image_projection, "text": config.text_projection}
    is_siglip = config.loss == "siglip"
    towers = DualTower(
        {
            name: (encoder, _projection(projections[name], encoder.width, config.embed_dim, name))
            for name, encoder in built.items()
        },
        logit_scale=SIGLIP_LOGIT_SCALE if is_siglip else INITIAL_LOGIT_SCALE,
        logit_bias=SIGLIP_LOGIT_BIAS if is_siglip else None,
        locked=config.lock,
    )
    return Clip(
        towers,
        queues={name: FeatureQueue(config.queue_size, config.embed_dim) for name in TOWERS} if config.queue_size else None,
        chunk_size=config.chunk_size,
        label_smoothing=config.label_smoothing,
        image_image_weight=config.image_image_weight,
    )


def _image_encoder(config: ImageEncoderConfig | LibraryImageConfig) -> Any:
    return build_library_image_encoder(config) if isinstance(config, LibraryImageConfig) else build_image_encoder(config)


def _text_encoder(config: TextEncoderConfig | LibraryTextConfig) -> Any:
    return build_library_text_encoder(config) if isinstance(config, LibraryTextConfig) else build_text_encoder(config)


def _projection(kind: Projection, width: int, embed_dim: int, tower: str) -> nn.Module:
    if kind == "none":
        if width != embed_dim:
            raise ConfigError(f"{tower}_projection: none needs an encoder that ends at embed_dim {embed_dim}, not at {width}")
        return nn.Identity()
    return projection(width, embed_dim, bias=kind == "affine")
