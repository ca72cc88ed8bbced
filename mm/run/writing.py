"""Writing captions of prepared pictures: in a language or behind a prompt, several of each, the best as another model sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.data.fields import nearest
from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.run.evaluation import loaded
from mm.run.generation import ranking
from mm.seeding import derive_seed
from mm.types import Captions, Decoding, TextBatch

BATCH_SIZE = 64
"""Captions, or beams, that are written together."""

DRAWN = Decoding(temperature=1.0)
"""How several captions of a picture are written, where nothing is said."""


@dataclass(frozen=True)
class Caption:
    """What a model wrote about a picture.

    Args:
        image: What the caller called the picture.
        text: The words behind the beginning.
        log_likelihood: In nats, of the words and their end, by the model that wrote them.
        finished: Whether the caption ended by itself, not at the longest length.
        number: Of the caption among all candidates of its picture, from 0.
        score: What it was chosen by, where a ranker had a say, see `best`.
    """

    image: str
    text: str
    log_likelihood: float
    finished: bool
    number: int
    score: float | None = None


def usual_decoding(count: int, best_of: int) -> Decoding:
    """The likeliest word at a time; drawn where several captions are to differ, by beams where there are candidates."""
    if best_of > 1:
        return Decoding(beams=count * best_of)
    return DRAWN if count > 1 else Decoding()


class Writer:
    """Writes captions of prepared pictures, with one model and one way to write.

    Args:
        model: Must write captions.
        language: Name of one of its beginnings; default: its first.
        prompt: Text to go on from instead.
        decoding: How to choose the words.
        each: Captions of each picture: drawn one by one, or the best beams, of which there may be fewer.
        seed: Of all that is drawn.

    Raises:
        UserError: The model writes no captions, has no such beginning, or several captions would be one and the same.
    """

    def __init__(
        self, model: Model, language: str | None, prompt: str | None, decoding: Decoding, each: int, seed: int
    ) -> None:
        if "captions" not in model.capabilities or not isinstance(model.system, Captions):
            able = ", ".join(sorted(model.capabilities)) or "nothing yet"
            raise UserError(f"{model.name} writes no captions (it can: {able}); take a model that does, see `mm list`")
        if each < 1:
            raise UserError(f"{each} captions of a picture: at least one is written")
        self.model, self.each, self._system, self._seed = model, each, model.system, seed
        self.language, self.beginning = _beginning(model.name, model.system.beginnings, language, prompt)
        self.decoding = decoding
        self._searches = self.decoding.beams > 1
        if each > max(1, self.decoding.beams) and self.decoding.temperature == 0:
            raise UserError(
                f"{each} captions of a picture from {self.decoding.beams} beams without drawing: some would be the same; "
                f"take {each} beams, or a temperature above 0"
            )
        self._text = self._read()

    def __call__(self, pixels: Tensor, names: Sequence[str]) -> list[tuple[Caption, ...]]:
        """``each`` captions of prepared pictures, uint8 ``(B, 3, S, S)``; the seeds depend on the pictures' names."""
        jobs = [(row, number) for row in range(len(names)) for number in range(1 if self._searches else self.each)]
        found: list[list[Caption]] = [[] for _ in names]
        decoding = replace(self.decoding, end=self.model.processor.tokenizer.end)
        together = max(1, BATCH_SIZE // self.decoding.beams)
        for start in range(0, len(jobs), together):
            part = jobs[start : start + together]
            rows = [row for row, _ in part]
            text = self._text[torch.zeros(len(rows), dtype=torch.int64)].to(self.model.device)
            seeds = [derive_seed(self._seed, names[row], number) for row, number in part]
            with torch.no_grad():
                written = self._system.caption(pixels[rows].to(self.model.device), text, decoding, seeds)
            for (row, number), best in zip(part, written, strict=True):
                for place, one in enumerate((best, *best.others)[: self.each]):
                    words = self.model.processor.tokenizer.decode(one.ids)
                    found[row].append(Caption(names[row], words, one.log_likelihood, one.finished, number + place))
        return [tuple(captions) for captions in found]

    def stamp(self, ranker: Model | None, best_of: int) -> dict[str, Any]:
        """What the protocol says of the writing."""
        facts = {"language": self.language} if self.language else {}
        return facts | {
            "beginning": repr(self.beginning),
            "decoding": str(self.decoding),
            "chosen": f"best of {best_of} by likelihood and {ranker.name}" if ranker else "the likeliest or only caption",
        }

    def _read(self) -> TextBatch:
        """The beginning as one row of ids, without an end."""
        processor = self.model.processor
        tokens = processor.tokenizer.encode(self.beginning)
        ends = (processor.tokenizer.start, processor.tokenizer.end)
        room = processor.context_length - sum(token is not None for token in ends)
        if len(tokens) >= room:
            raise UserError(
                f"prompt '{self.beginning}': {len(tokens)} tokens leave no room for a caption, {self.model.name} reads {room}"
            )
        return processor.beginnings([self.beginning])


def _beginning(name: str, beginnings: Mapping[str, str], language: str | None, prompt: str | None) -> tuple[str | None, str]:
    """The language of captions, where it is known, and the text that they are begun with."""
    if prompt is not None and language is not None:
        raise UserError(f"language '{language}' and prompt '{prompt}': both begin the caption; give one of them")
    if prompt is not None:
        return None, prompt
    chosen = language or next(iter(beginnings), None)
    if chosen is None:
        return None, ""
    if chosen not in beginnings:
        raise UserError(f"{name}: writes no captions in the language '{chosen}'; {nearest(chosen, list(beginnings))}")
    return chosen, beginnings[chosen]


def best(
    candidates: Sequence[Sequence[Caption]], ranker: Model, image_vectors: Tensor, count: int = 1
) -> list[tuple[Caption, ...]]:
    """Of each picture's candidates the ``count`` best different ones, by what both models think of them.

    The score is the log-likelihood by the writer plus the ranker's logit of picture and caption: both are logarithms of what a
    model believes, up to a constant of the picture. The ranker alone would take odd words for good names.

    Args:
        candidates: Of each picture.
        ranker: A model with a shared space.
        image_vectors: Its unit vectors of the pictures, ``(n, D)``.
        count: Captions wanted.
    """
    texts = list(dict.fromkeys(one.text for of_picture in candidates for one in of_picture))
    place = {text: row for row, text in enumerate(texts)}
    vectors = class_vectors(ranker.embed_texts, texts, ranker.processor.templates)
    chosen = []
    for of_picture, image in zip(candidates, image_vectors, strict=True):
        logits = ranker.scores(image[None], vectors[[place[one.text] for one in of_picture]])[0].tolist()
        scored = [replace(one, score=one.log_likelihood + logit) for one, logit in zip(of_picture, logits, strict=True)]
        scored.sort(key=lambda one: -(one.score or 0.0))
        different = {one.text: one for one in reversed(scored)}
        chosen.append(tuple(one for one in scored if different[one.text] is one)[:count])
    return chosen


def choosing(ranker: str | Path | Model | None, best_of: int, device: str, precision: str) -> Model | None:
    """The model that chooses among candidates, where there are several. Raises `UserError` where it cannot or is not given."""
    if best_of > 1 and ranker is None:
        raise UserError("best_of needs a ranker that chooses; give one such as emoji-clip")
    return ranking(loaded(ranker, device, precision)) if ranker is not None and best_of > 1 else None
