"""Heat laid over pictures, for maps of where something is."""

import numpy as np
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mm.evaluation.sheet import Picture, to_pillow

COLOURS = ((255, 225, 100), (255, 165, 20), (225, 40, 20), (120, 0, 60))
"""From little heat to the most; in greys they fall from light to dark, too."""

STRONGEST = 0.9
"""Opacity of the most heat."""

PALE = 0.35
"""How far the picture beneath is brought to white, of which only the greys are shown."""


def heat_over(picture: Picture, heat: Float[Tensor, "h w"]) -> Image.Image:
    """A pale grey copy of a picture under colours of the heat, which is enlarged smoothly; its maximum is the strongest colour.

    Args:
        picture: Anything `to_pillow` takes.
        heat: Not negative, of any scale, row 0 at the top; where all is zero nothing is laid over.
    """
    grey = np.asarray(to_pillow(picture).convert("L"), np.float32)[..., None]
    under = grey + PALE * (255 - grey)
    enlarged = F.interpolate(heat[None, None].float(), under.shape[:2], mode="bicubic", align_corners=False)[0, 0]
    level = (enlarged / heat.max().clamp(min=1e-30)).clamp(0, 1).cpu().numpy()
    steps = np.linspace(0, 1, len(COLOURS))
    colour = np.stack([np.interp(level, steps, channel) for channel in zip(*COLOURS, strict=True)], axis=-1)
    opacity = STRONGEST * level[..., None]
    return Image.fromarray((under + opacity * (colour - under)).round().astype(np.uint8))
