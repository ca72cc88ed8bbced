"""Audio encoder of wav2vec 2.0: convolutions over the raw wave, then a transformer. Source: https://arxiv.org/abs/2006.11477.

The backbone is torchaudio's, so its weights load under their own names.

Convolutions may run over a log-mel spectrogram instead (https://arxiv.org/abs/2010.10504), which need not be
learned.

Shapes: B batch, T samples, M bands, F frames of the spectrogram, N frames, C width of the convolutions, D width.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchaudio.models import Wav2Vec2Model, wav2vec2_model

from mm.config import StrictConfig
from mm.draws import Draws
from mm.encoders.audio import HOP_SECONDS, LogMel, normalise_bands
from mm.types import AudioBatch, Encoded

CONV_LAYERS = ((512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2)
"""Channels, kernel and stride of each convolution of the paper: a frame every 320 samples, which sees 400."""


class Wav2Vec2EncoderConfig(StrictConfig):
    """A wav2vec 2.0 encoder; the defaults are the paper's base model.

    Args:
        extractor: Norms of the convolutions. ``group_norm`` normalises the first one over the whole recording, padding
            included; ``layer_norm`` normalises every frame of every one by itself, as the large models do. ``log_mel`` has
            convolutions without norms over a spectrogram whose bands have mean 0 and spread 1 over a recording.
        conv_layers: Channels, kernel and stride of each convolution; the product of the strides is the length of a frame, in
            samples or, of a spectrogram, in its frames of 10 ms; there kernels are odd.
        conv_bias: Whether convolutions have a bias.
        rate: Samples a second that a spectrogram expects.
        mels: Its bands, M.
        width: D.
        layers: Of the transformer.
        heads: Of each attention.
        hidden: Width inside of the feed-forward parts.
        position_kernel: Frames that the convolution in place of position vectors sees.
        position_groups: Its groups.
        norm_first: Norms before each part of a layer instead of behind it, as the large models have them.
        dropout: Of the transformer.
        projection_dropout: Of the features before the transformer.
        attention_dropout: Of attention weights.
        hidden_dropout: Inside of the feed-forward parts.
        layer_drop: Probability of leaving out a layer in training.
    """

    kind: Literal["wav2vec2"] = "wav2vec2"
    extractor: Literal["group_norm", "layer_norm", "log_mel"] = "group_norm"
    conv_layers: tuple[tuple[int, int, int], ...] = Field(default=CONV_LAYERS, min_length=1)
    conv_bias: bool = False
    rate: int = Field(default=16_000, ge=1_000)
    mels: int = Field(default=80, ge=8)
    width: int = Field(default=768, ge=1)
    layers: int = Field(default=12, ge=1)
    heads: int = Field(default=12, ge=1)
    hidden: int = Field(default=3072, ge=1)
    position_kernel: int = Field(default=128, ge=1)
    position_groups: int = Field(default=16, ge=1)
    norm_first: bool = False
    dropout: float = Field(default=0.1, ge=0, lt=1)
    projection_dropout: float = Field(default=0.1, ge=0, lt=1)
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    layer_drop: float = Field(default=0.05, ge=0, lt=1)

    @model_validator(mode="after")
    def _possible(self) -> "Wav2Vec2EncoderConfig":
        for divisor in ("heads", "position_groups"):
            if self.width % getattr(self, divisor):
                raise ValueError(f"width {self.width} must be a multiple of {divisor} {getattr(self, divisor)}")
        if min(map(min, self.conv_layers)) < 1:
            raise ValueError("conv_layers: channels, kernels and strides are at least 1")
        if self.extractor == "log_mel" and any(kernel % 2 == 0 for _, kernel, _ in self.conv_layers):
            raise ValueError(
                "conv_layers over a log_mel spectrogram have odd kernels and count its frames: [[512, 3, 1], [512, 3, 2]]"
            )
        return self

    @property
    def wanted_rate(self) -> int | None:
        """Samples a second that recordings must have; None where any will do."""
        return self.rate if self.extractor == "log_mel" else None

    @property
    def frame_step(self) -> int:
        """Samples from the beginning of a frame to that of the next one."""
        strides = math.prod(stride for _, _, stride in self.conv_layers)
        return strides * round(HOP_SECONDS * self.rate) if self.extractor == "log_mel" else strides

    @property
    def receptive_field(self) -> int:
        """Samples that a frame of a wave sees; a spectrogram has a frame of any recording, so of it 1."""
        if self.extractor == "log_mel":
            return 1
        field, stride = 1, 1
        for _, kernel, step in self.conv_layers:
            field, stride = field + (kernel - 1) * stride, stride * step
        return field


class WaveFrames:
    """torchaudio's convolutions over waves, asked as `LogMelFrames` is.

    Args:
        convolutions: They.
        config: Their sizes.
    """

    def __init__(self, convolutions: nn.Module, config: Wav2Vec2EncoderConfig) -> None:
        self._convolutions, self._config = convolutions, config

    def mask(self, audio: AudioBatch) -> Bool[Tensor, "b n"]:
        """True for frames that are of the recording."""
        field = self._config.receptive_field
        frames, longest = audio.lengths.clamp(min=field), max(audio.waves.shape[1], field)
        for _, kernel, stride in self._config.conv_layers:
            frames, longest = (frames - kernel) // stride + 1, (longest - kernel) // stride + 1
        return torch.arange(longest, device=frames.device) < frames[:, None]

    def __call__(self, audio: AudioBatch) -> Float[Tensor, "b n c"]:
        """Frames of recordings, without meaning behind each end."""
        short = max(0, self._config.receptive_field - audio.waves.shape[1])
        dtype = next(self._convolutions.parameters()).dtype
        return self._convolutions(F.pad(audio.waves, (0, short)).to(dtype), None)[0]

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold them in another floating type, for inference."""
        self._convolutions.to(dtype)


