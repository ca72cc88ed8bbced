"""Evaluation of a model on a source: encode once, remember the vectors, hand them to the evaluators, stamp the protocol."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm.data.captions import look_up
from mm.data.labels import LabelTask, label_of, label_task
from mm.data.loader import Loader
from mm.data.sources import open_source, revision
from mm.errors import BadSample, UserError
from mm.evaluation.baseline import pixel_baseline, thumbnails
from mm.evaluation.metrics import Result
from mm.evaluation.retrieval import retrieval
from mm.evaluation.zero_shot import class_vectors, zero_shot
from mm.hub import Model, load
from mm.media.image import decode_image
from mm.paths import cache_folder
from mm.run.preparation import EvalPreparation
from mm.types import Source

Progress = Callable[[int, int], None]

BATCH_SIZE = 64


@dataclass(frozen=True)
class EncodedSource:
    """What a model made of a source, in the source's order; samples that cannot be used are left out and counted.

    Args:
        images: Unit vectors ``(N, D)``, fp32.
        samples: Fields (``"fields"``) and captions (``"captions"``) of each sample.
        accounting: One line that counts the samples delivered and skipped by cause.
    """

    images: Tensor
    samples: tuple[Mapping[str, Any], ...]
    accounting: str


def evaluate(task: str, model: str | Path | Model, data: str | Source, **options: Any) -> Result:
    """Measure a model: ``task`` is ``zero-shot`` or ``retrieval``; options are those of the function of that task.

    Raises:
        UserError: An unknown task, or what the task's own function raises.
    """
    if task not in TASKS:
        raise UserError(f"'{task}': no such evaluation; there are {', '.join(TASKS)}")
    return TASKS[task](model, data, **options)


def evaluate_zero_shot(
    model: str | Path | Model,
    data: str | Source,
    *,
    classes: Sequence[str] | None = None,
    label: str | None = None,
    templates: Sequence[str] | None = None,
    baseline: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Zero-shot classification of a labelled source.

    Args:
        model: A loaded model or a MODEL reference.
        data: A source. Pictures whose label is not among the classes are left out, and the stamp says how many remain.
        classes: Candidate names; default: the source's own.
        label: Field that holds the class name; default: the source's own.
        templates: Prompt ensemble; default: the processor's.
        baseline: Labelled source for nearest neighbour on pixels, ``none`` for no baseline; default: the source's own, if any.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        cache: Remember the vectors of this model on this source in the cache folder.
        progress: Called with (done, total) while encoding.

    Returns:
        ``top1``, ``top5``, ``mean_per_class``, the same with subset suffixes, and ``baseline_top1``.

    Raises:
        UserError: When labels, classes or templates do not fit the source.
    """
    model = loaded(model, device, precision)
    source = opened(data, model)
    task = label_task(source, label=label, classes=classes)
    encoded = encode(model, source, cache=cache, progress=progress)
    fields = [sample["fields"] for sample in encoded.samples]
    rows, labels = _labelled(fields, task, source)
    prompts = tuple(templates or model.processor.templates)
    vectors = class_vectors(model.embed_texts, task.classes, prompts)
    result = zero_shot(
        encoded.images[rows],
        vectors,
        labels,
        subsets=_subsets([fields[row] for row in rows], task),
        protocol=_protocol(model, source, encoded) | {"label": task.label, "templates": list(prompts)},
    )
    reference = baseline or task.reference
    if reference and reference != "none":
        result |= _baseline(source, reference, task, progress)
    return result


