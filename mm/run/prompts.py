"""What an evaluation of a painter asks for, and which real pictures show it: class names, or captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm.data.labels import LabelTask, label_task
from mm.data.sources import CaptionAsField
from mm.errors import UserError
from mm.run.evaluation import CAPTION_LABEL, EncodedSource, labelled, subset_masks
from mm.seeding import derive_seed, generator
from mm.types import Source


@dataclass(frozen=True)
class Classes:
    """Prompts that are class names.

    Args:
        task: All classes; each is a candidate of what a picture shows.
        asked: Number of each prompt among them, ``(n,)``.
        real: Of each real picture, ``(m,)``.
        asked_subsets: Masks over the prompts by name.
        real_subsets: Masks over the real pictures by name.
    """

    task: LabelTask
    asked: Tensor
    real: Tensor
    asked_subsets: Mapping[str, np.ndarray]
    real_subsets: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Prompts:
    """What is painted and what it is compared with.

    Args:
        texts: The prompts.
        rows: Real pictures of the same, rows of the encoded source in ascending order.
        kind: What the prompts are, for the protocol.
        classes: Where the prompts are class names.
    """

    texts: Sequence[str]
    rows: Sequence[int]
    kind: str
    classes: Classes | None


def labels_or_captions(source: Source, label: str | None, text_field: str | None) -> tuple[Source, LabelTask | None]:
    """The source, and its classification task, or None where prompts are captions: it has no labels, or they are asked for.

    Args:
        source: With the captions already taken from ``text_field``.
        label: Field that holds the class name, ``txt`` for the caption; default: the source's own.
        text_field: Field that was given for the captions; without ``label`` they are the prompts.

    Raises:
        UserError: There is no such label.
    """
    if label is None and text_field is not None:
        return source, None
    if label is not None:
        source = CaptionAsField(source, CAPTION_LABEL) if label == CAPTION_LABEL else source
        return source, label_task(source, label=label)
    try:
        return source, label_task(source)
    except UserError:
        return source, None


def prompts(source: Source, encoded: EncodedSource, task: LabelTask | None, limit: int, seed: int) -> Prompts:
    """At most ``limit`` prompts, drawn by the seed, with the pictures of the source that show them.

    Class names are those of classes that the source has pictures of, in the order of their numbers, with all their pictures.
    Captions are of so many pictures, one each, drawn among the picture's own.

    Raises:
        UserError: No picture has a label among the classes, or without a task no picture has a caption.
    """
    if task is None:
        return _captions(source, encoded, limit, seed)
    fields = [sample["fields"] for sample in encoded.samples]
    rows, labels = labelled(fields, task, source)
    present = sorted(set(labels.tolist()), key=lambda label: derive_seed(seed, "prompt", label))
    asked = sorted(present[:limit])
    chosen = torch.isin(labels, torch.tensor(asked))
    real_rows = torch.tensor(rows)[chosen].tolist()
    real = labels[chosen]
    first = {int(label): row for row, label in reversed(list(zip(real_rows, real.tolist(), strict=True)))}
    classes = Classes(
        task=task,
        asked=torch.tensor(asked),
        real=real,
        asked_subsets=_subsets([fields[first[label]] for label in asked], task),
        real_subsets=_subsets([fields[row] for row in real_rows], task),
    )
    return Prompts([task.classes[label] for label in asked], real_rows, "class names", classes)


def _captions(source: Source, encoded: EncodedSource, limit: int, seed: int) -> Prompts:
    able = [row for row, sample in enumerate(encoded.samples) if sample["captions"]]
    if not able:
        raise UserError(
            f"{source.name}: neither class labels nor captions found; name the field with --label or --text-field, "
            "or put a .txt beside each picture"
        )
    rows = sorted(sorted(able, key=lambda row: derive_seed(seed, "prompt", row))[:limit])
    captions = [encoded.samples[row]["captions"] for row in rows]
    texts = [own[generator(seed, "caption", row).integers(len(own))] for row, own in zip(rows, captions, strict=True)]
    return Prompts(texts, rows, "captions, one a picture", None)


def _subsets(fields: Sequence[Mapping[str, Any]], task: LabelTask) -> dict[str, np.ndarray]:
    """Masks of the task's subsets, where there is more than one."""
    masks = subset_masks(fields, task)
    return {name: np.array(mask) for name, mask in masks.items()} if len(masks) > 1 else {}
