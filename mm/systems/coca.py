"""CoCa: contrastive captioners. The lower half of a causal language model embeds texts, the upper half also sees the picture.

Paper: https://arxiv.org/abs/2205.01917 (a learned token behind each text, whose lower-half output is the text's vector;
attentional poolers for captioning and, behind them, for the contrastive vector; losses weighted 2 : 1).

Deviations: each text's words are averaged before the texts are; without poolers (``image_queries: 0``) words attend to the
encoder's own tokens, and its own pooled vector is aligned, so that an aligned dual tower gives its picture side whole.

Shapes: B pairs, T positions, N picture tokens, D width of the words, E width of the shared space.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.encoders.image import ImageEncoderConfig, build_image_encoder
from mm.fusion.align_before_fuse import FeatureMap
from mm.fusion.dual_tower import DualTower
from mm.generators.language_model import LanguageModel, LanguageModelConfig, NextWords, build_language_model
from mm.generators.writing import describe
from mm.losses.contrastive import info_nce
from mm.losses.gather import current_gather
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.pooler import AttentionPooler
from mm.systems.settings import SystemSettings
from mm.types import Batch, Decoding, Encoded, Losses, OnTokens, System, TextBatch, Written


class CocaConfig(SystemSettings):
    """A picture encoder and a language model of two halves.

    Args:
        image: The picture encoder.
        feature_map: The tokens are a bare feature map, as of a convolutional encoder: normalise them, project them to the width
            of the words and add trained positions.
        image_queries: Tokens of the pooler that words attend to; 0 for the encoder's own.
        text: The language model; its context is to hold a text and the token behind it.
        text_layers: Lower layers, which see no picture.
        embed_dim: E.
        caption_weight: Of predicting the next word.
        contrastive_weight: Of aligning pictures and texts.
        beginnings: Texts that captions may begin with, by name, as training gave them; the first is the usual one.
        lock: Towers whose encoders keep their weights.
    """

    name: Literal["coca"] = "coca"
    image: ImageEncoderConfig = ImageEncoderConfig()
    feature_map: bool = False
    image_queries: int = Field(default=0, ge=0)
    text: LanguageModelConfig = LanguageModelConfig()
    text_layers: int = Field(default=2, ge=1)
    embed_dim: int = Field(default=256, ge=1)
    caption_weight: float = Field(default=2.0, gt=0)
    contrastive_weight: float = Field(default=1.0, gt=0)
    beginnings: dict[str, str] = Field(default={"caption": ""}, min_length=1)
    lock: tuple[Literal["image"], ...] = ()

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length - 1

    def with_vocabulary(self, size: int) -> "CocaConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})

    @model_validator(mode="after")
    def _possible(self) -> "CocaConfig":
        if self.text_layers >= self.text.layers:
            raise ValueError(f"text_layers {self.text_layers} leave none of {self.text.layers} layers to see the picture")
        if self.image.patch_dropout and self.feature_map:
            raise ValueError("feature_map needs every patch; leave image.patch_dropout out")
        if self.text.sparse_attention is not None:
            raise ValueError("the query behind a text sees all of it; leave text.sparse_attention out")
        return self


class CocaText(nn.Module):
    """The language model as a tower: its lower half, read behind each text.

    Args:
        language: The language model, whose layers from ``lower`` on have cross-attention.
        lower: Number of layers that see words alone.
    """

    def __init__(self, language: LanguageModel, lower: int) -> None:
        super().__init__()
        self.language, self.lower = language, lower
        self.summary = nn.Parameter(torch.empty(language.width))
        self.norm = nn.LayerNorm(language.width)
        nn.init.normal_(self.summary, std=0.02)

    def forward(self, text: TextBatch) -> Encoded:
        """Words ``(B, T, D)`` that have seen no picture; what is pooled is the learned token behind each text."""
        rows = torch.arange(len(text), device=text.ids.device)
        words = torch.cat([self.language.embed(text.ids), self.summary.new_zeros(len(text), 1, self.language.width)], 1)
        words = words.index_put((rows, text.lengths), self.summary.to(words.dtype))
        placed = self.language.embedding.place(words)
        mask = attention_mask(placed.shape[1], causal=True)
        hidden = self.language.transformer(placed, mask=mask, layers=range(self.lower))
        return Encoded(hidden[:, :-1], text.valid(), self.norm(hidden[rows, text.lengths]))

    def upper(self, words: Float[Tensor, "b t d"], seen: Float[Tensor, "b n d"]) -> Float[Tensor, "b t d"]:
        """What the upper half makes of words and the picture tokens they attend to."""
        transformer = self.language.transformer
        mask = attention_mask(words.shape[1], causal=True)
        return transformer(words, seen, mask=mask, layers=range(self.lower, len(transformer.blocks)))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference."""
        self.to(dtype)


