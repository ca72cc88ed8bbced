"""Speech recognition: a wav2vec 2.0 encoder with a linear head, trained by connectionist temporal classification.

Papers: wav2vec 2.0 https://arxiv.org/abs/2006.11477 (section 3.2), CTC https://www.cs.toronto.edu/~graves/icml_2006.pdf. Start
with a pretrained encoder by ``init_from``.

Deviation: the paper's code draws spans of hidden channels, too.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mm.encoders.wav2vec2 import Wav2Vec2Encoder, Wav2Vec2EncoderConfig, build_wav2vec2_encoder, span_mask
from mm.errors import UserError
from mm.generators.ctc import at_rests, best_path, prefix_search
from mm.systems.settings import SystemSettings
from mm.systems.wav2vec2 import Wav2Vec2
from mm.types import AudioBatch, Batch, Encoded, Losses, System

WINDOWS_AT_ONCE = 8
"""Windows of a long recording that are heard as one batch."""

MIN_WINDOW_FRAMES = 6


class Wav2Vec2CtcConfig(SystemSettings):
    """A recogniser of speech.

    Args:
        audio: The encoder.
        vocab_size: Of the head, the blank included.
        context_length: Longest text in tokens.
        blank: Id that stands for no token; the one that fills up texts.
        dropout: Before the head.
        mask_share: Frames in spans that training hides, over all frames (0 for none), and
        mask_length: frames of a span.
        train_convolutions: Whether the convolutions learn, too; the paper holds them fixed once they are pretrained.
    """

    name: Literal["wav2vec2-ctc"] = "wav2vec2-ctc"
    audio: Wav2Vec2EncoderConfig = Wav2Vec2EncoderConfig()
    vocab_size: int = Field(default=32, ge=2)
    context_length: int = Field(default=256, ge=3)
    blank: int = Field(default=0, ge=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    mask_share: float = Field(default=0.05, ge=0, le=1)
    mask_length: int = Field(default=10, ge=1)
    train_convolutions: bool = True

    @model_validator(mode="after")
    def _possible(self) -> "Wav2Vec2CtcConfig":
        if self.blank >= self.vocab_size:
            raise ValueError(f"blank {self.blank} must be one of the {self.vocab_size} ids of vocab_size")
        return self

    @property
    def picture_side(self) -> None:
        return None

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.vocab_size, self.context_length

    @property
    def hears(self) -> bool:
        return True

    @property
    def audio_rate(self) -> int | None:
        return self.audio.wanted_rate

    def with_vocabulary(self, size: int) -> "Wav2Vec2CtcConfig":
        return self.model_copy(update={"vocab_size": size})


class Wav2Vec2Ctc(System):
    """Writes down what is said.

    Args:
        encoder: Of waves.
        config: What built it.
    """

    def __init__(self, encoder: Wav2Vec2Encoder, config: Wav2Vec2CtcConfig) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        self.mask_vector = nn.Parameter(torch.rand(encoder.width), requires_grad=config.mask_share > 0)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(encoder.width, config.vocab_size)
        encoder.trunk.feature_extractor.requires_grad_(config.train_convolutions)

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return ("mask_vector",)

    def state_from(self, start: System) -> dict[str, Tensor]:
        """See `mm.types.System`: of a pretrained network its encoder and the vector of hidden frames."""
        state = super().state_from(start)
        if not isinstance(start, Wav2Vec2):
            return state
        return {name: tensor for name, tensor in state.items() if name.startswith(("encoder.", "mask_vector"))}

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoder in another floating type, for inference."""
        self.encoder.cast_(dtype)

    def encode_audio(self, audio: AudioBatch) -> Encoded:
        """Features of recordings, frame by frame; they do not depend on the batch."""
        return self.encoder(audio)

    def log_shares(self, audio: AudioBatch) -> tuple[Float[Tensor, "b n v"], Bool[Tensor, "b n"]]:
        """Log-probabilities of the tokens at each frame, fp32, and which frames are of the recording."""
        encoded = self.encode_audio(audio)
        return self._shares(encoded.tokens), encoded.mask

    def loss(self, batch: Batch, step: int) -> Losses:
        """Mean negative log-likelihood of the texts, each over its number of tokens, nats; texts that no path fits give 0."""
        assert batch.audio is not None
        assert batch.text is not None
        mask = self.encoder.frame_mask(batch.audio)
        normalised = self.encoder.normalise(self.encoder.frames(batch.audio))
        hides = self.training and self.config.mask_share > 0
        draws = batch.draws(mask.device)
        hidden = span_mask(mask, self.config.mask_share, self.config.mask_length, draws) if hides else None
        tokens = self.encoder.contextualise(normalised, mask, None if hidden is None else (hidden, self.mask_vector))
        loss = F.ctc_loss(
            self._shares(self.dropout(tokens)).transpose(0, 1),
            batch.text.ids,
            mask.sum(1),
            batch.text.lengths,
            blank=self.config.blank,
            zero_infinity=True,
        )
        return Losses(loss)

    @torch.no_grad()
    def transcribe(self, audio: AudioBatch, *, beams: int = 1, window: int | None = None) -> list[tuple[int, ...]]:
        """See `mm.types.Transcribes`. Raises `UserError` where a window is shorter than `MIN_WINDOW_FRAMES`."""
        if window is None or audio.waves.shape[1] <= window:
            rows = self._rows(audio)
        else:
            rows = [self._windowed(wave[:length], window) for wave, length in zip(audio.waves, audio.lengths, strict=True)]
        if beams == 1:
            return [best_path(row, self.config.blank) for row in rows]
        parts = ([prefix_search(part, beams, self.config.blank)[0][0] for part in at_rests(r, self.config.blank)] for r in rows)
        return [tuple(chain.from_iterable(part)) for part in parts]

    def _rows(self, audio: AudioBatch) -> list[Float[Tensor, "n v"]]:
        """Log-probabilities of each recording's frames."""
        shares, mask = self.log_shares(audio)
        return [row[:count].cpu() for row, count in zip(shares, mask.sum(1).tolist(), strict=True)]

    def _windowed(self, wave: Float[Tensor, " t"], window: int) -> Float[Tensor, "n v"]:
        """The same of a long recording. Of each window the outer sixths, which see little of what is beside them, are left to
        its neighbours; frames are where they would be without windows."""
        audio = self.encoder.config
        frames = (window - audio.receptive_field) // audio.frame_step + 1
        if frames < MIN_WINDOW_FRAMES:
            raise UserError(f"a window of {window} samples has {frames} frames; long recordings need {MIN_WINDOW_FRAMES}")
        margin = frames // 6
        step = (frames - 2 * margin) * audio.frame_step
        starts = range(0, max(1, len(wave) - 2 * margin * audio.frame_step), step)
        windows = [wave[start : start + window] for start in starts]
        rows: list[Tensor] = []
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            batch = windows[first : first + WINDOWS_AT_ONCE]
            lengths = torch.tensor([len(part) for part in batch], device=wave.device)
            rows += self._rows(AudioBatch(pad_sequence(batch, batch_first=True), lengths))
        last = len(rows) - 1
        return torch.cat([row[margin if n else 0 : None if n == last else frames - margin] for n, row in enumerate(rows)])

    def _shares(self, tokens: Tensor) -> Tensor:
        return self.head(tokens.to(self.head.weight.dtype)).float().log_softmax(-1)


def build(config: Wav2Vec2CtcConfig, parts: Mapping[str, Any] | None = None) -> Wav2Vec2Ctc:
    """Build the network with fresh weights."""
    return Wav2Vec2Ctc(build_wav2vec2_encoder(config.audio), config)
