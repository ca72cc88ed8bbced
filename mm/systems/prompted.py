"""What generators are told of a text: words and one vector, by an encoder that is trained along or by another model.

Shapes: B texts, T words, D width of a word, E width of the vector.
"""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from mm.config import TAG_PREFIX
from mm.encoders.text import TextEncoder, TextEncoderConfig, build_text_encoder
from mm.errors import ConfigError
from mm.generators.denoiser import Condition
from mm.nn.freeze import freeze
from mm.systems import clip, language_model, text_tower
from mm.systems.clip import ClipConfig
from mm.systems.language_model import LanguageConfig
from mm.systems.text_tower import TextTowerConfig
from mm.types import Embeds, ReadsTexts, TextBatch

MODULES = {"clip": clip, "language-model": language_model, "text-tower": text_tower}
"""Name to the file that composes a system which may be given by its configuration."""

REFERENCE, OWN = TAG_PREFIX + "reference", TAG_PREFIX + "own"


def _kind(value: Any) -> str:
    """Whether a text encoder is the name of a model, the configuration of one, or one of the suite's own to train along."""
    if isinstance(value, str):
        return REFERENCE
    name = value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)
    return OWN if name is None else str(name)


PromptEncoderConfig = Annotated[
    Annotated[str, Tag(REFERENCE)]
    | Annotated[TextEncoderConfig, Tag(OWN)]
    | Annotated[ClipConfig, Tag("clip")]
    | Annotated[LanguageConfig, Tag("language-model")]
    | Annotated[TextTowerConfig, Tag("text-tower")],
    Discriminator(_kind),
]
"""A MODEL that reads texts (`mm.types.ReadsTexts`: a dual tower, a language model, T5), held fixed, or the configuration of a
text encoder that is trained along."""


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
        network: A `TextEncoder`, or a system that reads texts.
    """

    def __init__(self, network: TextEncoder | ReadsTexts) -> None:
        self._network = network
        self.words_width, self.vector_width = _widths(network)  # D and E

    @property
    def knows_pictures(self) -> bool:
        """Whether pictures have vectors in the space of the texts', see `of_picture`."""
        return isinstance(self._network, Embeds) and "image" in self._network.encoders()

    def __call__(self, text: TextBatch) -> Condition:
        """Words and vector; of a model that is held fixed without gradients, and in its own floating type."""
        if isinstance(self._network, TextEncoder):
            encoded = self._network(text)
        else:
            with torch.no_grad():
                encoded = self._network.read_texts(text)
        return Condition(encoded.tokens, encoded.mask, encoded.pooled)

    def of_picture(self, image: Tensor) -> Tensor:
        """Vectors ``(B, E)`` of pictures uint8, which may stand in for those of texts, where the network `knows_pictures`.

        Pictures of another size are brought to the tower's, averaged over areas or interpolated.
        """
        assert isinstance(self._network, Embeds), "asked for where there is a picture tower"
        side: Any = self._network.encoders()["image"].image_size
        if image.shape[-1] != side:
            image = F.interpolate(image.float(), (side, side), mode="area" if image.shape[-1] > side else "bilinear") / 255
        with torch.no_grad():
            return self._network.embed_image(image)


def _widths(network: TextEncoder | ReadsTexts) -> tuple[int, int]:
    """Of a word's features and of a text's vector."""
    if isinstance(network, TextEncoder):
        return network.width, network.width
    assert isinstance(network, nn.Module)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=next(network.parameters()).device)
    with torch.no_grad():
        read = network.read_texts(TextBatch(ids, torch.tensor([2], device=ids.device)))
    return read.tokens.shape[-1], read.pooled.shape[-1]


def build_prompt_network(config: "PromptEncoderConfig", parts: Mapping[str, Any] | None) -> Any:
    """The network behind a `PromptEncoder`: ``parts["text"]``, held fixed, or one with fresh weights.

    Raises:
        ConfigError: A mere name without the part, or a part that has no text tower.
    """
    given = (parts or {}).get("text")
    if isinstance(given, ReadsTexts):
        assert isinstance(given, nn.Module)
        return freeze(given)
    if given is not None:
        raise ConfigError(
            "text: this model has no text tower of its own; take emoji-clip, T5, a language model or a run of configs/clip.yaml"
        )
    if isinstance(config, str):
        raise ConfigError(f"text: '{config}' names a model; give it as a part, or its configuration in its place")
    if isinstance(config, TextEncoderConfig):
        return build_text_encoder(config)
    return freeze(MODULES[config.name].build(config.for_inference()))  # pyright: ignore[reportArgumentType] - each builds its own
