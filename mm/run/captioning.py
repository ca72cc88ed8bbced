"""Pictures described in words: captions of one's own pictures, the best of many by another model's eyes, and their figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.data.accounting import Accounting
from mm.data.emoji import EmojiSource
from mm.data.sources import Subset
from mm.errors import UserError
from mm.evaluation.captioning import captioning, normalised
from mm.evaluation.generation import CLIP_SCORE_PREFIX, clip_score
from mm.evaluation.metrics import Result
from mm.evaluation.zero_shot import class_vectors, ranked
from mm.hub import Model
from mm.run.caption_references import References, caption_references, neighbour_captions, only, training_index
from mm.run.evaluation import encode, loaded, opened, refuse_incomplete, shared_out, stamp
from mm.run.inference import expand_folder
from mm.run.picture_controls import check_independent
from mm.run.reading import BATCH_SIZE, evaluation_loader
from mm.run.writing import Caption, Writer, best, choosing, usual_decoding
from mm.training.parallel import open_world
from mm.types import Decoding, Source

Progress = Callable[[int, int], None]

NONE = "none"
"""Leaves out a judge or a baseline that would be taken by itself."""

RANK = 5
"""Places that count for the judge; the first alone where there are no more names than that."""

EMOJI_JUDGE, EMOJI_NEIGHBOUR = "emoji-judge", "emoji-clip"
"""Taken for sources of emoji, where no other is given."""


def caption(
    model: str | Path | Model,
    images: Sequence[Any],
    *,
    language: str | None = None,
    prompt: str | None = None,
    count: int = 1,
    best_of: int = 1,
    ranker: str | Path | Model | None = None,
    decoding: Decoding | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> list[Caption]:
    """Write ``count`` captions of each picture.

    Args:
        model: A loaded model or a MODEL reference; it must write captions.
        images: Paths (a folder stands for all pictures in it), bytes, PIL images, arrays or tensors.
        language: Name of one of the model's beginnings; default: its first.
        prompt: Text to go on from instead.
        count: Captions of each picture.
        best_of: Candidates of each caption; the best by likelihood and ``ranker`` are taken, see `mm.run.writing.best`.
        ranker: A model with a shared space of pictures and texts, for ``best_of`` above 1.
        decoding: How to choose the words; default: `mm.run.writing.usual_decoding`.
        seed: With the picture's name and the candidate's number it decides what is drawn.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (pictures done, in all).

    Returns:
        The captions, picture by picture.

    Raises:
        UserError: The model writes no captions, the ranker has no shared space, there is no picture, or the settings do not go
            together.
    """
    model = loaded(model, device, precision)
    writer = Writer(model, language, prompt, decoding or usual_decoding(count, best_of), count * best_of, seed)
    chooser = choosing(ranker, best_of, device, precision)
    raws = [raw for image in images for raw in expand_folder(image)]
    if not raws:
        raise UserError("no pictures to describe")
    names = [str(raw) if isinstance(raw, str | Path) else f"picture {number}" for number, raw in enumerate(raws)]
    found: list[tuple[Caption, ...]] = []
    for start in range(0, len(raws), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        candidates = writer(model.processor.images(raws[part]), names[part])
        found += candidates if chooser is None else best(candidates, chooser, chooser.embed_images(raws[part]), count)
        if progress:
            progress(len(found), len(raws))
    return [one for of_picture in found for one in of_picture]


def evaluate_captioning(
    model: str | Path | Model,
    data: str | Source,
    *,
    language: str | None = None,
    prompt: str | None = None,
    label: str | None = None,
    decoding: Decoding | None = None,
    best_of: int = 1,
    ranker: str | Path | Model | None = None,
    judge: str | Path | Model | None = None,
    neighbour: str | Path | Model | None = None,
    train: str | Source | None = None,
    limit: int | None = None,
    seed: int = 0,
    image_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
    on_written: Callable[[Sequence[Caption]], None] | None = None,
) -> Result:
    """A model's captions of a source's pictures against what people said, beside the captions of the nearest known pictures.

    Args:
        model: A loaded model or a MODEL reference; it must write captions.
        data: A source. References are the captions of each sample or, where the source has named classes, the name, in the
            language of the captions where the source has it. Samples without one are left out.
        language: Name of one of the model's beginnings; default: its first.
        prompt: Text to go on from instead.
        label: Field with the references, ``txt`` for the captions; default: see ``data``.
        decoding: How to choose the words; default: `mm.run.writing.usual_decoding`.
        best_of: Candidates of each caption; the best by likelihood and ``ranker`` is taken, see `mm.run.writing.best`.
        ranker: A model with a shared space of pictures and texts, for ``best_of`` above 1.
        judge: A model with a shared space that had no part in writing and choosing. Default: `EMOJI_JUDGE` for emoji;
            ``none`` for none.
        neighbour: A model with a shared space whose nearest training picture lends its caption, as a baseline. Default:
            `EMOJI_NEIGHBOUR` for emoji; ``none`` for none.
        train: Pictures whose captions the baselines know. Default: what the model's card or run says that it learned from, else
            the source's own reference; ``none`` for no baselines.
        limit: Take only so many samples, the first ones.
        seed: With the sample's id and the candidate's number it decides what is drawn.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        text_field: Column or field that holds the captions, likewise.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        cache: Remember the vectors of judge, ranker and neighbour in the cache folder.
        progress: Called with (pictures done, in all) while captions are written.
        on_written: Receives the captions.

    Returns:
        The figures of `mm.evaluation.captioning.captioning`, with subset suffixes. Beside them ``baseline_...``, of the caption
        of the training picture that is nearest in pixels, and ``neighbour_...``, of the one nearest to ``neighbour``. For
        classes that belong to subgroups ``subgroup``, of captions and baselines: whether the caption is the name of a class of
        the right subgroup. With a judge and references from a field ``judge_rank5``: whether the caption is among the five
        names that it finds likeliest for the picture, and ``judge_rank5_real`` of the right names (the likeliest alone where
        there are no more than 5). With a judge or a ranker ``clipscore`` by it, see `mm.evaluation.generation.clip_score`.

    Raises:
        UserError: The models cannot do what is asked of them, the source has no references, or too many of its samples cannot
            be used.
    """
    model = loaded(model, device, precision)
    writer = Writer(model, language, prompt, decoding or usual_decoding(1, best_of), best_of, seed)
    source = opened(data, model, image_field=image_field, text_field=text_field)
    references = caption_references(source, label, writer.language, strict=language is not None)
    usual_judge, usual_finder = (EMOJI_JUDGE, EMOJI_NEIGHBOUR) if isinstance(source, EmojiSource) else (None, None)
    chooser = choosing(ranker, best_of, device, precision)
    critic = _helper(judge, usual_judge, "judge", device, precision)
    finder = _helper(neighbour, usual_finder, "neighbour", device, precision)
    if critic is not None:
        check_independent(critic, model, chooser, makes="writes")
    index = training_index(model, source, train, image_field=image_field, text_field=text_field)
    if limit is not None:
        source = Subset(source, range(min(limit, len(source))))
    with open_world(model.device.type) as world:
        describe = partial(_describe_all, writer, references, progress)
        described, accounting = shared_out(source, world, describe, _Described.read)
    refuse_incomplete(source, accounting)
    if not described:
        raise UserError(
            f"{source.name}: no sample has a caption; name the field with --label or --text-field, "
            "or put a .txt beside each picture"
        )

    def look(helper: Model) -> Tensor:
        """A helper's unit vectors of the described pictures, ``(n, D)``."""
        encoded = encode(helper, source, cache=cache)
        place = {sample["id"]: row for row, sample in enumerate(encoded.samples)}
        return encoded.images[[place[one.id] for one in described]]

    if chooser is not None:
        picked = best([one.captions for one in described], chooser, look(chooser))
        described = [replace(one, captions=captions) for one, captions in zip(described, picked, strict=True)]
    if on_written:
        on_written([one.captions[0] for one in described])
    baselines, facts = {}, {"baseline": "none, no training source is given or known"}
    if index is not None:
        asked, seen = only(source, [one.id for one in described]), None if finder is None else look(finder)
        baselines, facts = neighbour_captions(asked, index, references, finder, seen, cache=cache)
    texts, fields = [one.captions[0].text for one in described], [one.fields for one in described]
    rates: dict[str, list[float]] = {}
    if references.has_subgroups:
        for name, said in {"": texts, **{f"{name}_": said for name, said in baselines.items()}}.items():
            rates[f"{name}subgroup"] = references.subgroup_hits(said, fields)
    if critic is not None and references.label is not None:
        rates |= _judge_ranks(critic, look(critic), references, described)
        facts["judge"] = f"{critic.name} {critic.fingerprint[:16]}, ranks the names of all classes"
    result = captioning(
        texts,
        [one.references for one in described],
        baselines=baselines,
        rates=rates,
        subsets=references.masks(fields),
        protocol=stamp(model, source, accounting.describe()) | writer.stamp(chooser, best_of) | references.stamp() | facts,
    )
    by = critic or chooser
    if by is None:
        return result
    behind_prefix = by.embed_texts([CLIP_SCORE_PREFIX["original"] + text for text in texts])
    return result | clip_score(look(by), behind_prefix, protocol={"clipscore_by": by.name})


