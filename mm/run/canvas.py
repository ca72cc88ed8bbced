"""A picture that a painter finishes or changes, and which part of it stays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from mm.errors import UserError
from mm.hub import Model
from mm.media.geometry import composite, fit_image, fit_mask
from mm.media.image import open_image

Part = Literal["top", "bottom", "left", "right", "border"]
WHITE = 128
"""Brightness, in 0..255, from which on a mask is white."""


@dataclass(frozen=True)
class Canvas:
    """What a painter starts from.

    Args:
        image: At the model's size, uint8 ``(3, H, W)``.
        keep: True for the pixels that stay, ``(H, W)``; None where the whole picture is changed.
    """

    image: UInt8[Tensor, "3 h w"]
    keep: Bool[Tensor, "h w"] | None

    def pasted(self, pictures: UInt8[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """The pictures with the pixels that stay as they were: a painter returns them only as far as its tokens can."""
        if self.keep is None:
            return pictures
        place = pictures.device
        return torch.where(self.keep.to(place), self.image.to(place), pictures)


def canvas(model: Model, image: Any, keep: Part | str | Path | Tensor | None) -> Canvas | None:
    """The picture and the part that stays, prepared for a model; None where there is no picture.

    Args:
        model: Who paints.
        image: Whatever `mm.media.image.open_image` takes.
        keep: A part by its name, a mask ``(H, W)`` at the model's picture size, True where it stays, or a picture file, white
            where it stays, of the size of ``image`` or of the model's pictures. None for a picture that is changed as a whole.

    Raises:
        UserError: A part to keep without a picture, the picture or the mask cannot be read, or the mask is of another size.
    """
    if image is None:
        if keep is not None:
            raise UserError("keep says what stays of a picture; give the picture, too (image)")
        return None
    raw = open_image(image)
    picture = fit_image(raw, model.processor.image_spec)
    if keep is None:
        return Canvas(picture, None)
    height, width = picture.shape[1:]
    if isinstance(keep, Tensor):
        if keep.shape != (height, width):
            raise UserError(f"keep: the mask is {tuple(keep.shape)}, the model's pictures are {(height, width)}")
        return Canvas(picture, keep.bool().cpu())
    if keep in get_args(Part):
        return Canvas(picture, _part(str(keep), height, width))
    if not Path(keep).is_file():
        raise UserError(f"keep: '{keep}' is none of {', '.join(get_args(Part))}, nor a mask picture, white where it stays")
    mask = _white(open_image(keep))
    if mask.shape == raw.shape[1:]:
        return Canvas(picture, fit_mask(mask, raw, model.processor.image_spec))
    if mask.shape == (height, width):
        return Canvas(picture, mask)
    raise UserError(
        f"{keep}: the mask is {tuple(mask.shape)}, the picture {tuple(raw.shape[1:])}; give it that size, or {(height, width)}"
    )


def _part(name: str, height: int, width: int) -> Tensor:
    mask = torch.zeros(height, width, dtype=torch.bool)
    parts = {
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "border": (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4))),
    }
    mask[parts[name]] = True
    return ~mask if name == "border" else mask


def _white(mask: Tensor) -> Tensor:
    opaque = composite(mask, (0, 0, 0)) if mask.shape[0] == 4 else mask
    return opaque.float().mean(0) >= WHITE
