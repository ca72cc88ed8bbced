"""Evaluation of a model on a source: encode once, remember the vectors, hand them to the evaluators, stamp the protocol."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save
from torch import Tensor

from mm.data.accounting import Accounting
from mm.data.captions import look_up
from mm.data.labels import LabelTask, label_of, label_task
from mm.data.sources import CaptionAsField, Subset, open_source, revision
from mm.errors import BadSample, DataError, UserError
from mm.evaluation.baseline import pixel_baseline, thumbnails
from mm.evaluation.compositional import pair_scores, sugarcrepe, winoground
from mm.evaluation.metrics import Result
from mm.evaluation.retrieval import retrieval
from mm.evaluation.zero_shot import class_vectors, ranked, zero_shot
from mm.hub import Model, load, load_painter
from mm.media.image import decode_image
from mm.paths import cache_folder
from mm.run.reading import MAX_BAD_SHARE, evaluation_loader
from mm.training.parallel import World, gather_bytes, open_world
from mm.types import Sample, Source

Progress = Callable[[int, int], None]
Medium = Literal["image", "audio"]
Between = tuple[Literal["image", "audio", "text"], Literal["image", "audio", "text"]]
T = TypeVar("T")

CAPTION_LABEL = "txt"
"""What ``label`` is called where the first caption of a sample is the name of its class."""

PROBED = 20
"""Samples that are tried to find out what a source holds."""

RANKED = 5
"""Classes of a picture that a caller of `evaluate_zero_shot` is told."""


COMMANDS = {"zero-shot": "zero-shot", "winoground": "compositional", "sugarcrepe": "compositional", "vqa": "vqa"}
"""``mm eval`` command for what figures of a set are published for, where it is not retrieval."""


@dataclass(frozen=True)
class EncodedSource:
    """What a model made of a source, in the source's order; samples that cannot be used are left out and counted.

    Args:
        images: Of the pictures, or of the recordings where these were asked for: unit vectors ``(N, D)``, fp32.
        samples: Id (``"id"``), fields (``"fields"``) and captions (``"captions"``) of each sample.
        accounting: One line that counts the samples delivered and skipped by cause.
    """

    images: Tensor
    samples: tuple[Mapping[str, Any], ...]
    accounting: str


@dataclass(frozen=True)
class Classified:
    """A picture of a zero-shot evaluation.

    Args:
        id: The sample's.
        right: Its class.
        ranked: The likeliest classes, best first: `RANKED` of them, or all where there are fewer.
        fields: The sample's.
    """

    id: str
    right: str
    ranked: tuple[str, ...]
    fields: Mapping[str, Any]


def evaluate_zero_shot(
    model: str | Path | Model,
    data: str | Source,
    *,
    media: Medium | None = None,
    classes: Sequence[str] | None = None,
    label: str | None = None,
    image_field: str | None = None,
    audio_field: str | None = None,
    templates: Sequence[str] | None = None,
    baseline: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
    on_classified: Callable[[Sequence[Classified]], None] | None = None,
) -> Result:
    """Zero-shot classification of a labelled source.

    Args:
        model: A loaded model or a MODEL reference.
        data: A source. Pictures whose label is not among the classes are left out, and the stamp says how many remain.
        media: What is classified: ``image`` or ``audio``; default: pictures, recordings where the first sample has no picture.
        classes: Candidate names; default: the source's own.
        label: Field that holds the class name, ``txt`` for the caption; default: the source's own.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        audio_field: Column that holds the recordings, likewise.
        templates: Prompt ensemble; default: the one published for the data set, else the processor's.
        baseline: Labelled source for nearest neighbour on pixels, ``none`` for no baseline; default: the source's own, if any.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        cache: Remember the vectors of this model on this source and of its texts in the cache folder.
        progress: Called with (done, total) while encoding.
        on_classified: Receives what each picture was taken for.

    Returns:
        ``top1``, ``top5``, ``mean_per_class``, the same with subset suffixes, and ``baseline_top1``.

    Raises:
        UserError: When labels, classes or templates do not fit the source.
    """
    model = loaded(model, device, precision)
    source = opened(data, model, image_field=image_field, audio_field=audio_field)
    if label == CAPTION_LABEL:
        source = CaptionAsField(source, CAPTION_LABEL)
    task = label_task(source, label=label, classes=classes)
    media = media or medium_of(source)
    prompts = tuple(templates or getattr(source, "templates", ()) or model.processor.templates)
    fingerprint = model.fingerprint
    with open_world(model.device.type) as world:
        encoded = encode(model, source, media, cache=cache, progress=progress, world=world, fingerprint=fingerprint)
        embed, key = embed_texts_together(model, world), [fingerprint, task.classes, prompts] if cache else None
        vectors = text_vectors(lambda: class_vectors(embed, task.classes, prompts), key, world)
    fields = [sample["fields"] for sample in encoded.samples]
    rows, labels = labelled(fields, task, source)
    if on_classified:
        order, _ = ranked(encoded.images[rows], vectors, min(RANKED, len(task.classes)))
        on_classified(
            [
                Classified(encoded.samples[row]["id"], task.classes[right], tuple(task.classes[c] for c in best), fields[row])
                for row, right, best in zip(rows, labels.tolist(), order.tolist(), strict=True)
            ]
        )
    result = zero_shot(
        encoded.images[rows],
        vectors,
        labels,
        subsets=subset_masks([fields[row] for row in rows], task),
        what="pictures" if media == "image" else "recordings",
        protocol=stamp(model, source, encoded.accounting, fingerprint) | {"label": task.label, "templates": list(prompts)},
    )
    reference = baseline or (task.reference if media == "image" else None)
    if reference and reference != "none":
        result |= _baseline(source, reference, task, progress)
    return result


def evaluate_retrieval(
    model: str | Path | Model,
    data: str | Source,
    *,
    between: Between = ("image", "text"),
    image_field: str | None = None,
    audio_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
    on_encoded: Callable[["Captioned"], None] | None = None,
) -> Result:
    """Retrieval both ways among all pictures (or recordings) of a source and all their captions, or pictures and recordings.

    Args:
        model: A loaded model or a MODEL reference.
        data: A source.
        between: The two sides, of ``image``, ``audio`` and ``text``.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        audio_field: Column that holds the recordings, likewise.
        text_field: Column or field that holds the captions, likewise.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        cache: Remember the vectors of this model on this source and of its texts in the cache folder.
        progress: Called with (done, total) while encoding.
        on_encoded: Receives the vectors that are compared.

    Raises:
        UserError: When no sample of the source has a caption, or its figures are published for another task, or the two sides
            are none.
    """
    if set(between) not in ({"image", "text"}, {"audio", "text"}, {"audio", "image"}):
        raise UserError(f"between '{','.join(between)}': give two of image, audio and text, such as audio,text")
    model = loaded(model, device, precision)
    source = opened(data, model, image_field=image_field, audio_field=audio_field, text_field=text_field)
    check_retrieval_set(source)
    fingerprint = model.fingerprint
    with open_world(model.device.type) as world:
        options: dict[str, Any] = {"cache": cache, "progress": progress, "fingerprint": fingerprint}
        if "text" in between:
            medium: Medium = "audio" if "audio" in between else "image"
            pairs = encode_captioned(model, source, world, medium, **options)
            sides, right, fields = (pairs.images, pairs.texts), pairs.image_of, pairs.fields
            accounting, names = pairs.accounting, (medium, "text")
            if on_encoded:
                on_encoded(pairs)
        else:
            pictures, sounds = (encode(model, source, medium, world=world, **options) for medium in ("image", "audio"))
            both = {sample["id"]: row for row, sample in enumerate(sounds.samples)}
            rows = [row for row, sample in enumerate(pictures.samples) if sample["id"] in both]
            fields = [pictures.samples[row]["fields"] for row in rows]
            sides = pictures.images[rows], sounds.images[[both[pictures.samples[row]["id"]] for row in rows]]
            right, accounting, names = torch.arange(len(rows)), pictures.accounting, ("image", "audio")
    return retrieval(
        *sides,
        right,
        subsets=_subsets(source, fields),
        protocol=stamp(model, source, accounting, fingerprint),
        modalities=names,
        precisions="audio" in names,
    )


def _subsets(source: Source, fields: Sequence[Mapping[str, Any]]) -> dict[str, list[bool]]:
    """Masks over samples, where the source says which of them belong together."""
    task = getattr(source, "task", None)
    masks = {} if task is None else subset_masks(fields, task)
    return masks if len(masks) > 1 else {}


def medium_of(source: Source) -> Medium:
    """``audio`` where the first sample that can be read has a recording and no picture."""
    for index in range(min(len(source), PROBED)):
        with suppress(BadSample):
            media = source.read(index).media
            return "audio" if "audio" in media and "image" not in media else "image"
    return "image"


@dataclass(frozen=True)
class Captioned:
    """What a model made of the N captioned pictures of a source and of their M captions.

    Args:
        images: Unit vectors ``(N, D)``, fp32.
        texts: Unit vectors ``(M, D)``, fp32.
        image_of: Index of each caption's picture, ``(M,)`` int64.
        ids: Of the pictures.
        captions: Of all pictures, one after the other.
        accounting: One line that counts the samples delivered and skipped by cause.
    """

    images: Tensor
    texts: Tensor
    image_of: Tensor
    ids: tuple[str, ...]
    captions: tuple[str, ...]
    accounting: str
    fields: tuple[Mapping[str, Any], ...] = ()


def encode_captioned(
    model: Model,
    source: Source,
    world: World,
    media: Medium = "image",
    *,
    cache: bool,
    progress: Progress | None,
    fingerprint: str,
) -> Captioned:
    """Vectors of the captioned pictures (or recordings) of a source and of their captions; arguments as `encode`.

    Raises:
        UserError: No sample has a caption; what `encode` raises.
    """
    encoded = encode(model, source, media, cache=cache, progress=progress, world=world, fingerprint=fingerprint)
    rows = [row for row, sample in enumerate(encoded.samples) if sample["captions"]]
    if not rows:
        raise UserError(
            f"{source.name}: no sample has a caption; put a .txt beside each picture or a caption column in the table"
        )
    captions = tuple(caption for row in rows for caption in encoded.samples[row]["captions"])
    embed = embed_texts_together(model, world)
    return Captioned(
        images=encoded.images[rows],
        texts=text_vectors(lambda: embed(captions), [fingerprint, captions] if cache else None, world),
        image_of=torch.tensor([place for place, row in enumerate(rows) for _ in encoded.samples[row]["captions"]]),
        ids=tuple(encoded.samples[row]["id"] for row in rows),
        captions=captions,
        accounting=encoded.accounting,
        fields=tuple(encoded.samples[row]["fields"] for row in rows),
    )


def check_retrieval_set(source: Source) -> None:
    """Raises `UserError` for a source whose figures are published for another task."""
    kind = getattr(source, "evaluation", None)
    if kind not in (None, "retrieval"):
        hint = f"measure it with `mm eval {COMMANDS[kind]}`" if kind in COMMANDS else "give a set such as coco:FOLDER"
        raise UserError(f"{source.name}: a {kind} set, whose texts are not for retrieval; {hint}")


def evaluate_compositional(
    model: str | Path | Model,
    data: str | Source,
    *,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Winoground's scores or SugarCrepe's accuracies, as the source asks for.

    Raises:
        UserError: The source is neither of them, or a picture of it cannot be used: no example may be left out.
    """
    model = loaded(model, device, precision)
    source = opened(data, model)
    kind = getattr(source, "evaluation", None)
    if kind not in ("winoground", "sugarcrepe"):
        raise UserError(f"{source.name}: not a compositional set; give winoground:FOLDER or sugarcrepe:FOLDER")
    fingerprint = model.fingerprint
    with open_world(model.device.type) as world:
        encoded = encode(model, source, cache=cache, progress=progress, world=world, fingerprint=fingerprint)
        fields = [sample["fields"] for sample in encoded.samples]
        right = [sample["captions"][0] for sample in encoded.samples]
        embed = embed_texts_together(model, world)
        texts = embed(right if kind == "winoground" else [*right, *(entry["negative"] for entry in fields)])
    protocol = stamp(model, source, encoded.accounting, fingerprint)
    if kind == "winoground":
        return winoground(pair_scores(encoded.images.unflatten(0, (-1, 2)), texts.unflatten(0, (-1, 2))), protocol=protocol)
    scores = pair_scores(encoded.images[:, None], texts.unflatten(0, (2, -1)).transpose(0, 1))[:, 0]
    return sugarcrepe(scores, [entry["category"] for entry in fields], protocol=protocol)


