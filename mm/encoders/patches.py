"""Pictures as a sequence of patches, for a transformer that reads them together with something else.

Shapes: B batch, H and W pixels, D width.
"""

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mm.errors import UserError
from mm.types import Encoded


class PatchEmbedding(nn.Module):
    """Pixels to one vector a patch, in raster order.

    Args:
        projection: Normalised pixels ``(B, 3, H, W)`` to ``(B, D, rows, columns)``.
        image_size: Side of the pictures it accepts, pixels.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        projection: nn.Module,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.projection, self.image_size = projection, image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]) -> Encoded:
        """Embed pictures, uint8 in 0..255 or float in 0..1. Raises `UserError` for pictures of another size.

        ``extras["grid"]`` holds the rows and columns of the patches; what is pooled is their mean.
        """
        size = self.image_size
        if image.shape[1:] != (3, size, size):
            raise UserError(
                f"pictures of shape {tuple(image.shape[1:])} where (3, {size}, {size}) is expected; "
                "prepare them with the model's processor or change image_size"
            )
        white = 1.0 if image.is_floating_point() else 255.0
        pixels = (image.to(self.mean.dtype) - self.mean * white) / (self.std * white)
        features = self.projection(pixels.to(next(self.projection.parameters()).dtype))
        tokens = rearrange(features, "b d r c -> b (r c) d")
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return Encoded(tokens, mask, tokens.mean(1), {"grid": tuple(features.shape[2:])})
