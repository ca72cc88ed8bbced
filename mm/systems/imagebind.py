"""ImageBind: recordings join a space that pictures and texts share, bound to it by what they are seen and said with.

Paper: https://arxiv.org/abs/2305.05665. There the pictures are the hub: every other modality is aligned with them alone, and
what no pair taught, sound and text, comes out aligned. Here the hub is a whole dual tower, and recordings may be aligned with
its pictures (``text_weight: 0``, the paper), its texts, or both; a hub that is trained along gives the loss of all pairs.

Deviations: recordings may follow the directions of texts from the mean of all texts (``queue_size``), which is added again
where recordings are compared with pictures and texts. A recording may be read by texts known by heart (``memory_size``): its
vector is drawn towards those that are most like it, as DeCap (https://arxiv.org/abs/2303.03032) brings pictures to texts. A
third objective may draw the vector of a recording towards that of its words (``likeness_weight``), which lets a small tower
follow a trained text tower also where no batch tells two texts apart.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from mm.encoders.audio import LogMelEncoderConfig
from mm.errors import ConfigError
from mm.fusion.dual_tower import DualTower, unit
from mm.losses.contrastive import info_nce
from mm.losses.gather import current_gather
from mm.losses.groups import lasting_groups
from mm.losses.queue import FeatureQueue, Queued
from mm.nn.freeze import freeze
from mm.systems import clip
from mm.systems.clap import AudioTower, build_audio_encoder
from mm.systems.clip import Clip, ClipConfig
from mm.systems.prompted import REFERENCE
from mm.systems.settings import SystemSettings
from mm.systems.two_towers import projection
from mm.types import AudioBatch, Batch, Encoded, Losses, System, TextBatch

MEMORY_SCALE = 50.0
"""Multiplier of the cosines of a recording with the texts known by heart, from their centre, before the softmax."""

MEMORY_SHARE = 0.6
"""Of what is remembered in a recording's vector; the rest is as it was heard, for texts that are not remembered."""


def _kind(value: Any) -> str:
    return REFERENCE if isinstance(value, str) else "clip"


HubConfig = Annotated[Annotated[str, Tag(REFERENCE)] | Annotated[ClipConfig, Tag("clip")], Discriminator(_kind)]
"""A MODEL with pictures and texts in one space, or its configuration."""


class ImagebindConfig(SystemSettings):
    """A dual tower for pictures and texts, and a third for recordings.

    Args:
        hub: A MODEL such as ``emoji-clip``, held fixed; or the configuration of a CLIP.
        train_hub: Train the hub along, which is then given by its configuration: all pairs are learned.
        audio: The encoder of recordings.
        image_weight: Of the contrastive loss between recordings and pictures.
        text_weight: Of that between recordings and texts.
        likeness_weight: Of one minus the cosine of a recording's vector and its text's. Needs no batch to tell texts apart.
        queue_size: Past vectors of pictures and texts kept as further negatives of the recordings. A fixed hub never changes
            them, so that they are as good as those of a larger batch. ``Batch.groups`` must then have lasting meaning. With a
            queue, recordings follow the directions of the hub's vectors from its mean: these lie in a narrow cone, so that
            whoever follows them from the origin mostly learns their mean.
        memory_size: Number of texts known by heart, which `mm.run.memory.remembering` puts there after training.
        chunk_size: See `mm.systems.clip.ClipConfig`.
    """

    name: Literal["imagebind"] = "imagebind"
    hub: HubConfig = "emoji-clip"
    train_hub: bool = False
    audio: AudioTower = LogMelEncoderConfig()
    image_weight: float = Field(default=1.0, ge=0)
    text_weight: float = Field(default=1.0, ge=0)
    likeness_weight: float = Field(default=0.0, ge=0)
    queue_size: int = Field(default=0, ge=0)
    memory_size: int = Field(default=0, ge=0)
    chunk_size: int | None = Field(default=None, ge=0)

    def check_start(self, start: SystemSettings | None) -> None:
        """What is known by heart is no parameter: a training keeps it, and cannot make it."""
        if self.memory_size and getattr(start, "memory_size", 0) != self.memory_size:
            raise ConfigError(
                f"system.memory_size {self.memory_size}: would be a memory of zeros; leave it out, and after the training "
                "`mm remember RUN --data DATA -o MODEL` learns the captions of DATA by heart"
            )

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.hub, str), "known once the model is loaded"
        return self.hub.picture_side

    @property
    def hears(self) -> bool:
        return True

    @property
    def audio_rate(self) -> int | None:
        return self.audio.wanted_rate

    @property
    def learns_pictures(self) -> bool:
        return self.train_hub or self.image_weight > 0

    @property
    def embed_dim(self) -> int:
        """Width of the shared space."""
        assert not isinstance(self.hub, str), "known once the model is loaded"
        return self.hub.embed_dim

    @property
    def text_limits(self) -> tuple[int, int]:
        assert not isinstance(self.hub, str), "known once the model is loaded"
        return self.hub.text_limits

    def with_vocabulary(self, size: int) -> "ImagebindConfig":
        return self if isinstance(self.hub, str) else self.model_copy(update={"hub": self.hub.with_vocabulary(size)})

    def for_inference(self) -> "ImagebindConfig":
        hub = self.hub if isinstance(self.hub, str) else self.hub.for_inference()
        return self.model_copy(update={"hub": hub, "queue_size": 0})

    def parts(self) -> dict[str, str]:
        return {"hub": self.hub} if isinstance(self.hub, str) else {}

    @model_validator(mode="after")
    def _possible(self) -> "ImagebindConfig":
        if self.train_hub and isinstance(self.hub, str):
            raise ValueError(f"train_hub: a hub that is trained is given by its configuration, not as the MODEL '{self.hub}'")
        if not (self.image_weight or self.text_weight or self.likeness_weight):
            raise ValueError("image_weight, text_weight and likeness_weight are all 0, so that nothing is learned; raise one")
        if self.train_hub and self.queue_size:
            raise ValueError("queue_size: vectors of a hub that is trained grow old; set it to 0, or hub.queue_size instead")
        return self

    @property
    def contrasted(self) -> dict[str, float]:
        """Weights of the contrastive losses, by what recordings are compared with."""
        return {name: weight for name, weight in (("image", self.image_weight), ("text", self.text_weight)) if weight}