def encode(
    model: Model,
    source: Source,
    media: Medium = "image",
    *,
    cache: bool = True,
    progress: Progress | None = None,
    world: World | None = None,
    fingerprint: str | None = None,
) -> EncodedSource:
    """Vectors of every picture (or recording) of a source, from the cache where the same model has met the same source before.

    Several processes share the work, each a stretch of the source; all of them return the whole, or raise alike.

    Args:
        model: What encodes.
        source: The pictures.
        media: What of its samples is encoded: ``image`` or ``audio``.
        cache: Remember the vectors in the cache folder.
        progress: Called with (done, total).
        world: The processes that share the work; default: this one alone.
        fingerprint: The model's, where the caller has it already: it is a digest of all weights.

    Raises:
        UserError: No sample of the source can be used, more than a fifth cannot, or one of a published set cannot.
    """
    path = _cache_file(fingerprint or model.fingerprint, source, media) if cache else None
    remembered = _recall(path, _unpack) if path else None
    world = world or World(0, 1, model.device)
    if all(flag == b"1" for flag in gather_bytes(b"0" if remembered is None else b"1", world)) and remembered is not None:
        return _encoded(source, *remembered)
    first, last = stretch(len(source), world)
    own = source if world.size == 1 else Subset(source, range(first, last), name=source.name)
    parts = [_unpack(part) for part in gather_bytes(_pack(*_encode_here(model, own, media, progress)), world)]
    accounting = Accounting()
    for _, _, part in parts:
        accounting.add(part)
    samples = [sample for _, part, _ in parts for sample in part]
    encoded = _encoded(source, torch.cat([vectors for vectors, _, _ in parts]), samples, accounting)
    if path and world.is_main:
        _remember(path, _pack(encoded.images, samples, accounting))
    return encoded


