"""Fitting a decoded picture of any shape into the square that an encoder takes.

Shapes: H and W pixels of the input, S the wanted side. All pictures are uint8 in 0..255, channels first.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, UInt8
from pydantic import Field, model_validator
from torch import Tensor

from mm.config import StrictConfig

Channel = Annotated[int, Field(ge=0, le=255)]

MAX_ASPECT = 8
"""Pictures longer than this are cut to their middle before resizing, so that a 1 x 50,000 strip cannot fill the memory."""

BORDER_TOLERANCE = 16
"""How far, in 0..255, a channel may be from the border colour and still count as background (JPEG noise is below this)."""


class ImageSpec(StrictConfig):
    """The square that a picture is brought to.

    Args:
        size: Side in pixels.
        fit: ``crop`` resizes the shortest side and takes the centre; ``squash`` resizes both sides; ``content`` takes the
            bounding box of what differs from the background (alpha above 0, else far from the border's colour), centred in a
            square.
        interpolation: Filter, always antialiased.
        background: What shows through transparent pixels.
        margin: Free space on each side of the content, as a fraction of the side; used by ``content``.
        resize_to: Side that ``crop`` and ``squash`` resize to before the centre of ``size`` is cut out; ``size`` if None.
        centre: Where the cut falls between two pixels: ``nearest`` is torchvision's rounding, ``down`` that of transformers.
    """

    size: int = Field(ge=8, le=4096)
    fit: Literal["crop", "squash", "content"] = "crop"
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    background: tuple[Channel, Channel, Channel] = (255, 255, 255)
    margin: float = Field(default=0.04, ge=0, lt=0.5)
    resize_to: int | None = Field(default=None, ge=8, le=8192)
    centre: Literal["nearest", "down"] = "nearest"

    @model_validator(mode="after")
    def _possible(self) -> "ImageSpec":
        if self.resize_to is not None and (self.resize_to < self.size or self.fit == "content"):
            raise ValueError(f"resize_to {self.resize_to} must be at least size {self.size}, with fit: crop or squash")
        return self


def fit_image(image: UInt8[Tensor, "c h w"], spec: ImageSpec, keep_alpha: bool = False) -> UInt8[Tensor, "k s s"]:
    """Bring a picture to ``spec.size`` pixels square.

    Args:
        image: ``(3, H, W)`` or ``(4, H, W)`` RGBA with straight (not premultiplied) alpha.
        spec: Target size and manner.
        keep_alpha: Return ``(4, S, S)`` for every picture, opaque ones with alpha 255, so that a background can be chosen
            later. Colours are resized premultiplied: compositing the result equals resizing the composite, but for rounding.

    Returns:
        ``(3, S, S)``, composited on ``spec.background`` before resizing; or ``(4, S, S)``.
    """
    assert image.dtype == torch.uint8, f"pictures are uint8, not {image.dtype}"
    assert image.ndim == 3, f"pictures are (channels, height, width), not {tuple(image.shape)}"
    assert image.shape[0] in (3, 4), f"pictures have 3 or 4 channels, not {image.shape[0]}"
    fill = torch.tensor(spec.background, dtype=torch.uint8)
    box = None
    if spec.fit == "content":
        box, border = _content(image)
        image = _cut(image, box)
        fill = fill if border is None else border
    if image.shape[0] == 3:
        fitted = _place(image, spec, fill)
        return torch.cat([fitted, fitted.new_full((1, spec.size, spec.size), 255)]) if keep_alpha else fitted
    if not keep_alpha:
        return _place(composite(image, spec.background), spec, fill)
    return _straight(_place(_premultiplied(image), spec, torch.zeros(4)))


def fit_mask(mask: Bool[Tensor, "h w"], image: UInt8[Tensor, "c h w"], spec: ImageSpec) -> Bool[Tensor, "s s"]:
    """Bring a mask of a picture to where `fit_image` brings the picture; True around content that is cut out."""
    layer = 255 * mask.to(torch.uint8).expand(3, -1, -1)
    if spec.fit == "content":
        layer = _cut(layer, _content(image)[0])
    return _place(layer, spec, torch.full((3,), 255))[0] >= 128


def composite(image: UInt8[Tensor, "4 h w"], background: tuple[int, int, int]) -> UInt8[Tensor, "3 h w"]:
    """Lay an RGBA picture with straight alpha on a plain colour; exact to the nearest integer."""
    alpha = image[3:].to(torch.int32)
    under = torch.tensor(background, dtype=torch.int32).view(3, 1, 1)
    return ((image[:3].to(torch.int32) * alpha + under * (255 - alpha) + 127) // 255).to(torch.uint8)


def _place(image: Tensor, spec: ImageSpec, fill: Tensor) -> Tensor:
    """Resize (C, H, W) into (C, S, S) by the manner of the spec; ``fill`` (C,) is the colour around content."""
    size, side = spec.size, spec.resize_to or spec.size
    if spec.fit == "squash":
        return _centre(_resize(image, side, side, spec), spec)
    height, width = image.shape[-2:]
    if spec.fit == "crop":
        short = min(height, width)
        image = _middle(image, min(height, short * MAX_ASPECT), min(width, short * MAX_ASPECT))
        height, width = image.shape[-2:]
        image = _resize(image, max(side, side * height // short), max(side, side * width // short), spec)
        return _centre(image, spec)
    inner = max(1, round(size * (1 - 2 * spec.margin)))
    scale = inner / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    canvas = fill.to(image.dtype).view(-1, 1, 1).expand(-1, size, size).clone()
    top, left = (size - new_height) // 2, (size - new_width) // 2
    canvas[:, top : top + new_height, left : left + new_width] = _resize(image, new_height, new_width, spec)
    return canvas


def _centre(image: Tensor, spec: ImageSpec) -> Tensor:
    """The square of ``spec.size`` in the middle of a picture that is at least as large."""
    size = spec.size
    if spec.centre == "nearest":
        return _middle(image, size, size)
    top, left = ((side - size) // 2 for side in image.shape[-2:])
    return image[..., top : top + size, left : left + size]


def _middle(image: Tensor, height: int, width: int) -> Tensor:
    """As torchvision cuts it out of a picture that is at least as large."""
    top, left = (round((side - wanted) / 2) for side, wanted in zip(image.shape[-2:], (height, width), strict=True))
    return image[..., top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int, spec: ImageSpec) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as F

    return F.resize(image, [height, width], interpolation=InterpolationMode(spec.interpolation), antialias=True)


def _content(image: Tensor) -> tuple[tuple[int, int, int, int], Tensor | None]:
    """Bounding box (top, bottom, left, right) of the content, and the border's colour (3,) where the picture is opaque."""
    if image.shape[0] == 4:
        mask, border = image[3] > 0, None
    else:
        ring = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
        border = ring.median(dim=1).values
        mask = ((image.to(torch.int16) - border.to(torch.int16).view(3, 1, 1)).abs() > BORDER_TOLERANCE).any(0)
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if len(rows) == 0:
        return (0, image.shape[1], 0, image.shape[2]), border
    return (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1), border


def _cut(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    top, bottom, left, right = box
    return image[:, top:bottom, left:right]


def _premultiplied(image: Tensor) -> Tensor:
    """RGBA uint8 to float RGBA in 0..255 with colours times alpha, so that hidden colours do not bleed when resized."""
    floating = image.to(torch.float32)
    return torch.cat([floating[:3] * (floating[3:] / 255), floating[3:]])


def _straight(premultiplied: Tensor) -> Tensor:
    """The inverse of `_premultiplied`, rounded to uint8; bicubic overshoot is clipped."""
    alpha = premultiplied[3:].clamp(0, 255)
    colour = premultiplied[:3].clamp(min=0) * (255 / alpha.clamp(min=0.5))
    return torch.cat([colour.clamp(max=255), alpha]).round().to(torch.uint8)