class Imagebind(System):
    """See above.

    Args:
        hub: Pictures and texts; its scale is everybody's at inference.
        towers: The ``audio`` tower, with a scale for training.
        config: Weights.
        queues: Past vectors by tower of the hub.

    Attributes:
        centre: The mean from which recordings follow directions, ``(D,)``; zero without queues.
        memory: Vectors of texts known by heart, ``(M, D)``.
    """

    centre: Tensor
    memory: Tensor

    def __init__(
        self, hub: Clip, towers: DualTower, config: ImagebindConfig, queues: Mapping[str, FeatureQueue] | None = None
    ) -> None:
        super().__init__()
        self.hub = hub if config.train_hub else freeze(hub)
        self.towers = towers
        self.config = config
        self._queues = dict(queues or {})  # the same modules as below, with their type
        self.queues = nn.ModuleDict(self._queues)
        width = next(iter(towers.projections.parameters())).shape[0]
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("memory", torch.zeros(config.memory_size, width))

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("queues.", *(f"hub.{name}" for name in self.hub.only_for_training))

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors ``audio``, ``text`` and, where pictures are learned from, ``image``, each ``(B, D)``."""
        assert batch.audio is not None
        names = ("image", "text") if self.config.learns_pictures else ("text",)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.train_hub):
            known = {name: self.hub.towers.embed(name, getattr(batch, name)) for name in names}
        return known | {"audio": self.towers.embed("audio", batch.audio)}

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        """The weighted losses of the whole batch given its unit vectors."""
        config, scale, gather = self.config, self.towers.scale(), current_gather()
        audio, parts = representations["audio"], {"logit_scale": scale.detach()}
        total = audio.new_zeros(())
        groups = lasting_groups(batch, audio.device) if self._queues else batch.groups
        targets = {name: representations[name] for name in ("image", "text") if name in representations}
        negatives: dict[str, tuple[Queued, Queued]] = {}
        for name, queue in self._queues.items():
            assert groups is not None
            past = queue.content()
            if self.training and torch.is_grad_enabled():
                queue.stage(targets[name], groups, step)
            targets[name], known = (_from_centre(x, past.features) for x in (targets[name], past.features))
            negatives[name] = Queued(audio[:0].detach(), groups[:0]), Queued(known, past.ids)
        for name, weight in config.contrasted.items():
            part = info_nce(
                audio,
                targets[name],
                scale,
                groups=groups,
                chunk_size=config.chunk_size,
                negatives=negatives.get(name),
                gather=gather,
            )
            parts[f"audio_{name}"] = part.detach()
            total = total + weight * part
        if config.likeness_weight:
            unlike = 1 - (audio * targets["text"]).sum(1).mean()
            parts["unlike"] = unlike.detach()
            total = total + config.likeness_weight * unlike
        if config.train_hub:
            hub = self.hub.loss_from(representations, batch, step)
            parts |= {f"hub_{name}": value for name, value in hub.parts.items()}
            total = total + hub.total
        return Losses(total, parts)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Training loss of this rank's share of the global batch."""
        return self.loss_from(self.represent(batch), batch, step)

    def after_step(self, step: int) -> None:
        """Clamp the scales, queue the vectors of the step that was applied, and what the hub does."""
        self.towers.clamp_()
        for queue in self._queues.values():
            queue.commit(current_gather())
        if self._queues:
            queue = self._queues["text" if "text" in self._queues else "image"]
            self.centre.copy_(queue.content().features.mean(0))
        if self.config.train_hub:
            self.hub.after_step(step)

    def embed_audio(self, audio: AudioBatch) -> Tensor:
        """See `mm.types.Hears`."""
        heard = self.towers.embed("audio", audio)
        centre, memory = self.centre.to(heard), self.memory.to(heard)
        vector = unit(centre + heard)
        if not len(memory):
            return vector
        shares = (MEMORY_SCALE * heard @ unit(memory - centre).T).softmax(1)
        return unit(torch.lerp(vector, unit(shares @ memory), MEMORY_SHARE))

    @torch.no_grad()
    def remember(self, texts: Float[Tensor, "m d"]) -> None:
        """Know texts by heart from now on, in place of what was known.

        Args:
            texts: Their unit vectors.
        """
        self.memory = texts.detach().clone()

    def embed_image(self, image: Tensor) -> Tensor:
        """As the hub's."""
        return self.hub.embed_image(image)

    def embed_text(self, text: TextBatch) -> Tensor:
        """As the hub's."""
        return self.hub.embed_text(text)

    def read_texts(self, text: TextBatch) -> Encoded:
        """As the hub's."""
        return self.hub.read_texts(text)

    def encoders(self) -> Mapping[str, nn.Module]:
        """The ``image``, ``text`` and ``audio`` encoders."""
        return {**self.hub.encoders(), "audio": self.towers.encoders["audio"]}

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the towers in another floating type, for inference."""
        self.hub.cast_(dtype)
        self.towers.cast_(dtype)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits ``(Q, M)`` with the hub's scale."""
        return self.hub.scores(queries, items)


