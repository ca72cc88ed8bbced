"""ALBEF answers questions about pictures: a decoder writes answers to the fused question, or a classifier chooses one.

Paper: ALBEF https://arxiv.org/abs/2107.07651, section 4 (questions: a decoder like the fusion, begun with its weights, that
attends to the fused question; answers of a list are ranked by their likelihood, of a long list those that a first stage picks
by their first token, and others are written freely; visual entailment: a classifier over the first fused token).

Deviations: every token of a ranked answer counts once, its end too (the reference counts the first token twice); the decoder
has the word vectors, positions and word logits of the network instead of copies; an answer weighs by how right it is as a share
of its question, where the reference takes its frequency; no momentum distillation.

Shapes: B questions, A answers of the list, R pairs of a question and an answer, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from mm.encoders.text import TextEncoder
from mm.errors import ConfigError
from mm.fusion.align_before_fuse import AlignBeforeFuse
from mm.fusion.cross_attention import CrossAttention
from mm.generators.language_model import LanguageModel
from mm.generators.writing import describe
from mm.losses.answers import answer_shares, answer_targets
from mm.nn.freeze import freeze
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.systems.albef import Albef, AlbefSizes, build_fusion, build_network, given_by_towers
from mm.systems.answer_list import AnswerList, grey, ranked
from mm.systems.settings import AnswerSettings
from mm.types import Batch, Candidates, Decoding, Encoded, Losses, RankedAnswers, System, TextBatch, Written

ROWS_AT_ONCE = 2048
"""Pairs of a question and an answer whose likelihood is computed together, for the sake of memory."""


class AlbefVqaConfig(AlbefSizes, AnswerSettings):
    """The network of ALBEF that reads a picture with a question, and what answers.

    Args:
        head: ``decoder`` writes answers; ``list`` is a classifier over the answers, of which several may be right; ``classes``
            is one over answers of which one is right, as in visual entailment.
        shortlist: Answers of a longer list that the decoder reads in whole, those with the likeliest first tokens.
    """

    name: Literal["albef-vqa"] = "albef-vqa"
    head: Literal["decoder", "list", "classes"] = "decoder"
    shortlist: int = Field(default=128, ge=1)

    @property
    def learns_answers(self) -> bool:
        return True

    @property
    def fresh_parts(self) -> tuple[str, ...]:
        return "answer_list", "answer_ids", "answer_lengths"

    @model_validator(mode="after")
    def _possible(self) -> "AlbefVqaConfig":
        if not (self.num_answers or self.answers):
            raise ValueError("there is nothing to answer with; set num_answers above 0, or give answers")
        return self


class AlbefVqa(System):
    """A fusion that reads a picture with a question, and a decoder or a classifier behind it.

    Args:
        network: Encoders, fusion and word logits.
        decoder: Reads words and the fused question; None for the classifiers.
        config: Sizes, the list of answers, how it is chosen from.
        answer_text: The answers as token ids; None where weights that hold them will be loaded.
    """

    answer_ids: Tensor
    answer_lengths: Tensor

    def __init__(
        self,
        network: AlignBeforeFuse,
        decoder: CrossAttention | None,
        config: AlbefVqaConfig,
        answer_text: TextBatch | None = None,
    ) -> None:
        super().__init__()
        self.network, self.decoder, self.config = network, decoder, config
        freeze(network.towers.projections)  # kept, so that a later training may take up the same weights
        network.towers.logit_scale.requires_grad_(False)
        count = len(config.answers) or config.num_answers
        if decoder is None:
            freeze(network.masked_head)
            network.word_bias.requires_grad_(False)
            self.answer_list = AnswerList(config.width, config.answers, count, exclusive=config.head == "classes")
            return
        self._places = {answer: place for place, answer in enumerate(config.answers)}
        text = answer_text or TextBatch(torch.zeros(count, 0, dtype=torch.int64), torch.zeros(count, dtype=torch.int64))
        self.register_buffer("answer_ids", F.pad(text.ids, (0, config.context_length - text.ids.shape[1])))
        self.register_buffer("answer_lengths", text.lengths)

    @property
    def lacks(self) -> frozenset[str]:
        return frozenset() if self.config.head == "decoder" else frozenset({"answers_freely"})

    @property
    def known_answers(self) -> tuple[str, ...]:
        return self.config.known_answers

    def read(self, image: Tensor, question: TextBatch) -> Encoded:
        """Questions with the pictures ``(B, 3, H, W)`` that they are about; what is pooled is the first token."""
        network = self.network
        seen = network.encode_image(grey(image) if self.config.blind else image)
        return network.fusion(network.encode_text(question), seen)

    def answer(
        self, image: Tensor, question: TextBatch, candidates: Candidates | None = None, *, k: int = 1
    ) -> list[RankedAnswers]:
        """The ``k`` best answers to question i about picture i, see `mm.types.Answers`.

        The decoder's scores are the likelihoods of writing an answer, and it ranks any candidates; at least ``k`` of them are
        read in whole.
        """
        fused = self.read(image, question)
        if self.decoder is None:
            return self.answer_list.rank(fused.pooled, candidates, k)
        among = self._own_list() if candidates is None else candidates
        return ranked(among.words, self.log_likelihoods(fused, among.text, max(k, self.config.shortlist)), k, torch.exp)

    @property
    def writer(self) -> LanguageModel:
        """The decoder, with the words of the network; all of its weights are theirs."""
        text = self.network.towers.encoders["text"]
        assert isinstance(text, TextEncoder)
        assert self.decoder is not None
        return LanguageModel(
            embedding=text.embedding,
            transformer=self.decoder.transformer,
            head=self.network.words,
            context_length=text.context_length,
        )

    def write_answer(self, image: Tensor, question: TextBatch, decoding: Decoding, seeds: Sequence[int]) -> list[Written]:
        """See `mm.types.AnswersFreely`; the start is that of the known answers."""
        fused = self.read(image, question)
        count = len(question)
        start = TextBatch(self.answer_ids[:1, :1].expand(count, 1), self.answer_lengths.new_ones(count))
        seen = attention_mask(1, fused.tokens.shape[1], keys=fused.mask)
        return describe(self.writer, fused.tokens, start, decoding, seeds, context_mask=seen)

    def log_likelihoods(self, fused: Encoded, answers: TextBatch, shortlist: int) -> Float[Tensor, "b a"]:
        """Of each answer to each question, fp32; of a longer list than ``shortlist`` those of the answers with the likeliest
        first tokens, and minus infinity for the others."""
        count, num_questions, device = len(answers), len(fused.tokens), answers.ids.device
        answers = _trimmed(answers)
        words = self._embed(answers.ids[:, :-1])
        places = torch.arange(count, device=device).expand(num_questions, count)
        if count > shortlist:
            start = words[:1, :1].expand(num_questions, 1, -1)
            mask = torch.ones(num_questions, 1, dtype=torch.bool, device=device)
            first = self._following(Encoded(start, mask, start[:, 0]), fused)[:, answers.ids[:, 1]]
            places = first.sort(dim=1, descending=True, stable=True).indices[:, :shortlist]
        questions = torch.arange(num_questions, device=device)[:, None].expand_as(places)
        pairs = zip(questions.flatten().split(ROWS_AT_ONCE), places.flatten().split(ROWS_AT_ONCE), strict=True)
        found = torch.cat([self._likelihood(fused[q], answers[a], words[a])[0] for q, a in pairs])
        return found.new_full((num_questions, count), -torch.inf).scatter(1, places, found.view_as(places))

    def loss(self, batch: Batch, step: int) -> Losses:
        """Negative log-likelihood in nats of the right answers, each by its share of its question, mean over the questions."""
        assert batch.image is not None
        assert batch.text is not None
        fused = self.read(batch.image, batch.text)
        if self.decoder is None:
            parts = self.answer_list.losses(fused.pooled, batch.answers)
        else:
            parts = self._written(fused, batch.answers)
        return Losses(parts["answer"], {name: part.detach() for name, part in parts.items()})

    def state_from(self, start: System) -> dict[str, Tensor]:
        """An `Albef` gives its network, and its fusion is what the decoder begins as; towers give towers."""
        if not isinstance(start, Albef):
            return given_by_towers(self, start) or super().state_from(start)
        given = {name: tensor for name, tensor in start.state_dict().items() if name.startswith("network.")}
        if lacking := sorted(f"network.{name}" for name in self.network.state_dict() if f"network.{name}" not in given):
            raise ConfigError(f"init_from: is another network than 'system' describes (first difference: {lacking[0]})")
        if self.decoder is not None:  # pictures may be wider than words, then keys and values of the context start fresh
            own, fusion = self.state_dict(), start.network.fusion.state_dict(prefix="decoder.")
            given |= {name: tensor for name, tensor in fusion.items() if name in own and tensor.shape == own[name].shape}
        return given

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference; likelihoods are still computed in fp32."""
        self.network.cast_(dtype)
        (self.answer_list if self.decoder is None else self.decoder).to(dtype)

    def _written(self, fused: Encoded, answers: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
        """``answer``, the loss, and ``token_accuracy``: how often the decoder knows best which token of an answer follows."""
        text, shares = self._own_list().text, answer_shares(answer_targets(answers, self._places)).to(fused.tokens.device)
        if shares.any():
            questions, places = shares.nonzero().T
        else:  # none is known: an answer of no weight, so that every parameter still has a gradient
            questions, places = torch.zeros(2, 1, dtype=torch.int64, device=shares.device)
        text = _trimmed(text[places])
        found, accuracy = self._likelihood(fused[questions], text, self._embed(text.ids[:, :-1]))
        return {"answer": -(shares[questions, places] * found).sum() / len(answers), "token_accuracy": accuracy}

    def _own_list(self) -> Candidates:
        return Candidates(self.known_answers, TextBatch(self.answer_ids, self.answer_lengths))

    def _embed(self, ids: Tensor) -> Tensor:
        return self.network.towers.encoders["text"].get_submodule("embedding")(ids)

    def _likelihood(self, fused: Encoded, answers: TextBatch, words: Tensor) -> tuple[Float[Tensor, " r"], Float[Tensor, ""]]:
        """Log-likelihood of answer i, its vectors given, to question i: the sum over its tokens behind the start, its end
        included; and the share of those tokens that are the likeliest ones."""
        longest = int(answers.lengths.max())
        follows = answers.valid()[:, 1:longest]
        logits = self._following(Encoded(words[:, : longest - 1], follows, words[:, 0]), fused)
        targets = answers.ids[:, 1:longest][follows]
        each = -F.cross_entropy(logits, targets, reduction="none")
        right = (logits.argmax(1) == targets).float()
        return each.new_zeros(len(answers)).index_add(0, follows.nonzero()[:, 0], each), right.mean()

    def _following(self, words: Encoded, fused: Encoded) -> Float[Tensor, "m v"]:
        """Logits of what follows each of the M words that the mask holds, fp32."""
        assert self.decoder is not None
        return self.network.words(self.decoder(words, fused, causal=True).tokens[words.mask]).float()


def _trimmed(text: TextBatch) -> TextBatch:
    """Without positions that none of the texts has."""
    return TextBatch(text.ids[:, : int(text.lengths.max())], text.lengths)


def build(config: AlbefVqaConfig, parts: Mapping[str, Any] | None = None) -> AlbefVqa:
    """Build the network with fresh weights; ``parts`` may hold ``answer_text``, the answers as token ids."""
    decoder = build_fusion(config, config.width) if config.head == "decoder" else None
    if decoder is not None:
        initialise(decoder)
    return AlbefVqa(build_network(config, parts), decoder, config, (parts or {}).get("answer_text"))
