"""How well pictures are reconstructed: PSNR and SSIM.

Shapes: B pictures, H and W pixels, uint8 in 0..255.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from mm.types import Compresses, Tokenizes

MAX_PSNR = 100.0
"""Of equal pictures, in decibels."""

WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03
"""SSIM's window in pixels and constants (https://doi.org/10.1109/TIP.2003.819861)."""


def reconstructed(
    system: Tokenizes | Compresses, image: UInt8[Tensor, "b 3 h w"]
) -> tuple[UInt8[Tensor, "b 3 h w"], Int64[Tensor, "b n"] | None]:
    """Pictures that went through tokens, and these; or through latents where a system has no tokens."""
    if isinstance(system, Tokenizes):
        ids = system.encode(image)
        return system.decode(ids), ids
    return system.from_latents(system.to_latents(image)), None


def psnr(made: UInt8[Tensor, "b 3 h w"], real: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture over its three channels, in decibels."""
    error = ((made.double() - real.double()) / 255).square().mean((1, 2, 3))
    return (-10 * error.clamp(min=10 ** (-MAX_PSNR / 10)).log10()).float()


def ssim(made: UInt8[Tensor, "b 3 h w"], real: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Structural similarity of each picture, averaged over channels and over the windows that lie inside it; at most 1."""
    x, y = made.double() / 255, real.double() / 255
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=x.device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    line = line / line.sum()

    def smooth(values: Tensor) -> Tensor:
        rows = F.conv2d(values, line.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
        return F.conv2d(rows, line.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)

    mean_x, mean_y = smooth(x), smooth(y)
    var_x, var_y, cov = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2, smooth(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    likeness = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return likeness.mean((1, 2, 3)).float()
