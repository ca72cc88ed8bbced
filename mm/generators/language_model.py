"""A language model: a causal transformer over words, and whatever other vectors stand between them.

It takes vectors, not only ids, so that pictures may stand among the words (Frozen), and a context for blocks that attend to
one (Flamingo, captioners). Texts of unequal lengths are decoded together: they end in the same column of the caches, and what
stands before a shorter one is hidden.

Papers: GPT-2 (learned positions, norms before the branches), OPT https://arxiv.org/abs/2205.01068 (the same with ReLU), LLaMA
https://arxiv.org/abs/2302.13971 (rotary positions, RMS norms, gated feed-forward).

Shapes: B texts, T positions, S positions of the context, D width, V vocabulary, M words.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn import buckets
from mm.nn.attention import KVCache, MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, Rotary, TokenEmbedding
from mm.nn.ends import end
from mm.nn.experts import ExpertsConfig, feed_forward, refuse_hash
from mm.nn.initialise import initialise
from mm.nn.linear import Linear, linear
from mm.nn.masks import (
    EVERYTHING,
    Mask,
    Pattern,
    SparseAttentionConfig,
    attention_mask,
    layer_masks,
    patterns_of,
)
from mm.nn.norm import RMSNorm
from mm.nn.transformer import Block, FeedForward, GatedFeedForward, Stack, Transformer
from mm.types import Encoded, TextBatch

MAX_CANDIDATE_ROWS = 256
"""Candidates, times prompts, whose likelihoods are computed together."""

Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu"]
ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
}


class RotaryScaling(StrictConfig):
    """LLaMA 3.1's rotary positions for longer texts than it was trained on first (https://arxiv.org/abs/2407.21783).

    Args:
        factor: Wavelengths longer than ``trained_length / low`` become so many times longer.
        low: See above.
        high: Wavelengths shorter than ``trained_length / high`` stay; those between are stretched by less.
        trained_length: Positions of the first training.
    """

    factor: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    trained_length: int = Field(ge=1)

    def __call__(self, frequencies: Tensor) -> Tensor:
        """The frequencies of the stretched wavelengths."""
        turns = self.trained_length * frequencies / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)

    @model_validator(mode="after")
    def _possible(self) -> "RotaryScaling":
        if self.high <= self.low:
            raise ValueError(f"high {self.high} must be above low {self.low}")
        return self


class LanguageModelConfig(StrictConfig):
    """Sizes and parts of a language model.

    Args:
        vocab_size: V, at least that of the tokenizer.
        context_length: Longest sequence in positions, pictures included.
        width: D.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        kv_heads: Heads of keys and values, a divisor of ``heads``; as many if None.
        hidden_width: Of the feed-forward; four times the width if None.
        activation: Of the feed-forward; ``gelu_tanh`` is GPT-2's, ``relu`` OPT's, ``swiglu`` LLaMA's gated one.
        norm: LLaMA's is ``rms``.
        norm_eps: Added to the variance in the norms.
        positions: ``learned`` or ``rotary``; rotary ones are relative, so that pictures may stand where training had none.
        rotary_base: Ratio of the longest to the shortest wavelength of rotary positions.
        rotary_scaling: Stretches long wavelengths of rotary positions.
        bias: Whether the linear layers have a bias; the gated feed-forward has none.
        tied: The vectors that words come in with are those that they are predicted by.
        token_std: Of the components of fresh word vectors; 0.02 is GPT-2's. A small network learns sooner to look words up in
            its context where they are nearly as large as what its blocks add to them, 0.3 for instance.
        dropout: Of each block's branches and of the words, in training.
        sparse_attention: To a part of the words (https://arxiv.org/abs/1904.10509).
        experts: Feed-forward layers of several experts, with learned routing (https://arxiv.org/abs/2101.03961).
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    vocab_size: int = Field(default=4096, ge=3)
    context_length: int = Field(default=128, ge=3)
    width: int = Field(default=256, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int | None = Field(default=None, ge=1)
    hidden_width: int | None = Field(default=None, ge=1)
    activation: Activation = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = Field(default=1e-5, gt=0)
    positions: Literal["learned", "rotary"] = "learned"
    rotary_base: float = Field(default=10_000.0, gt=0)
    rotary_scaling: RotaryScaling | None = None
    bias: bool = True
    tied: bool = True
    token_std: float = Field(default=0.02, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    sparse_attention: SparseAttentionConfig | None = None
    experts: ExpertsConfig | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "LanguageModelConfig":
        refuse_hash(self.experts)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError("rotary positions need heads of an even width")
        return self


@dataclass
class WritingState:
    """What is kept from one step of decoding to the next.

    Attributes:
        caches: Of each layer.
        width: Columns of the caches that the prompts take.
        starts: Column in which each row begins, ``(B,)``; None where all begin in the first one.
        mask: Which columns a row may see, of all that the caches have room for.
        context_mask: Which positions of the context the next words may see.
    """

    caches: list[KVCache]
    width: int
    starts: Int64[Tensor, " b"] | None = None
    mask: Mask = EVERYTHING
    context_mask: Mask = EVERYTHING

    def __getitem__(self, rows: Int64[Tensor, " r"]) -> "WritingState":
        """Some rows, which may be repeated, in memory of their own."""
        return WritingState(
            caches=[cache.select(rows) for cache in self.caches],
            width=self.width,
            starts=None if self.starts is None else self.starts[rows],
            mask=_rows_of(self.mask, rows),
            context_mask=_rows_of(self.context_mask, rows),
        )

    def exchange(self, rows: Int64[Tensor, " b"], num_tokens: int) -> None:
        """Let row i go on from the first ``num_tokens`` words of row ``rows[i]``, which must have the same prompt."""
        written = slice(self.width, self.width + num_tokens)
        for cache in self.caches:
            for part in (cache.keys, cache.values):
                part[:, :, written] = part[rows, :, written]


class NextWords(NamedTuple):
    """Predictions of M words of B texts: their logits, the words themselves, the text that each is of."""

    logits: Float[Tensor, "m v"]
    words: Int64[Tensor, " m"]
    texts: Int64[Tensor, " m"]

    def log_likelihoods(self, num_texts: int) -> Float[Tensor, " b"]:
        """Of each text, in nats, fp32: the sum over its words."""
        each = -F.cross_entropy(self.logits.float(), self.words, reduction="none")
        return each.new_zeros(num_texts).index_add(0, self.texts, each)

    def loss(self, num_texts: int, *, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Cross-entropy in nats, mean over the words of a text, then over the texts, so that a batch may be cut into slices.

        Args:
            num_texts: B.
            smoothing: Share of the target that is spread evenly over the vocabulary.
        """
        each = F.cross_entropy(self.logits.float(), self.words, reduction="none", label_smoothing=smoothing)
        count = torch.bincount(self.texts, minlength=num_texts).clamp(min=1)
        return each.new_zeros(num_texts).index_add(0, self.texts, each).div(count).mean()

    def perplexity(self) -> Float[Tensor, ""]:
        """Exponential of the mean cross-entropy of all words."""
        return F.cross_entropy(self.logits.float(), self.words).exp()

    def accuracy(self) -> Float[Tensor, ""]:
        """Share of the words that were the likeliest ones; 0 where there are none."""
        return (self.logits.argmax(1) == self.words).float().sum() / max(1, len(self.words))


class LanguageModel(nn.Module):
    """Predicts the next word.

    Args:
        embedding: Ids to vectors, and their positions.
        transformer: Causal by the masks that it is given; ends with its own norm.
        head: Vectors to logits, a module or any function; None for the vectors of the words themselves.
        context_length: Longest sequence.
        patterns: Sparse attention, one for each layer or one for all; None is dense.
    """

    def __init__(
        self,
        *,
        embedding: TokenEmbedding,
        transformer: Transformer | Stack,
        head: Callable[[Tensor], Tensor] | None = None,
        context_length: int,
        patterns: Sequence[Pattern | None] = (None,),
    ) -> None:
        super().__init__()
        self.embedding, self.transformer, self.head, self.patterns = embedding, transformer, head, tuple(patterns)
        self.context_length = context_length

    @property
    def width(self) -> int:
        """D."""
        return self.embedding.tokens.embedding_dim

    def embed(self, ids: Int64[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The vectors of words, without positions."""
        return self.embedding.tokens(ids)

    def forward(
        self,
        vectors: Float[Tensor, "b t d"],
        context: Float[Tensor, "b s c"] | None = None,
        *,
        context_mask: Mask = EVERYTHING,
        valid: Bool[Tensor, "b t"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        """What stands for the word behind each position; a padding behind a text changes nothing before it.

        Args:
            vectors: Of words, from `embed`, and of whatever stands between them.
            context: For blocks with cross-attention.
            context_mask: See `Transformer.forward`.
            valid: False for padding, which experts then leave alone; None where there is none, or nobody minds.
        """
        self._check(vectors.shape[1])
        length, device = vectors.shape[1], vectors.device
        mask = layer_masks(self.patterns, lambda pattern: attention_mask(length, causal=True, pattern=pattern, device=device))
        token_ids = None if valid is None else valid.long() - 1
        placed = self.embedding.place(vectors)
        return self.transformer(placed, context, mask=mask, context_mask=context_mask, token_ids=token_ids)

    def logits(self, hidden: Float[Tensor, "*b d"]) -> Float[Tensor, "*b v"]:
        """Of the next word."""
        return linear(hidden, self.embedding.tokens.weight) if self.head is None else self.head(hidden)

    def next_words(self, text: TextBatch, context: Float[Tensor, "b s c"] | None = None) -> "NextWords":
        """Predict every word behind the first of each text, its end included; texts of like length are computed together."""
        inputs, needed = text.ids[:, :-1], text.lengths - 1

        def read(longest: int, ids: Tensor, lengths: Tensor, *seen: Tensor) -> Encoded:
            part = TextBatch(ids[:, :longest], lengths)
            hidden = self(self.embed(part.ids), *seen, valid=part.valid())
            return Encoded(hidden, part.valid(), hidden[:, 0])

        rows = (inputs, needed) if context is None else (inputs, needed, context)
        length = inputs.shape[1]
        several = buckets.pays(len(text), text.ids.device)
        found = buckets.by_length(length, needed, rows, read) if several else read(length, *rows)
        return NextWords(self.logits(found.tokens[found.mask]), text.ids[:, 1:][found.mask], found.mask.nonzero()[:, 0])

    def prefill(
        self,
        vectors: Float[Tensor, "b t d"],
        lengths: Int64[Tensor, " b"],
        num_tokens: int,
        context: Float[Tensor, "b s c"] | None = None,
        *,
        context_mask: Mask = EVERYTHING,
        last_context_mask: Mask | None = None,
    ) -> tuple[Float[Tensor, "b v"], WritingState]:
        """Read prompts, padded on the right, in one pass.

        Args:
            vectors: As in `forward`; what stands behind the length of a row means nothing.
            lengths: Real positions of each row, at least 1.
            num_tokens: Words for which the caches need room behind the prompts.
            context: As in `forward`.
            context_mask: Of the positions of ``vectors``, if the same for all positions or for all rows of equal length.
            last_context_mask: Of the words to come; default: ``context_mask``.

        Returns:
            The logits of the first word behind each prompt, and what later steps need.

        Raises:
            UserError: Prompts and words do not fit the context length.
        """
        rows, length = vectors.shape[:2]
        self._check(length + num_tokens - 1)
        capacity = length + num_tokens - 1
        caches = self.transformer.caches(rows, capacity)
        later = context_mask if last_context_mask is None else last_context_mask
        if bool((lengths == length).all()):
            state = WritingState(caches, length, context_mask=later)
            present, places, placed = None, None, self.embedding.place(vectors)
        else:
            starts = length - lengths
            columns = torch.arange(capacity, device=vectors.device)
            seen = columns >= starts[:, None]
            state = WritingState(caches, length, starts, Mask(seen[:, None, None]), later)
            places = columns[:length] - starts[:, None]  # negative before a text
            vectors = vectors.gather(1, places.clamp(min=0)[..., None].expand_as(vectors))
            present, placed = seen[:, :length], self.embedding.place(vectors, places.clamp(min=0))
            context_mask = _shifted(context_mask, places)
        options = {"causal": True, "keys": present, "positions": places, "device": vectors.device}
        mask = layer_masks(self.patterns, lambda pattern: attention_mask(length, pattern=pattern, **options))
        hidden = self.transformer(placed, context, mask=mask, context_mask=context_mask, caches=caches)
        return self.logits(hidden[:, -1]), state

    def step(self, ids: Int64[Tensor, " b"], index: int | Tensor, state: WritingState) -> Float[Tensor, "b v"]:
        """Read word number ``index`` behind the prompts, counted from 0, and return the logits of the next one.

        The index is a number, or where the step is compiled an int64 tensor ``(1,)``.
        """
        position = state.width + index
        place = position if state.starts is None else (position - state.starts)[:, None]
        vectors = self.embedding.place(self.embed(ids[:, None]), place)
        mask = layer_masks(self.patterns, lambda pattern: _seen_from(pattern, position, state))
        hidden = self.transformer(vectors, mask=mask, context_mask=state.context_mask, caches=state.caches, position=position)
        return self.logits(hidden[:, -1])

    def _check(self, length: int) -> None:
        if length > self.context_length:
            raise UserError(
                f"language model: {length} positions do not fit its context of {self.context_length}; "
                "shorten the prompt or write less"
            )


@torch.no_grad()
def continuation_likelihoods(
    model: LanguageModel, logits: Float[Tensor, "b v"], state: WritingState, candidates: TextBatch
) -> Float[Tensor, "b a"]:
    """Log-likelihood in nats, fp32, of each of A candidates behind each prompt.

    Args:
        model: Which read the prompts.
        logits: Of the first word behind each, with ``state`` from a prefill with room for the longest candidate.
        state: Left as it was.
        candidates: Texts of at least one token, the same for all prompts.
    """
    many = max(1, MAX_CANDIDATE_ROWS // len(logits))
    starts = range(0, len(candidates), many)
    return torch.cat([_likelihoods(model, logits, state, candidates[start : start + many]) for start in starts], 1)


def _likelihoods(model: LanguageModel, logits: Tensor, state: WritingState, candidates: TextBatch) -> Tensor:
    prompts, count = len(logits), len(candidates)
    ids = candidates.ids.repeat(prompts, 1)
    lengths = candidates.lengths.repeat(prompts)
    rows = torch.arange(prompts, device=logits.device).repeat_interleave(count)
    state, logits = state[rows], logits[rows]
    total = torch.zeros(len(rows), device=logits.device)
    for index in range(int(lengths.max())):
        gained = logits.float().log_softmax(-1).gather(1, ids[:, index, None])[:, 0]
        total += gained.masked_fill(index >= lengths, 0.0)
        if index + 1 < int(lengths.max()):
            logits = model.step(ids[:, index], index, state)
    return total.view(prompts, count)


def _seen_from(pattern: Pattern | None, position: int | Tensor, state: WritingState) -> Mask:
    """What a single word at ``position`` of the caches may see of all that they have room for."""
    if pattern is None:
        return state.mask
    columns = torch.arange(state.caches[0].keys.shape[2], device=state.caches[0].keys.device)
    query = torch.as_tensor(position, device=columns.device).view(1)
    if state.starts is None:
        return Mask(pattern.visible(query, columns))
    starts = state.starts[:, None]
    visible = pattern.visible(query - starts, columns - starts)[:, None]
    return Mask(visible if state.mask.allowed is None else visible & state.mask.allowed)


def _rows_of(mask: Mask, rows: Tensor) -> Mask:
    """The mask of some rows; parts that all rows share stay as they are."""

    def of(part: Tensor | None) -> Tensor | None:
        return part if part is None or part.ndim < 4 or len(part) == 1 else part[rows]

    return replace(mask, allowed=of(mask.allowed), empty=of(mask.empty))


def _shifted(mask: Mask, places: Int64[Tensor, "b t"]) -> Mask:
    """A mask whose queries stand at other places than before."""

    def moved(part: Tensor | None) -> Tensor | None:
        if part is None or part.ndim < 4 or part.shape[2] == 1:
            return part
        part = part.expand(len(places), -1, -1, -1)
        return part.gather(2, places.clamp(min=0)[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))

    return replace(mask, allowed=moved(mask.allowed), empty=moved(mask.empty))


def build_language_model(
    config: LanguageModelConfig,
    wrap: Callable[[int, Block], nn.Module] | None = None,
    *,
    context_width: int | None = None,
    context_from: int = 0,
) -> LanguageModel:
    """A language model with fresh weights.

    Args:
        config: Sizes and parts.
        wrap: Called with the number and the block of each layer, gives what stands in its place.
        context_width: Width of a context that blocks attend to between self-attention and feed-forward.
        context_from: The first layer that does.
    """
    norm = functools.partial(RMSNorm if config.norm == "rms" else nn.LayerNorm, config.width, eps=config.norm_eps)
    hidden_width = config.hidden_width or 4 * config.width

    def make_feed_forward() -> FeedForward | GatedFeedForward:
        if config.activation == "swiglu":
            return GatedFeedForward(config.width, hidden_width)
        return FeedForward(config.width, hidden_width, ACTIVATIONS[config.activation](), bias=config.bias)

    def make_block(layer: int) -> nn.Module:
        attention = MultiHeadAttention(config.width, config.heads, num_kv_heads=config.kv_heads, bias=config.bias)
        reads = context_width is not None and layer >= context_from
        cross_attention = MultiHeadAttention(config.width, config.heads, context_width=context_width) if reads else None
        block = Block(
            attention=attention,
            feed_forward=feed_forward(make_feed_forward, config.width, config.experts, layer),
            norm=norm,
            cross_attention=cross_attention,
            dropout=config.dropout,
        )
        return block if wrap is None else wrap(layer, block)

    rotary = config.positions == "rotary"
    model = LanguageModel(
        embedding=TokenEmbedding(
            config.vocab_size,
            config.width,
            positions=None if rotary else LearnedPositions(config.context_length, config.width),
            dropout=config.dropout,
        ),
        transformer=Transformer(
            make_block,  # pyright: ignore[reportArgumentType]
            config.layers,
            final_norm=norm(),
            rotary=Rotary(config.width // config.heads, config.rotary_base, config.rotary_scaling) if rotary else None,
            gradient_checkpointing=config.gradient_checkpointing,
        ),
        head=None if config.tied else end(Linear(config.width, config.vocab_size, bias=False)),
        context_length=config.context_length,
        patterns=patterns_of(config.sparse_attention, config.layers),
    )
    initialise(model)
    nn.init.normal_(model.embedding.tokens.weight, std=config.token_std)
    if isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.weight, std=0.02)
    return model