def _encoded(source: Source, vectors: Tensor, samples: Sequence[Mapping[str, Any]], accounting: Accounting) -> EncodedSource:
    """What was encoded, unless so much of the source is missing that its figures would mislead."""
    refuse_incomplete(source, accounting)
    return EncodedSource(vectors, tuple(samples), accounting.describe())


def refuse_incomplete(source: Source, accounting: Accounting) -> None:
    """Raise `DataError` where so much of a source could not be used that its figures would mislead."""
    allowed = MAX_BAD_SHARE if getattr(source, "evaluation", None) is None else 0
    if not accounting.delivered or accounting.skipped > allowed * accounting.indexed:
        cause, where = next(iter(accounting.examples.items()), ("empty", source.name))
        remedy = "run `mm data check` on it" if allowed else "a published set is measured whole, complete the copy"
        raise DataError(
            f"{source.name}: too few samples can be used: {accounting.describe()}; for example {cause}: {where}; {remedy}"
        )


def embed_texts_together(model: Model, world: World) -> Callable[[Sequence[str]], Tensor]:
    """`Model.embed_texts` with the work shared among processes, each a stretch of the texts."""

    def embed(texts: Sequence[str]) -> Tensor:
        first, last = stretch(len(texts), world)
        parts = gather_bytes(save({"vectors": model.embed_texts(texts[first:last])}), world)
        return torch.cat([_vectors(part) for part in parts])

    return embed


