"""A captioner: a picture encoder, and a language model whose words attend to the picture's tokens.

Papers: the caption half of BLIP https://arxiv.org/abs/2201.12086 (a decoder with cross-attention in every layer, label
smoothing of 0.1); GIT https://arxiv.org/abs/2205.14100 shows that no more is needed.

Deviations: each text's words are averaged before the texts are; the picture's aligned vector may be one more token
(``embed_dim``), since what a dual tower has learned of names is there; beginnings of captions are predicted like their other
words (BLIP leaves its prompt out), so that the model may choose one by itself.

Shapes: B pictures, N picture tokens, D width of the words.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder, ImageEncoderConfig, build_image_encoder
from mm.fusion.align_before_fuse import FeatureMap
from mm.fusion.dual_tower import DualTower, unit
from mm.generators.language_model import LanguageModel, LanguageModelConfig, build_language_model
from mm.generators.writing import describe
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.systems.settings import SystemSettings
from mm.types import Batch, Decoding, Losses, OnTokens, System, TextBatch, Written


class CaptionerConfig(SystemSettings):
    """A picture encoder and a language model that looks at its tokens.

    Args:
        image: The picture encoder.
        feature_map: The tokens are a bare feature map, as of a convolutional encoder: normalise them, project them to the width
            of the words and add trained positions.
        embed_dim: Width of the picture's vector in a space that it shares with texts, which becomes one more token, so that the
            projection of a dual tower can be taken over; 0 for no such token.
        text: The language model.
        label_smoothing: Share of the target that is spread over all words, in training.
        beginnings: Texts that captions may begin with, by name, as training gave them; the first is the usual one.
        lock: Parts that keep their weights; of a locked ``image`` what stands behind the encoder and its projection is trained.
    """

    name: Literal["captioner"] = "captioner"
    image: ImageEncoderConfig = ImageEncoderConfig()
    feature_map: bool = False
    embed_dim: int = Field(default=0, ge=0)
    text: LanguageModelConfig = LanguageModelConfig()
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    beginnings: dict[str, str] = Field(default={"caption": ""}, min_length=1)
    lock: tuple[Literal["image"], ...] = ()

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length

    def with_vocabulary(self, size: int) -> "CaptionerConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})

    @model_validator(mode="after")
    def _possible(self) -> "CaptionerConfig":
        if self.image.patch_dropout and self.feature_map:
            raise ValueError("feature_map needs every patch; leave image.patch_dropout out")
        return self


class Captioner(System):
    """Writes what it sees.

    Args:
        image: The picture encoder.
        decoder: The language model, each of whose layers attends to the picture.
        config: Which tokens the words see.
    """

    def __init__(self, image: ImageEncoder, decoder: LanguageModel, config: CaptionerConfig) -> None:
        super().__init__()
        self.image, self.decoder, self.config = image, decoder, config
        width = config.text.width
        self.picture_tokens = (
            FeatureMap(image.num_tokens, image.token_width, width)
            if config.feature_map
            else nn.Linear(image.token_width, width)
        )
        self.projection = nn.Linear(image.width, config.embed_dim) if config.embed_dim else None
        self.vector_token = nn.Linear(config.embed_dim, config.text.width) if config.embed_dim else None
        if "image" in config.lock:
            freeze(image)
            if self.projection is not None:
                freeze(self.projection)

    @property
    def beginnings(self) -> Mapping[str, str]:
        """See `mm.types.Captions`."""
        return self.config.beginnings

    def look(self, image: Tensor) -> Float[Tensor, "b n d"]:
        """Pixels ``(B, 3, H, W)`` to what words attend to: the picture's tokens, behind its vector."""
        encoded = self.image(image)
        tokens = self.picture_tokens(encoded.tokens)
        if self.projection is None or self.vector_token is None:
            return tokens
        vector = unit(self.projection(encoded.pooled.to(self.projection.weight.dtype)))
        scaled = vector * self.config.embed_dim**0.5  # components of about one, as those of the other tokens
        return torch.cat([self.vector_token(scaled)[:, None].to(tokens.dtype), tokens], 1)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Cross-entropy of the words of a caption in nats, mean over the captions."""
        assert batch.image is not None
        assert batch.text is not None
        found = self.decoder.next_words(batch.text, self.look(batch.image))
        smoothing = self.config.label_smoothing if self.training else 0.0
        loss = found.loss(len(batch), smoothing=smoothing)
        return Losses(loss, {"caption": loss.detach(), "word_accuracy": found.accuracy()})

    @torch.no_grad()
    def caption(
        self,
        image: Tensor,
        beginning: TextBatch,
        decoding: Decoding,
        seeds: Sequence[int],
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Written]:
        """See `mm.types.Captions`."""
        return describe(self.decoder, self.look(image), beginning, decoding, seeds, on_tokens)

    @torch.no_grad()
    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """See `mm.types.Captions`."""
        return self.decoder.next_words(text, self.look(image)).log_likelihoods(len(text))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference; the projection into the shared space stays in fp32."""
        for part in (self.decoder, self.picture_tokens):
            part.to(dtype)
        self.image.cast_(dtype)

    def state_from(self, start: System) -> dict[str, Tensor]:
        """An aligned dual tower gives its picture encoder and projection, an ALBEF what stands before its words, too."""
        network = getattr(start, "network", start)
        towers = getattr(network, "towers", None)
        if not isinstance(towers, DualTower):
            return super().state_from(start)
        given = towers.encoders["image"].state_dict(prefix="image.")
        if self.projection is not None:
            given |= {"projection.bias": torch.zeros_like(self.projection.bias)}
            given |= towers.projections["image"].state_dict(prefix="projection.")
        if self.config.feature_map and isinstance(tokens := getattr(network, "picture_tokens", None), FeatureMap):
            given |= tokens.state_dict(prefix="picture_tokens.")
        return given


def build(config: CaptionerConfig, parts: Mapping[str, Any] | None = None) -> Captioner:
    """Build a captioner with fresh weights; ``parts`` may hold a ready ``image`` encoder for the configured one."""
    image = (parts or {}).get("image") or build_image_encoder(config.image)
    decoder = build_language_model(config.text, context_width=config.text.width)
    captioner = Captioner(image, decoder, config)
    initialise(captioner.picture_tokens)
    return captioner