def evaluate_retrieval(
    model: str | Path | Model,
    data: str | Source,
    *,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Image-text retrieval both ways among all pictures of a source and all their captions.

    Raises:
        UserError: When no sample of the source has a caption.
    """
    model = loaded(model, device, precision)
    source = opened(data, model)
    encoded = encode(model, source, cache=cache, progress=progress)
    rows = [row for row, sample in enumerate(encoded.samples) if sample["captions"]]
    if not rows:
        raise UserError(
            f"{source.name}: no sample has a caption; put a .txt beside each picture or a caption column in the table"
        )
    captions = [caption for row in rows for caption in encoded.samples[row]["captions"]]
    image_of = torch.tensor([position for position, row in enumerate(rows) for _ in encoded.samples[row]["captions"]])
    texts = model.embed_texts(captions)
    return retrieval(encoded.images[rows], texts, image_of, protocol=_protocol(model, source, encoded))


TASKS: Mapping[str, Callable[..., Result]] = {"zero-shot": evaluate_zero_shot, "retrieval": evaluate_retrieval}
"""Evaluations by the name that the command line and `evaluate` know them by."""


def encode(model: Model, source: Source, *, cache: bool = True, progress: Progress | None = None) -> EncodedSource:
    """Vectors of every picture of a source, from the cache where the same model has met the same source before.

    Raises:
        UserError: When no sample of the source can be used.
    """
    path = _cache_file(model, source)
    remembered = _recall(path) if cache else None
    if remembered is not None:
        return remembered
    preparation = EvalPreparation(model.processor)
    loader = Loader(
        source, preparation, preparation.collate, batch_size=BATCH_SIZE, seed=0, tail="short", shuffle=False, substitute=False
    )
    vectors: list[Tensor] = []
    samples: list[Mapping[str, Any]] = []
    for batch in loader.one_epoch():
        assert batch.image is not None
        vectors.append(model.embed_pixels(batch.image))
        samples += [{"fields": f, "captions": c} for f, c in zip(batch.fields, batch.captions, strict=True)]
        if progress:
            progress(len(samples), len(source))
    if not vectors:
        raise UserError(f"{source.name}: no sample can be used: {loader.accounting.describe()}")
    encoded = EncodedSource(torch.cat(vectors), tuple(samples), loader.accounting.describe())
    if cache:
        _remember(path, encoded)
    return encoded


def loaded(model: str | Path | Model, device: str, precision: str = "auto") -> Model:
    """The model itself, or the one that a MODEL reference names, on the chosen device and in the chosen precision."""
    return model if isinstance(model, Model) else load(model, device=device, precision=precision)


def opened(data: str | Source, model: Model) -> Source:
    """The source itself, or the one that a SRC names, with vector art drawn at the model's size."""
    return open_source(data, image_size=model.processor.image_spec.size) if isinstance(data, str) else data


def _labelled(fields: Sequence[Mapping[str, Any]], task: LabelTask, source: Source) -> tuple[list[int], Tensor]:
    """Rows whose label is among the classes, and its index."""
    index = {name: position for position, name in enumerate(task.classes)}
    labels = [label_of(entry, task.label) for entry in fields]
    rows = [row for row, label in enumerate(labels) if label in index]
    if not rows:
        example = next((label for label in labels if label is not None), None)
        raise UserError(f"{source.name}: no picture has a label among the {len(index)} classes (a label here is {example!r})")
    return rows, torch.tensor([index[str(labels[row])] for row in rows])


def _subsets(fields: Sequence[Mapping[str, Any]], task: LabelTask) -> dict[str, list[bool]]:
    """Masks over samples for each value of the task's subset field."""
    if task.subsets is None:
        return {}
    values = [str(look_up(entry, task.subsets)) for entry in fields]
    return {name: [value == name for value in values] for name in sorted(set(values))}


def _baseline(source: Source, reference: str, task: LabelTask, progress: Progress | None) -> Result:
    """Nearest neighbour on pixels, on the same pictures and classes."""
    sides = []
    for side in (open_source(reference), source):
        pictures, fields = _thumbnails_of(side, progress)
        rows, labels = _labelled(fields, task, side)
        sides.append((pictures[rows], labels.tolist(), [fields[row] for row in rows]))
    (index, index_labels, _), (queries, query_labels, query_fields) = sides
    return pixel_baseline(
        index,
        index_labels,
        queries,
        query_labels,
        subsets=_subsets(query_fields, task),
        protocol={"baseline_index": reference},
    )


def _thumbnails_of(source: Source, progress: Progress | None) -> tuple[Tensor, list[Mapping[str, Any]]]:
    """Thumbnails and fields of every picture of a source that can be used."""
    pictures, fields = [], []
    for index in range(len(source)):
        try:
            sample = source.read(index)
            pictures.append(decode_image(sample.media["image"], where=sample.id))
            fields.append(sample.fields)
        except (BadSample, KeyError):
            continue
        if progress:
            progress(index + 1, len(source))
    return thumbnails(pictures), fields


def _protocol(model: Model, source: Source, encoded: EncodedSource) -> dict[str, Any]:
    precision = str(next(model.system.parameters()).dtype).removeprefix("torch.")
    return {
        "model": model.name,
        "data": source.name,
        "samples": encoded.accounting,
        **model.processor.stamp(),
        "precision": precision,
        "data_fingerprint": source.fingerprint[:16],
        "model_fingerprint": model.fingerprint[:16],
    }


def _cache_file(model: Model, source: Source) -> Path:
    key = hashlib.sha256(f"1 {model.fingerprint} {revision(source)}".encode()).hexdigest()
    return cache_folder() / "vectors" / f"{key[:32]}.safetensors"


def _recall(path: Path) -> EncodedSource | None:
    """Vectors encoded before; a damaged file is made again, it is only a cache."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads(file.metadata()["samples"])
            return EncodedSource(file.get_tensor("images"), tuple(metadata["samples"]), metadata["accounting"])
    except (SafetensorError, KeyError, ValueError, TypeError):
        path.unlink(missing_ok=True)
        return None


def _remember(path: Path, encoded: EncodedSource) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = json.dumps({"samples": [dict(sample) for sample in encoded.samples], "accounting": encoded.accounting})
    temporary = path.with_suffix(f".{id(encoded):x}.tmp")
    save_file({"images": encoded.images.contiguous()}, temporary, metadata={"samples": metadata})
    temporary.replace(path)
