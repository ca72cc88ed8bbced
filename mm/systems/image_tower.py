"""A picture encoder alone: unit vectors for search by picture, nearest neighbours and linear probes. It knows no text."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder, ImageEncoderConfig, build_image_encoder
from mm.errors import ConfigError, UserError
from mm.fusion.dual_tower import unit
from mm.systems.settings import SystemSettings
from mm.types import Batch, Losses, System, TextBatch


class ImageTowerConfig(SystemSettings):
    """A picture encoder.

    Args:
        image: The encoder.
    """

    name: Literal["image-tower"] = "image-tower"
    image: ImageEncoderConfig = ImageEncoderConfig()

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> None:
        return None


class ImageTower(System):
    """Embeds pictures; scores are cosines.

    Args:
        encoder: Gives the pooled vectors.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def embed_image(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` to unit vectors ``(B, D)``, fp32."""
        return unit(self.encoder(image).pooled)

    def embed_text(self, text: TextBatch) -> Tensor:
        """There is none. Raises `UserError`."""
        raise UserError(
            "a picture encoder alone knows no text; take a dual tower, or examples instead of names (mm eval probe)"
        )

    def encoders(self) -> Mapping[str, nn.Module]:
        """The ``image`` encoder."""
        return {"image": self.encoder}

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Cosines ``(Q, M)`` of unit vectors."""
        return queries.float() @ items.float().T

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoder in another floating type, for inference."""
        self.encoder.cast_(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """There is none. Raises `ConfigError`."""
        raise ConfigError("a picture encoder alone has no objective here; train it as a tower of system: {name: clip}")


def build(config: ImageTowerConfig, parts: Mapping[str, Any] | None = None) -> ImageTower:
    """Build the encoder with fresh weights."""
    return ImageTower(build_image_encoder(config.image))
