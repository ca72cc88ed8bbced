"""Small recordings for tests: sounds that are known, in every format."""

import io

import numpy as np
import soundfile

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "float": ("WAV", "FLOAT"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}


def tone(hertz: float, rate: int, seconds: float = 1.0, loud: float = 0.5) -> np.ndarray:
    """A sine, fp32."""
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def encoded(wave: np.ndarray, rate: int, kind: str = "wav") -> bytes:
    """A file with a wave ``(T,)`` or ``(T, channels)``."""
    file = io.BytesIO()
    name, subtype = FORMATS[kind]
    soundfile.write(file, wave, rate, format=name, subtype=subtype)
    return file.getvalue()
