"""Random changes of training pictures: each picture's are drawn from its own seed, then applied to the whole batch at once.

A picture comes out the same whatever else is in the batch, in whichever process. For speed on one core the work is done in
blocks that fit the cache, and costly changes touch only the pictures they were drawn for.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, UInt8
from pydantic import Field, field_validator
from torch import Tensor

from mm.config import StrictConfig
from mm.data.draws import Draws
from mm.data.recolor import Recolor, draw_recolor, recolor
from mm.data.warp import Warp, draw_warp, warp
from mm.types import Sample

BLOCK_PIXELS = 1 << 17
"""Pixels that are worked on at once, so that they stay in the processor's cache."""

"""Pixels that are worked on at once, so that they stay in the processor's cache."""

MIN_ALPHA = 0.02
"""Below this opacity, colour cannot be recovered from the premultiplied values."""


RAMPED = (
    *("rotation", "aspect", "shear", "shift", "perspective"),
    *("hue", "any_hue", "saturation", "contrast", "brightness", "tint", "gamma"),
)
"""Settings that the ramp scales; it scales ln of `scale` too."""


class AugmentConfig(StrictConfig):
    """How much training pictures are changed; everything is off by default.

    Standard deviations are those of normal distributions; ``ln`` is the logarithm of a factor. Probabilities are per picture.

    Args:
        flip: Probability of a mirror image.
        rotation: Standard deviation, radians; half of the pictures get a fifth of it.
        scale: Smallest and largest factor of size, drawn evenly in ln.
        aspect: Standard deviation of ln of the factor by which width grows and height shrinks.
        shear: Standard deviation, as a slope.
        shift: Largest shift to each side, as a fraction of the side.
        perspective: Standard deviation of the tilt; 0.1 makes one edge 10 % longer and its opposite 10 % shorter.
        elastic: Probability of a smooth random deformation (about 2.5 % of the side).
        hue: Standard deviation of the hue's rotation, radians.
        any_hue: Probability of a rotation to any hue.
        saturation: Standard deviation of ln of the factor.
        grayscale: Probability of no colour at all.
        channel_permutation: Probability of exchanging red, green and blue at random.
        channel_mix: Probability of a random linear mixture of the channels.
        contrast: Standard deviation of ln of the factor.
        brightness: Standard deviation of what is added (white is 1).
        tint: Standard deviation of what is added to each channel.
        gamma: Standard deviation of ln of the exponent.
        shade: Probability of a smooth pattern of light and shadow.
        edges: Probability of reducing a picture to its edges.
        outline: Probability of drawing dark outlines (pictures with transparency only).
        background: Probability of a random colour behind transparent parts.
        cut: Probability of cutting out a rectangle, 10 to 40 % of the side long.
        blur: Probability of a slight blur.
        noise: Probability of pixel noise, its standard deviation up to 0.06.
        no_flip: Words that forbid mirroring: of pictures whose first caption or any text field contains one (see `may_flip`).
        ramp_epochs: Number of epochs over which the `RAMPED` settings rise to their values.
        ramp_from: Strength at the beginning of the ramp, as a factor.
    """

    flip: float = Field(default=0.0, ge=0, le=1)
    rotation: float = Field(default=0.0, ge=0, le=3.2)
    scale: tuple[float, float] = (1.0, 1.0)
    aspect: float = Field(default=0.0, ge=0, le=1)
    shear: float = Field(default=0.0, ge=0, le=1)
    shift: float = Field(default=0.0, ge=0, le=0.5)
    perspective: float = Field(default=0.0, ge=0, le=0.5)
    elastic: float = Field(default=0.0, ge=0, le=1)
    hue: float = Field(default=0.0, ge=0, le=3.2)
    any_hue: float = Field(default=0.0, ge=0, le=1)
    saturation: float = Field(default=0.0, ge=0, le=2)
    grayscale: float = Field(default=0.0, ge=0, le=1)
    channel_permutation: float = Field(default=0.0, ge=0, le=1)
    channel_mix: float = Field(default=0.0, ge=0, le=1)
    contrast: float = Field(default=0.0, ge=0, le=2)
    brightness: float = Field(default=0.0, ge=0, le=1)
    tint: float = Field(default=0.0, ge=0, le=1)
    gamma: float = Field(default=0.0, ge=0, le=2)
    shade: float = Field(default=0.0, ge=0, le=1)
    edges: float = Field(default=0.0, ge=0, le=1)
    outline: float = Field(default=0.0, ge=0, le=1)
    background: float = Field(default=0.0, ge=0, le=1)
    cut: float = Field(default=0.0, ge=0, le=1)
    blur: float = Field(default=0.0, ge=0, le=1)
    noise: float = Field(default=0.0, ge=0, le=1)
    no_flip: tuple[str, ...] = ()
    ramp_epochs: int = Field(default=0, ge=0)
    ramp_from: float = Field(default=0.3, ge=0, le=1)

    @field_validator("scale")
    @classmethod
    def _is_a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("write it as [smallest, largest], both above 0")
        return scale

    def at(self, epoch: int) -> "AugmentConfig":
        """The settings of one epoch: weaker during the ramp."""
        if epoch >= self.ramp_epochs:
            return self
        strength = self.ramp_from + (1 - self.ramp_from) * epoch / self.ramp_epochs
        weaker: dict[str, Any] = {name: getattr(self, name) * strength for name in RAMPED}
        weaker["scale"] = (self.scale[0] ** strength, self.scale[1] ** strength)
        return self.model_copy(update=weaker)