@dataclass(frozen=True)
class _Described:
    """A sample with its right captions and those that were written."""

    id: str
    fields: Mapping[str, Any]
    references: tuple[str, ...]
    captions: tuple[Caption, ...]

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "_Described":
        """From a dictionary that has been JSON."""
        captions = tuple(Caption(**caption) for caption in values["captions"])
        return cls(values["id"], values["fields"], tuple(values["references"]), captions)


def _describe_all(
    writer: Writer, references: References, progress: Progress | None, source: Source
) -> tuple[list[_Described], Accounting]:
    """Captions of every usable sample of a source that has a right one, and the counts of those that cannot be used."""
    loader = evaluation_loader(source, writer.model.processor)
    found: list[_Described] = []
    done = 0
    for batch in loader.one_epoch():
        assert batch.image is not None
        right = [references.of(*entry) for entry in zip(batch.fields, batch.captions, strict=True)]
        rows = [row for row, captions in enumerate(right) if captions]
        if rows:
            written = writer(batch.image[rows], [batch.ids[row] for row in rows])
            entries = zip(rows, written, strict=True)
            found += [_Described(batch.ids[row], batch.fields[row], right[row], captions) for row, captions in entries]
        done += len(batch)
        if progress:
            progress(done, len(source))
    return found, loader.accounting