def text_vectors(compute: Callable[[], Tensor], key: Sequence[Any] | None, world: World) -> Tensor:
    """Vectors of texts, remembered where ``key`` says whose they are: a data set has the same prompts at every evaluation.

    Args:
        compute: Gives them; called by all processes, or by none.
        key: The model's fingerprint and all that the vectors depend on; None does not remember.
        world: This process among all.
    """
    if key is None:
        return compute()
    digest = hashlib.sha256(json.dumps(["texts", *key]).encode()).hexdigest()
    path = cache_folder() / "vectors" / f"{digest[:32]}.safetensors"
    remembered = _recall(path, _vectors)
    if all(flag == b"1" for flag in gather_bytes(b"0" if remembered is None else b"1", world)) and remembered is not None:
        return remembered
    vectors = compute()
    if world.is_main:
        _remember(path, save({"vectors": vectors.contiguous()}))
    return vectors


def _encode_here(
    model: Model, source: Source, media: Medium, progress: Progress | None
) -> tuple[Tensor, list[Mapping[str, Any]], Accounting]:
    """What this process encodes: vectors, samples and counts. Pictures are decoded beside the network where it pays."""
    if not len(source):  # fewer samples than processes
        return torch.empty(0, model.embed_dim), [], Accounting()
    _check_medium(model, media)
    loader = evaluation_loader(source, model.processor, (media,))  # what all processes left out is judged in `encode`
    vectors: list[Tensor] = []
    samples: list[Mapping[str, Any]] = []
    for batch in loader.one_epoch():
        if batch.audio is not None:
            vectors.append(model.embed_waves(batch.audio))
        else:
            assert batch.image is not None
            vectors.append(model.embed_pixels(batch.image))
        entries = zip(batch.ids, batch.fields, batch.captions, strict=True)
        samples += [{"id": name, "fields": fields, "captions": captions} for name, fields, captions in entries]
        if progress:
            progress(len(samples), len(source))
    return torch.cat(vectors) if vectors else torch.empty(0, model.embed_dim), samples, loader.accounting


