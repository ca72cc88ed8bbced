"""Geometry of augmentation: rotation, scale, shear, shift, flip, perspective and smooth deformation in one resampling.

Coordinates run from -1 to 1 over the picture. Shapes: B pictures, H and W pixels.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.draws import Draws

if TYPE_CHECKING:
    from mm.data.augment import AugmentConfig

SMALL_ROTATION = 0.2
"""Factor on the rotation of half of the pictures."""

BEND_STD = 0.05
"""Standard deviation of the deformation at its control points, in coordinates; 4 by 4 control points."""

BEND_POINTS = 4
MIN_DEPTH = 0.3
"""Perspective never magnifies more than 1 / MIN_DEPTH."""


@dataclass(frozen=True)
class Warp:
    """Where each pixel of the result comes from.

    Args:
        matrix: Linear map from result to picture, ``(B, 2, 2)``.
        offset: Its translation, ``(B, 2)``.
        tilt: Perspective: coordinates are divided by ``1 + tilt . (x, y)``, ``(B, 2)``.
        bend: Deformation at the control points, zero for pictures that are not bent, ``(B, 2, 4, 4)``.
        bent: Which pictures are, ``(B,)``.
        still: True when the settings leave every picture where it is.
    """

    matrix: Tensor
    offset: Tensor
    tilt: Tensor
    bend: Tensor
    bent: Tensor
    still: bool

    def __getitem__(self, rows: slice) -> "Warp":
        return Warp(self.matrix[rows], self.offset[rows], self.tilt[rows], self.bend[rows], self.bent[rows], self.still)


def draw_warp(draws: Draws, config: "AugmentConfig", may_flip: Tensor) -> Warp:
    """Draw the geometry of a batch. ``may_flip`` is True for pictures whose mirror image means the same, ``(B,)``."""
    angle = draws.normal(config.rotation)
    angle = torch.where(draws.happens(0.5), angle, angle * SMALL_ROTATION)
    scale = torch.exp(draws.uniform(*(math.log(factor) for factor in config.scale)))
    aspect = torch.exp(draws.normal(config.aspect))
    shear = draws.normal(config.shear)
    mirror = torch.where(draws.happens(config.flip) & may_flip, -1.0, 1.0)
    shift = torch.stack([draws.uniform(-2 * config.shift, 2 * config.shift) for _ in range(2)], -1)
    tilt = draws.normals(2) * config.perspective
    bent = draws.happens(config.elastic)
    bend = draws.normals(2, BEND_POINTS, BEND_POINTS) * BEND_STD * bent[:, None, None, None]

    cos, sin = angle.cos(), angle.sin()
    rotate = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], 1)
    slant = torch.eye(2, dtype=torch.float64).repeat(len(angle), 1, 1)
    slant[:, 0, 1] = shear
    stretch = torch.diag_embed(torch.stack([aspect / scale, 1 / (aspect * scale)], -1))
    matrix = rotate @ slant @ stretch
    matrix[:, 0] *= mirror[:, None]
    amounts = (config.flip, config.rotation, config.aspect, config.shear, config.shift, config.perspective, config.elastic)
    still = not any(amounts) and config.scale == (1, 1)
    return Warp(matrix.float(), shift.float(), tilt.float(), bend.float(), bent, still)


def warp(images: Tensor, geometry: Warp, size: int) -> Tensor:
    """Resample pictures, bilinearly.

    Args:
        images: float ``(B, C, H, W)``, premultiplied where C is 4. Beyond the border, RGBA is transparent and RGB is mirrored.
        geometry: What to do.
        size: Side of the result in pixels; a much smaller one than that of the pictures would alias.

    Returns:
        float ``(B, C, size, size)``.
    """
    axis = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    x, y = axis[None, None, :], axis[None, :, None]
    matrix, offset, tilt = geometry.matrix[..., None, None], geometry.offset[..., None, None], geometry.tilt[..., None, None]
    grid = torch.empty(len(images), 2, size, size)
    depth = None
    if geometry.tilt.any():
        depth = (tilt[:, 0] * x + (1 + tilt[:, 1] * y)).clamp_(min=MIN_DEPTH)
    for axis_index in range(2):
        column = matrix[:, axis_index, 0] * x + (matrix[:, axis_index, 1] * y + offset[:, axis_index])
        grid[:, axis_index] = column if depth is None else column / depth
    rows = geometry.bent.nonzero()[:, 0]
    if len(rows):
        grid[rows] += F.interpolate(geometry.bend[rows], size=(size, size), mode="bicubic", align_corners=True)
    padding = "zeros" if images.shape[1] == 4 else "reflection"
    grid = grid.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)
