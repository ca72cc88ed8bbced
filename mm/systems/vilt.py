"""ViLT: words and patches of a picture in one sequence, one transformer, no encoder before it.

Paper: ViLT https://arxiv.org/abs/2102.03334 (masked language modelling, image-text matching with half of the pairs mismatched,
word-patch alignment; fine-tuning for retrieval against random texts with ``retrieval_negatives``, for questions with
``answer_weight``); a convolutional stem instead of linear patches with ``stem``, https://arxiv.org/abs/2106.14881.

Deviations: fresh weights, not those of a picture classifier, without which linear patches need much data (hence ``stem``);
square pictures of one size; single tokens are hidden, whole words only with ``whole_words``; one logit tells whether a picture
and a text match, which is the paper's two-way softmax; negatives are a derangement of the batch, so that a text alone does not
tell, and never of the same group. As in the reference, the alignment cost of mismatched pairs counts negatively. Each slice of
an accumulated batch, and each process, averages over its own hidden words, so these weigh a little differently where slices
hide different numbers of them.
"""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.draws import Draws
from mm.encoders.patches import PatchEmbedding
from mm.errors import UserError
from mm.fusion.single_tower import SingleTower
from mm.losses.alignment import word_patch_alignment
from mm.losses.masked import MASK_RATE, hide_words, masked_cross_entropy
from mm.losses.matching import half_mismatched, matching_loss, random_candidates, ranking_loss
from mm.nn.attention import MultiHeadAttention
from mm.nn.conv import PictureEncoder
from mm.nn.embeddings import LearnedPositions, TokenEmbedding
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.systems.answer_list import AnswerList, grey
from mm.systems.settings import AnswerSettings
from mm.types import Batch, Candidates, Encoded, Losses, RankedAnswers, System, TextBatch


class ViltConfig(AnswerSettings):
    """A single tower over words and patches.

    Args:
        image_size: Side of the square picture in pixels.
        patch_size: Side of a patch; divides ``image_size``.
        stem: Channels of the stages of a convolutional stem, fine to coarse, the first of which has patches of
            ``patch_size / 2 ** (stages - 1)`` pixels. Empty for linear patches.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
        vocab_size: Number of token ids; at least that of the tokenizer.
        context_length: Longest text in tokens, start and end included.
        width: Feature width.
        layers: Number of blocks.
        heads: Attention heads; divides ``width``.
        mlp_ratio: Hidden width of the feed-forward over ``width``.
        dropout: Of each block's branches and of the words, in training.
        masked_weight: Of predicting hidden words.
        mask_rate: Share of the words to predict.
        whole_words: Hide all tokens of a word together, so that none is told by the others; else each token counts as a word.
        matching_weight: Of telling matching pairs from others.
        alignment_weight: Of moving words onto patches; needs ``matching_weight``.
        retrieval_negatives: Texts of the batch among which a picture's own is to be found, for fine-tuning; 0 leaves it out.
        answer_weight: Of answering the texts, which are questions, from a list of answers.
    """

    name: Literal["vilt"] = "vilt"
    image_size: int = Field(default=64, ge=1)
    patch_size: int = Field(default=8, ge=1)
    stem: tuple[int, ...] = ()
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    vocab_size: int = Field(default=4096, ge=3)
    context_length: int = Field(default=32, ge=3)
    width: int = Field(default=256, ge=1)
    layers: int = Field(default=6, ge=1)
    heads: int = Field(default=4, ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    masked_weight: float = Field(default=1.0, ge=0)
    mask_rate: float = Field(default=MASK_RATE, gt=0, lt=1)
    whole_words: bool = False
    matching_weight: float = Field(default=1.0, ge=0)
    alignment_weight: float = Field(default=0.1, ge=0)
    retrieval_negatives: int = Field(default=0, ge=0)
    answer_weight: float = Field(default=0.0, ge=0)

    @property
    def picture_side(self) -> int:
        return self.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        return self.vocab_size, self.context_length

    def with_vocabulary(self, size: int) -> "ViltConfig":
        return self.model_copy(update={"vocab_size": size})

    @property
    def learns_answers(self) -> bool:
        return self.answer_weight > 0

    @property
    def fresh_parts(self) -> tuple[str, ...]:
        return ("answer_list",)

    @property
    def learns_whole_words(self) -> bool:
        return self.whole_words and self.masked_weight > 0

    @property
    def learns_matching(self) -> bool:
        """Whether any loss tells matching pairs from others."""
        return bool(self.matching_weight or self.retrieval_negatives)

    @model_validator(mode="after")
    def _possible(self) -> "ViltConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}")
        if self.stem and self.patch_size % 2 ** (len(self.stem) - 1):
            raise ValueError(f"patch_size {self.patch_size} cannot be halved between the {len(self.stem)} stages of stem")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        if not (self.learns_matching or self.answer_weight):
            raise ValueError(
                "nothing would learn to match or to answer; set matching_weight, retrieval_negatives or answer_weight above 0"
            )
        if bool(self.answer_weight) != bool(self.num_answers or self.answers):
            raise ValueError("answer_weight and num_answers (or answers) go together; set both above 0, or none")
        if self.alignment_weight and not self.matching_weight:
            raise ValueError("alignment_weight is of the pairs of matching; set it to 0 where matching_weight is 0")
        return self