def _check_medium(model: Model, media: Medium) -> None:
    """Raises `UserError` where the model does not take it."""
    _ = model.processor.audio_spec if media == "audio" else model.processor.image_spec


def shared_out(
    source: Source,
    world: World,
    work: Callable[[Source], tuple[list[T], Accounting]],
    read: Callable[[Mapping[str, Any]], T],
) -> tuple[list[T], Accounting]:
    """What ``work`` makes of all samples of a source, of which each process has a stretch; all of them return the whole.

    Args:
        source: The samples.
        world: The processes.
        work: A source's samples to data classes that JSON can hold, in their order, and the counts of the samples.
        read: Such a data class from the dictionary of its fields.
    """
    if world.size == 1:
        return work(source)
    first, last = stretch(len(source), world)
    found, counts = work(Subset(source, range(first, last), name=source.name)) if first < last else ([], Accounting())
    own = json.dumps({"found": [asdict(one) for one in found], "counts": counts.to_dict()}, default=str)  # pyright: ignore[reportArgumentType]
    everything, accounting = [], Accounting()
    for part in map(json.loads, gather_bytes(own.encode(), world)):
        everything += map(read, part["found"])
        accounting.add(Accounting.from_dict(part["counts"]))
    return everything, accounting


def stretch(length: int, world: World) -> tuple[int, int]:
    """First and last (exclusive) of this process's part of ``length`` things."""
    return length * world.rank // world.size, length * (world.rank + 1) // world.size


def _pack(vectors: Tensor, samples: Sequence[Mapping[str, Any]], accounting: Accounting) -> bytes:
    text = json.dumps({"samples": list(samples), "accounting": accounting.to_dict()}, default=str)
    return save({"vectors": vectors.contiguous(), "text": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)})


def _unpack(data: bytes) -> tuple[Tensor, list[Mapping[str, Any]], Accounting]:
    tensors = load_tensors(data)
    values = json.loads(tensors["text"].numpy().tobytes())
    return tensors["vectors"], values["samples"], Accounting.from_dict(values["accounting"])


def loaded(model: str | Path | Model, device: str, precision: str = "auto", *, painting: bool = False) -> Model:
    """The model itself, or the one that a MODEL reference names, on the chosen device and in the chosen precision.

    Only for ``painting``, see `mm.hub.load_painter`.
    """
    if isinstance(model, Model):
        return model
    return (load_painter if painting else load)(model, device=device, precision=precision)


def opened(
    data: str | Source,
    model: Model,
    *,
    image_field: str | None = None,
    audio_field: str | None = None,
    text_field: str | None = None,
) -> Source:
    """The source itself, or the one that a SRC names, with vector art drawn at the model's size."""
    if not isinstance(data, str):
        return data
    size: dict[str, Any] = {"image_size": model.processor.image_spec.size} if model.processor.has_image else {}
    return open_source(data, image_field=image_field, audio_field=audio_field, text_field=text_field, **size)


