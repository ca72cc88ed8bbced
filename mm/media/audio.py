"""Decoding sound from untrusted bytes, within stated bounds.

The format is decided by magic bytes, never by a file's name. What a header says of the length is not believed: samples are
decoded block by block, mixed to one channel at once and counted, so that memory grows with what is kept, not with what is
there.

Shapes: T samples of one channel.
"""

import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mm.config import StrictConfig
from mm.errors import BadSample, UserError

RawAudio = str | Path | bytes | np.ndarray | Tensor | tuple[int, np.ndarray]

AUDIO_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3"})

AudioFormat = Literal["WAV", "FLAC", "OGG", "MP3"]

BLOCK_FRAMES = 1 << 16
"""Frames of all channels that are decoded at once."""

FULL_SCALE = 4.0
"""Waves are in -1..1; files of floating-point samples may go beyond, up to here. What goes further is damaged."""


class AudioLimits(StrictConfig):
    """What a recording may ask for before it is refused.

    Args:
        max_bytes: Encoded.
        max_channels: Which are mixed to one.
        min_rate: Samples a second.
        max_rate: Samples a second.
        max_seconds: Of a recording that is read whole; where only the beginning is needed, the rest is not decoded.
    """

    max_bytes: int = Field(default=256 << 20, ge=1)
    max_channels: int = Field(default=16, ge=1)
    min_rate: int = Field(default=1_000, ge=1)
    max_rate: int = Field(default=384_000, ge=1)
    max_seconds: float = Field(default=1_800.0, gt=0)


DEFAULT_AUDIO_LIMITS = AudioLimits()


class AudioSpec(StrictConfig):
    """How a recording becomes the wave that a model takes.

    Args:
        rate: Samples a second.
        max_seconds: Longer recordings are cut to this: to their beginning, so that the same recording always gives the same
            wave; in training to a part drawn at random.
        normalise: Bring each wave to zero mean and unit spread, as weights of wav2vec 2.0 with layer norm expect.
        repeat: Repeat a shorter recording until it fills ``max_seconds``, as CLAP does; else waves keep their length.
    """

    rate: int = Field(default=16_000, ge=1_000, le=384_000)
    max_seconds: float = Field(default=10.0, gt=0, le=1_800)
    normalise: bool = False
    repeat: bool = False

    @property
    def max_samples(self) -> int:
        """Longest wave."""
        return max(1, round(self.max_seconds * self.rate))


def audio_format(data: bytes) -> AudioFormat | None:
    """The container that the magic bytes announce, or None when it is not one that mm reads."""
    if data.startswith((b"RIFF", b"RIFX", b"RF64")) and data[8:12] == b"WAVE":
        return "WAV"
    if data.startswith(b"fLaC"):
        return "FLAC"
    if data.startswith(b"OggS"):
        return "OGG"
    if data.startswith(b"ID3") or (len(data) > 1 and data[0] == 0xFF and data[1] & 0xE6 == 0xE2):
        return "MP3"
    return None


def decode_audio(
    data: bytes,
    rate: int,
    *,
    max_seconds: float | None = None,
    begin: float = 0.0,
    limits: AudioLimits = DEFAULT_AUDIO_LIMITS,
    where: str = "",
) -> Float[Tensor, " t"]:
    """Decode a WAV, FLAC, Ogg (Vorbis, Opus) or MP3 file held in memory to one channel at another rate.

    Args:
        data: The file's bytes.
        rate: Samples a second of the result; resampled by a windowed sinc (torchaudio).
        max_seconds: Decode no more than so much; default: all of it, up to the limit.
        begin: Where, in 0..1, among all parts of a longer recording that are ``max_seconds`` long.
        limits: Bounds on bytes, channels, rate and length.
        where: Name of the sample, for the error.

    Returns:
        fp32, about -1..1: the mean of the channels.

    Raises:
        BadSample: Cause ``empty``, ``too many bytes``, ``unknown format``, ``too many channels``, ``impossible rate``, ``too
            long``, ``undecodable`` or ``not finite``.
    """
    if not data:
        raise BadSample("empty", where)
    if len(data) > limits.max_bytes:
        raise BadSample("too many bytes", where)
    if audio_format(data) is None:
        raise BadSample("unknown format", where)
    wave, own_rate = _decoded(data, max_seconds, begin, limits, where)
    if not len(wave):
        raise BadSample("empty", where)
    if not bool(np.isfinite(wave).all()) or float(np.abs(wave).max()) > FULL_SCALE:
        raise BadSample("not finite", where)
    return resample(torch.from_numpy(wave), own_rate, rate)


def resample(wave: Float[Tensor, " t"], rate: int, wanted: int) -> Float[Tensor, " t"]:
    """Another rate of the same sound; the wave itself where the rates are equal."""
    if rate == wanted:
        return wave
    from torchaudio.functional import resample as by_windowed_sinc

    return by_windowed_sinc(wave, rate, wanted)


