"""Better captions for training: a captioner writes some, a filter leaves out those, given or written, that do not fit.

CapFilt of BLIP, https://arxiv.org/abs/2201.12086, section 3.3: captions are drawn from the nucleus (0.9), since what a beam
search finds is safe and teaches little; captioner and filter are two models, and a new one is trained on what comes out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mm.data.write import Progress, write_shards
from mm.errors import BadSample, UserError
from mm.generators.writing import check_decoding
from mm.hub import Model
from mm.media.image import decode_image
from mm.run.evaluation import loaded
from mm.seeding import derive_seed
from mm.types import Captions, Decoding, Embeds, Matches, Sample, Source

NUCLEUS = Decoding(max_tokens=20, temperature=1.0, top_p=0.9)
"""How BLIP's captioner draws."""

MATCH_THRESHOLD = 0.5
WRITTEN_FIELD = "written_captions"
BATCH_SIZE = 64


@dataclass
class Filtered:
    """What became of the captions of a source.

    Attributes:
        shards: Where they are.
        given: Captions that came with the pictures.
        given_kept: Those that fit.
        written: Captions that the captioner wrote and that were not among the given ones.
        written_kept: Those that fit.
        samples: Pictures with a caption that fits.
        dropped: Pictures left without one.
        bad: Samples that cannot be read, by cause.
    """

    shards: list[Path] = field(default_factory=list)
    given: int = 0
    given_kept: int = 0
    written: int = 0
    written_kept: int = 0
    samples: int = 0
    dropped: int = 0
    bad: Counter[str] = field(default_factory=Counter)