def labelled(fields: Sequence[Mapping[str, Any]], task: LabelTask, source: Source) -> tuple[list[int], Tensor]:
    """Rows whose label is among the classes, and its index. Raises `UserError` where there is none."""
    index = task.index()
    labels = [label_of(entry, task.label) for entry in fields]
    if not any(label in index for label in labels):  # class numbers, as webdataset's .cls files hold them
        index = {str(position): position for position in range(len(task.classes))}
    rows = [row for row, label in enumerate(labels) if label in index]
    if not rows:
        example = next((label for label in labels if label is not None), None)
        raise UserError(f"{source.name}: no picture has a label among the {len(index)} classes (a label here is {example!r})")
    return rows, torch.tensor([index[str(labels[row])] for row in rows])


def subset_masks(fields: Sequence[Mapping[str, Any]], task: LabelTask) -> dict[str, list[bool]]:
    """Masks over samples for each value of the task's subset field."""
    if task.subsets is None:
        return {}
    values = [str(look_up(entry, task.subsets)) for entry in fields]
    return {name: [value == name for value in values] for name in sorted(set(values))}


def _baseline(source: Source, reference: str, task: LabelTask, progress: Progress | None) -> Result:
    """Nearest neighbour on pixels, on the same pictures and classes."""
    sides = []
    for side in (open_source(reference), source):
        pictures, samples = thumbnails_of(side, progress)
        fields = [sample.fields for sample in samples]
        rows, labels = labelled(fields, task, side)
        sides.append((pictures[rows], labels.tolist(), [fields[row] for row in rows]))
    (index, index_labels, _), (queries, query_labels, query_fields) = sides
    return pixel_baseline(
        index,
        index_labels,
        queries,
        query_labels,
        subsets=subset_masks(query_fields, task),
        protocol={"baseline_index": reference},
    )


def thumbnails_of(source: Source, progress: Progress | None) -> tuple[Tensor, list[Sample]]:
    """Thumbnails of every picture of a source that can be used, and the samples without media; no full size is kept.

    Raises:
        UserError: No picture can be used.
    """
    samples: list[Sample] = []

    def pictures() -> Iterator[Tensor]:
        for index in range(len(source)):
            try:
                sample = source.read(index)
                picture = decode_image(sample.media["image"], where=sample.id)
            except (BadSample, KeyError):
                continue
            samples.append(replace(sample, media={}))
            if progress:
                progress(index + 1, len(source))
            yield picture

    return thumbnails(pictures()), samples


def stamp(model: Model, source: Source, samples: str, fingerprint: str | None = None) -> dict[str, Any]:
    """What every evaluation states: model, data, preparation, precision, and how many samples could be used.

    The model's fingerprint is taken from the caller where it has it already.
    """
    return {
        "model": model.name,
        "data": source.name,
        "samples": samples,
        **model.processor.stamp(),
        "precision": str(model.dtype).removeprefix("torch."),
        "data_fingerprint": source.fingerprint[:16],
        "model_fingerprint": (fingerprint or model.fingerprint)[:16],
    }


def _cache_file(fingerprint: str, source: Source, media: Medium) -> Path:
    of_media = "" if media == "image" else f" {media}"
    key = hashlib.sha256(f"3 {fingerprint} {revision(source)}{of_media}".encode()).hexdigest()
    return cache_folder() / "vectors" / f"{key[:32]}.safetensors"


def _vectors(data: bytes) -> Tensor:
    return load_tensors(data)["vectors"]


def _recall(path: Path, read: Callable[[bytes], T]) -> T | None:
    """What was encoded before; a damaged file is made again, it is only a cache."""
    if not path.is_file():
        return None
    try:
        return read(path.read_bytes())
    except (SafetensorError, KeyError, ValueError, TypeError, OSError):
        with suppress(OSError):
            path.unlink()
        return None


def _remember(path: Path, content: bytes) -> None:
    """Keep what was encoded. A cache that cannot be written costs only the time of encoding again."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
