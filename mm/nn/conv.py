"""Convolutional networks that bring a picture to a grid of features and back.

Shapes: B batch, C channels, H and W pixels, D width of a feature, h and w its grid.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.attention import MultiHeadAttention
from mm.nn.ends import end

GROUPS = 32
"""Most groups of a group norm; fewer where the width is not a multiple."""

HEAD_WIDTH = 32


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm of the largest number of groups up to 32 that divides ``width``."""
    return nn.GroupNorm(next(groups for groups in range(min(GROUPS, width), 0, -1) if width % groups == 0), width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions behind norm and SiLU, added to their input, at first nothing (https://arxiv.org/abs/2012.09841).

    Args:
        width: Channels of the input.
        out_width: Channels of the result; the input passes through a 1 x 1 convolution where they differ.
    """

    def __init__(self, width: int, out_width: int | None = None) -> None:
        super().__init__()
        out_width = out_width or width
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out_width, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_width), nn.Conv2d(out_width, out_width, 3, padding=1)
        self.skip = nn.Identity() if width == out_width else nn.Conv2d(width, out_width, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class GridAttention(nn.Module):
    """Every cell of the grid looks at every other; what it sees is added, at first nothing.

    Args:
        width: Channels.
        num_heads: Attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.attention = MultiHeadAttention(width, num_heads)
        nn.init.zeros_(self.attention.output.weight)
        nn.init.zeros_(self.attention.output.bias)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        cells = rearrange(self.norm(x), "b d h w -> b (h w) d")
        attended, _ = self.attention(cells)
        return x + rearrange(attended, "b (h w) d -> b d h w", h=x.shape[2])


class PictureEncoder(nn.Module):
    """Pixels to a grid of features: patches, then a stage of residual blocks for each width, halving the grid between.

    Args:
        patch: Side of the patch that becomes one cell of the first stage, pixels.
        widths: Channels of the stages, fine to coarse.
        num_blocks: Residual blocks of a stage.
        out_width: D.
        num_heads: Heads of the attention between the blocks of the coarsest stage; 0 for none.
    """

    def __init__(self, patch: int, widths: Sequence[int], num_blocks: int, out_width: int, num_heads: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.PixelUnshuffle(patch), end(nn.Conv2d(3 * patch * patch, widths[0], 3, padding=1))]
        for stage, width in enumerate(widths):
            if stage:
                layers.append(nn.Conv2d(widths[stage - 1], width, 4, stride=2, padding=1))
            heads = num_heads if stage == len(widths) - 1 else 0
            layers += _stage(width, num_blocks, heads)
        layers += [group_norm(widths[-1]), nn.SiLU(), end(nn.Conv2d(widths[-1], out_width, 1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        return self.layers(pixels)


class PictureDecoder(nn.Module):
    """A grid of features to pixels, the mirror of `PictureEncoder`.

    Args:
        in_width: D.
        patch: Side of the patch that one cell of the last stage becomes, pixels.
        widths: Channels of the stages, fine to coarse, as for the encoder.
        num_blocks: Residual blocks of a stage.
        out_channels: C of the result.
        num_heads: Heads of the attention between the blocks of the coarsest stage; 0 for none.
        refinement: Further blocks at the start of each stage, in the coarsest one with attention behind each. They begin as the
            identity, so that a trained decoder may be given some.
    """

    def __init__(
        self,
        in_width: int,
        patch: int,
        widths: Sequence[int],
        num_blocks: int,
        out_channels: int = 3,
        num_heads: int = 0,
        refinement: int = 0,
    ) -> None:
        super().__init__()
        self.refinement = nn.ModuleList(
            nn.Sequential(*_refinement(width, refinement, attention=stage == 0)) for stage, width in enumerate(reversed(widths))
        )
        layers: list[nn.Module] = [end(nn.Conv2d(in_width, widths[-1], 3, padding=1))]
        for stage in reversed(range(len(widths))):
            heads = num_heads if stage == len(widths) - 1 else 0
            layers += _stage(widths[stage], num_blocks, heads)
            if stage:
                layers += [nn.Conv2d(widths[stage], 4 * widths[stage - 1], 1), nn.PixelShuffle(2)]
        layers += [group_norm(widths[0]), nn.SiLU()]
        self.layers = nn.Sequential(*layers)
        self.output = end(nn.Conv2d(widths[0], out_channels * patch * patch, 3, padding=1))
        self.shuffle = nn.PixelShuffle(patch)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        stages = iter(self.refinement)
        first, *layers = self.layers
        x = next(stages)(first(features))
        for layer in layers:
            x = layer(x)
            if isinstance(layer, nn.PixelShuffle):
                x = next(stages)(x)
        return self.shuffle(self.output(x))


def _refinement(width: int, count: int, attention: bool) -> list[nn.Module]:
    """Residual blocks, each followed by attention where wanted, with heads of about `HEAD_WIDTH`."""
    heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
    layers: list[nn.Module] = []
    for _ in range(count):
        layers.append(ResidualBlock(width))
        if attention:
            layers.append(GridAttention(width, heads))
    return layers


def _stage(width: int, num_blocks: int, num_heads: int) -> list[nn.Module]:
    """Residual blocks, with attention behind each but the last where it has heads."""
    layers: list[nn.Module] = []
    for block in range(num_blocks):
        layers.append(ResidualBlock(width))
        if num_heads and block < num_blocks - 1:
            layers.append(GridAttention(width, num_heads))
    return layers
