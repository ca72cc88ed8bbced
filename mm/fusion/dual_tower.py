"""Dual tower: any number of encoders that meet in one space of unit vectors, compared by a learnable scale."""

import math
from collections.abc import Collection, Mapping
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mm.types import Encoded

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""Log of CLIP's initial inverse temperature (https://arxiv.org/abs/2103.00020, section 2.5)."""

MAX_LOGIT_SCALE = math.log(100)
"""Log of the largest multiplier of a cosine; CLIP clips here to keep training stable."""


class DualTower(nn.Module):
    """Towers of built encoders and their projections into one space.

    Args:
        towers: Name of a modality to its encoder and the projection of the encoder's pooled vector ``(B, width) -> (B, D)``.
        logit_scale: Initial value of the log of the multiplier of cosines.
        logit_bias: Initial value of a learnable bias of the logits, or None for none.
        logit_scale_range: Where `clamp_` keeps the log of the multiplier.
        locked: Towers whose encoders are not trained and stay in evaluation mode (LiT, https://arxiv.org/abs/2111.07991). Their
            projections are trained, so that an encoder that never met the others can be locked.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self,
        towers: Mapping[str, tuple[nn.Module, nn.Module]],
        *,
        logit_scale: float = INITIAL_LOGIT_SCALE,
        logit_bias: float | None = None,
        logit_scale_range: tuple[float, float] = (0.0, MAX_LOGIT_SCALE),
        locked: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: encoder for name, (encoder, _) in towers.items()})
        self.projections = nn.ModuleDict({name: projection for name, (_, projection) in towers.items()})
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))
        self.logit_scale_range = logit_scale_range
        self.locked = frozenset(locked)
        for name in self.locked:
            self.encoders[name].requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in every module, but locked encoders stay in evaluation mode: no dropout, no new batch statistics."""
        super().train(mode)
        for name in self.locked:
            self.encoders[name].eval()
        return self

    def embed(self, name: str, value: Any) -> Float[Tensor, "b d"]:
        """Unit vectors of a modality's input, fp32."""
        return self.project(name, self.encoders[name](value))

    def project(self, name: str, encoded: Encoded) -> Float[Tensor, "b d"]:
        """Unit vectors of what a modality's encoder has made of its input, fp32."""
        return unit(self.projections[name](encoded.pooled.to(self.logit_scale.dtype)))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoders in another floating type, cast once, for inference; projections and scores stay in fp32."""
        for encoder in self.encoders.values():
            encoder.cast_(dtype)  # pyright: ignore[reportCallIssue] - every encoder has it

    def scale(self) -> Float[Tensor, ""]:
        """The multiplier of cosines; without a bias within its range after `clamp_`."""
        return self.logit_scale.float().exp()

    def scores(self, queries: Float[Tensor, "q d"], items: Float[Tensor, "m d"]) -> Float[Tensor, "q m"]:
        """Logits of every query with every item, fp32: scaled cosines plus the bias, where there is one."""
        with torch.autocast(queries.device.type, enabled=False):
            logits = self.scale() * queries.float() @ items.float().T
        return logits if self.logit_bias is None else logits + self.logit_bias.float()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep a softmax's multiplier in its range (CLIP's is 1..100); to be called after each optimizer step.

        SigLIP's is free: its published one is about 117, which fine-tuning must not cut.
        """
        if self.logit_bias is None:
            self.logit_scale.clamp_(*self.logit_scale_range)


def unit(vectors: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Scale rows to length one in fp32, whatever their magnitude.

    A row of zeros has no direction; it becomes the constant unit vector with zero gradient, so that scores stay defined. Rows
    with NaN or infinity become NaN, for the caller to notice.
    """
    vectors = vectors.float()
    peak = vectors.detach().abs().amax(-1, keepdim=True)
    empty = peak == 0
    bounded = torch.where(empty, 1.0, vectors / peak.masked_fill(empty, 1.0))  # squares of huge or tiny entries stay in range
    return bounded / torch.linalg.vector_norm(bounded, dim=-1, keepdim=True)
