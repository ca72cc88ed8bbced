"""wav2vec 2.0: an encoder of speech that learns without any words. Source: https://arxiv.org/abs/2006.11477.

Frames are hidden in spans; from what is left the transformer tells, for each hidden frame, its quantised features from those
of other hidden frames of the recording.

Deviations from the paper's code: the penalty on the features is a mean over frames of recordings alone, not over padding;
the loss is the mean over hidden frames of a batch, so its scale does not depend on their number. Means and the use of codes are
those of the frames of all processes; in the paper's code each has its own.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.draws import Draws
from mm.encoders.wav2vec2 import (
    Wav2Vec2Encoder,
    Wav2Vec2EncoderConfig,
    build_wav2vec2_encoder,
    draw_negatives,
    span_mask,
)
from mm.errors import ConfigError
from mm.losses.gather import Gather, average_count, current_gather
from mm.nn.product_quantize import ProductQuantizer
from mm.systems.settings import SystemSettings
from mm.types import AudioBatch, Batch, Encoded, Losses, System


class PretrainingConfig(StrictConfig):
    """What the encoder learns by; the defaults are the paper's.

    Args:
        mask_share: Frames in hidden spans, over all frames, were no two spans to overlap; 0.65 hides about half.
        mask_length: Frames of a span.
        codebooks: Of the quantizer.
        codes: Of each codebook.
        code_width: Of all codes of a frame together.
        width: Of the space in which contexts and codes are compared.
        negatives: Other hidden frames that each is told apart from.
        temperature: Cosines are divided by it.
        diversity: Weight of the loss that makes all codes be used.
        count_twins: Count negatives with the very codes of the frame as negatives. The paper leaves them out, so that few codes
            in use make the loss small; counted, they make it large, up to the logarithm of all choices.
        feature_penalty: Weight of the mean square of the convolutions' output.
        feature_gradient: What the convolutions' gradients are multiplied with.
        gumbel: First and last temperature of the draws of codes, and the factor of a step.
    """

    mask_share: float = Field(default=0.65, gt=0, le=1)
    mask_length: int = Field(default=10, ge=2)
    codebooks: int = Field(default=2, ge=1)
    codes: int = Field(default=320, ge=2)
    code_width: int = Field(default=256, ge=1)
    width: int = Field(default=256, ge=1)
    negatives: int = Field(default=100, ge=1)
    temperature: float = Field(default=0.1, gt=0)
    diversity: float = Field(default=0.1, ge=0)
    count_twins: bool = False
    feature_penalty: float = Field(default=10.0, ge=0)
    feature_gradient: float = Field(default=0.1, gt=0, le=1)
    gumbel: tuple[float, float, float] = (2.0, 0.5, 0.999995)

    @model_validator(mode="after")
    def _possible(self) -> "PretrainingConfig":
        if self.code_width % self.codebooks:
            raise ValueError(f"code_width {self.code_width} must be a multiple of codebooks {self.codebooks}")
        first, last, factor = self.gumbel
        if not (first >= last > 0 and 0 < factor <= 1):
            raise ValueError("gumbel: the first temperature, the last one, above 0 and no higher, and a factor up to 1")
        return self


class Wav2Vec2Config(SystemSettings):
    """An encoder of speech and what it is pretrained by.

    Args:
        audio: The encoder.
        objective: Null for an encoder that was published without what it was pretrained by; it cannot be trained further, but
            ``wav2vec2-ctc`` can begin with it.
    """

    name: Literal["wav2vec2"] = "wav2vec2"
    audio: Wav2Vec2EncoderConfig = Wav2Vec2EncoderConfig()
    objective: PretrainingConfig | None = PretrainingConfig()

    @property
    def picture_side(self) -> None:
        return None

    @property
    def text_limits(self) -> None:
        return None

    @property
    def hears(self) -> bool:
        return True

    @property
    def audio_rate(self) -> int | None:
        return self.audio.wanted_rate


class Wav2Vec2(System):
    """An encoder in pretraining.

    Args:
        encoder: Of waves.
        config: Weights of the losses.
    """

    def __init__(self, encoder: Wav2Vec2Encoder, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.encoder, self.config = encoder, config
        objective = config.objective
        if objective is not None:
            self.mask_vector = nn.Parameter(torch.rand(encoder.width))
            self.quantizer = ProductQuantizer(
                encoder.frame_width, groups=objective.codebooks, codes=objective.codes, width=objective.code_width
            )
            self.code_projection = nn.Linear(objective.code_width, objective.width)
            self.context_projection = nn.Linear(encoder.width, objective.width)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoder in another floating type, for inference."""
        self.encoder.cast_(dtype)

    def encode_audio(self, audio: AudioBatch) -> Encoded:
        """Features of recordings, frame by frame; they do not depend on the batch."""
        return self.encoder(audio)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Contrastive loss in nats, diversity of the codes, and the penalty on the features.

        Parts beside these: ``accuracy``, the share of hidden frames told apart from all others that were drawn; ``code_use``,
        the share of all codes that would carry as much as the likeliest ones of the frames if they were equally frequent;
        ``code_spread``, the same of the distributions that codes are drawn from, which training keeps wide.
        """
        objective = self.config.objective
        if objective is None:
            raise ConfigError("this encoder was published without its objective, so it cannot be pretrained; take wav2vec2-ctc")
        assert batch.audio is not None
        first, last, factor = objective.gumbel
        self.quantizer.temperature = max(last, first * factor**step)
        mask, draws = self.encoder.frame_mask(batch.audio), batch.draws(batch.audio.waves.device)
        hidden = span_mask(mask, objective.mask_share, objective.mask_length, draws)
        return self.judged(batch.audio, hidden, draw_negatives(hidden, objective.negatives, draws), draws)

    def judged(
        self, audio: AudioBatch, hidden: Bool[Tensor, "b n"], negatives: Int64[Tensor, "b n k"], draws: Draws | None = None
    ) -> Losses:
        """The losses with these frames hidden, these places as negatives of each of them, and codes drawn by these numbers."""
        objective, gather = self.config.objective, current_gather()
        assert objective is not None
        mask, frames = self.encoder.frame_mask(audio), self.encoder.frames(audio)
        frames = frames.detach() + objective.feature_gradient * (frames - frames.detach())
        squares = frames.float().square().mean(-1)[mask]
        penalty = squares.sum() / average_count(len(squares), gather, squares.device)
        normalised = self.encoder.normalise(frames)
        contexts = self.encoder.contextualise(normalised, mask, (hidden, self.mask_vector))
        quantized = self.quantizer(normalised, hidden, draws, None if gather is None else gather.sum)
        similar = _similarities(self.context_projection(contexts), self.code_projection(quantized.codes))
        ids = None if objective.count_twins else quantized.ids
        contrastive, accuracy = contrast(similar / objective.temperature, ids, hidden, negatives, gather)
        codes = objective.codebooks * objective.codes
        spread, use = quantized.perplexity / codes, quantized.used / codes
        total = contrastive + objective.diversity * (1 - spread) + objective.feature_penalty * penalty
        parts = {
            "contrastive": contrastive,
            "accuracy": accuracy,
            "code_use": use,
            "code_spread": spread,
            "features": penalty,
        }
        return Losses(total, {name: part.detach() for name, part in parts.items()})


def contrast(
    logits: Float[Tensor, "b n n"],
    ids: Int64[Tensor, "b n g"] | None,
    hidden: Bool[Tensor, "b n"],
    negatives: Int64[Tensor, "b n k"],
    gather: Gather | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy in nats of telling each hidden frame's codes from its negatives', and how often that succeeds: scalars.

    Where a negative is as likely as the frame, nothing was told apart.

    Args:
        logits: Of the context at a frame with the codes of another.
        ids: Codes of each frame; a negative with the same ones is no negative. None where it is one.
        hidden: The frames that count.
        negatives: Places of each frame's negatives.
        gather: Processes over whose hidden frames the means are, once averaged; None for this one alone.
    """
    others = logits.gather(2, negatives)
    if ids is not None:
        same = (ids[:, :, None] == ids[:, None]).all(-1).gather(2, negatives)
        others = others.masked_fill(same, -torch.inf)
    right, others = logits.diagonal(dim1=1, dim2=2)[hidden], others[hidden]
    count = average_count(len(right), gather, right.device)
    loss = (torch.cat([right[:, None], others], 1).logsumexp(1) - right).sum() / count
    return loss, (right > others.amax(1)).sum() / count


def _similarities(contexts: Float[Tensor, "b n d"], codes: Float[Tensor, "b m d"]) -> Float[Tensor, "b n m"]:
    """Cosines in fp32."""
    with torch.autocast(contexts.device.type, enabled=False):
        return F.normalize(contexts.float(), dim=-1) @ F.normalize(codes.float(), dim=-1).mT


def build(config: Wav2Vec2Config, parts: Mapping[str, Any] | None = None) -> Wav2Vec2:
    """Build the network with fresh weights."""
    return Wav2Vec2(build_wav2vec2_encoder(config.audio), config)
