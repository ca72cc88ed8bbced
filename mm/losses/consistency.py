"""Consistency: a network that tells the same data from every moment of a teacher's way from noise to data.

Sources: consistency models https://arxiv.org/abs/2303.01469, latent consistency https://arxiv.org/abs/2310.04378, pseudo-Huber
distances https://arxiv.org/abs/2310.14189.

Shapes: B samples, the rest of a sample's shape is arbitrary.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mm.losses.diffusion import Path, Prediction, predicted_sample

Distance = Literal["huber", "l2"]

HUBER_WIDTH = 0.00054
"""Errors of a number far below it count by their squares, far above by their size (https://arxiv.org/abs/2310.14189)."""


def consistent(
    path: Path, prediction: Prediction, output: Float[Tensor, "b ..."], x: Float[Tensor, "b ..."], time: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The consistency function ``f(x_t, t)``: the data that a network's output means, and at moment 0 ``x`` itself, exactly.

    A velocity and a noise mean just that at 0, so that the function has no jump there without further factors.
    """
    sample = predicted_sample(path, prediction, output, x, time)
    return torch.where((time > 0).reshape(-1, *[1] * (x.ndim - 1)), sample, x)


def distance(first: Float[Tensor, "b ..."], second: Float[Tensor, "b ..."], kind: Distance = "huber") -> Float[Tensor, " b"]:
    """How far samples are apart, fp32: the mean square of their difference, or its root, rounded off near 0."""
    square = (first.float() - second.float()).square().flatten(1).mean(1)
    return square if kind == "l2" else (square + HUBER_WIDTH**2).sqrt() - HUBER_WIDTH