def open_audio(
    raw: RawAudio, rate: int, *, max_seconds: float | None = None, limits: AudioLimits = DEFAULT_AUDIO_LIMITS
) -> Float[Tensor, " t"]:
    """Take a recording in any form a user may have it.

    Args:
        raw: A path; the bytes of a file; an array or tensor ``(T,)`` that is at ``rate`` already: floating in -1..1 or
            int16; or a rate and an array, ``(T,)`` or ``(T, channels)``, as microphones in web pages give it.
        rate: Samples a second of the result.
        max_seconds: See `decode_audio`.
        limits: Bounds for files.

    Raises:
        UserError: No such file, not a recording, or an array of another kind; the message names it.
    """
    if isinstance(raw, str | Path):
        return _open_file(Path(raw), rate, max_seconds, limits)
    try:
        if isinstance(raw, bytes):
            return decode_audio(raw, rate, max_seconds=max_seconds, limits=limits, where="bytes")
    except BadSample as error:
        raise UserError(f"{error.where}: not a usable recording: {error.cause}") from None
    if isinstance(raw, tuple):
        return _from_microphone(raw, rate, max_seconds, limits)
    wave = torch.as_tensor(raw)
    if wave.ndim != 1 or not (wave.is_floating_point() or wave.dtype == torch.int16) or not len(wave):
        raise UserError(
            f"a wave is a one-dimensional array of floating numbers in -1..1 or of int16, not {tuple(wave.shape)} {wave.dtype}"
        )
    wave = wave.float() / 32768 if wave.dtype == torch.int16 else wave.float()
    if not bool(wave.isfinite().all()):
        raise UserError("a wave holds numbers that are not finite")
    return wave if max_seconds is None else wave[: math.ceil(max_seconds * rate)]


def fit_audio(wave: Float[Tensor, " t"], spec: AudioSpec) -> Float[Tensor, " t"]:
    """Cut to the beginning, or repeat, and normalise as ``spec`` says."""
    wave = wave[: spec.max_samples]
    if spec.repeat and len(wave) < spec.max_samples:
        wave = wave.repeat(-(-spec.max_samples // len(wave)))[: spec.max_samples]
    if spec.normalise:
        wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
    return wave


def _from_microphone(raw: tuple[int, np.ndarray], rate: int, max_seconds: float | None, limits: AudioLimits) -> Tensor:
    own, wave = int(raw[0]), np.asarray(raw[1])
    if not limits.min_rate <= own <= limits.max_rate:
        raise UserError(f"a rate of {own} samples a second; {limits.min_rate} to {limits.max_rate} are read")
    if wave.ndim == 2 and 1 <= wave.shape[1] <= limits.max_channels:
        wave = wave.mean(1) if wave.dtype != np.int16 else (wave.astype(np.float32) / 32768).mean(1)
    wanted = math.ceil((limits.max_seconds if max_seconds is None else max_seconds) * own)
    return resample(open_audio(wave[:wanted], own), own, rate)


def _open_file(path: Path, rate: int, max_seconds: float | None, limits: AudioLimits) -> Tensor:
    try:
        with path.open("rb") as file:
            data = file.read(limits.max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        return decode_audio(data, rate, max_seconds=max_seconds, limits=limits, where=str(path))
    except BadSample as error:
        raise UserError(
            f"{path}: not a usable recording: {error.cause}; wav, flac, ogg, opus and mp3 are read, up to "
            f"{limits.max_channels} channels, {limits.max_rate} Hz and {limits.max_bytes >> 20} MB"
        ) from None


def _decoded(data: bytes, max_seconds: float | None, begin: float, limits: AudioLimits, where: str) -> tuple[np.ndarray, int]:
    """The mean of the channels, fp32, and the rate."""
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels > limits.max_channels:
                raise BadSample("too many channels", where)
            if not limits.min_rate <= file.samplerate <= limits.max_rate:
                raise BadSample("impossible rate", where)
            longest = int(limits.max_seconds * file.samplerate)
            wanted = longest + 1 if max_seconds is None else min(longest, math.ceil(max_seconds * file.samplerate))
            if begin and 0 < wanted < file.frames:
                file.seek(int(begin * (file.frames - wanted)))
            blocks: list[np.ndarray] = []
            while wanted > 0:
                block = file.read(min(BLOCK_FRAMES, wanted), dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(1))
                wanted -= len(block)
            if max_seconds is None and wanted == 0:
                raise BadSample("too long", where)
            return np.concatenate(blocks) if blocks else np.empty(0, np.float32), file.samplerate
    except BadSample:
        raise
    except Exception as error:  # decoders of untrusted bytes raise nearly anything; all of it means the same to the caller
        raise BadSample("undecodable", where) from error
