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
"""Captions that are written together."""

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
        score: Cosine of picture and caption to the ranker, where there is one.
    """

    image: str
    text: str
    log_likelihood: float
    finished: bool
    number: int
    score: float | None = None


class Writer:
    """Writes captions of prepared pictures, with one model and one way to write.

    Args:
        model: Must write captions.
        language: Name of one of its beginnings; default: its first.
        prompt: Text to go on from instead.
        decoding: How to choose the words; default: as in `caption`.
        each: Captions of each picture.
        seed: Of all that is drawn.

    Raises:
        UserError: The model writes no captions, has no such beginning, or several captions would be one and the same.
    """

    def __init__(
        self, model: Model, language: str | None, prompt: str | None, decoding: Decoding | None, each: int, seed: int
    ) -> None:
        if "captions" not in model.capabilities or not isinstance(model.system, Captions):
            able = ", ".join(sorted(model.capabilities)) or "nothing yet"
            raise UserError(f"{model.name} writes no captions (it can: {able}); take a model that does, see `mm list`")
        if each < 1:
            raise UserError(f"{each} captions of a picture: at least one is written")
        self.model, self.each, self._system, self._seed = model, each, model.system, seed
        self.language, self.beginning = _beginning(model.name, model.system.beginnings, language, prompt)
        self.decoding = decoding or (DRAWN if each > 1 else Decoding())
        if each > 1 and (self.decoding.temperature == 0 or self.decoding.beams > 1):
            raise UserError(
                f"{each} captions of a picture: they are drawn, and would be the same with temperature "
                f"{self.decoding.temperature:g} and {self.decoding.beams} beams; take a temperature above 0 and 1 beam"
            )
        self._text = self._read()

    def __call__(self, pixels: Tensor, names: Sequence[str]) -> list[tuple[Caption, ...]]:
        """``each`` captions of prepared pictures, uint8 ``(B, 3, S, S)``; the seeds depend on the pictures' names."""
        jobs = [(row, number) for row in range(len(names)) for number in range(self.each)]
        found: list[Caption] = []
        for start in range(0, len(jobs), BATCH_SIZE):
            part = jobs[start : start + BATCH_SIZE]
            rows = [row for row, _ in part]
            text = TextBatch(self._text.ids.expand(len(rows), -1), self._text.lengths.expand(len(rows)))
            seeds = [derive_seed(self._seed, names[row], number) for row, number in part]
            with torch.no_grad():
                written = self._system.caption(
                    pixels[rows].to(self.model.device), text.to(self.model.device), self.decoding, seeds
                )
            for (row, number), one in zip(part, written, strict=True):
                words = self.model.processor.tokenizer.decode(one.ids)
                found.append(Caption(names[row], words, one.log_likelihood, one.finished, number))
        return [tuple(found[start : start + self.each]) for start in range(0, len(found), self.each)]

    def stamp(self, ranker: Model | None, best_of: int) -> dict[str, Any]:
        """What the protocol says of the writing."""
        facts = {"language": self.language} if self.language else {}
        return facts | {
            "beginning": repr(self.beginning),
            "decoding": str(self.decoding),
            "chosen": f"best of {best_of} by {ranker.name}" if ranker else "the only caption of each picture",
        }

    def _read(self) -> TextBatch:
        """The beginning as one row of ids, without an end."""
        processor = self.model.processor
        tokens = processor.tokenizer.encode(self.beginning)
        room = processor.context_length - sum(
            token is not None for token in (processor.tokenizer.start, processor.tokenizer.end)
        )
        if len(tokens) >= room:
            raise UserError(
                f"prompt '{self.beginning}': {len(tokens)} tokens leave no room for a caption, {self.model.name} reads {room}"
            )
        text = processor.text([self.beginning])
        ended = int(processor.tokenizer.end is not None)
        return TextBatch(text.ids[:, : len(text.ids[0]) - ended], text.lengths - ended)


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
    candidates: Sequence[Sequence[Caption]], ranker: Model, image_vectors: Tensor, best_of: int
) -> list[tuple[Caption, ...]]:
    """Of every ``best_of`` consecutive candidates of a picture the one that the ranker finds nearest to it, with its score.

    Args:
        candidates: Of each picture, all alike in number.
        ranker: A model with a shared space.
        image_vectors: Its unit vectors of the pictures, ``(n, D)``.
        best_of: Candidates of each caption.
    """
    texts = list(dict.fromkeys(one.text for of_picture in candidates for one in of_picture))
    place = {text: row for row, text in enumerate(texts)}
    vectors = class_vectors(ranker.embed_texts, texts, ranker.processor.templates)
    chosen = []
    for of_picture, image in zip(candidates, image_vectors, strict=True):
        scores = (vectors[[place[one.text] for one in of_picture]] @ image).tolist()
        scored = [replace(one, score=score) for one, score in zip(of_picture, scores, strict=True)]
        groups = (scored[start : start + best_of] for start in range(0, len(scored), best_of))
        chosen.append(tuple(max(group, key=lambda one: one.score or 0.0) for group in groups))
    return chosen


def choosing(ranker: str | Path | Model | None, best_of: int, device: str, precision: str) -> Model | None:
    """The model that chooses among candidates, where there are several. Raises `UserError` where it cannot or is not given."""
    if best_of > 1 and ranker is None:
        raise UserError("best_of needs a ranker that chooses; give one such as emoji-clip")
    return ranking(loaded(ranker, device, precision)) if ranker is not None and best_of > 1 else None