def may_flip(sample: Sample, config: AugmentConfig) -> bool:
    """False when a word of ``no_flip``, or its plural, is in the sample's first caption or a text field."""
    if not config.flip or not config.no_flip:
        return True
    texts = [*sample.texts[:1], *(value for value in sample.fields.values() if isinstance(value, str))]
    pattern = _any_word(config.no_flip)
    return not any(pattern.search(text) for text in texts)


@lru_cache
def _any_word(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b", re.IGNORECASE)


def flips_alone(config: AugmentConfig) -> bool:
    """Whether pictures are at most mirrored."""
    return config == AugmentConfig(flip=config.flip, no_flip=config.no_flip)


def mirrored(seeds: Sequence[int], config: AugmentConfig, flippable: Sequence[bool]) -> Bool[Tensor, " b"]:
    """Which pictures `augment` would mirror with these seeds, where `flips_alone`."""
    if not config.flip:
        return torch.zeros(len(seeds), dtype=torch.bool)
    return draw_warp(Draws(seeds), config, torch.tensor(flippable)).matrix[:, 0, 0] < 0


def augment(
    images: Tensor | Sequence[Tensor],
    seeds: Sequence[int],
    config: AugmentConfig,
    size: int,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    flippable: Sequence[bool] | None = None,
) -> UInt8[Tensor, "b 3 s s"]:
    """Change each picture at random.

    Args:
        images: uint8 RGB or RGBA (straight alpha), ``(B, 3, H, W)`` or ``(B, 4, H, W)``, or a list of pictures of both kinds.
        seeds: One a picture, in 0..2**63, from `mm.seeding.derive_seed`.
        config: How much.
        size: Side of the result in pixels, at most little smaller than H and W.
        background: Colour behind transparent parts where no random one is drawn.
        flippable: False for pictures whose mirror image means something else, from `may_flip`; default: all are.

    Returns:
        uint8, the same for a picture whatever else is in the batch and however many threads there are.
    """
    if len(seeds) != len(images):
        raise ValueError(f"{len(images)} pictures and {len(seeds)} seeds")
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    draws = Draws(seeds)
    geometry = draw_warp(draws, config, torch.tensor(flippable if flippable is not None else [True] * len(seeds)))
    colors = draw_recolor(draws, config, background)
    with _one_thread():
        for rows in _blocks(images, size):
            block = images[rows] if isinstance(images, Tensor) else torch.stack(list(images[rows]))
            out[rows] = _augment_block(block, geometry[rows], colors[rows], size)
    return out


def _augment_block(images: Tensor, geometry: Warp, colors: Recolor, size: int) -> Tensor:
    pixels = images.float().mul_(1 / 255)
    alpha = None
    if pixels.shape[1] == 4:
        pixels[:, :3] *= pixels[:, 3:]
    if not geometry.still or pixels.shape[-2:] != (size, size):
        pixels = warp(pixels, geometry, size)
    if pixels.shape[1] == 4:
        alpha = pixels[:, 3:].clamp(0, 1)
        pixels = pixels[:, :3] / alpha.clamp(min=MIN_ALPHA)
    return recolor(pixels, alpha, colors).mul_(255).add_(0.5).to(torch.uint8)


def _blocks(images: Tensor | Sequence[Tensor], size: int) -> Iterator[slice]:
    """Runs of pictures with the same number of channels and at most about BLOCK_PIXELS pixels."""
    most = max(1, BLOCK_PIXELS // (size * size))
    start = 0
    for row in range(1, len(images) + 1):
        if row == len(images) or row - start == most or images[row].shape != images[start].shape:
            yield slice(start, row)
            start = row


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread: where a plane is split between threads decides how its last few pixels are rounded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
