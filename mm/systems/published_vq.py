"""Published picture tokenizers, held fixed: diffusers' VQModel, VQGANs of taming-transformers, OpenAI's dVAE.

Papers: VQGAN https://arxiv.org/abs/2012.09841, dVAE https://arxiv.org/abs/2102.12092.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor, dtype

from mm.config import TAG_PREFIX
from mm.errors import ConfigError
from mm.systems import vq
from mm.systems.settings import SystemSettings
from mm.systems.vq import Vq, VqConfig
from mm.tokenizers.library_image import (
    LibraryImageTokenizer,
    LibraryImageTokenizerConfig,
    build_library_image_tokenizer,
)
from mm.types import Batch, Losses, System


class PublishedVqConfig(SystemSettings):
    """A published picture tokenizer.

    Args:
        tokenizer: The network, in its publisher's terms.
    """

    name: Literal["published-vq"] = "published-vq"
    tokenizer: LibraryImageTokenizerConfig = Field(discriminator="kind")

    @property
    def picture_side(self) -> int:
        return self.tokenizer.image_size

    @property
    def text_limits(self) -> None:
        return None


class PublishedVq(System):
    """Encodes and decodes with a published network; it is not trained here.

    Args:
        tokenizer: Pictures to ids and back.
    """

    def __init__(self, tokenizer: LibraryImageTokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tokenizer.vocab_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.tokenizer.grid

    def encode(self, image: Tensor) -> Tensor:
        """Pixels uint8 ``(B, 3, H, W)`` to token ids ``(B, N)``."""
        return self.tokenizer.encode(image)

    def decode(self, ids: Tensor) -> Tensor:
        """Token ids ``(B, N)`` to pixels uint8 ``(B, 3, H, W)``."""
        return self.tokenizer.decode(ids)

    def cast_(self, dtype: dtype) -> None:
        """Stays in fp32: in bf16 neighbouring codes merge."""

    def loss(self, batch: Batch, step: int) -> Losses:
        """There is none. Raises `ConfigError`."""
        raise ConfigError("a published tokenizer is held fixed; train one of your own with configs/vq.yaml")


REFERENCE = TAG_PREFIX + "reference"


def _kind(value: Any) -> str:
    """Whether a tokenizer is the name of a model, or which configuration it has; the suite's own where none is said."""
    if isinstance(value, str):
        return REFERENCE
    return str(value.get("name", "vq") if isinstance(value, Mapping) else getattr(value, "name", ""))


TokenizerConfig = Annotated[
    Annotated[str, Tag(REFERENCE)] | Annotated[VqConfig, Tag("vq")] | Annotated[PublishedVqConfig, Tag("published-vq")],
    Discriminator(_kind),
]
"""What systems may stand on that make pictures of tokens: a MODEL, or the configuration of one."""


def build(config: PublishedVqConfig, parts: Mapping[str, Any] | None = None) -> PublishedVq:
    """Build the network with fresh weights, to be filled with the published ones."""
    return PublishedVq(build_library_image_tokenizer(config.tokenizer))


def build_tokenizer(config: str | VqConfig | PublishedVqConfig, parts: Mapping[str, Any] | None = None) -> Vq | PublishedVq:
    """The tokenizer of a system that stands on it: ``parts["tokenizer"]``, or one with fresh weights.

    Raises:
        ConfigError: A mere name without the part, or a part that is no picture tokenizer.
    """
    given = (parts or {}).get("tokenizer")
    if isinstance(given, Vq | PublishedVq):
        return given
    if given is not None:
        raise ConfigError("tokenizer: this model does not turn pictures into tokens; take emoji-vq or a run of configs/vq.yaml")
    if isinstance(config, str):
        raise ConfigError(f"tokenizer: '{config}' names a model; give it as a part, or its configuration in its place")
    return vq.build(config) if isinstance(config, VqConfig) else build(config)
