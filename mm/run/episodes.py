"""Episodes as batches: pictures and names in one sequence, for training and for prompts. Picklable, for loader workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mm.data.augment import augment, may_flip
from mm.data.episodes import EpisodeConfig, Pool
from mm.processor import Processor
from mm.run.preparation import TrainPreparation, picture
from mm.seeding import derive_seed, generator
from mm.types import MEDIUM, Batch, Interleaved, Sample, TextBatch


@dataclass(frozen=True)
class Shown:
    """One prepared picture: pixels uint8 ``(3 or 4, S, S)``, and whether its mirror image means the same."""

    image: Tensor
    flippable: bool


@dataclass(frozen=True)
class EpisodeItem:
    """One prepared episode: its pictures, the text behind each, whether it is learned, and the seeds of the pictures' changes.

    The first example of a concept has a name that nothing before it tells, so it is not learned.
    """

    id: str
    shown: tuple[Shown, ...]
    texts: tuple[str, ...]
    learned: tuple[bool, ...]
    augment_seeds: tuple[int, ...]


@dataclass(frozen=True)
class EpisodePreparation:
    """Each sample is the query of an episode, or at times a captioned picture. Everything random is a function of (seed, visit,
    sample id, purpose).

    Args:
        base: Draws captions and prepares single pictures.
        pool: Where examples come from.
        config: How episodes are drawn.
        remembered: Decoded pictures by their id, filled up to ``config.remember`` of them.
    """

    base: TrainPreparation
    pool: Pool
    config: EpisodeConfig
    remembered: dict[str, Shown] = field(default_factory=dict)

    def __call__(self, sample: Sample, visit: int) -> EpisodeItem:
        config, seed = self.config, self.base.seed
        random = generator(seed, visit, sample.id, "episode")
        query = self._show(sample.id, lambda: sample)
        if random.random() < config.captions:
            caption = self.base.captioner(sample, generator(seed, visit, sample.id, "caption"))
            return self._item(sample.id, visit, [query], [caption], [True])
        ways = int(random.integers(config.ways[0], config.ways[1] + 1))
        shots = int(random.integers(config.shots[0], config.shots[1] + 1))
        ways = max(2, min(ways, self.pool.ways(sample.fields)))
        source = self.pool.source
        episode = self.pool.draw(random, sample.fields, ways=ways, shots=shots, query_id=sample.id, again=config.again)
        examples = [self._show(source.key(index), lambda index=index: source.read(index)) for index, _ in episode.support]
        order = [*(way for _, way in episode.support), episode.answer]
        texts = [config.template.format(episode.names[way]) for way in order]
        told = [way in order[:place] for place, way in enumerate(order)]
        return self._item(sample.id, visit, [*examples, query], texts, told)

    def collate(self, items: Sequence[EpisodeItem], epoch: int) -> Batch:
        """Change all pictures of the batch at once; what becomes of each depends on its own seed alone."""
        base, spec = self.base, self.base.processor.image_spec
        image = augment(
            [shown.image for item in items for shown in item.shown],
            [seed for item in items for seed in item.augment_seeds],
            base.augment.at(epoch),
            spec.size,
            background=spec.background,
            flippable=[shown.flippable for item in items for shown in item.shown],
        )
        text = captioned(base.processor, [item.texts for item in items])
        count = (text.ids == MEDIUM).cumsum(1)  # of the pictures up to each position
        flags = [torch.tensor([False, *item.learned]) for item in items]
        learned = torch.stack([flag[row] for flag, row in zip(flags, count, strict=True)])
        return Batch(ids=tuple(item.id for item in items), interleaved=Interleaved(text, image, learned))

    def _item(self, id: str, visit: int, shown: Sequence[Shown], texts: Sequence[str], learned: Sequence[bool]) -> EpisodeItem:
        seeds = tuple(derive_seed(self.base.seed, visit, id, "augment", place) for place in range(len(shown)))
        return EpisodeItem(id, tuple(shown), tuple(texts), tuple(learned), seeds)

    def _show(self, id: str, read: Callable[[], Sample]) -> Shown:
        if id in self.remembered:
            return self.remembered[id]
        sample = read()
        image = picture(sample, self.base.processor, keep_alpha=True)
        shown = Shown(image, may_flip(sample, self.base.augment))
        if len(self.remembered) < self.config.remember:
            self.remembered[id] = shown
        return shown


def captioned(processor: Processor, texts: Sequence[Sequence[str]], beginning: str | None = None) -> TextBatch:
    """Rows of pictures with their texts, each a place for the picture and then the text with its start and end.

    Args:
        processor: Whose tokenizer is used.
        texts: Of the pictures of each row.
        beginning: What a row ends with behind another picture, without an end, to be continued; None for no such picture.
    """
    chunks = processor.text([text for row in texts for text in row])
    rest = iter([MEDIUM, *ids[:length]] for ids, length in zip(chunks.ids.tolist(), chunks.lengths.tolist(), strict=True))
    last = [] if beginning is None else [MEDIUM, *_begun(processor, beginning)]
    rows = [[token for _ in row for token in next(rest)] + last for row in texts]
    ids = torch.full((len(rows), max(map(len, rows))), processor.tokenizer.pad)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
    return TextBatch(ids, torch.tensor(list(map(len, rows))))


def endings(processor: Processor, template: str, names: Sequence[str]) -> TextBatch:
    """What follows the beginning of a template with each of the names in it, ends included, as candidates to continue with."""
    skip = len(_begun(processor, template.partition("{}")[0]))
    whole = processor.text([template.format(name) for name in names])
    return TextBatch(whole.ids[:, skip:], whole.lengths - skip)


def _begun(processor: Processor, text: str) -> list[int]:
    """Ids of the beginning of a text, with its start."""
    tokenizer = processor.tokenizer
    return [*([] if tokenizer.start is None else [tokenizer.start]), *tokenizer.encode(text.rstrip())]