class Vilt(System):
    """A transformer that reads words and patches together.

    Args:
        patches: Pictures to vectors.
        words: Token ids to vectors, without positions; its last id stands for a hidden word.
        tower: Over the modalities ``text`` and ``image``.
        config: Sizes and weights.
    """

    def __init__(self, patches: PatchEmbedding, words: TokenEmbedding, tower: SingleTower, config: ViltConfig) -> None:
        super().__init__()
        self.patches, self.words, self.tower, self.config = patches, words, tower, config
        width = config.width
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.matching_head = nn.Linear(width, 1)
        self.masked_head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))
        if not config.masked_weight:  # kept, so that fine-tuning takes and gives the same weights
            freeze(self.masked_head)
            self.word_bias.requires_grad_(False)
        if not config.learns_matching:
            freeze(self.matching_head)
        if config.answer_weight:
            self.answer_list = AnswerList(width, config.answers, len(config.answers) or config.num_answers)

    @property
    def lacks(self) -> frozenset[str]:
        learned = {"matches": self.config.learns_matching, "answers": self.config.learns_answers}
        return frozenset(name for name, has in learned.items() if not has)

    @property
    def known_answers(self) -> tuple[str, ...]:
        return self.config.known_answers

    def encode_image(self, image: Tensor) -> Encoded:
        """Pixels ``(B, 3, H, W)`` to patch vectors, the part of a picture's computation that does not depend on a text."""
        return self.patches(grey(image) if self.config.blind else image)

    def encode_text(self, text: TextBatch) -> Encoded:
        """Token ids to word vectors. Raises `UserError` for texts that are too long."""
        length, longest = text.ids.shape[1], self.config.context_length
        if length > longest:
            raise UserError(f"text of {length} tokens where the model takes {longest}; tokenize with context_length={longest}")
        words = self.words(text.ids)
        return Encoded(words, text.valid(), words[:, 0])

    def fuse(self, image: Encoded, text: Encoded) -> Encoded:
        """Read pairs: row i of the pictures with row i of the texts.

        ``extras`` of the result holds the slices ``text`` and ``image`` of its tokens.
        """
        return self.tower({"text": text, "image": image})

    def match(self, image: Encoded, text: Encoded) -> Float[Tensor, " b"]:
        """Logits of row i of the pictures and row i of the texts, both encoded, belonging together, fp32."""
        return self._matching_logits(self.fuse(image, text))

    def answer(
        self, image: Tensor, question: TextBatch, candidates: Candidates | None = None, *, k: int = 1
    ) -> list[RankedAnswers]:
        """The ``k`` likeliest answers to question i about picture i, pixels ``(B, 3, H, W)``; see `mm.types.Answers`."""
        return self.answer_list.rank(
            self._pooled(self.fuse(self.encode_image(image), self.encode_text(question))), candidates, k
        )

    def loss(self, batch: Batch, step: int) -> Losses:
        """Weighted sum of the losses of all tasks; each task reads the batch in a pass of its own."""
        assert batch.image is not None
        assert batch.text is not None
        image, text, config = self.encode_image(batch.image), batch.text, self.config
        groups = torch.arange(len(batch), device=text.ids.device) if batch.groups is None else batch.groups
        parts: dict[str, Tensor] = {}
        total = image.tokens.new_zeros((), dtype=torch.float32)
        if config.masked_weight:
            parts["masked"] = self._masked_loss(image, text, batch.draws(groups.device))
            total = total + config.masked_weight * parts["masked"]
        if config.matching_weight:
            parts |= self._matching_losses(image, text, groups)
            total = total + config.matching_weight * parts["matching"]
        if config.alignment_weight:
            total = total + config.alignment_weight * parts["alignment"]
        if config.retrieval_negatives:
            parts["retrieval"] = self._retrieval_loss(image, text, groups)
            total = total + parts["retrieval"]
        if config.answer_weight:
            parts |= self.answer_list.losses(self._pooled(self.fuse(image, self.encode_text(text))), batch.answers)
            total = total + config.answer_weight * parts["answer"]
        return Losses(total, {name: part.detach() for name, part in parts.items()})

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the weights in another floating type, for inference; pixels are still normalised in fp32."""
        mean, std = self.patches.mean, self.patches.std
        self.to(dtype)
        self.patches.mean, self.patches.std = mean, std

    def _pooled(self, fused: Encoded) -> Tensor:
        return self.pooler(fused.pooled)

    def _matching_logits(self, fused: Encoded) -> Tensor:
        return self.matching_head(self._pooled(fused))[:, 0].float()

    def _masked_loss(self, image: Encoded, text: TextBatch, draws: Draws) -> Tensor:
        config = self.config
        masked = hide_words(text, config.vocab_size, rate=config.mask_rate, whole=config.whole_words, draws=draws)
        fused = self.fuse(image, self.encode_text(TextBatch(masked.ids, text.lengths)))
        vectors = self.words.tokens.weight[: config.vocab_size]
        head = lambda features: F.linear(self.masked_head(features), vectors, self.word_bias)  # noqa: E731
        return masked_cross_entropy(fused.tokens[:, fused.extras["text"]], masked, head)

    def _matching_losses(self, image: Encoded, text: TextBatch, groups: Tensor) -> dict[str, Tensor]:
        """Of half of the texts given to other pictures: the loss, the alignment cost that they change, and the accuracy."""
        rows, matched = half_mismatched(groups)
        text = text[rows]
        fused = self.fuse(image, self.encode_text(text))
        logits = self._matching_logits(fused)
        words, patches = (fused.tokens[:, fused.extras[name]] for name in ("text", "image"))
        losses = {"matching": matching_loss(logits, matched)}
        if self.config.alignment_weight:
            cost = word_patch_alignment(words, patches, text.inner(), image.mask)
            losses["alignment"] = torch.where(matched, cost, -cost).mean()
        return losses | {"matching_accuracy": ((logits > 0) == matched).float().mean()}

    def _retrieval_loss(self, image: Encoded, text: TextBatch, groups: Tensor) -> Tensor:
        rows, valid = random_candidates(groups, self.config.retrieval_negatives)
        pictures = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
        logits = self.match(image[pictures], self.encode_text(text[rows.flatten()]))
        return ranking_loss(logits.view_as(rows), valid)


def build(config: ViltConfig, parts: Mapping[str, Any] | None = None) -> Vilt:
    """Build ViLT with fresh weights; it has no parts."""
    width = config.width
    norm = functools.partial(nn.LayerNorm, width)

    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(width, config.heads),
            feed_forward=FeedForward(width, int(width * config.mlp_ratio), nn.GELU()),
            norm=norm,
            dropout=config.dropout,
        )

    positions = {
        "text": LearnedPositions(config.context_length, width),
        "image": LearnedPositions((config.image_size // config.patch_size) ** 2, width),
    }
    vilt = Vilt(
        PatchEmbedding(_projection(config), config.image_size, config.mean, config.std),
        TokenEmbedding(config.vocab_size + 1, width, dropout=config.dropout),
        SingleTower(Transformer(make_block, config.layers, final_norm=norm()), positions, width),
        config,
    )
    initialise(vilt.words)
    initialise(vilt.tower)
    return vilt


def _projection(config: ViltConfig) -> nn.Module:
    """Linear patches, or stages of convolutions with one residual block each."""
    if not config.stem:
        return nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
    patch = config.patch_size // 2 ** (len(config.stem) - 1)
    return PictureEncoder(patch, config.stem, num_blocks=1, out_width=config.width)
