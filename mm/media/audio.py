"""Decoding sound from untrusted bytes, within stated bounds.

The format is decided by magic bytes, never by a file's name. What a header says of the length is not believed: samples are
decoded block by block, mixed to one channel at once and counted, so that memory grows with what is kept, not with what is
there. A file that ends before its header says is cut off, and refused like a picture that is; headers of streams, which state
no length, are fine.

Shapes: T samples of one channel.
"""

import io
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mm.config import StrictConfig
from mm.errors import BadSample, UserError

if TYPE_CHECKING:
    from soundfile import SoundFile

RawAudio = str | Path | bytes | np.ndarray | Tensor | tuple[int, np.ndarray]

AudioFormat = Literal["WAV", "FLAC", "OGG", "MP3"]

BLOCK_FRAMES = 1 << 16
"""Frames of all channels that are decoded at once."""

FULL_SCALE = 4.0
"""Waves are in -1..1; files of floating-point samples may go beyond, up to here. What goes further is damaged."""

STREAMED_BYTES = 0x7FFF_0000
"""From this size on, a WAV header means that its writer, a pipe, did not know it."""

UNKNOWN_FRAMES = 1 << 62
"""From this number on, libsndfile means that the header does not say how many there are."""

SLACK_BYTES, SLACK_FRAMES = 8, 4_608
"""Headers are often wrong by their own size, and MP3 headers by the delay of coder and decoder."""

FRAME_SECONDS, FRAMES_KEPT, FAINT = 0.02, 6, 0.03
"""For `without_silence`: length of a frame, how many faint ones stay at each end, and what is faint (-30 dB of the loudest)."""

MAX_KERNEL = 1 << 20
"""Numbers in a resampling filter. Rates without a large common divisor would need thousands of times as many."""


class AudioLimits(StrictConfig):
    """What a recording may ask for before it is refused.

    Args:
        max_bytes: Encoded.
        max_channels: Which are mixed to one.
        min_rate: Samples a second.
        max_rate: Samples a second.
        max_seconds: Of a recording that is read whole; where only the beginning is needed, the rest is not decoded.
        max_samples: The same as a number of samples at the recording's own rate.
    """

    max_bytes: int = Field(default=256 << 20, ge=1)
    max_channels: int = Field(default=16, ge=1)
    min_rate: int = Field(default=1_000, ge=1)
    max_rate: int = Field(default=384_000, ge=1)
    max_seconds: float = Field(default=1_800.0, gt=0)
    max_samples: int = Field(default=1 << 26, ge=1)


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