def _judge_ranks(
    judge: Model, vectors: Tensor, references: References, described: Sequence[_Described]
) -> dict[str, list[float]]:
    """Whether what was written, and what is right, is among the names that a judge finds likeliest for each picture."""
    names = list(dict.fromkeys([*references.names, *(one.references[0] for one in described)]))
    candidates = class_vectors(judge.embed_texts, names, judge.processor.templates)
    order, _ = ranked(vectors, candidates, RANK if len(names) > RANK else 1)
    likeliest = [{normalised(names[column]) for column in row} for row in order.tolist()]
    said = {
        f"judge_rank{RANK}": [one.captions[0].text for one in described],
        f"judge_rank{RANK}_real": [one.references[0] for one in described],
    }
    return {
        name: [float(normalised(text) in likely) for text, likely in zip(texts, likeliest, strict=True)]
        for name, texts in said.items()
    }


def _helper(given: str | Path | Model | None, usual: str | None, role: str, device: str, precision: str) -> Model | None:
    """A judge or neighbour: the one that was given, else the usual one. Raises `UserError` where it has no shared space."""
    chosen = usual if given is None else given
    if chosen is None or chosen == NONE:
        return None
    helper = loaded(chosen, device, precision)
    if "embeds" not in helper.capabilities:
        raise UserError(f"{role} {helper.name}: has no shared space of pictures and texts; take a model such as emoji-clip")
    return helper
