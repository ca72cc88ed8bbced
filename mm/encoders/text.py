"""Text encoder: token ids to features, with any of the suite's transformers inside.

Shapes: B batch, T positions, D width.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn import buckets
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, TokenEmbedding
from mm.nn.experts import ExpertsConfig, feed_forward
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.transformer import Block, FeedForward, QuickGELU, Transformer
from mm.types import Encoded, TextBatch

Pooling = Literal["last", "first", "mean", "final"]

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "quick_gelu": QuickGELU,
    "gelu_tanh": functools.partial(nn.GELU, approximate="tanh"),
}


class TextEncoderConfig(StrictConfig):
    """A CLIP-style text transformer.

    Args:
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        context_length: Longest text in tokens, start and end included.
        vocab_size: Number of token ids; at least that of the tokenizer.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        causal: Whether a token sees only what is before it.
        attend_padding: Whether padding is attended to like words, as in weights that were trained so (SigLIP), or read like
            words by a generator (Stable Diffusion). Every text is then filled up to ``context_length`` with ``pad_id``, and may
            not be trimmed.
        pad_id: Id of the padding, for ``attend_padding``.
        pooling: Token that stands for the text: "last" (the end token), "first", the "mean" of all, or "final": the last
            position of the context, whatever it holds, for ``attend_padding``.
        activation: "gelu", or "quick_gelu" (OpenAI's CLIP) or "gelu_tanh" (SigLIP) for weights that were trained with it.
        norm_eps: Added to the variance in the norms.
        dropout: Of each block's branches and of the embedding, in training.
        token_dropout: Probability of hiding a word (never start and end) in training.
        experts: Feed-forward layers of several experts (https://arxiv.org/abs/2101.03961).
        gradient_checkpointing: Trade time for memory.
    """

    width: int = Field(default=256, ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    context_length: int = Field(default=32, ge=3)
    vocab_size: int = Field(default=4096, ge=3)
    mlp_ratio: float = Field(default=4.0, gt=0)
    causal: bool = True
    attend_padding: bool = False
    pad_id: int = Field(default=0, ge=0)
    pooling: Pooling = "last"
    activation: Literal["gelu", "quick_gelu", "gelu_tanh"] = "gelu"
    norm_eps: float = Field(default=1e-5, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    token_dropout: float = Field(default=0.0, ge=0, lt=1)
    experts: ExpertsConfig | None = None
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _possible(self) -> "TextEncoderConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.causal and self.pooling == "first":
            raise ValueError("with causal: true the first token sees nothing but itself; use pooling: last or mean")
        if self.attend_padding and self.pooling == "mean":
            raise ValueError("attend_padding is for pooling: last, first or final")
        if self.pooling == "final" and not self.attend_padding:
            raise ValueError("pooling: final takes a position that only attend_padding: true fills")
        return self


class TextEncoder(nn.Module):
    """Embeds ids, runs a transformer over them and pools one vector a text.

    Causal encoders attend over the padding behind a text for free: no real token can see it. Others mask it. Either way the
    result does not depend on how far a batch is padded.

    Args:
        embedding: Ids to vectors.
        transformer: Ends with its own norm.
        causal: See `TextEncoderConfig`.
        pooling: See `TextEncoderConfig`.
        context_length: Longest text that is accepted.
        pad_id: Fills every text up to the context and is attended to; None where padding is masked.
        token_dropout: See `TextEncoderConfig`.
    """

    def __init__(
        self,
        *,
        embedding: TokenEmbedding,
        transformer: Transformer,
        causal: bool,
        pooling: Pooling,
        context_length: int,
        pad_id: int | None = None,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.transformer = transformer
        self.causal = causal
        self.pooling: Pooling = pooling
        self.context_length = context_length
        self.pad_id = pad_id
        self.token_dropout = token_dropout

    @property
    def width(self) -> int:
        """D, of the tokens and of the pooled vector."""
        return self.embedding.tokens.embedding_dim

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference."""
        self.to(dtype)

    def forward(self, text: TextBatch) -> Encoded:
        """Encode texts. Raises `UserError` if they are longer than ``context_length``.

        Tokens behind the end of a text are zero or arbitrary; the mask leaves them out.
        """
        length = text.ids.shape[1]
        if length > self.context_length:
            raise UserError(
                f"text encoder: {length} tokens do not fit its context of {self.context_length}; "
                f"tokenize with context_length={self.context_length}"
            )
        if self.pad_id is not None:
            return self._encode_padded(text, self.pad_id)
        if not buckets.pays(text.ids.shape[0], text.ids.device):
            return self._encode(text)

        def encode(longest: int, ids: Tensor, lengths: Tensor, seeds: Tensor | None = None) -> Encoded:
            return self._encode(TextBatch(ids[:, :longest], lengths, seeds=seeds))

        seeds = () if text.seeds is None else (text.seeds,)
        return buckets.by_length(length, text.lengths, (text.ids, text.lengths, *seeds), encode)

    def _encode_padded(self, text: TextBatch, pad_id: int) -> Encoded:
        """Padding takes part as if it were words: the whole context is computed for every text."""
        inside = torch.arange(text.ids.shape[1], device=text.ids.device) < text.lengths[:, None]
        ids = F.pad(text.ids.where(inside, pad_id), (0, self.context_length - text.ids.shape[1]), value=pad_id)
        x = self.embedding(ids, keep=self._kept(TextBatch(ids, text.lengths, seeds=text.seeds)))
        everything = torch.ones(ids.shape, dtype=torch.bool, device=ids.device)
        mask = attention_mask(self.context_length, causal=self.causal, device=x.device)
        tokens = self.transformer(x, mask=mask, token_ids=ids)
        return Encoded(tokens, everything, pool(tokens, text.lengths, everything, self.pooling))

    def encode_vectors(self, vectors: Float[Tensor, "b t d"], lengths: Tensor) -> Encoded:
        """Encode token vectors instead of ids, learned ones for instance; positions are added here.

        Args:
            vectors: One for each position.
            lengths: Number of real positions of each row.
        """
        return self._encode_placed(self.embedding.place(vectors), lengths)

    def _encode(self, text: TextBatch) -> Encoded:
        return self._encode_placed(self.embedding(text.ids, keep=self._kept(text)), text.lengths, text.ids)

    def _encode_placed(self, x: Tensor, lengths: Tensor, ids: Tensor | None = None) -> Encoded:
        valid = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        token_ids = torch.where(valid, 0 if ids is None else ids, -1)
        mask = attention_mask(x.shape[1], causal=self.causal, keys=None if self.causal else valid, device=x.device)
        tokens = self.transformer(x, mask=mask, token_ids=token_ids)
        return Encoded(tokens, valid, pool(tokens, lengths, valid, self.pooling))

    def _kept(self, text: TextBatch) -> Float[Tensor, "b t 1"] | None:
        """0 for the words hidden in this training step, 1 for the others; start and end stay."""
        if not self.training or self.token_dropout == 0:
            return None
        hidden = text.draws().uniform(text.ids.shape[1]) < self.token_dropout
        return (~(hidden & text.inner())).to(self.embedding.tokens.weight.dtype)[..., None]


def pool(tokens: Float[Tensor, "b t d"], lengths: Tensor, valid: Bool[Tensor, "b t"], pooling: Pooling) -> Float[Tensor, "b d"]:
    """One vector a sequence: its first or last real token, the mean of its real tokens, or the final position."""
    if pooling == "first":
        return tokens[:, 0]
    if pooling == "final":
        return tokens[:, -1]
    if pooling == "last":
        return tokens[torch.arange(tokens.shape[0], device=tokens.device), lengths - 1]
    return (tokens * valid[..., None]).sum(1) / lengths[:, None]


def build_text_encoder(config: TextEncoderConfig) -> TextEncoder:
    """A CLIP-style text transformer with fresh weights: pre-norm blocks, learned positions."""
    norm = functools.partial(nn.LayerNorm, config.width, eps=config.norm_eps)

    def make_feed_forward() -> FeedForward:
        return FeedForward(config.width, int(config.width * config.mlp_ratio), ACTIVATIONS[config.activation]())

    def make_block(layer: int) -> Block:
        return Block(
            attention=MultiHeadAttention(config.width, config.heads),
            feed_forward=feed_forward(make_feed_forward, config.width, config.experts, layer),
            norm=norm,
            dropout=config.dropout,
        )

    encoder = TextEncoder(
        embedding=TokenEmbedding(
            config.vocab_size,
            config.width,
            positions=LearnedPositions(config.context_length, config.width),
            dropout=config.dropout,
        ),
        transformer=Transformer(
            make_block, config.layers, final_norm=norm(), gradient_checkpointing=config.gradient_checkpointing
        ),
        causal=config.causal,
        pooling=config.pooling,
        context_length=config.context_length,
        pad_id=config.pad_id if config.attend_padding else None,
        token_dropout=config.token_dropout,
    )
    initialise(encoder)
    return encoder


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the text tower in an open_clip CLIP ``state_dict`` for `TextEncoder.load_state_dict`; other entries are left out.

    ``text_projection`` is one of those: it is the projection of the dual tower.
    """
    names = {
        "token_embedding.weight": "embedding.tokens.weight",
        "positional_embedding": "embedding.positions.weight",
        "ln_final.weight": "transformer.final_norm.weight",
        "ln_final.bias": "transformer.final_norm.bias",
    }
    parts = {
        "ln_1": "attention_residual.norm",
        "ln_2": "feed_forward_residual.norm",
        "attn.out_proj": "attention.output",
        "mlp.c_fc": "feed_forward.input",
        "mlp.c_proj": "feed_forward.output",
    }
    result = {new: state[old] for old, new in names.items()}
    prefix = "transformer.resblocks."
    for key in (key for key in state if key.startswith(prefix)):
        layer, _, rest = key.removeprefix(prefix).partition(".")
        part, _, kind = rest.replace("in_proj_", "in_proj.").rpartition(".")
        block = f"transformer.blocks.{layer}."
        if part == "attn.in_proj":
            width = state[key].shape[0] // 3
            result[f"{block}attention.query.{kind}"] = state[key][:width]
            result[f"{block}attention.key_value.{kind}"] = state[key][width:]
        else:
            result[f"{block}{parts[part]}.{kind}"] = state[key]
    return result
