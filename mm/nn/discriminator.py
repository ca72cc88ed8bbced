"""A judge of picture patches: real or made."""

from jaxtyping import Float
from torch import Tensor, nn

from mm.nn.conv import group_norm
from mm.nn.ends import end

SLOPE = 0.2
"""Of the leaky rectifier below zero."""


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches, high for real ones (https://arxiv.org/abs/1611.07004).

    Group norm takes the place of the original's batch norm: judgement of a picture must not depend on its batch, nor running
    statistics on the order of real and made ones.

    Args:
        width: Channels after the first layer, doubled by each further one.
        num_layers: Layers that halve the resolution.
    """

    def __init__(self, width: int = 64, num_layers: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [end(nn.Conv2d(3, width, 4, stride=2, padding=1)), nn.LeakyReLU(SLOPE)]
        for layer in range(1, num_layers):
            wider = width * 2**layer
            layers += [nn.Conv2d(wider // 2, wider, 4, stride=2, padding=1), group_norm(wider), nn.LeakyReLU(SLOPE)]
        layers.append(end(nn.Conv2d(width * 2 ** (num_layers - 1), 1, 3, padding=1)))
        self.layers = nn.Sequential(*layers)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 i j"]:
        return self.layers(pixels)
