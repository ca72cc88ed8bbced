"""What systems share that read texts in which pictures stand: captions, prompts with examples, and their likelihoods.

A picture with a text behind it is the picture's place and then the text with its start and end, as the tokenizer gives it; a
prompt is as many of these as there are examples, and then a picture with the beginning of a text.

Shapes: B texts of T positions, M pictures, A candidates, D width of the words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder, ImageEncoderConfig
from mm.fusion.dual_tower import DualTower, unit
from mm.fusion.interleaving import NOTHING, behind_last_medium, following, in_front, words_of
from mm.generators.language_model import LanguageModel, continuation_likelihoods
from mm.generators.writing import check_decoding, fitted, write
from mm.nn.freeze import freeze
from mm.nn.masks import EVERYTHING, Mask
from mm.systems.language_model import Language, LanguageConfig, LanguagePart
from mm.systems.settings import SystemSettings
from mm.tokenizers.memory import TokenMemory
from mm.types import Batch, Decoding, Encoded, Interleaved, Losses, OnTokens, System, TextBatch, Written


class InterleavedSettings(SystemSettings):
    """A picture encoder and a language model.

    Args:
        image: The picture encoder.
        embed_dim: Width of the picture's vector in a space that it shares with texts, so that the projection of a dual tower
            can be taken over with its encoder; 0 for the encoder's own pooled vector, or where tokens are taken.
        language: A MODEL that predicts words, held fixed, or the configuration of one.
        train_language: Whether the language model learns, too. Both papers hold it fixed.
        text_length: Longest text between two pictures in tokens, start and end included.
        lock: Parts that keep their weights: ``image`` is the encoder with its projection.
        remember_pictures: Number of pictures whose features are kept in memory, for a locked encoder and data that is not
            changed at random: then the encoder's work is done when each has come once.
    """

    image: ImageEncoderConfig = ImageEncoderConfig()
    embed_dim: int = Field(default=0, ge=0)
    language: LanguagePart = LanguageConfig()
    train_language: bool = False
    text_length: int = Field(default=32, ge=3)
    lock: tuple[Literal["image"], ...] = ()
    remember_pictures: int = Field(default=0, ge=0)

    @property
    def picture_side(self) -> int:
        return self.image.image_size

    @property
    def text_limits(self) -> tuple[int, int]:
        assert isinstance(self.language, LanguageConfig), "known once the language model is loaded"
        return self.language.text_limits[0], self.text_length

    @property
    def picture_positions(self) -> int:
        """Positions that a picture takes among the words, at least."""
        return 1

    @property
    def begins_texts(self) -> bool:
        """A language model of its own predicts the first word from the picture itself; one that is given knows its start."""
        return isinstance(self.language, str)

    def with_vocabulary(self, size: int) -> Self:
        if not isinstance(self.language, LanguageConfig):
            return self
        return self.model_copy(update={"language": self.language.with_vocabulary(size)})

    def for_inference(self) -> Self:
        return self.model_copy(update={"remember_pictures": 0})

    def parts(self) -> dict[str, str]:
        return {"language": self.language} if isinstance(self.language, str) else {}

    @model_validator(mode="after")
    def _possible_parts(self) -> Self:
        if isinstance(self.language, str) and self.train_language:
            raise ValueError(
                f"train_language: a MODEL, '{self.language}', is held fixed; give its configuration as 'language' and the "
                "MODEL as 'init_from'"
            )
        if self.remember_pictures and "image" not in self.lock:
            raise ValueError("remember_pictures needs lock: [image]; features of an encoder that learns do not stay the same")
        return self


@dataclass(frozen=True)
class Reading:
    """Texts with their pictures, as the language model takes them.

    Args:
        text: Ids of each position of ``vectors``, `mm.types.MEDIUM` where it is of a picture.
        vectors: ``(B, T, D)``.
        context: What layers with cross-attention see.
        context_mask: What each position may see of it.
        last_context_mask: What the words to come may see of it; None for what all see.
    """

    text: TextBatch
    vectors: Tensor
    context: Tensor | None = None
    context_mask: Mask = EVERYTHING
    last_context_mask: Mask | None = None


class InterleavedSystem(System):
    """Reads pictures and words in one sequence and continues it. Only `read` and `takes_tokens` differ.

    Args:
        image: The picture encoder.
        language: Predicts words.
        config: What is locked and remembered.
    """

    def __init__(self, image: ImageEncoder, language: LanguageModel, config: InterleavedSettings) -> None:
        super().__init__()
        self.image, self.language, self.settings = image, language, config
        self.projection = nn.Linear(image.width, config.embed_dim) if config.embed_dim else None
        if "image" in config.lock:
            freeze(image)
            if self.projection is not None:
                freeze(self.projection)
        if not config.train_language:
            freeze(language)
        self._features = TokenMemory(self._encode, config.remember_pictures) if config.remember_pictures else self._encode

    @property
    def takes_tokens(self) -> bool:
        """Whether pictures are read by their tokens instead of their pooled vector."""
        raise NotImplementedError

    def read(self, prompt: Interleaved) -> Reading:
        """Texts and pictures to what the language model takes. Raises `UserError` for more or fewer pictures than places."""
        raise NotImplementedError

    @property
    def beginnings(self) -> Mapping[str, str]:
        """See `mm.types.Captions`."""
        return {"caption": ""}

    def see(self, image: Tensor) -> Encoded:
        """Pixels ``(M, 3, H, W)`` to tokens, or to the pooled vector alone, which is then the only token."""
        features = self._features(image) if len(image) else self._no_features()
        tokens = features if self.takes_tokens else features[:, None]
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), tokens[:, 0])

    def loss(self, batch: Batch, step: int) -> Losses:
        """Cross-entropy in nats of the words behind pictures that are learned, mean over those of a text, then over the texts.

        Without interleaved texts each text of the batch is the caption of its picture. ``answer_accuracy`` is of the words
        behind the last picture.
        """
        prompt = batch.interleaved
        if prompt is None:
            assert batch.image is not None
            assert batch.text is not None
            prompt = Interleaved(in_front(len(batch.image), batch.text), batch.image)
        reading = self.read(prompt)
        wanted = following(reading.text)
        if prompt.learned is not None:
            learned = torch.zeros_like(reading.text.ids, dtype=torch.bool)
            learned[words_of(reading.text)] = prompt.learned[words_of(prompt.text)]
            wanted = wanted.where(learned[:, 1:], NOTHING)
        chosen = wanted != NOTHING
        logits = self._logits(reading, chosen)
        each = torch.zeros_like(wanted, dtype=torch.float32)
        each[chosen] = F.cross_entropy(logits, wanted[chosen], reduction="none")
        loss = (each.sum(1) / chosen.sum(1).clamp(min=1)).mean()
        right = (logits.argmax(1) == wanted[chosen]).float()
        last = behind_last_medium(reading.text)[chosen]
        accuracies = {"word_accuracy": right.mean(), "answer_accuracy": (right * last).sum() / last.sum().clamp(min=1)}
        return Losses(loss, {"words": loss.detach(), **accuracies})

    @torch.no_grad()
    def write(
        self, prompt: Interleaved, decoding: Decoding, seeds: Sequence[int], *, on_tokens: OnTokens | None = None
    ) -> list[Written]:
        """See `mm.types.Writes`."""
        check_decoding(decoding)
        reading = self.read(prompt)
        decoding = fitted(decoding, self.language, reading.vectors.shape[1])
        logits, state = self.language.prefill(
            reading.vectors,
            reading.text.lengths,
            decoding.max_tokens,
            reading.context,
            context_mask=reading.context_mask,
            last_context_mask=reading.last_context_mask,
        )
        return write(self.language, logits, state, decoding, seeds, end=decoding.end, on_tokens=on_tokens)

    @torch.no_grad()
    def continuation_likelihoods(self, prompt: Interleaved, candidates: TextBatch) -> Float[Tensor, "b a"]:
        """See `mm.types.Writes`. Each text is read once, whatever the number of candidates."""
        reading = self.read(prompt)
        logits, state = self.language.prefill(
            reading.vectors,
            reading.text.lengths,
            candidates.ids.shape[1],
            reading.context,
            context_mask=reading.context_mask,
            last_context_mask=reading.last_context_mask,
        )
        return continuation_likelihoods(self.language, logits, state, candidates)

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
        return self.write(Interleaved(in_front(len(image), beginning), image), decoding, seeds, on_tokens=on_tokens)

    @torch.no_grad()
    def caption_likelihoods(self, image: Tensor, text: TextBatch) -> Float[Tensor, " b"]:
        """See `mm.types.Captions`; a start, where the tokenizer has one, is predicted like any other token."""
        reading = self.read(Interleaved(in_front(len(image), text), image))
        wanted = following(reading.text)
        chosen = wanted != NOTHING
        each = torch.zeros_like(wanted, dtype=torch.float32)
        each[chosen] = -F.cross_entropy(self._logits(reading, chosen), wanted[chosen], reduction="none")
        return each.sum(1)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference; the projection into the shared space stays in fp32."""
        for name, part in self.named_children():
            if name not in ("image", "projection"):
                part.to(dtype)
        self.image.cast_(dtype)

    def state_from(self, start: System) -> dict[str, Tensor]:
        """An aligned dual tower gives its picture encoder and projection, a language model all that it is."""
        if isinstance(start, Language):
            return start.network.state_dict(prefix="language.")
        towers = getattr(start, "towers", None)
        if not isinstance(towers, DualTower):
            return super().state_from(start)
        given = towers.encoders["image"].state_dict(prefix="image.")
        if self.projection is not None:
            given |= {"projection.bias": torch.zeros_like(self.projection.bias)}
            given |= towers.projections["image"].state_dict(prefix="projection.")
        return given

    def _encode(self, image: Tensor) -> Float[Tensor, "m *n c"]:
        """Tokens, or one vector a picture."""
        encoded = self.image(image)
        if self.takes_tokens:
            return encoded.tokens
        if self.projection is None:
            return encoded.pooled
        vector = unit(self.projection(encoded.pooled.to(self.projection.weight.dtype)))
        return vector * self.settings.embed_dim**0.5  # components of about one

    def _no_features(self) -> Tensor:
        """Of no picture, which not every encoder takes."""
        image = self.image
        shape = (image.num_tokens, image.token_width) if self.takes_tokens else (self.settings.embed_dim or image.width,)
        return self.language.embed(torch.zeros(0, dtype=torch.int64, device=image.mean.device)).new_zeros(0, *shape)

    def _logits(self, reading: Reading, chosen: Tensor) -> Float[Tensor, "m v"]:
        """Of the words behind those positions, all but the last, that are chosen, fp32."""
        hidden = self.language(reading.vectors, reading.context, context_mask=reading.context_mask)
        return self.language.logits(hidden[:, :-1][chosen]).float()
