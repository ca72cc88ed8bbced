"""Muse: picture tokens are hidden and all predicted at once, with the text at hand; pictures appear in a few parallel steps.

Papers: Muse https://arxiv.org/abs/2301.00704, MaskGIT https://arxiv.org/abs/2202.04200 (the schedule and the decoding),
classifier-free guidance https://arxiv.org/abs/2207.12598 (``caption_dropout``).

Deviations from Muse: one resolution, without a second stage for a finer one; the text encoder may also be small and trained
along (Muse's is a frozen T5-XXL); ``text_fusion: concat`` puts words and picture tokens into one sequence instead of attending
across.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.draws import Draws
from mm.encoders.text import TextEncoderConfig
from mm.generators.masked import generate
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import GridPositions
from mm.nn.ends import end
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.stacked import stacked
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.systems.prompted import PromptEncoder, PromptEncoderConfig, build_prompt_network, text_limits, with_vocabulary
from mm.systems.published_vq import PublishedVq, TokenizerConfig, build_tokenizer
from mm.systems.settings import SystemSettings
from mm.systems.vq import Vq
from mm.tokenizers.image import check_kept, check_token_sampling, kept_tokens
from mm.tokenizers.memory import TokenMemory
from mm.types import Batch, Losses, OnPicture, Sampling, System, TextBatch

HIDDEN_SHARE = 2 / math.pi
"""Of the tokens, on average over the cosine schedule."""


class MuseConfig(SystemSettings):
    """Muse with its picture tokenizer and its text encoder.

    Args:
        tokenizer: A MODEL that turns pictures into tokens, held fixed, or its configuration.
        text: A MODEL with a text tower, held fixed, or the configuration of a text encoder that is trained along.
        text_fusion: Picture tokens attend to the words in layers of their own (``cross``), or share a sequence (``concat``).
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        dropout: Of each block's branches and of the embedding, in training.
        label_smoothing: Share of the target that is spread evenly over all codes.
        caption_dropout: Share of captions that are left out in training.
        remember_tokens: See `mm.systems.dalle.DalleConfig`.
    """

    name: Literal["muse"] = "muse"
    tokenizer: TokenizerConfig = "emoji-vq"
    text: PromptEncoderConfig = TextEncoderConfig(
        width=192, layers=2, context_length=16, vocab_size=2048, causal=False, pooling="mean"
    )
    text_fusion: Literal["cross", "concat"] = "cross"
    width: int = Field(default=192, ge=1)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=6, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    remember_tokens: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.tokenizer, str), "known once the tokenizer is loaded"
        return self.tokenizer.picture_side

    @property
    def text_limits(self) -> tuple[int, int]:
        return text_limits(self.text)

    def with_vocabulary(self, size: int) -> "MuseConfig":
        return self.model_copy(update={"text": with_vocabulary(self.text, size)})

    def parts(self) -> dict[str, str]:
        return {name: part for name in ("tokenizer", "text") if isinstance(part := getattr(self, name), str)}

    @property
    def readers(self) -> frozenset[str]:
        return frozenset({"text"})

    @model_validator(mode="after")
    def _possible(self) -> "MuseConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class Muse(System):
    """A bidirectional transformer over picture tokens, some of them hidden, that knows the words.

    Args:
        tokenizer: Pictures to ids and back; held fixed.
        text: Reads the words; held fixed or trained along.
        transformer: Ends with its own norm; has cross-attention for ``text_fusion: cross``.
        config: Sizes and weights.
    """

    def __init__(self, tokenizer: Vq | PublishedVq, text: Any, transformer: Transformer, config: MuseConfig) -> None:
        super().__init__()
        self.tokenizer = freeze(tokenizer)
        self.text = text
        self._reader = PromptEncoder(text)
        self.transformer = transformer
        self.config = config
        self._encode = TokenMemory(tokenizer.encode, config.remember_tokens) if config.remember_tokens else tokenizer.encode
        self.mask_id, self.num_tokens = tokenizer.vocab_size, tokenizer.grid[0] * tokenizer.grid[1]
        self.tokens = nn.Embedding(tokenizer.vocab_size + 1, config.width)  # the last is the hidden token
        self.positions = GridPositions(*tokenizer.grid, config.width)
        self.words = nn.Linear(self._reader.words_width, config.width)
        self.no_words = nn.Parameter(torch.zeros(config.width))
        self.dropout = nn.Dropout(config.dropout)
        self.head = end(nn.Linear(config.width, tokenizer.vocab_size))

    @property
    def only_for_training(self) -> tuple[str, ...]:
        """See `mm.types.System`."""
        return tuple(f"text.{name}" for name in self.text.only_for_training) if isinstance(self.text, System) else ()

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold all but the tokenizer in another floating type, for inference."""
        for name, part in self.named_children():
            if isinstance(part, System):
                part.cast_(dtype)
            elif name != "tokenizer":
                part.to(dtype)
        self.no_words.data = self.no_words.data.to(dtype)

    def loss(self, batch: Batch, step: int) -> Losses:
        """Cross-entropy of the hidden tokens, in nats; the share of hidden ones is drawn for each picture.

        The sum is divided by the number of tokens that is hidden on average, the same for every slice of a batch.
        """
        assert batch.image is not None
        assert batch.text is not None
        ids = self._encode(batch.image)
        draws = batch.draws(ids.device)
        hidden = hide(ids, draws)
        words, known = self.context(batch.text)
        if self.training and self.config.caption_dropout:
            dropped = draws.uniform() < self.config.caption_dropout
            words, known = self._without_words(words, known, dropped)
        logits = self.predict(ids.masked_fill(hidden, self.mask_id), words, known)[hidden]
        losses = F.cross_entropy(logits.float(), ids[hidden], label_smoothing=self.config.label_smoothing, reduction="none")
        loss = losses.sum() / (HIDDEN_SHARE * ids.numel())
        correct = (logits.argmax(-1) == ids[hidden]).float().mean()
        return Losses(loss, {"image": losses.detach().mean(), "token_accuracy": correct.detach()})

    def context(self, text: TextBatch) -> tuple[Tensor, Tensor]:
        """Word features ``(B, T, D)`` and which of them are there ``(B, T)``."""
        read = self._reader(text)
        return self.words(read.words.to(self.words.weight.dtype)), read.known

    def predict(self, ids: Tensor, words: Tensor, known: Tensor) -> Tensor:
        """Logits ``(B, N, K)`` of every picture token.

        Args:
            ids: Picture ids with `mask_id` where they are hidden, ``(B, N)``.
            words: Word features, ``(B, T, D)``.
            known: Which of them are there, ``(B, T)``.
        """
        x = self.dropout(self.tokens(ids) + self.positions())
        if self.config.text_fusion == "cross":
            mask = attention_mask(x.shape[1], known.shape[1], keys=known)
            return self.head(self.transformer(x, words.to(x.dtype), context_mask=mask))
        keys = torch.cat([known, known.new_ones(ids.shape)], 1)
        whole = torch.cat([words.to(x.dtype), x], 1)
        hidden = self.transformer(whole, mask=attention_mask(whole.shape[1], keys=keys))
        return self.head(hidden[:, words.shape[1] :])

    @torch.no_grad()
    def paint(
        self,
        text: TextBatch,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        image: Tensor | None = None,
        keep: Tensor | None = None,
        on_picture: OnPicture | None = None,
        negative: TextBatch | None = None,
    ) -> Tensor:
        """See `mm.types.Paints`. Any part of ``image`` may be kept: in- and out-painting."""
        check_kept(image, keep)
        check_token_sampling(sampling)
        ids = torch.full((len(text), self.num_tokens), self.mask_id, device=text.ids.device)
        if image is not None and keep is not None:
            ids = torch.where(kept_tokens(keep, self.tokenizer.grid), self.tokenizer.encode(image), ids)
        words, known = self.context(text)
        nothing = (
            self._without_words(words, known, torch.ones_like(known[:, 0])) if negative is None else self.context(negative)
        )
        both = stacked(words, nothing[0]), stacked(known, nothing[1])

        def predict(ids: Tensor) -> Tensor:
            return self.predict(ids, *(part[: len(ids)] for part in both))

        def show(guess: Tensor, _: Tensor, progress: float) -> None:
            if on_picture is not None:
                on_picture(self.tokenizer.decode(guess), progress)

        drawn = generate(predict, ids, seeds, sampling, mask_id=self.mask_id, on_tokens=show)
        return self.tokenizer.decode(drawn)

    def _without_words(self, words: Tensor, known: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
        """In the rows that are dropped, one learned vector takes the place of the words."""
        first = torch.zeros_like(known)
        first[:, 0] = True
        words = torch.where(dropped[:, None, None], self.no_words.to(words.dtype), words)
        return words, torch.where(dropped[:, None], first, known)


def hide(ids: Tensor, draws: Draws | None = None) -> Tensor:
    """Which tokens to hide: a share of ``cos(pi u / 2)``, u uniform in 0..1, of each row, at least one; ``(B, N)`` bool."""
    draws = draws or Draws(None, len(ids), ids.device)
    share = torch.cos(draws.uniform(1) * math.pi / 2)
    count = (share * ids.shape[1]).ceil().clamp(min=1)
    order = draws.uniform(ids.shape[1]).argsort(1).argsort(1)
    return order < count


def build(config: MuseConfig, parts: Mapping[str, Any] | None = None) -> Muse:
    """Build Muse with fresh weights; ``parts`` may hold a trained ``tokenizer``, and a system that reads texts as ``text``."""
    tokenizer = build_tokenizer(config.tokenizer, parts)

    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(config.width, config.heads),
            cross_attention=MultiHeadAttention(config.width, config.heads, context_width=config.width)
            if config.text_fusion == "cross"
            else None,
            feed_forward=FeedForward(config.width, int(config.width * config.mlp_ratio), nn.GELU()),
            norm=functools.partial(nn.LayerNorm, config.width),
            dropout=config.dropout,
        )

    transformer = Transformer(make_block, config.layers, final_norm=nn.LayerNorm(config.width))
    muse = Muse(tokenizer, build_prompt_network(config.text, parts), transformer, config)
    initialise(muse.transformer)
    initialise(muse.positions)
    nn.init.normal_(muse.tokens.weight, std=0.02)
    nn.init.normal_(muse.head.weight, std=0.02)
    return muse
