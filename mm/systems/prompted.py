"""What generators are told of a text: words and one vector, by an encoder that is trained along or by another model.

Shapes: B texts, T words, D width of a word, E width of the vector.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Tag
from torch import Tensor

from mm.config import TAG_PREFIX
from mm.encoders.text import TextEncoder, TextEncoderConfig, build_text_encoder
from mm.errors import ConfigError
from mm.generators.denoiser import Condition
from mm.nn.freeze import freeze
from mm.systems import clip
from mm.systems.clip import Clip, ClipConfig
from mm.types import TextBatch

REFERENCE, OWN = TAG_PREFIX + "reference", TAG_PREFIX + "own"


def _kind(value: Any) -> str:
    """Whether a text encoder is the name of a model, the configuration of one, or one of the suite's own to train along."""
    if isinstance(value, str):
        return REFERENCE
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return OWN if name is None else str(name)


PromptEncoderConfig = Annotated[
    Annotated[str, Tag(REFERENCE)] | Annotated[TextEncoderConfig, Tag(OWN)] | Annotated[ClipConfig, Tag("clip")],
    Discriminator(_kind),
]
"""A MODEL with a text tower, held fixed, or the configuration of a text encoder that is trained along."""


def text_limits(config: "PromptEncoderConfig") -> tuple[int, int]:
    """Largest vocabulary and longest text in tokens."""
    assert not isinstance(config, str), "known once the model is loaded"
    return (config.vocab_size, config.context_length) if isinstance(config, TextEncoderConfig) else config.text_limits


def with_vocabulary(config: "PromptEncoderConfig", size: int) -> "PromptEncoderConfig":
    """The configuration for a vocabulary of ``size``; a model that is given knows its own."""
    return config.model_copy(update={"vocab_size": size}) if isinstance(config, TextEncoderConfig) else config


class PromptEncoder:
    """Reads texts for a generator. No module itself: its network is the generator's child, saved under the name ``text``.

    Args:
        network: A `TextEncoder`, whose pooled vector counts, or a dual tower, whose text vector counts.
    """

    def __init__(self, network: TextEncoder | Clip) -> None:
        self._network = network

    @property
    def words_width(self) -> int:
        """D."""
        return self._tower.width

    @property
    def vector_width(self) -> int:
        """E."""
        if isinstance(self._network, TextEncoder):
            return self._network.width
        one = torch.ones(1, 2, dtype=torch.int64, device=next(self._network.parameters()).device)
        return self._network.embed_text(TextBatch(one, torch.tensor([2], device=one.device))).shape[1]

    def __call__(self, text: TextBatch) -> Condition:
        """Words and vector; of a model that is held fixed without gradients, and in its own floating type."""
        if isinstance(self._network, TextEncoder):
            encoded = self._network(text)
            return Condition(encoded.tokens, encoded.mask, encoded.pooled)
        with torch.no_grad():
            encoded = self._tower(text)
            return Condition(encoded.tokens, encoded.mask, self._network.towers.project("text", encoded))

    def of_picture(self, image: Tensor) -> Tensor:
        """Vectors ``(B, E)`` of pictures uint8, which may stand in for those of texts; for dual towers only.

        Pictures of another size are brought to the tower's, averaged over areas or interpolated.
        """
        assert isinstance(self._network, Clip), "an encoder that is trained along knows no pictures"
        side = self._network.encoders()["image"].image_size
        if image.shape[-1] != side:
            image = F.interpolate(image.float(), (side, side), mode="area" if image.shape[-1] > side else "bilinear") / 255
        with torch.no_grad():
            return self._network.embed_image(image)

    @property
    def _tower(self) -> Any:
        return self._network if isinstance(self._network, TextEncoder) else self._network.encoders()["text"]


def build_prompt_network(config: "PromptEncoderConfig", parts: Mapping[str, Any] | None) -> TextEncoder | Clip:
    """The network behind a `PromptEncoder`: ``parts["text"]``, held fixed, or one with fresh weights.

    Raises:
        ConfigError: A mere name without the part, or a part that has no text tower.
    """
    given = (parts or {}).get("text")
    if isinstance(given, Clip):
        return freeze(given)
    if given is not None:
        raise ConfigError("text: this model has no text tower of its own; take emoji-clip or a run of configs/clip.yaml")
    if isinstance(config, str):
        raise ConfigError(f"text: '{config}' names a model; give it as a part, or its configuration in its place")
    return build_text_encoder(config) if isinstance(config, TextEncoderConfig) else freeze(clip.build(config))