class LogMelFrames(nn.Module):
    """A spectrogram and convolutions over it, in place of those over the wave.

    Args:
        config: Sizes.
    """

    def __init__(self, config: Wav2Vec2EncoderConfig) -> None:
        super().__init__()
        self.spectrogram = LogMel(config.rate, config.mels)
        inputs = [config.mels, *(channels for channels, _, _ in config.conv_layers)]
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(width, channels, kernel, stride, padding=kernel // 2, bias=config.conv_bias)
            for width, (channels, kernel, stride) in zip(inputs, config.conv_layers, strict=False)
        )
        self._strides = [stride for _, _, stride in config.conv_layers]

    def mask(self, audio: AudioBatch) -> Bool[Tensor, "b n"]:
        """True for frames that are of the recording."""
        count = self.spectrogram.frames(torch.tensor([audio.waves.shape[1]], device=audio.lengths.device))
        there = torch.arange(int(count), device=count.device) < self.spectrogram.frames(audio.lengths)[:, None]
        return there[:, :: math.prod(self._strides)]

    def forward(self, audio: AudioBatch) -> Float[Tensor, "b n c"]:
        """Frames of recordings, zero behind each end."""
        x, there = self.spectrogram(audio)
        x = normalise_bands(x, there).to(next(self.conv_layers.parameters()).dtype)
        for number, (layer, stride) in enumerate(zip(self.conv_layers, self._strides, strict=True)):
            there = there[:, ::stride]
            x = layer(F.gelu(x) if number else x) * there[:, None]
        return x.transpose(1, 2)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold all behind the spectrogram in another floating type, for inference."""
        self.conv_layers.to(dtype)


class Wav2Vec2Encoder(nn.Module):
    """Waves to features, frame by frame.

    A recording's features do not depend on the others of its batch. With layer norms what is behind its end is masked. Group
    norm has no such mask, and the published models were trained without one: in evaluation recordings of different lengths are
    computed apart; in training, which pads, statistics include the padding as they did for the published models.

    Recordings too short for a single frame are filled up with silence to that length.

    Args:
        trunk: torchaudio's network without a head.
        config: What built it.
    """

    def __init__(self, trunk: Wav2Vec2Model, config: Wav2Vec2EncoderConfig) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.config = config
        self.trunk.encoder.transformer.pos_conv_embed.conv.parametrizations.weight.original0.no_decay = True  # a gain

    @property
    def width(self) -> int:
        """D, of the tokens and of the pooled vector."""
        return self.config.width

    @property
    def frame_width(self) -> int:
        """C, of what the convolutions give."""
        return self.config.conv_layers[-1][0]

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network, but for a spectrogram, in another floating type, for inference."""
        self.trunk.encoder.to(dtype)
        self._extractor.cast_(dtype)

    def forward(self, audio: AudioBatch) -> Encoded:
        """Encode recordings; the pooled vector is the mean over their frames."""
        if self.config.extractor == "group_norm" and not self.training:
            return self._encode_by_length(audio)
        return self._encode(audio)

    def frame_mask(self, audio: AudioBatch) -> Bool[Tensor, "b n"]:
        """True for frames that are of the recording."""
        return self._extractor.mask(audio)

    def frames(self, audio: AudioBatch) -> Float[Tensor, "b n c"]:
        """What the convolutions make of recordings, before any norm or projection; without meaning behind the end."""
        return self._extractor(audio)

    def normalise(self, frames: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        """Frames after their layer norm: what a quantiser is given."""
        return self.trunk.encoder.feature_projection.layer_norm(frames)

    def contextualise(
        self, normalised: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"], hidden: tuple[Tensor, Tensor] | None = None
    ) -> Float[Tensor, "b n d"]:
        """Run the transformer over frames.

        Args:
            normalised: See `normalised`.
            mask: True for frames of the recording.
            hidden: Which frames are hidden, ``(B, N)``, and the vector ``(D,)`` that stands in their place.
        """
        projection = self.trunk.encoder.feature_projection
        x = projection.dropout(projection.projection(normalised))
        if hidden is not None:
            x = torch.where(hidden[0][..., None], hidden[1].to(x.dtype), x)
        x = x * mask[..., None]
        count = mask.shape[1]
        attended = None if bool(mask.all()) else mask[:, None, None, :].expand(len(mask), 1, count, count)
        return self.trunk.encoder.transformer(x, attended)

    @property
    def _extractor(self) -> "WaveFrames | LogMelFrames":
        own = self.trunk.feature_extractor
        return own if isinstance(own, LogMelFrames) else WaveFrames(own, self.config)

    def _encode(self, audio: AudioBatch) -> Encoded:
        mask = self.frame_mask(audio)
        tokens = self.contextualise(self.normalise(self.frames(audio)), mask) * mask[..., None]
        return Encoded(tokens, mask, tokens.sum(1) / mask.sum(1, keepdim=True))

    def _encode_by_length(self, audio: AudioBatch) -> Encoded:
        """Recordings of one length at a time, without padding."""
        rows: list[Tensor] = []
        parts: list[Encoded] = []
        for length in audio.lengths.unique().tolist():
            rows.append((audio.lengths == length).nonzero().flatten())
            parts.append(self._encode(AudioBatch(audio.waves[rows[-1], :length], audio.lengths[rows[-1]])))
        if len(parts) == 1:
            return parts[0]
        longest = max(part.mask.shape[1] for part in parts)
        back = torch.cat(rows).argsort()
        tokens = torch.cat([F.pad(part.tokens, (0, 0, 0, longest - part.mask.shape[1])) for part in parts])
        mask = torch.cat([F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts])
        return Encoded(tokens[back], mask[back], torch.cat([part.pooled for part in parts])[back])


def build_wav2vec2_encoder(config: Wav2Vec2EncoderConfig) -> Wav2Vec2Encoder:
    """An encoder with fresh weights, drawn as the paper's code draws them."""
    trunk = wav2vec2_model(
        extractor_mode="layer_norm" if config.extractor == "log_mel" else config.extractor,
        extractor_conv_layer_config=list(config.conv_layers),
        extractor_conv_bias=config.conv_bias,
        encoder_embed_dim=config.width,
        encoder_projection_dropout=config.projection_dropout,
        encoder_pos_conv_kernel=config.position_kernel,
        encoder_pos_conv_groups=config.position_groups,
        encoder_num_layers=config.layers,
        encoder_num_heads=config.heads,
        encoder_attention_dropout=config.attention_dropout,
        encoder_ff_interm_features=config.hidden,
        encoder_ff_interm_dropout=config.hidden_dropout,
        encoder_dropout=config.dropout,
        encoder_layer_norm_first=config.norm_first,
        encoder_layer_drop=config.layer_drop,
        aux_num_out=None,
    )
    if config.extractor == "log_mel":
        trunk.feature_extractor = LogMelFrames(config)  # pyright: ignore[reportAttributeAccessIssue]
    _initialise(trunk, config)
    return Wav2Vec2Encoder(trunk, config)


@torch.no_grad()
def _initialise(trunk: Any, config: Wav2Vec2EncoderConfig) -> None:
    """fairseq's: convolutions by He, linear layers by N(0, 0.02), biases 0, the position convolution by its fan-in."""
    for module in trunk.feature_extractor.modules():
        if isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight)
    for module in trunk.encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    positions = trunk.encoder.transformer.pos_conv_embed.conv
    positions.weight = torch.randn_like(positions.weight) * (4 / (config.position_kernel * config.width)) ** 0.5
    nn.init.zeros_(positions.bias)


