"""Log-mel encoder: a spectrogram, two convolutions and a transformer, as in Whisper and the Audio Spectrogram Transformer.

Papers: Whisper https://arxiv.org/abs/2212.04356 (spectrogram, stem), AST https://arxiv.org/abs/2104.01778, SpecAugment
https://arxiv.org/abs/1904.08779 (masks in training).

Deviation from Whisper: recordings are not filled up to 30 seconds. What lies behind a recording's end is hidden at every stage,
so that its features do not depend on the others of its batch.

Shapes: B recordings, T samples, F frames of the spectrogram, M mel bands, N tokens, D width.
"""

import functools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.draws import Draws
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import Rotary
from mm.nn.experts import ExpertsConfig, feed_forward, refuse_hash
from mm.nn.initialise import initialise
from mm.nn.masks import SparseAttentionConfig, attention_mask, layer_masks, patterns_of
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.types import AudioBatch, Encoded

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
DYNAMIC_RANGE = 8.0
"""Powers of ten below a recording's loudest band that are told apart; what is softer counts as this soft (Whisper)."""

FLOOR = 1e-10
KERNEL = 3
NORMALISING_FLOOR = 1e-3
"""Added to the variance of a band, whose levels differ by about 1: silence is not blown up."""


class LogMelEncoderConfig(StrictConfig):
    """A log-mel spectrogram with a transformer behind it.

    Args:
        kind: Tells this encoder from others of sound.
        rate: Samples a second that it expects.
        mels: Bands of the spectrogram, M.
        normalise: Give each band of a recording mean 0 and spread 1 over time: loudness and microphone count less.
        stride: Frames of 10 ms that become one token: 2 (Whisper) or 4.
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        pooling: What stands for a recording: the ``mean`` of its tokens, or their ``attention``: each is weighed by what a
            learned query makes of it.
        dropout: Of each block's branches and of the stem, in training.
        mask_time: Longest time in training that is hidden in one piece, in seconds; twice a recording.
        mask_bands: Most neighbouring bands that are hidden, as a share; twice a recording.
        sparse_attention: To a part of the tokens (https://arxiv.org/abs/1904.10509), for long recordings.
        experts: Feed-forward layers of several experts, with learned routing (https://arxiv.org/abs/2101.03961).
        gradient_checkpointing: Trade time for memory.
    """

    kind: Literal["log-mel"] = "log-mel"
    rate: int = Field(default=16_000, ge=1_000)
    mels: int = Field(default=80, ge=8)
    normalise: bool = False
    stride: Literal[2, 4] = 2
    width: int = Field(default=256, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    pooling: Literal["mean", "attention"] = "mean"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    mask_time: float = Field(default=0.0, ge=0, le=10)
    mask_bands: float = Field(default=0.0, ge=0, le=0.9)
    sparse_attention: SparseAttentionConfig | None = None
    experts: ExpertsConfig | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "LogMelEncoderConfig":
        refuse_hash(self.experts)
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of 2 x heads {self.heads}")
        return self

    @property
    def wanted_rate(self) -> int:
        """Samples a second that recordings must have."""
        return self.rate


class LogMel(nn.Module):
    """Log-mel spectrogram, about -1..1.5.

    Args:
        rate: Samples a second.
        mels: Bands, M.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, rate: int, mels: int) -> None:
        super().__init__()
        from torchaudio.functional import melscale_fbanks

        self.size, self.hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
        filters = melscale_fbanks(self.size // 2 + 1, 0.0, rate / 2, mels, rate, norm="slaney", mel_scale="slaney")
        self.register_buffer("filters", filters.T.contiguous(), persistent=False)
        self.register_buffer("window", torch.hann_window(self.size), persistent=False)

    def frames(self, lengths: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
        """Number of frames of recordings of so many samples."""
        return torch.div(lengths, self.hop, rounding_mode="floor") + 1

    def forward(self, audio: AudioBatch) -> tuple[Float[Tensor, "b m f"], Bool[Tensor, "b f"]]:
        """The spectrogram, zero behind each end, and which frames are before it."""
        waves = (audio.waves * audio.valid()).float()  # silence behind the end, whatever the padding holds
        with torch.autocast(waves.device.type, enabled=False):
            spectrum = torch.stft(
                waves, self.size, self.hop, window=self.window.float(), center=True, pad_mode="constant", return_complex=True
            )
            power = self.filters.float() @ spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        there = torch.arange(power.shape[-1], device=power.device) < self.frames(audio.lengths)[:, None]
        levels = power.clamp(min=FLOOR).log10()
        loudest = levels.masked_fill(~there[:, None], -torch.inf).amax((1, 2), keepdim=True)
        levels = (torch.maximum(levels, loudest - DYNAMIC_RANGE) + 4) / 4
        return levels * there[:, None], there


class LogMelEncoder(nn.Module):
    """See above.

    Args:
        spectrogram: Waves to bands.
        stem: Convolutions over time, ``(B, M, F) -> (B, D, N)``; the second halves the frames, a third halves them again.
        transformer: Ends with its own norm.
        config: Sizes, pooling, masks.
    """

    def __init__(self, spectrogram: LogMel, stem: nn.ModuleList, transformer: Transformer, config: LogMelEncoderConfig) -> None:
        super().__init__()
        self.spectrogram = spectrogram
        self.stem = stem
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = transformer
        self.config = config
        self.query = nn.Linear(config.width, 1, bias=False) if config.pooling == "attention" else None

    @property
    def width(self) -> int:
        """Of tokens and pooled vector, D."""
        return self.config.width

    def forward(self, audio: AudioBatch) -> Encoded:
        """Features of recordings; none depends on the others of the batch."""
        x, there = self.spectrogram(audio)
        if self.config.normalise:
            x = normalise_bands(x, there)
        if self.training:
            x = self._masked(x, there.sum(1), audio.draws()) * there[:, None]
        x = x.to(next(self.stem.parameters()).dtype)
        for layer in self.stem:
            x = F.gelu(layer(x))
            there = there[:, :: layer.stride[0]]  # pyright: ignore[reportArgumentType, reportIndexIssue]
            x = x * there[:, None]
        length, patterns = x.shape[2], patterns_of(self.config.sparse_attention, self.config.layers)
        mask = layer_masks(patterns, lambda pattern: attention_mask(length, keys=there, pattern=pattern))
        x = self.transformer(self.dropout(x.transpose(1, 2)), mask=mask, token_ids=there.long() - 1)
        return Encoded(x, there, self._pooled(x, there))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold all behind the spectrogram in another floating type, for inference."""
        for name, part in self.named_children():
            if name != "spectrogram":
                part.to(dtype)

    def _pooled(self, x: Float[Tensor, "b n d"], there: Bool[Tensor, "b n"]) -> Float[Tensor, "b d"]:
        scores = x.new_zeros(x.shape[:2]) if self.query is None else self.query(x)[..., 0]
        weights = scores.float().masked_fill(~there, -torch.inf).softmax(1).to(x.dtype)
        return (weights[:, None] @ x)[:, 0]

    def _masked(self, x: Float[Tensor, "b m f"], frames: Int64[Tensor, " b"], draws: Draws) -> Float[Tensor, "b m f"]:
        """Two runs of frames and two of bands of each recording become its mean (SpecAugment)."""
        if not (self.config.mask_time or self.config.mask_bands):
            return x
        mean = x.sum((1, 2), keepdim=True) / (frames * x.shape[1])[:, None, None].clamp(min=1)
        hidden = torch.zeros_like(x, dtype=torch.bool)
        longest = torch.minimum(frames / 2, frames.new_tensor(self.config.mask_time / HOP_SECONDS))
        bands = frames.new_full(frames.shape, x.shape[1])
        for _ in range(2):
            hidden |= _run(frames, longest, x.shape[2], draws)[:, None]
            hidden |= _run(bands, self.config.mask_bands * bands, x.shape[1], draws)[:, :, None]
        return torch.where(hidden, mean, x)


def normalise_bands(x: Float[Tensor, "b m f"], there: Bool[Tensor, "b f"]) -> Float[Tensor, "b m f"]:
    """Each recording's bands with mean 0 and spread 1 over its frames, zero behind its end."""
    valid, frames = there[:, None], there.sum(1)[:, None, None]
    centred = (x - x.sum(2, keepdim=True) / frames) * valid  # the spectrogram is zero behind the end
    return centred / (centred.square().sum(2, keepdim=True) / frames + NORMALISING_FLOOR).sqrt()


def _run(lengths: Tensor, longest: Tensor, size: int, draws: Draws) -> Bool[Tensor, "b n"]:
    """True in one run, no longer than ``longest``, within the first ``lengths`` of ``size`` places."""
    run = draws.uniform() * longest
    first = draws.uniform() * (lengths - run)
    places = torch.arange(size, device=lengths.device)
    return (places >= first[:, None].floor()) & (places < (first + run)[:, None].floor())


def build_log_mel_encoder(config: LogMelEncoderConfig) -> LogMelEncoder:
    """A log-mel encoder with fresh weights: pre-norm blocks, rotary positions."""
    norm = functools.partial(nn.LayerNorm, config.width)

    def make_feed_forward() -> FeedForward:
        return FeedForward(config.width, int(config.width * config.mlp_ratio), nn.GELU())

    def make_block(layer: int) -> Block:
        return Block(
            attention=MultiHeadAttention(config.width, config.heads),
            feed_forward=feed_forward(make_feed_forward, config.width, config.experts, layer),
            norm=norm,
            dropout=config.dropout,
        )

    halvings = round(math.log2(config.stride))
    stem = nn.ModuleList(
        nn.Conv1d(
            config.mels if layer == 0 else config.width, config.width, KERNEL, stride=2 if layer else 1, padding=KERNEL // 2
        )
        for layer in range(1 + halvings)
    )
    for layer in stem:  # else what was heard would be faint beside the biases
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # pyright: ignore[reportArgumentType]
        nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
    transformer = Transformer(
        make_block,
        config.layers,
        final_norm=norm(),
        rotary=Rotary(config.width // config.heads),
        gradient_checkpointing=config.gradient_checkpointing,
    )
    initialise(transformer)
    return LogMelEncoder(LogMel(config.rate, config.mels), stem, transformer, config)
