"""Towers that are a published library's own module: for checkpoints that the suite's encoders cannot hold exactly.

Everything that builds a tower is in its configuration: no registry, no network, no code from a checkpoint.
Shapes: B batch, N tokens, T text positions, D width.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.encoders.library_towers import (
    image_features,
    open_clip_image_tower,
    open_clip_text_tower,
    takes_any_length,
    text_features,
    transformers_tower,
)
from mm.errors import UserError
from mm.types import Encoded, TextBatch

Library = Literal["open_clip", "transformers"]

TOWER_FAILURES = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    ImportError,
)
"""What the libraries raise for sizes and options that a tower cannot have."""


class LibraryImageConfig(StrictConfig):
    """A picture tower of another library, up to the shared space.

    Args:
        library: Whose module it is.
        architecture: ``vision`` for open_clip, the model class for transformers, e.g. "AltCLIPModel".
        config: For open_clip ``embed_dim``, ``quick_gelu`` and ``vision_cfg`` of its model configurations; for transformers
            ``model``, the content of a ``config.json``.
        image_size: Side of the square picture in pixels.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
    """

    library: Library
    architecture: str
    config: dict[str, JsonValue]
    image_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @model_validator(mode="after")
    def _possible(self) -> "LibraryImageConfig":
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self


class LibraryTextConfig(StrictConfig):
    """A text tower of another library, up to the shared space.

    Args:
        library: Whose module it is.
        architecture: ``text`` for open_clip, the model class for transformers.
        config: For open_clip ``embed_dim``, ``quick_gelu``, ``text_cfg`` of its model configurations, ``pad_id``, and
            ``hf_config``, the content of the ``config.json`` of a text model of transformers where ``text_cfg`` names one; for
            transformers ``model``, the content of a ``config.json``, ``pad_id``, and ``attend_padding``: true where padding is
            attended to like words and every text is filled up to the context.
        context_length: Longest text in tokens, start and end included.
        vocab_size: Number of token ids.
    """

    library: Library
    architecture: str
    config: dict[str, JsonValue]
    context_length: int = Field(ge=3)
    vocab_size: int = Field(ge=3)


class LibraryImageEncoder(nn.Module):
    """Normalises pixels and runs a library's picture tower.

    Args:
        tower: The library's module.
        library: Whose it is.
        width: D of the pooled vector, which is in the shared space.
        image_size: Side of the pictures it accepts, pixels.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        tower: nn.Module,
        *,
        library: Library,
        width: int,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> None:
        super().__init__()
        self.tower: Any = tower
        self.library = library
        self.width = width
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the tower in another floating type, for inference; pixels are still normalised in fp32."""
        self.tower.to(dtype)

    def forward(self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]) -> Encoded:
        """Encode pictures, uint8 in 0..255 or float in 0..1. Raises `UserError` for pictures of another size.

        The tokens are the tower's own, of its inner width; where it gives none away, the pooled vector is the only one.
        """
        if image.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise UserError(
                f"image encoder: pictures of shape {tuple(image.shape[1:])} where (3, {size}, {size}) is expected; "
                "prepare them with the model's processor"
            )
        white = 1.0 if image.is_floating_point() else 255.0
        pixels = (image.to(self.mean.dtype) - self.mean * white) / (self.std * white)
        pixels = pixels.to(next(self.tower.parameters()).dtype, memory_format=torch.channels_last)
        pooled, tokens = _separate(self.tower(pixels)) if self.library == "open_clip" else image_features(self.tower, pixels)
        tokens = pooled[:, None] if tokens is None else tokens
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled)


class LibraryTextEncoder(nn.Module):
    """Runs a library's text tower.

    Args:
        tower: The library's module.
        library: Whose it is.
        width: D of the pooled vector, which is in the shared space.
        context_length: Longest text that is accepted.
        pad_id: What the tower expects behind a text.
        fill: Whether every text is filled up to the context length.
        attend_padding: Whether the tower attends to padding like words.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        library: Library,
        width: int,
        context_length: int,
        pad_id: int,
        fill: bool,
        attend_padding: bool,
    ) -> None:
        super().__init__()
        self.tower: Any = tower
        self.library = library
        self.width = width
        self.context_length = context_length
        self.pad_id = pad_id
        self.fill = fill
        self.attend_padding = attend_padding

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the tower in another floating type, for inference."""
        self.tower.to(dtype)

    def forward(self, text: TextBatch) -> Encoded:
        """Encode texts. Raises `UserError` if they are longer than ``context_length``.

        Tokens behind the end of a text are arbitrary; the mask leaves them out, unless the tower attends to its padding.
        """
        length = text.ids.shape[1]
        if length > self.context_length:
            raise UserError(
                f"text encoder: {length} tokens do not fit its context of {self.context_length}; "
                f"tokenize with context_length={self.context_length}"
            )
        room = self.context_length - length if self.fill else 0
        positions = torch.arange(length + room, device=text.ids.device)
        valid = positions < text.lengths[:, None]
        ids = F.pad(text.ids, (0, room)).where(valid, self.pad_id)
        if self.library == "open_clip":
            pooled, tokens = _separate(self.tower(ids))
        else:
            pooled, tokens = text_features(self.tower, ids, None if self.attend_padding else valid)
        if tokens is None or tokens.shape[1] != valid.shape[1]:
            return Encoded(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool, device=pooled.device), pooled)
        return Encoded(tokens, torch.ones_like(valid) if self.attend_padding else valid, pooled)


def build_library_image_encoder(config: LibraryImageConfig) -> LibraryImageEncoder:
    """A picture tower with fresh weights. Raises `UserError` where the library cannot build it."""
    try:
        if config.library == "open_clip":
            tower, width = open_clip_image_tower(config.config)
        else:
            tower, width = transformers_tower(config.architecture, config.config, "image")
    except TOWER_FAILURES as error:
        raise _unbuildable("image", config.library, config.architecture, error) from None
    return LibraryImageEncoder(
        tower, library=config.library, width=width, image_size=config.image_size, mean=config.mean, std=config.std
    )


def build_library_text_encoder(config: LibraryTextConfig) -> LibraryTextEncoder:
    """A text tower with fresh weights. Raises `UserError` where the library cannot build it."""
    try:
        if config.library == "open_clip":
            tower, width = open_clip_text_tower(config.config)
            attend_padding, fill = False, not takes_any_length(config.config)
        else:
            tower, width = transformers_tower(config.architecture, config.config, "text")
            attend_padding = fill = bool(config.config.get("attend_padding", False))
        pad_id = int(cast(int, config.config.get("pad_id", 0)))
    except TOWER_FAILURES as error:
        raise _unbuildable("text", config.library, config.architecture, error) from None
    return LibraryTextEncoder(
        tower,
        library=config.library,
        width=width,
        context_length=config.context_length,
        pad_id=pad_id,
        fill=fill,
        attend_padding=attend_padding,
    )


def _unbuildable(kind: str, library: str, architecture: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return UserError(f"{kind} tower '{architecture}' of {library} cannot be built: {reason}; correct its config")


def _separate(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """open_clip's towers return the pooled vector, or it and the tokens."""
    return (output, None) if isinstance(output, Tensor) else (output[0], output[1])
