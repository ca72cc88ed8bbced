"""Random changes of training recordings: each one's are drawn from its own seed, so that they do not depend on the batch."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mm.config import StrictConfig
from mm.media.audio import resample

DECIBELS = 20.0

SPEED_STEPS = 100
"""Steps in which speed changes, of the speed as it is: small numbers make small filters."""


class AudioAugmentConfig(StrictConfig):
    """How much training recordings are changed; everything is off by default.

    Args:
        gain: Standard deviation of the loudness, decibels.
        speed: Largest change of speed and pitch, as a share; drawn evenly, in hundredths.
        noise: Probability of noise, white or coloured at random by a filter of one zero.
        noise_decibels: Smallest and largest ratio of sound to noise.
        silence: Longest silence in seconds put before the recording, drawn evenly.
        hidden: Largest share of the recording that is silenced, in one piece.
    """

    gain: float = Field(default=0.0, ge=0, le=40)
    speed: float = Field(default=0.0, ge=0, le=0.5)
    noise: float = Field(default=0.0, ge=0, le=1)
    noise_decibels: tuple[float, float] = (5.0, 30.0)
    silence: float = Field(default=0.0, ge=0, le=10)
    hidden: float = Field(default=0.0, ge=0, le=0.9)


def augment_audio(wave: Float[Tensor, " t"], seed: int, config: AudioAugmentConfig, rate: int) -> Float[Tensor, " t"]:
    """A changed copy of a wave, which may be longer or shorter.

    Args:
        wave: fp32, about -1..1.
        seed: Decides everything that is random.
        config: How much.
        rate: Samples a second.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    # All are drawn whether or not they are used, so that a setting does not change what another one draws.
    speed, choice, ratio, colour, before, share, place = torch.rand(7, generator=generator).tolist()
    loudness = float(torch.randn((), generator=generator))
    if config.speed:
        wave = resample(wave, SPEED_STEPS + round(SPEED_STEPS * config.speed * (2 * speed - 1)), SPEED_STEPS)
    if config.hidden:
        hidden = int(share * config.hidden * len(wave))
        first = int(place * (len(wave) - hidden))
        wave = torch.cat([wave[:first], wave.new_zeros(hidden), wave[first + hidden :]])
    if config.silence:
        wave = F.pad(wave, (int(before * config.silence * rate), 0))
    if choice < config.noise:
        low, high = config.noise_decibels
        white = torch.randn(len(wave), generator=generator)
        noise = white - (2 * colour - 1) * F.pad(white, (1, 0))[:-1]
        loud = wave.square().mean().sqrt() * 10 ** (-(low + ratio * (high - low)) / DECIBELS)
        wave = wave + noise * loud / noise.square().mean().sqrt().clamp(min=1e-8)
    return wave * 10 ** (config.gain * loudness / DECIBELS)