class Coca(System):
    """Embeds pictures and texts, and writes what it sees.

    Args:
        towers: The picture encoder and a `CocaText`, with their projections.
        picture_tokens: From the encoder's tokens to what words attend to.
        config: Weights of the losses.
        pooler: Makes the aligned vector of a picture of what words attend to; None for the encoder's own.
    """

    def __init__(
        self, towers: DualTower, picture_tokens: nn.Module, config: CocaConfig, pooler: AttentionPooler | None = None
    ) -> None:
        super().__init__()
        self.towers, self.picture_tokens, self.pooler, self.config = towers, picture_tokens, pooler, config

    @property
    def beginnings(self) -> Mapping[str, str]:
        """See `mm.types.Captions`."""
        return self.config.beginnings

    @property
    def _text(self) -> CocaText:
        return self.towers.encoders["text"]  # pyright: ignore[reportReturnType]

    def look(self, image: Tensor) -> Encoded:
        """Pixels ``(B, 3, H, W)`` to what words attend to; what is pooled is what is aligned, before its projection."""
        encoded = self.towers.encoders["image"](image)
        tokens = self.picture_tokens(encoded.tokens)
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        pooled = encoded.pooled if self.pooler is None else self.pooler(tokens)[:, 0]
        return Encoded(tokens, mask, pooled)

    def embed_image(self, image: Tensor) -> Tensor:
        """Pixels ``(B, 3, H, W)`` to unit vectors ``(B, E)``, fp32."""
        return self.towers.project("image", self.look(image))

    def embed_text(self, text: TextBatch) -> Tensor:
        """Token ids to unit vectors ``(B, E)``, fp32."""
        return self.towers.embed("text", text)

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Contrastive logits ``(Q, M)`` of vectors from either side."""
        return self.towers.scores(queries, items)

    def encoders(self) -> Mapping[str, nn.Module]:
        """The ``image`` and ``text`` encoders."""
        return dict(self.towers.encoders.items())

    def loss(self, batch: Batch, step: int) -> Losses:
        """Weighted mean of both losses in nats, this rank's share of the global batch."""
        assert batch.image is not None
        assert batch.text is not None
        config, seen, words = self.config, self.look(batch.image), self._text(batch.text)
        image, text = self.towers.project("image", seen), self.towers.project("text", words)
        scale, gather = self.towers.scale(), current_gather()
        contrastive = info_nce(image, text, scale, groups=batch.groups, gather=gather)
        found = self._next_words(batch.text, words, seen)
        caption = found.loss(len(batch))
        total = config.caption_weight * caption + config.contrastive_weight * contrastive
        candidates = len(batch) * (1 if gather is None else gather.world_size)
        parts = {"caption": caption, "word_accuracy": found.accuracy(), "contrastive": contrastive, "logit_scale": scale}
        parts["guessing"] = torch.tensor(math.log(candidates), device=scale.device)
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def after_step(self, step: int) -> None:
        """Clamp the temperature."""
        self.towers.clamp_()

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
        return describe(self._text.language, self.look(image).tokens, beginning, decoding, seeds, on_tokens)

    @torch.no_grad()
    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """See `mm.types.Captions`."""
        return self._next_words(text, self._text(text), self.look(image)).log_likelihoods(len(text))

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the encoders and the poolers in another floating type, for inference; projections and scores stay in fp32."""
        self.towers.cast_(dtype)
        for part in (self.picture_tokens, self.pooler):
            if part is not None:
                part.to(dtype)

    def state_from(self, start: System) -> dict[str, Tensor]:
        """An aligned dual tower gives its picture encoder, and where the vector is the encoder's own, its projection, too."""
        towers = getattr(getattr(start, "network", start), "towers", None)
        if isinstance(start, Coca) or not isinstance(towers, DualTower):
            return super().state_from(start)
        given = towers.encoders["image"].state_dict(prefix="towers.encoders.image.")
        if self.pooler is None:
            given |= towers.projections["image"].state_dict(prefix="towers.projections.image.")
        return given

    def _next_words(self, text: TextBatch, words: Encoded, seen: Encoded) -> NextWords:
        hidden = self._text.upper(words.tokens[:, :-1], seen.tokens)
        follows = text.valid()[:, 1:]
        return NextWords(self._text.language.logits(hidden[follows]), text.ids[:, 1:][follows], follows.nonzero()[:, 0])


def build(config: CocaConfig, parts: Mapping[str, Any] | None = None) -> Coca:
    """Build CoCa with fresh weights; ``parts`` may hold a ready ``image`` encoder for the configured one."""
    image = (parts or {}).get("image") or build_image_encoder(config.image)
    width = config.text.width
    tokens = FeatureMap(image.num_tokens, image.token_width, width) if config.feature_map else nn.Identity()
    initialise(tokens)
    tokens_width, pooler = (width if config.feature_map else image.token_width), None
    if config.image_queries:
        tokens = nn.Sequential(tokens, AttentionPooler(config.image_queries, width, tokens_width, config.text.heads))
        pooler = AttentionPooler(1, width, width, config.text.heads)
        tokens_width = width
    language = build_language_model(config.text, context_width=tokens_width, context_from=config.text_layers)
    pooled_width = image.width if pooler is None else width
    projections = nn.Linear(pooled_width, config.embed_dim, bias=False), nn.Linear(width, config.embed_dim, bias=False)
    for projection in projections:  # keeps the variance of its input
        nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
    towers = DualTower(
        {"image": (image, projections[0]), "text": (CocaText(language, config.text_layers), projections[1])}, locked=config.lock
    )
    return Coca(towers, tokens, config, pooler)
