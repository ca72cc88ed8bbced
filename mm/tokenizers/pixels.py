"""Pictures as they are, where a generator works on pixels instead of latents."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mm.tokenizers.limits import check_pictures


class Pixels(nn.Module):
    """Pixels in -1..1.

    Args:
        image_size: Side of the square picture in pixels.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """See `mm.types.Compresses`."""
        return 3, self.image_size, self.image_size

    def to_latents(self, image: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        """See `mm.types.Compresses`. Raises `UserError` for pictures of another size."""
        check_pictures(image, self.image_size)
        return image.float() / 127.5 - 1

    def from_latents(self, latents: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
        """See `mm.types.Compresses`: rounded and clipped."""
        return ((latents.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
