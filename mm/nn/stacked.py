"""Batches of sequences of different lengths, one under the other."""

import torch
import torch.nn.functional as F
from jaxtyping import Shaped
from torch import Tensor


def stacked(first: Shaped[Tensor, "a t *d"], second: Shaped[Tensor, "b s *d"]) -> Shaped[Tensor, "c u *d"]:
    """Both, ``(A + B, max(T, S), ...)``; the shorter rows are filled up with zeros, or False."""
    length = max(first.shape[1], second.shape[1])
    return torch.cat([F.pad(part, [0, 0] * (part.ndim - 2) + [0, length - part.shape[1]]) for part in (first, second)])
