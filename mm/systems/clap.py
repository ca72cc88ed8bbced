"""CLAP: a tower for recordings and a text tower trained to agree on which words belong to which sound.

Papers: CLAP https://arxiv.org/abs/2211.06687, https://arxiv.org/abs/2206.04769.

Deviations: any of the suite's encoders may be the towers; recordings keep their length instead of being repeated or fused from
crops (`mm.media.audio.AudioSpec.repeat` does as the paper).
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor

from mm.encoders.audio import LogMelEncoderConfig, build_log_mel_encoder
from mm.encoders.text import TextEncoderConfig, build_text_encoder
from mm.encoders.wav2vec2 import Wav2Vec2EncoderConfig, build_wav2vec2_encoder
from mm.fusion.dual_tower import DualTower
from mm.losses.contrastive import info_nce
from mm.losses.gather import current_gather
from mm.systems.settings import SystemSettings
from mm.systems.two_towers import TwoTowers, projection
from mm.types import AudioBatch, Batch, Losses


def _kind(value: Any) -> str:
    kind = value.get("kind", "log-mel") if isinstance(value, Mapping) else getattr(value, "kind", "log-mel")
    return str(kind)


AudioTower = Annotated[
    Annotated[LogMelEncoderConfig, Tag("log-mel")] | Annotated[Wav2Vec2EncoderConfig, Tag("wav2vec2")], Discriminator(_kind)
]
"""Encoders of recordings, told apart by ``kind``; log-mel where it is not said."""


class ClapConfig(SystemSettings):
    """CLAP with its two encoders.

    Args:
        audio: The encoder of recordings.
        text: The text encoder.
        embed_dim: Width of the shared space.
        chunk_size: See `mm.systems.clip.ClipConfig`.
        label_smoothing: See there.
    """

    name: Literal["clap"] = "clap"
    audio: AudioTower = LogMelEncoderConfig()
    text: TextEncoderConfig = TextEncoderConfig()
    embed_dim: int = Field(default=512, ge=1)
    chunk_size: int | None = Field(default=None, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    @property
    def picture_side(self) -> None:
        return None

    @property
    def hears(self) -> bool:
        return True

    @property
    def audio_rate(self) -> int | None:
        return self.audio.wanted_rate

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length

    def with_vocabulary(self, size: int) -> "ClapConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})


class Clap(TwoTowers):
    """A dual tower with a contrastive loss.

    Args:
        towers: The ``audio`` and ``text`` towers and their scale.
        chunk_size: See `ClapConfig`.
        label_smoothing: See `ClapConfig`.
    """

    modalities = ("audio", "text")

    def __init__(self, towers: DualTower, *, chunk_size: int | None = None, label_smoothing: float = 0.0) -> None:
        super().__init__(towers)
        self.chunk_size = chunk_size
        self.label_smoothing = label_smoothing

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        """The contrastive loss of the whole batch given its unit vectors."""
        scale = self.towers.scale()
        loss = info_nce(
            representations["audio"],
            representations["text"],
            scale,
            groups=batch.groups,
            chunk_size=self.chunk_size,
            label_smoothing=self.label_smoothing,
            gather=current_gather(),
        )
        return Losses(loss, {"contrastive": loss.detach(), "logit_scale": scale.detach()})

    def embed_audio(self, audio: AudioBatch) -> Tensor:
        """See `mm.types.Hears`."""
        return self.towers.embed("audio", audio)


def build_audio_encoder(config: AudioTower) -> Any:
    """An encoder of recordings with fresh weights."""
    if isinstance(config, Wav2Vec2EncoderConfig):
        return build_wav2vec2_encoder(config)
    return build_log_mel_encoder(config)


def build(config: ClapConfig, parts: Mapping[str, Any] | None = None) -> Clap:
    """Build CLAP with fresh weights."""
    audio, text = build_audio_encoder(config.audio), build_text_encoder(config.text)
    towers = DualTower(
        {
            "audio": (audio, projection(audio.width, config.embed_dim)),
            "text": (text, projection(text.width, config.embed_dim)),
        }
    )
    return Clap(towers, chunk_size=config.chunk_size, label_smoothing=config.label_smoothing)