def span_mask(valid: Bool[Tensor, "b n"], share: float, length: int, draws: Draws | None = None) -> Bool[Tensor, "b n"]:
    """Spans of frames to hide: about ``share / length`` of a recording's frames begin one, and spans may overlap.

    Args:
        valid: True for frames of the recording, from the first on.
        share: Frames in spans, over all frames, were no two spans to overlap.
        length: Frames of a span; recordings that are shorter have none.
        draws: Random numbers; None draws from torch's generators.
    """
    frames = valid.sum(1, keepdim=True)
    numbers = (draws or Draws(None, len(valid), valid.device)).uniform(1 + valid.shape[1])
    spans = (share * frames / length + numbers[:, :1]).long().clamp(min=1)
    may_begin = torch.arange(valid.shape[1], device=valid.device) <= frames - length
    order = numbers[:, 1:].masked_fill(~may_begin, 2.0).argsort(1).argsort(1)
    begins = ((order < spans) & may_begin).float()
    return F.max_pool1d(F.pad(begins[:, None], (length - 1, 0)), length, 1)[:, 0] > 0


def draw_negatives(masked: Bool[Tensor, "b n"], count: int, draws: Draws | None = None) -> Int64[Tensor, "b n k"]:
    """For each masked frame the places of others of the same recording, evenly drawn with repetition.

    What stands at frames that are not masked means nothing; so does all of a recording with a single masked frame.

    Args:
        masked: The frames, ``(B, N)``.
        count: Negatives of each.
        draws: Random numbers; None draws from torch's generators.
    """
    rank, total = masked.cumsum(1) - 1, masked.sum(1)
    numbers = (draws or Draws(None, len(masked), masked.device)).uniform(masked.shape[1], count)
    others = (numbers * (total - 1).clamp(min=1)[:, None, None]).long()
    others = (others + (others >= rank[..., None])).clamp(max=masked.shape[1] - 1)
    places = (~masked).int().argsort(dim=1, stable=True)
    return places.gather(1, others.flatten(1)).view_as(others)