def build(config: ImagebindConfig, parts: Mapping[str, Any] | None = None) -> Imagebind:
    """Build the network with fresh weights; ``parts["hub"]`` may hold a trained dual tower.

    Raises:
        ConfigError: A mere name without the part, or a part that is no CLIP.
    """
    hub = (parts or {}).get("hub")
    if hub is None:
        if isinstance(config.hub, str):
            raise ConfigError(f"hub: '{config.hub}' names a model; give it as a part, or its configuration in its place")
        hub = clip.build(config.hub if config.train_hub else config.hub.for_inference())
    if not isinstance(hub, Clip):
        raise ConfigError(
            "hub: this model is no dual tower of pictures and texts; take emoji-clip, or a run of configs/clip.yaml"
        )
    audio, width = build_audio_encoder(config.audio), _embed_dim(hub)
    queues = {name: FeatureQueue(config.queue_size, width) for name in config.contrasted} if config.queue_size else None
    return Imagebind(hub, DualTower({"audio": (audio, projection(audio.width, width))}), config, queues)


def _from_centre(x: Float[Tensor, "b d"], past: Float[Tensor, "q d"]) -> Float[Tensor, "b d"]:
    """Directions of vectors from the mean of past ones, of length one."""
    return F.normalize(x - past.mean(0), dim=1) if len(past) else x


def _embed_dim(hub: Clip) -> int:
    """Width of the shared space, where a part was given for a name."""
    width: Any = hub.towers.encoders["text"].width
    like = next(hub.parameters())
    return hub.towers.projections["text"](torch.zeros(1, width, device=like.device)).shape[-1]
