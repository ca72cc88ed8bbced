"""Colour of augmentation: one colour matrix for hue, saturation, mixing and contrast, then tone, shade, edges, outlines.

Shapes: B pictures, S pixels a side. Colours are in 0..1.
"""

import itertools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.draws import Draws, pixel_noise

if TYPE_CHECKING:
    from mm.data.augment import AugmentConfig

LUMINANCE = (0.299, 0.587, 0.114)
MIX_STD = 0.25
SHADE_STD, SHADE_POINTS = 0.22, 3
MAX_LINE_BRIGHTNESS = 0.25
MAX_NOISE_STD = 0.06
SIDE_OF_LINES = 64
"""Line widths are given for pictures of this side and grow with it."""

_PERMUTATIONS = torch.tensor(list(itertools.permutations(range(3))))


@dataclass(frozen=True)
class Recolor:
    """Drawn colours of a batch; every tensor has B rows. Flags are bool ``(B,)``.

    Args:
        matrix, offset: Colour map, ``(B, 3, 3)`` and ``(B, 3)``.
        tone: The curve ``x / (x + tone (1 - x))``, ``(B,)``: a power curve's shape through its points at 0, 1/2 and 1.
        shaded, shade: Light and shadow at 3 by 3 control points, ``(B, 1, 3, 3)``.
        edges, keep_shape: Reduce to edges; keep the area of the picture, or only its lines.
        outlined, thick, inside, inner_lines, line: Outlines: thicker, inward, also between colours; colour ``(B, 3)``.
        background: Colour behind transparent parts, ``(B, 3)``; the given one where none was drawn.
        cut, box: Cut out a rectangle: centre x, y and half width, height, in -1..1, ``(B, 4)``.
        blurred: Slight blur.
        noise, noise_place: Standard deviation of pixel noise and its place in the table of noise, ``(B,)``.
    """

    matrix: Tensor
    offset: Tensor
    tone: Tensor
    shaded: Tensor
    shade: Tensor
    edges: Tensor
    keep_shape: Tensor
    outlined: Tensor
    thick: Tensor
    inside: Tensor
    inner_lines: Tensor
    line: Tensor
    background: Tensor
    cut: Tensor
    box: Tensor
    blurred: Tensor
    noise: Tensor
    noise_place: Tensor

    def __getitem__(self, rows: slice) -> "Recolor":
        return Recolor(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def draw_recolor(draws: Draws, config: "AugmentConfig", background: tuple[int, int, int]) -> Recolor:
    """Draw the colours of a batch."""
    matrix, offset = _draw_matrix(draws, config)
    given = torch.tensor(background, dtype=torch.float64) / 255

    def color(brightest: float = 1.0) -> Tensor:
        return torch.stack([draws.uniform(0, brightest) for _ in range(3)], -1)

    return Recolor(
        matrix=matrix.float(),
        offset=offset.float(),
        tone=(torch.exp2(torch.exp(draws.normal(config.gamma))) - 1).float(),
        shaded=draws.happens(config.shade),
        shade=(draws.normals(1, SHADE_POINTS, SHADE_POINTS) * SHADE_STD).float(),
        edges=draws.happens(config.edges),
        keep_shape=draws.happens(0.5),
        outlined=draws.happens(config.outline),
        thick=draws.happens(0.5),
        inside=draws.happens(0.6),
        inner_lines=draws.happens(0.6),
        line=color(MAX_LINE_BRIGHTNESS).float(),
        background=torch.where(draws.happens(config.background)[:, None], color(), given).float(),
        cut=draws.happens(config.cut),
        box=torch.stack(
            [draws.uniform(-1, 1), draws.uniform(-1, 1), draws.uniform(0.1, 0.4), draws.uniform(0.1, 0.4)], -1
        ).float(),
        blurred=draws.happens(config.blur),
        noise=(draws.uniform(0, MAX_NOISE_STD) * draws.happens(config.noise)).float(),
        noise_place=draws.uniform(),
    )


def _draw_matrix(draws: Draws, config: "AugmentConfig") -> tuple[Tensor, Tensor]:
    """Colour matrix and offset, float64: hue, then saturation, channels, and contrast about middle grey."""
    eye = torch.eye(3, dtype=torch.float64)
    angle = draws.normal(config.hue)
    angle = torch.where(draws.happens(config.any_hue), draws.uniform(0, 2 * math.pi), angle)
    saturation = torch.exp(draws.normal(config.saturation))
    saturation = torch.where(draws.happens(config.grayscale), 0.0, saturation)[:, None, None]
    order = _PERMUTATIONS[(draws.uniform() * len(_PERMUTATIONS)).long()]
    order = torch.where(draws.happens(config.channel_permutation)[:, None], order, torch.arange(3))
    mix = eye + draws.normals(3, 3) * MIX_STD * draws.happens(config.channel_mix)[:, None, None]
    contrast = torch.exp(draws.normal(config.contrast))[:, None]
    added = draws.normal(config.brightness)[:, None] + draws.normals(3) * config.tint

    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    root = 3**-0.5  # rotation about the grey axis (1, 1, 1)
    turn = torch.tensor([[0, -root, root], [root, 0, -root], [-root, root, 0]], dtype=torch.float64)
    hue = eye * cos + (1 - cos) / 3 + sin * turn
    grey = torch.tensor(LUMINANCE, dtype=torch.float64).expand(3, 3)
    mix = mix / mix.sum(-1, keepdim=True).clamp(min=0.4)
    matrix = contrast[..., None] * (eye[order] @ mix @ (grey + (eye - grey) * saturation) @ hue)
    return matrix, 0.5 - 0.5 * contrast + added


def recolor(rgb: Tensor, alpha: Tensor | None, colors: Recolor) -> Tensor:
    """Apply drawn colours.

    Args:
        rgb: Straight colours, float ``(B, 3, S, S)``.
        alpha: Opacity, float ``(B, 1, S, S)``; None for opaque pictures, which get no outlines.
        colors: What to do.

    Returns:
        Composited pictures, float ``(B, 3, S, S)``, in 0..1.
    """
    rgb = _tone(_color_map(rgb, colors), colors)
    lines = alpha if alpha is not None else torch.ones_like(rgb[:, :1])
    _draw_edges(rgb, lines, colors)
    if alpha is not None:
        _draw_outlines(rgb, lines, colors)
    _cut_out(lines, colors)
    out = rgb.mul_(lines).add_(colors.background[..., None, None] * (1 - lines))
    rows = colors.blurred.nonzero()[:, 0]
    if len(rows):
        out[rows] = F.avg_pool2d(F.pad(out[rows], (1, 1, 1, 1), mode="replicate"), 3, 1)
    for row in colors.noise.nonzero()[:, 0].tolist():
        out[row] += pixel_noise(float(colors.noise_place[row]), out[row].shape) * colors.noise[row]
    return out.clamp_(0, 1)


def _color_map(rgb: Tensor, colors: Recolor) -> Tensor:
    """The matrix, plane by plane: sums in a fixed order, which a matrix product does not promise."""
    out = torch.empty_like(rgb)
    for channel in range(3):
        weights = colors.matrix[:, channel, :, None, None]
        plane = out[:, channel]
        torch.mul(rgb[:, 0], weights[:, 0], out=plane)
        plane += rgb[:, 1] * weights[:, 1]
        plane += rgb[:, 2] * weights[:, 2]
        plane += colors.offset[:, channel, None, None]
    return out


def _tone(rgb: Tensor, colors: Recolor) -> Tensor:
    rows = colors.shaded.nonzero()[:, 0]
    if len(rows):
        rgb[rows] += F.interpolate(colors.shade[rows], size=rgb.shape[-2:], mode="bilinear", align_corners=True)
    rgb.clamp_(0, 1)
    if (colors.tone == 1).all():
        return rgb
    tone = colors.tone[:, None, None, None]
    return rgb.div_(rgb * (1 - tone) + tone)


def _luminance(rgb: Tensor) -> Tensor:
    red, green, blue = LUMINANCE
    return rgb[:, 0:1] * red + rgb[:, 1:2] * green + rgb[:, 2:3] * blue


def _dilate(image: Tensor, radius: int) -> Tensor:
    """Largest value in the square around each pixel, one axis after the other."""
    for axis in (-1, -2):
        source, size = image, image.shape[axis]
        image = source.clone()
        for step in range(1, min(radius, size - 1) + 1):
            near, far = image.narrow(axis, 0, size - step), image.narrow(axis, step, size - step)
            torch.maximum(near, source.narrow(axis, step, size - step), out=near)
            torch.maximum(far, source.narrow(axis, 0, size - step), out=far)
    return image


def _line_radius(side: int, radius: int) -> int:
    return max(1, round(radius * side / SIDE_OF_LINES))


def _contours(brightness: Tensor) -> Tensor:
    """Largest difference of brightness around each pixel."""
    radius = _line_radius(brightness.shape[-1], 1)
    return _dilate(brightness, radius) + _dilate(-brightness, radius)


def _draw_edges(rgb: Tensor, alpha: Tensor, colors: Recolor) -> None:
    rows = colors.edges.nonzero()[:, 0]
    if not len(rows):
        return
    seen_on_white = _luminance(rgb[rows]) * alpha[rows] + (1 - alpha[rows])
    edges = (_contours(seen_on_white) * 1.5).clamp_(0, 1)
    keep = colors.keep_shape[rows, None, None, None]
    rgb[rows] = (1 - edges).expand(-1, 3, -1, -1)
    alpha[rows] = torch.where(keep, alpha[rows], edges)


def _draw_outlines(rgb: Tensor, alpha: Tensor, colors: Recolor) -> None:
    for thick, inside in itertools.product((False, True), repeat=2):
        rows = (colors.outlined & (colors.thick == thick) & (colors.inside == inside)).nonzero()[:, 0]
        if not len(rows):
            continue
        picture, shape, line = rgb[rows], alpha[rows], colors.line[rows, :, None, None]
        radius = _line_radius(rgb.shape[-1], 2 if thick else 1)
        if inside:
            between = (_contours(_luminance(picture)) * 2 - 0.2).clamp_(0, 1) * colors.inner_lines[rows, None, None, None]
            lines = torch.maximum(shape + _dilate(-shape, radius), between)
            rgb[rows] = picture * (1 - lines) + line * lines
        else:
            rgb[rows] = picture * shape + line * (1 - shape)
            alpha[rows] = _dilate(shape, radius)


def _cut_out(alpha: Tensor, colors: Recolor) -> None:
    rows = colors.cut.nonzero()[:, 0]
    if not len(rows):
        return
    size = alpha.shape[-1]
    axis = (torch.arange(size, dtype=torch.float32) * 2 + 1) / size - 1
    center_x, center_y, half_width, half_height = (colors.box[rows, i, None] for i in range(4))
    across, down = (axis - center_x).abs() < half_width, (axis - center_y).abs() < half_height
    alpha[rows] = alpha[rows].masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0)