def filter_captions(
    source: Source,
    folder: str | Path,
    judge: str | Path | Model,
    *,
    captioner: str | Path | Model | None = None,
    count: int = 1,
    threshold: float | None = None,
    beginning: str | None = None,
    decoding: Decoding = NUCLEUS,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Filtered:
    """Write a source as shards that hold, of all captions, those that fit their pictures, given ones first.

    Captions that a model wrote are also in the field ``written_captions`` of their sample.

    Args:
        source: Pictures, with captions or without.
        folder: New or empty folder for the shards.
        judge: Tells what fits: the probability that picture and text match of a model that reads both, else their cosine.
        captioner: Writes further captions; None only filters.
        count: Captions to write for each picture.
        threshold: The least that fits; default: a probability of 0.5. Cosines need it given.
        beginning: What written captions begin with; default: the captioner's usual one.
        decoding: How captions are written.
        seed: With the id of a sample it decides what is written for it.
        device: Where to compute.
        progress: Called with (samples done, in all).

    Raises:
        UserError: The judge neither reads pairs nor embeds, a threshold is missing or out of range, the captioner does not
            caption, or no caption of any picture fits.
    """
    judge = loaded(judge, device)
    fits = _fit(judge, threshold)
    writer = None if captioner is None else loaded(captioner, device)
    if count < 1:
        raise UserError(f"count is {count}; write at least 1 caption for each picture")
    if writer is not None and "captions" not in writer.capabilities:
        raise UserError(f"{writer.name} does not write captions; take a model such as emoji-captioner")
    check_decoding(decoding)
    result = Filtered()

    def kept() -> Iterator[Sample]:
        waiting: list[tuple[Sample, Tensor]] = []
        for pair in _readable(source, result):
            waiting.append(pair)
            if len(waiting) == BATCH_SIZE:
                yield from _fitting(waiting, write(waiting), fits, result)
                waiting = []
        yield from _fitting(waiting, write(waiting), fits, result)

    def write(pairs: Sequence[tuple[Sample, Tensor]]) -> list[tuple[str, ...]]:
        return [()] * len(pairs) if writer is None else _write(writer, pairs, count, beginning, decoding, seed)

    result.shards = write_shards(kept(), folder, total=len(source), progress=progress)
    if not result.samples:
        raise UserError(
            f"{source.name}: no caption fits its picture by {judge.name}; lower the threshold, or check the captions"
        )
    return result


Fits = Callable[[Sequence[Tensor], Sequence[str]], Sequence[bool]]


def _fit(judge: Model, threshold: float | None) -> Fits:
    """Whether text i fits picture i."""
    system = judge.system
    if "matches" in judge.capabilities and isinstance(system, Matches):
        least = MATCH_THRESHOLD if threshold is None else threshold
        if not 0 < least < 1:
            raise UserError(f"threshold {least}: {judge.name} gives probabilities; take a number between 0 and 1")

        @torch.no_grad()
        def match(pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
            pixels, ids = judge.processor.images(pictures).to(judge.device), judge.processor.text(texts).to(judge.device)
            return system.match(system.encode_image(pixels), system.encode_text(ids)).sigmoid()

        score = match
    elif isinstance(system, Embeds):
        if threshold is None or not -1 < threshold < 1:
            raise UserError(f"{judge.name} gives cosines, which have no usual threshold; give one between -1 and 1")
        least = threshold

        def cosine(pictures: Sequence[Tensor], texts: Sequence[str]) -> Tensor:
            return (judge.embed_images(pictures) * judge.embed_texts(texts)).sum(1)

        score = cosine
    else:
        raise UserError(f"{judge.name} neither reads pictures with texts nor embeds both; take a model such as emoji-albef")

    def fits(pictures: Sequence[Tensor], texts: Sequence[str]) -> list[bool]:
        parts = [slice(start, start + BATCH_SIZE) for start in range(0, len(texts), BATCH_SIZE)]
        found = torch.cat([score(pictures[part], texts[part]).float().cpu() for part in parts]) if parts else torch.empty(0)
        if found.isnan().any():
            raise UserError(f"{judge.name} computes NaN; its weights are damaged, so nothing can be judged")
        return (found >= least).tolist()

    return fits


def _readable(source: Source, result: Filtered) -> Iterator[tuple[Sample, Tensor]]:
    """Samples with their pictures, decoded; the others are counted."""
    for index in range(len(source)):
        try:
            sample = source.read(index)
            if "image" not in sample.media:
                raise BadSample("no picture", sample.id)
            yield sample, decode_image(sample.media["image"], where=sample.id)
        except BadSample as error:
            result.bad[error.cause] += 1


def _write(
    writer: Model,
    pairs: Sequence[tuple[Sample, Tensor]],
    count: int,
    beginning: str | None,
    decoding: Decoding,
    seed: int,
) -> list[tuple[str, ...]]:
    """New captions of each picture, without their beginning."""
    system, tokenizer = writer.system, writer.processor.tokenizer
    if not pairs:
        return []
    assert isinstance(system, Captions)
    start = next(iter(system.beginnings.values())) if beginning is None else beginning
    pixels = writer.processor.images([picture for _, picture in pairs]).to(writer.device)
    words = writer.processor.beginnings([start] * len(pairs)).to(writer.device)
    options = replace(decoding, end=tokenizer.end)
    found: list[dict[str, None]] = [{} for _ in pairs]
    for number in range(count):
        seeds = [derive_seed(seed, sample.id, number) for sample, _ in pairs]
        with torch.no_grad():
            drawn = system.caption(pixels, words, options, seeds)
        for place, written in enumerate(drawn):
            if text := tokenizer.decode(written.ids):
                found[place][text] = None
    return [tuple(texts) for texts in found]


def _fitting(
    pairs: Sequence[tuple[Sample, Tensor]], written: Sequence[tuple[str, ...]], fits: Fits, result: Filtered
) -> Iterator[Sample]:
    """The samples that keep a caption, with those that they keep."""
    given = [tuple(text for text in sample.texts if text.strip()) for sample, _ in pairs]
    known = [{" ".join(text.lower().split()) for text in texts} for texts in given]
    new = [tuple(text for text in texts if text not in old) for texts, old in zip(written, known, strict=True)]
    rows = [(place, text, kind) for place in range(len(pairs)) for kind in (given, new) for text in kind[place]]
    verdicts = fits([pairs[place][1] for place, *_ in rows], [text for _, text, _ in rows])
    kept = [row for row, fit in zip(rows, verdicts, strict=True) if fit]
    result.given += sum(map(len, given))
    result.written += sum(map(len, new))
    for place, (sample, _) in enumerate(pairs):
        own = [text for at, text, kind in kept if at == place and kind is given]
        made = [text for at, text, kind in kept if at == place and kind is new]
        result.given_kept += len(own)
        result.written_kept += len(made)
        if not own and not made:
            result.dropped += 1
            continue
        result.samples += 1
        yield replace(sample, texts=(*own, *made), fields={**sample.fields, **({WRITTEN_FIELD: made} if made else {})})
