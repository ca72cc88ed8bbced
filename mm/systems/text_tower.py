"""A text encoder alone, such as T5's: what generators are told of a text, and unit vectors of texts. It knows no pictures."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mm.encoders.library import LibraryTextConfig, LibraryTextEncoder, build_library_text_encoder
from mm.errors import ConfigError, UserError
from mm.fusion.dual_tower import unit
from mm.systems.settings import SystemSettings
from mm.types import Batch, Encoded, Losses, System, TextBatch


class TextTowerConfig(SystemSettings):
    """A text encoder.

    Args:
        text: The encoder.
    """

    name: Literal["text-tower"] = "text-tower"
    text: LibraryTextConfig

    @property
    def picture_side(self) -> None:
        return None

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length

    def with_vocabulary(self, size: int) -> "TextTowerConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})


class TextTower(System):
    """Reads texts; scores are cosines.

    Args:
        encoder: Gives the features of the words and the pooled vectors.
    """

    def __init__(self, encoder: LibraryTextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def read_texts(self, text: TextBatch) -> Encoded:
        """See `mm.types.ReadsTexts`."""
        return self.encoder(text)

    def embed_text(self, text: TextBatch) -> Tensor:
        """Token ids to unit vectors ``(B, D)``, fp32."""
        return unit(self.encoder(text).pooled)

    def embed_image(self, image: Tensor) -> Tensor:
        """There is none. Raises `UserError`."""
        raise UserError("a text encoder alone knows no pictures; take a dual tower such as emoji-clip")

    def encoders(self) -> Mapping[str, nn.Module]:
        """The ``text`` encoder."""
        return {"text": self.encoder}

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Cosines ``(Q, M)`` of unit vectors."""
        return queries.float() @ items.float().T

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoder in another floating type, for inference."""
        self.encoder.cast_(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """There is none. Raises `ConfigError`."""
        raise ConfigError("a text encoder alone has no objective here; it is the field text of flow, imagen or dalle2")


def build(config: TextTowerConfig, parts: Mapping[str, Any] | None = None) -> TextTower:
    """Build the encoder with fresh weights."""
    return TextTower(build_library_text_encoder(config.text))
