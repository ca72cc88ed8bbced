"""What CLIP and CLAP have in common: two towers whose vectors meet in one space, and a loss that couples a whole batch."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mm.fusion.dual_tower import DualTower
from mm.types import Batch, Encoded, Losses, System, TextBatch


class TwoTowers(System):
    """A dual tower, one side of which reads texts. `loss_from` is to be written.

    Args:
        towers: Named as the fields of `mm.types.Batch`.
    """

    modalities: ClassVar[tuple[str, str]]
    """Names of the two towers."""

    def __init__(self, towers: DualTower) -> None:
        super().__init__()
        self.towers = towers

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        """Unit vectors by modality, each ``(B, D)``."""
        return {name: self.towers.embed(name, getattr(batch, name)) for name in self.modalities}

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        """The contrastive loss of the whole batch given its unit vectors."""
        raise NotImplementedError

    def loss(self, batch: Batch, step: int) -> Losses:
        """Training loss of this rank's share of the global batch."""
        return self.loss_from(self.represent(batch), batch, step)

    def after_step(self, step: int) -> None:
        """Clamp the scale."""
        self.towers.clamp_()

    def embed_text(self, text: TextBatch) -> Tensor:
        """Token ids to unit vectors ``(B, D)``, fp32."""
        return self.towers.embed("text", text)

    def read_texts(self, text: TextBatch) -> Encoded:
        """See `mm.types.ReadsTexts`; the vector is that of the shared space, of length one."""
        encoded = self.towers.encoders["text"](text)
        return Encoded(encoded.tokens, encoded.mask, self.towers.project("text", encoded))

    def encoders(self) -> Mapping[str, nn.Module]:
        """The encoders by modality."""
        return dict(self.towers.encoders.items())

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the towers in another floating type, for inference."""
        self.towers.cast_(dtype)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits ``(Q, M)`` of vectors from either tower."""
        return self.towers.scores(queries, items)


def projection(width: int, embed_dim: int, *, bias: bool = False) -> nn.Linear:
    """Into the shared space, as CLIP's: standard deviation ``width ** -0.5``, which keeps the variance of its input."""
    linear = nn.Linear(width, embed_dim, bias=bias)
    nn.init.normal_(linear.weight, std=width**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear
