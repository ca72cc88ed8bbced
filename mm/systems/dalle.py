"""DALL-E: words and picture tokens in one sequence, one causal transformer, the next token predicted.

Papers: DALL-E https://arxiv.org/abs/2102.12092 (texts of a fixed length whose padding has a token of its own at every position;
row, column and convolutional attention with ``sparse_attention``; text and picture losses weighted 1 : 7), CogView
https://arxiv.org/abs/2105.13290 (``norm: sandwich``, ``image_loss_weight: 1``), classifier-free guidance
https://arxiv.org/abs/2207.12598 (``caption_dropout``).

Deviations from DALL-E: the tokenizer is whatever ``tokenizer`` names, by default with finite scalar quantization; attention is
dense by default, which for a few hundred tokens is faster; padding is not predicted; a dropped caption is all padding, so that
guidance is trained and needs no second network; words and picture tokens are averaged apart before they are weighted, each
sample's by itself, so that a batch may be cut into slices (CogView averages over all tokens). CogView's PB-relax is what
torch's fused attention does anyway: the maximum is subtracted and sums are in fp32.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import UserError
from mm.fusion.single_tower import SingleTower
from mm.generators.autoregressive import Compiled, stream
from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import GridPositions, LearnedPositions
from mm.nn.ends import end
from mm.nn.experts import ExpertsConfig, feed_forward, refuse_hash
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.nn.linear import Linear
from mm.nn.masks import Pattern, Raster, SparseAttentionConfig, dalle_layer_pattern, patterns_of
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.systems.published_vq import PublishedVq, TokenizerConfig, build_tokenizer
from mm.systems.settings import SystemSettings
from mm.systems.vq import Vq
from mm.tokenizers.image import check_kept, check_token_sampling, kept_tokens
from mm.tokenizers.memory import TokenMemory
from mm.types import Batch, Losses, OnPicture, Sampling, System, TextBatch


class PromptConfig(StrictConfig):
    """The texts that a generator takes.

    Args:
        vocab_size: Number of token ids; at least that of the text tokenizer.
        context_length: Longest text in tokens, start and end included.
    """

    vocab_size: int = Field(default=2048, ge=3)
    context_length: int = Field(default=16, ge=3)


class DalleConfig(SystemSettings):
    """DALL-E with its picture tokenizer.

    Args:
        tokenizer: A MODEL that turns pictures into tokens, held fixed, or its configuration.
        text: Vocabulary and length of the texts.
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        norm: Norms before each branch (``pre``), or before and after it (``sandwich``).
        sparse_attention: DALL-E's row, column and convolutional attention instead of dense attention (true), or another kind
            over words and picture tokens alike.
        experts: Feed-forward layers of several experts, with learned routing (https://arxiv.org/abs/2101.03961).
        dropout: Of each block's branches, in training.
        text_loss_weight: Of predicting the next word, relative to ``image_loss_weight``.
        image_loss_weight: Of predicting the next picture token.
        caption_dropout: Share of captions that are left out in training.
        remember_tokens: Number of pictures whose tokens are kept in memory, for data that is not changed at random: then the
            tokenizer's work is done in the first epoch.
    """

    name: Literal["dalle"] = "dalle"
    tokenizer: TokenizerConfig = "emoji-vq"
    text: PromptConfig = PromptConfig()
    width: int = Field(default=192, ge=1)
    layers: int = Field(default=8, ge=1)
    heads: int = Field(default=6, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    norm: Literal["pre", "sandwich"] = "pre"
    sparse_attention: bool | SparseAttentionConfig = False
    experts: ExpertsConfig | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    text_loss_weight: float = Field(default=1.0, ge=0)
    image_loss_weight: float = Field(default=7.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, lt=1)
    remember_tokens: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        assert not isinstance(self.tokenizer, str), "known once the tokenizer is loaded"
        return self.tokenizer.picture_side

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.text.vocab_size, self.text.context_length

    def with_vocabulary(self, size: int) -> "DalleConfig":
        return self.model_copy(update={"text": self.text.model_copy(update={"vocab_size": size})})

    def parts(self) -> dict[str, str]:
        return {"tokenizer": self.tokenizer} if isinstance(self.tokenizer, str) else {}

    @model_validator(mode="after")
    def _possible(self) -> "DalleConfig":
        refuse_hash(self.experts)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        return self


class Dalle(System):
    """A causal transformer over the T positions of a text followed by the N tokens of a picture.

    Args:
        tokenizer: Pictures to ids and back; held fixed.
        tower: Joins ``text`` and ``image``, causal.
        config: Sizes and weights.
    """

    def __init__(self, tokenizer: Vq | PublishedVq, tower: SingleTower, config: DalleConfig) -> None:
        super().__init__()
        self.tokenizer = freeze(tokenizer)
        self.tower = tower
        self.config = config
        self._encode = TokenMemory(tokenizer.encode, config.remember_tokens) if config.remember_tokens else tokenizer.encode
        self._compiled: Compiled | None = None
        self.num_text, self.num_words = config.text.context_length, config.text.vocab_size
        rows, columns = tokenizer.grid
        self.num_image = rows * columns
        self.text_tokens = nn.Embedding(
            self.num_words + self.num_text, config.width
        )  # words, then the padding of each position
        self.image_tokens = nn.Embedding(tokenizer.vocab_size, config.width)
        self.text_head = end(Linear(config.width, self.num_words))
        self.image_head = end(Linear(config.width, tokenizer.vocab_size))

    def compile_decoding(self) -> None:
        """See `mm.types.CompilesDecoding`."""
        self._compiled = Compiled(self)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold all but the tokenizer in another floating type, for inference."""
        for name, part in self.named_children():
            if name != "tokenizer":
                part.to(dtype)

    def forward_logits(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of every next token of complete sequences.

        Args:
            text: Ids with padding as `prompt` gives them, ``(B, T)``.
            image: Picture ids, ``(B, N)``.

        Returns:
            Logits of the words 1..T-1, ``(B, T - 1, V)``, and of the picture tokens, ``(B, N, K)``.
        """
        hidden = self.tower({"text": self.text_tokens(text), "image": self.image_tokens(image[:, :-1])}).tokens
        return self.text_head(hidden[:, : self.num_text - 1]), self.image_head(hidden[:, self.num_text - 1 :])

    def loss(self, batch: Batch, step: int) -> Losses:
        """Weighted mean of the cross-entropy of the next word (0 where the caption is left out) and picture token, in nats."""
        assert batch.image is not None
        assert batch.text is not None
        ids = self._encode(batch.image)
        lengths = batch.text.lengths
        if self.training and self.config.caption_dropout:
            lengths = lengths.masked_fill(batch.draws(lengths.device).uniform() < self.config.caption_dropout, 0)
        text = self.prompt(TextBatch(batch.text.ids, lengths))
        text_logits, image_logits = self.forward_logits(text, ids)
        words = text[:, 1:].masked_fill(text[:, 1:] >= self.num_words, -100)
        image_loss = F.cross_entropy(image_logits.float().flatten(0, 1), ids.flatten())
        word_losses = F.cross_entropy(text_logits.float().transpose(1, 2), words, ignore_index=-100, reduction="none")
        text_loss = (word_losses.sum(1) / (words >= 0).sum(1).clamp(min=1)).mean()
        weights = self.config.text_loss_weight, self.config.image_loss_weight
        total = (weights[0] * text_loss + weights[1] * image_loss) / sum(weights)
        return Losses(total, {"image": image_loss.detach(), "text": text_loss.detach()})

    def prompt(self, text: TextBatch) -> Tensor:
        """Ids ``(B, T)`` in which what is behind a text is the padding of its position. Raises `UserError` for longer texts."""
        length = text.ids.shape[1]
        if length > self.num_text:
            raise UserError(f"text of {length} tokens where the model takes {self.num_text}; shorten it")
        positions = torch.arange(self.num_text, device=text.ids.device)
        ids = F.pad(text.ids, (0, self.num_text - length))
        return torch.where(positions < text.lengths[:, None], ids, self.num_words + positions)

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
        """See `mm.types.Paints`. Tokens are made from the top left on, so the kept part of ``image`` must be its upper rows."""
        check_kept(image, keep)
        check_token_sampling(sampling)
        prompt = self.prompt(text)
        nothing = self.prompt(TextBatch(text.ids, torch.zeros_like(text.lengths)) if negative is None else negative)
        prefix = None if image is None or keep is None else self._kept(image, keep)
        every = self.num_image if on_picture is None else self.tokenizer.grid[1]
        ids = prompt[:, :0]
        for ids in stream(
            self._compiled or self, prompt, seeds, sampling, self.num_image, unconditional=nothing, prefix=prefix, every=every
        ):
            if on_picture is not None:
                on_picture(self.decode_partial(ids), ids.shape[1] / self.num_image)
        return self.tokenizer.decode(ids)

    @torch.no_grad()
    def picture_likelihoods(self, image: Tensor, text: TextBatch) -> Tensor:
        """See `mm.types.Expects`."""
        ids = self.tokenizer.encode(image)
        logits = self.forward_logits(self.prompt(text), ids)[1].float()
        return -F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(1)

    def decode_partial(self, ids: Tensor) -> Tensor:
        """The picture of its first tokens, ``(B, n)``; what is missing is filled up with the last one."""
        missing = self.num_image - ids.shape[1]
        return self.tokenizer.decode(torch.cat([ids, ids[:, -1:].expand(-1, missing)], 1))

    def prefill(self, prompt: Tensor, prefix: Tensor, num_tokens: int) -> tuple[Tensor, list[KVCache]]:
        """See `mm.generators.autoregressive.NextToken`; a prompt is what `prompt` gives."""
        caches = self.tower.transformer.caches(len(prompt), self.num_text + num_tokens - 1)
        parts = {"text": self.text_tokens(prompt), "image": self.image_tokens(prefix)}
        return self.image_head(self.tower(parts, caches=caches).pooled), caches

    def step(self, ids: Tensor, index: int | Tensor, caches: list[KVCache]) -> Tensor:
        """See `mm.generators.autoregressive.NextToken`."""
        part = {"image": self.image_tokens(ids[:, None])}
        position = self.num_text + index if isinstance(index, Tensor) else None
        return self.image_head(self.tower(part, starts={"image": index}, caches=caches, position=position).pooled)

    def _kept(self, image: Tensor, keep: Tensor) -> Tensor:
        """The first tokens of pictures, as far as all their pixels are kept. Raises `UserError` for parts further below."""
        kept = kept_tokens(keep, self.tokenizer.grid)
        number = int(kept[0].sum())
        if not number or not kept[:, :number].all() or kept[:, number:].any():
            raise UserError(
                "pictures are made from the top left on; keep their top, or take a model that fills in (emoji-muse)"
            )
        return self.tokenizer.encode(image)[:, :number]


def _patterns(config: DalleConfig, columns: int) -> Sequence[Pattern | None]:
    sparse = config.sparse_attention
    if isinstance(sparse, SparseAttentionConfig):
        return patterns_of(sparse, config.layers)
    layers, num_text = range(config.layers), config.text.context_length
    return [Raster(dalle_layer_pattern(layer, len(layers)), num_text, columns) for layer in layers] if sparse else (None,)


def build(config: DalleConfig, parts: Mapping[str, Any] | None = None) -> Dalle:
    """Build DALL-E with fresh weights; ``parts["tokenizer"]`` may hold a trained tokenizer."""
    tokenizer = build_tokenizer(config.tokenizer, parts)

    def make_feed_forward() -> FeedForward:
        return FeedForward(config.width, int(config.width * config.mlp_ratio), nn.GELU())

    def make_block(layer: int) -> Block:
        return Block(
            attention=MultiHeadAttention(config.width, config.heads),
            feed_forward=feed_forward(make_feed_forward, config.width, config.experts, layer),
            norm=functools.partial(nn.LayerNorm, config.width),
            norm_place=config.norm,
            dropout=config.dropout,
        )

    num_text, (rows, columns) = config.text.context_length, tokenizer.grid
    tower = SingleTower(
        Transformer(make_block, config.layers, final_norm=nn.LayerNorm(config.width)),
        {"text": LearnedPositions(num_text, config.width), "image": GridPositions(rows, columns, config.width)},
        config.width,
        causal=True,
        patterns=_patterns(config, columns),
    )
    initialise(tower)
    dalle = Dalle(tokenizer, tower, config)
    for layer in (dalle.text_tokens, dalle.image_tokens, dalle.text_head, dalle.image_head):
        nn.init.normal_(layer.weight, std=0.02)
    return dalle
