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


def group_norm(width: int) -> nn.GroupNorm:
    """Group norm of the largest number of groups up to 32 that divides ``width``."""
    return nn.GroupNorm(next(groups for groups in range(min(GROUPS, width), 0, -1) if width % groups == 0), width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions behind norm and SiLU, added to their input (https://arxiv.org/abs/2012.09841).

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

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h w"]:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(hidden)))


class GridAttention(nn.Module):
    """Every cell of the grid looks at every other.

    Args:
        width: Channels.
        num_heads: Attention heads.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = group_norm(width)
        self.attention = MultiHeadAttention(width, num_heads)
        nn.init.zeros_(self.attention.output.weight)

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
    """

    def __init__(
        self, in_width: int, patch: int, widths: Sequence[int], num_blocks: int, out_channels: int = 3, num_heads: int = 0
    ) -> None:
        super().__init__()
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
        return self.shuffle(self.output(self.layers(features)))


def _stage(width: int, num_blocks: int, num_heads: int) -> list[nn.Module]:
    """Residual blocks, with attention behind each but the last where it has heads."""
    layers: list[nn.Module] = []
    for block in range(num_blocks):
        layers.append(ResidualBlock(width))
        if num_heads and block < num_blocks - 1:
            layers.append(GridAttention(width, num_heads))
    return layers
