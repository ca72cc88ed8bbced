"""Language model: predicts the next word of texts; a system of its own, or the part of one that writes about pictures.

Papers: GPT-2 (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf), OPT
https://arxiv.org/abs/2205.01068, LLaMA https://arxiv.org/abs/2302.13971, whose published weights `mm.published.language_models`
reads.

Deviation from all of them, who average over the words of a batch: each text's words are averaged by themselves, then the
texts, so that a batch may be cut into slices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Discriminator, Tag
from torch import Tensor, nn

from mm.config import TAG_PREFIX
from mm.errors import ConfigError, UserError
from mm.generators.language_model import (
    LanguageModel,
    LanguageModelConfig,
    build_language_model,
    continuation_likelihoods,
)
from mm.generators.writing import CompiledSteps, check_decoding, fitted, write
from mm.nn.transformer import Block
from mm.systems.settings import SystemSettings
from mm.types import MEDIUM, Batch, Decoding, Encoded, Interleaved, Losses, OnTokens, System, TextBatch, Written


class LanguageConfig(SystemSettings):
    """A language model.

    Args:
        network: Sizes and parts.
    """

    name: Literal["language-model"] = "language-model"
    network: LanguageModelConfig = LanguageModelConfig()

    @property
    def picture_side(self) -> None:
        return None

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.network.vocab_size, self.network.context_length

    def with_vocabulary(self, size: int) -> "LanguageConfig":
        return self.model_copy(update={"network": self.network.model_copy(update={"vocab_size": size})})


class Language(System):
    """Next-word prediction.

    Args:
        network: Predicts.
        config: What built it.
    """

    def __init__(self, network: LanguageModel, config: LanguageConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self._compiled: CompiledSteps | None = None

    def loss(self, batch: Batch, step: int) -> Losses:
        """Cross-entropy of the next token in nats, the mean over each text's, then over texts.

        The part ``perplexity`` is the exponential of the mean over all tokens of the batch.
        """
        assert batch.text is not None
        found = self.network.next_words(batch.text)
        return Losses(found.loss(len(batch)), {"perplexity": found.perplexity().detach()})

    def compile_decoding(self) -> None:
        """See `mm.types.CompilesDecoding`."""
        self._compiled = CompiledSteps(self.network)

    @torch.no_grad()
    def write(
        self, prompt: Interleaved, decoding: Decoding, seeds: Sequence[int], *, on_tokens: OnTokens | None = None
    ) -> list[Written]:
        """See `mm.types.Writes`. Raises `UserError` for prompts with pictures, and for empty or too long ones."""
        check_decoding(decoding)
        decoding = fitted(decoding, self.network, prompt.text.ids.shape[1])
        logits, state = self.network.prefill(self._vectors(prompt), prompt.text.lengths, decoding.max_tokens)
        model = self._compiled or self.network
        return write(model, logits, state, decoding, seeds, end=decoding.end, on_tokens=on_tokens)

    @torch.no_grad()
    def continuation_likelihoods(self, prompt: Interleaved, candidates: TextBatch) -> Tensor:
        """See `mm.types.Writes`; errors as for `write`."""
        logits, state = self.network.prefill(self._vectors(prompt), prompt.text.lengths, candidates.ids.shape[1])
        return continuation_likelihoods(self.network, logits, state, candidates)

    def read_texts(self, text: TextBatch) -> Encoded:
        """See `mm.types.ReadsTexts`: what the last layer makes of the words; the vector is that of the last one."""
        hidden = self.network(self.network.embed(text.ids))
        last = hidden[torch.arange(len(text), device=hidden.device), (text.lengths - 1).clamp(min=0)]
        return Encoded(hidden, text.valid(), last)

    def _vectors(self, prompt: Interleaved) -> Tensor:
        """Of the words of prompts."""
        text = prompt.text
        if len(prompt.image) or (text.ids == MEDIUM).any():
            raise UserError("this model reads no pictures; leave them out of the prompt, or take a model that does")
        if not text.lengths.all():
            raise UserError("an empty prompt: this model needs a word to go on from")
        return self.network.embed(text.ids)


REFERENCE = TAG_PREFIX + "reference"


def _kind(value: Any) -> str:
    """Whether a language model is the name of a model, or which configuration it has."""
    if isinstance(value, str):
        return REFERENCE
    return str(value.get("name", "language-model") if isinstance(value, Mapping) else getattr(value, "name", ""))


LanguagePart = Annotated[
    Annotated[str, Tag(REFERENCE)] | Annotated[LanguageConfig, Tag("language-model")], Discriminator(_kind)
]
"""The language model that other systems stand on: a MODEL, or the configuration of one."""


def build(config: LanguageConfig, parts: Mapping[str, Any] | None = None) -> Language:
    """Build the network with fresh weights."""
    return Language(build_language_model(config.network), config)


def build_language_part(
    config: str | LanguageConfig,
    parts: Mapping[str, Any] | None = None,
    wrap: Callable[[int, Block], nn.Module] | None = None,
) -> LanguageModel:
    """The network of a system that stands on a language model: that of ``parts["language"]``, or one with fresh weights.

    Args:
        config: Of the field ``language``.
        parts: Trained models.
        wrap: See `build_language_model`. The blocks that it is called with have the part's weights in the end; what it adds
            to them starts fresh.

    Raises:
        ConfigError: A mere name without the part, or a part that is no language model.
    """
    given = (parts or {}).get("language")
    if given is None:
        if isinstance(config, str):
            raise ConfigError(f"language: '{config}' names a model; give it as a part, or its configuration in its place")
        return build_language_model(config.network, wrap)
    if not isinstance(given, Language):
        raise ConfigError("language: this model does not predict words; take a run of configs/language_model.yaml, or GPT-2")
    return given.network if wrap is None else _wrapped(given, wrap)


def _wrapped(given: Language, wrap: Callable[[int, Block], nn.Module]) -> LanguageModel:
    """A network with the weights of another one, and with something around or in its blocks."""
    own: list[Block] = []

    def remembered(layer: int, block: Block) -> nn.Module:
        own.append(block)
        return wrap(layer, block)

    network = build_language_model(given.config.network, remembered)
    for block, trained in zip(own, given.network.transformer.blocks, strict=True):
        unfit = block.load_state_dict(trained.state_dict(), strict=False)  # what was added into a block starts fresh
        assert not unfit.unexpected_keys, "a block is wrapped, or added to, with its layers under their own names"
    others = {name: value for name, value in given.network.state_dict().items() if ".blocks." not in name}
    unfit = network.load_state_dict(others, strict=False)
    assert not unfit.unexpected_keys, "both have the same configuration"
    return network