@dataclass(frozen=True)
class AudioFacts:
    """What `measure_audio` found: seconds that can be decoded, samples a second, channels."""

    seconds: float
    rate: int
    channels: int


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
        BadSample: Cause ``empty``, ``too many bytes``, ``unknown format``, ``truncated``, ``too many channels``, ``impossible
            rate``, ``too long``, ``undecodable``, ``not finite`` or ``out of range``.
    """
    with _opened(data, limits, where) as file:
        longest = min(int(limits.max_seconds * file.samplerate), limits.max_samples)
        wanted = longest + 1 if max_seconds is None else min(longest, math.ceil(max_seconds * file.samplerate))
        if begin and wanted < file.frames < UNKNOWN_FRAMES:
            file.seek(int(begin * (file.frames - wanted)))
        wave, length = np.empty(min(wanted, file.frames), np.float32), 0
        for block in _blocks(file, wanted, where):
            wave[length : length + len(block)] = block
            length += len(block)
        if length > longest:
            raise BadSample("too long", where)
        return resample(torch.from_numpy(wave[:length]), file.samplerate, rate)


def measure_audio(data: bytes, limits: AudioLimits = DEFAULT_AUDIO_LIMITS, where: str = "") -> AudioFacts:
    """Decode a whole recording, or as much of it as the limits allow, and keep nothing. Raises as `decode_audio`."""
    with _opened(data, limits, where) as file:
        longest = min(int(limits.max_seconds * file.samplerate), limits.max_samples)
        length = sum(len(block) for block in _blocks(file, longest, where))
        return AudioFacts(length / file.samplerate, file.samplerate, file.channels)


def resample(wave: Float[Tensor, " t"], rate: int, wanted: int) -> Float[Tensor, " t"]:
    """Another rate of the same sound, by a windowed sinc (torchaudio's); the wave itself where the rates are equal.

    The ratio of all usual rates is exact. Where its filter would be larger than `MAX_KERNEL`, the nearest ratio is taken whose
    filter is not: a change of pitch by at most 0.05 %, which nobody hears.
    """
    ratio = Fraction(rate, wanted).limit_denominator(max(1, math.isqrt(MAX_KERNEL * wanted // rate)))
    if ratio == 1:
        return wave
    from torchaudio.functional import resample as by_windowed_sinc

    # Rounded from fp64, the wave is the same to the bit whatever number of threads made it.
    return by_windowed_sinc(wave.double(), ratio.numerator, ratio.denominator).float()


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
        return _decoded(_file_bytes(raw, limits), rate, max_seconds, limits, str(raw))
    if isinstance(raw, bytes | bytearray | memoryview):
        return _decoded(bytes(raw), rate, max_seconds, limits, "bytes of a recording")
    if isinstance(raw, tuple):
        return _from_microphone(raw, rate, max_seconds, limits)
    if not isinstance(raw, np.ndarray | Tensor):
        raise UserError(f"a recording is a path, bytes, an array or a tensor, not {type(raw).__name__}")
    wave = _from_numbers(raw)
    return wave if max_seconds is None else wave[: math.ceil(max_seconds * rate)]


def without_silence(wave: Float[Tensor, " t"], rate: int) -> Float[Tensor, " u"]:
    """What is heard between the silences before and behind it, as microphones record them: models hear the beginning alone.

    Args:
        wave: Whole numbers of frames of `FRAME_SECONDS` are cut off, `FRAMES_KEPT` of them left for faint consonants.
        rate: Samples a second.

    Returns:
        A view of ``wave``; none of it where it holds nothing but zeros.
    """
    step = max(1, round(FRAME_SECONDS * rate))
    frames = torch.nn.functional.pad(wave, (0, -len(wave) % step)).reshape(-1, step)
    loudness = frames.square().mean(1).sqrt()
    heard = (loudness > FAINT * loudness.amax()).nonzero().flatten()
    if not len(heard):
        return wave[:0]
    return wave[max(0, int(heard[0]) - FRAMES_KEPT) * step : (int(heard[-1]) + 1 + FRAMES_KEPT) * step]


def fit_audio(wave: Float[Tensor, " t"], spec: AudioSpec, *, whole: bool = False) -> Float[Tensor, " t"]:
    """Cut to the beginning (unless ``whole``), or repeat, and normalise as ``spec`` says."""
    wave = wave if whole else wave[: spec.max_samples]
    if spec.repeat and len(wave) < spec.max_samples:
        wave = wave.repeat(-(-spec.max_samples // len(wave)))[: spec.max_samples]
    if spec.normalise:
        wave = (wave - wave.mean()) / (wave.var(correction=0) + 1e-7).sqrt()
    return wave


def _from_microphone(raw: tuple[int, np.ndarray], rate: int, max_seconds: float | None, limits: AudioLimits) -> Tensor:
    own, wave = int(raw[0]), np.asarray(raw[1])
    if not limits.min_rate <= own <= limits.max_rate:
        raise UserError(f"a recording of {own} samples a second; {limits.min_rate} to {limits.max_rate} are read")
    seconds = limits.max_seconds if max_seconds is None else max_seconds
    wave = wave[: math.ceil(seconds * own)]
    if wave.ndim == 2 and 1 <= wave.shape[1] <= limits.max_channels:
        wave = torch.stack([_from_numbers(channel) for channel in wave.T]).mean(0)
    return resample(open_audio(wave, own), own, rate)


def _from_numbers(raw: np.ndarray | Tensor) -> Tensor:
    if isinstance(raw, Tensor):
        raw = (raw.float() if raw.is_floating_point() else raw).detach().cpu()  # numpy knows no bfloat16
    numbers = np.asarray(raw)
    if numbers.ndim != 1 or not numbers.size or not (numbers.dtype.kind == "f" or numbers.dtype == np.int16):
        raise UserError(
            "a recording as numbers has one dimension and is floating point (-1 to 1) or int16, "
            f"not {tuple(numbers.shape)} {numbers.dtype}"
        )
    wave = torch.from_numpy(np.array(numbers, np.float32))
    if not bool(wave.isfinite().all()):
        raise UserError("a recording holds numbers that are not finite")
    if numbers.dtype == np.int16:
        return wave / 32768
    if float(wave.abs().max()) > FULL_SCALE:
        raise UserError("a recording as floating point is in -1 to 1; divide 16-bit samples by 32768, or give them as int16")
    return wave


def _file_bytes(raw: str | Path, limits: AudioLimits) -> bytes:
    """No more of a file than shows that it is too large. Folders, devices and pipes are refused before they are opened."""
    path = Path(raw)
    if "://" in str(raw):
        raise UserError(f"{raw}: addresses are not fetched; download the recording and give its path")
    try:
        if stat.S_ISREG(path.stat().st_mode):
            with path.open("rb") as file:
                return file.read(limits.max_bytes + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such recording") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    raise UserError(f"{path}: not a file with a recording, but a folder or a device")


def _decoded(data: bytes, rate: int, max_seconds: float | None, limits: AudioLimits, where: str) -> Tensor:
    try:
        return decode_audio(data, rate, max_seconds=max_seconds, limits=limits, where=where)
    except BadSample as error:
        raise UserError(
            f"{where}: not a usable recording: {error.cause}; wav, flac, ogg, opus and mp3 are read, up to "
            f"{limits.max_channels} channels, {limits.max_rate} Hz and {limits.max_bytes >> 20} MB"
        ) from error


@contextmanager
def _opened(data: bytes, limits: AudioLimits, where: str) -> Iterator["SoundFile"]:
    """A decoder behind the first checks. Whatever goes wrong while it is used is a `BadSample`."""
    import soundfile

    if not data:
        raise BadSample("empty", where)
    if len(data) > limits.max_bytes:
        raise BadSample("too many bytes", where)
    kind = audio_format(data)
    if kind is None:
        raise BadSample("unknown format", where)
    if _cut_off(data, kind):
        raise BadSample("truncated", where)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            if file.channels > limits.max_channels:
                raise BadSample("too many channels", where)
            if not limits.min_rate <= file.samplerate <= limits.max_rate:
                raise BadSample("impossible rate", where)
            yield file
    except BadSample:
        raise
    except Exception as error:  # decoders of untrusted bytes raise nearly anything; all of it means the same to the caller
        raise BadSample("undecodable", where) from error


def _cut_off(data: bytes, kind: AudioFormat) -> bool:
    """Whether a WAV file is shorter than its header says, or the last page of an Ogg file than its own."""
    if kind == "WAV" and data.startswith(b"RF64"):
        return data[12:16] == b"ds64" and len(data) + SLACK_BYTES < int.from_bytes(data[20:28], "little") + 8
    if kind == "WAV":
        stated = int.from_bytes(data[4:8], "big" if data.startswith(b"RIFX") else "little")
        return len(data) + SLACK_BYTES < stated + 8 and stated < STREAMED_BYTES
    if kind == "OGG":
        page = data[data.rfind(b"OggS") :]
        return len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]])
    return False


def _blocks(file: "SoundFile", wanted: int, where: str) -> Iterator[np.ndarray]:
    """The mean of the channels from the current position on, fp32, at most ``wanted`` samples of it."""
    expected = min(wanted, file.frames - file.tell()) if file.frames < UNKNOWN_FRAMES else 0
    length = 0
    while length < wanted and len(block := file.read(min(BLOCK_FRAMES, wanted - length), dtype="float32", always_2d=True)):
        with np.errstate(invalid="ignore", over="ignore"):
            mono = block.mean(1)
            largest = float(np.abs(mono).max())
        if not math.isfinite(largest):
            raise BadSample("not finite", where)
        if largest > FULL_SCALE:
            raise BadSample("out of range", where)
        length += len(mono)
        yield mono
    if length + SLACK_FRAMES < expected:
        raise BadSample("truncated", where)
    if not length:
        raise BadSample("empty", where)
