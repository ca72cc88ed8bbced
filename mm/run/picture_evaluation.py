"""Measuring models that make pictures: reconstruction through tokens, generation from prompts."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.data.labels import LabelTask, label_task
from mm.data.loader import Loader
from mm.errors import UserError
from mm.evaluation.fid import distances
from mm.evaluation.generation import clip_score, copying, rank_of_prompt
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, share
from mm.evaluation.reconstruction import psnr, ssim
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.nn.quantize import CodeUsage
from mm.run.evaluation import encode, labelled, loaded, opened, stamp, subset_masks
from mm.run.generation import Painting, generate
from mm.run.preparation import EvalPreparation
from mm.seeding import derive_seed
from mm.types import Sampling, Source, Tokenizes

Progress = Callable[[int, int | None], None]

BATCH_SIZE = 64
RANK = 5
"""Places that count for the judge; the first alone where there are no more classes than that."""

SIDE = 16
"""Of the pictures that are compared for copies, pixels."""

MIN_SET = 8
"""Fewest pictures for distances between sets."""


def evaluate_reconstruction(
    model: str | Path | Model,
    data: str | Source,
    *,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
) -> Result:
    """Pictures to tokens and back: PSNR and SSIM with intervals, the share of codes that are used, and their perplexity.

    Args:
        model: A loaded model or a MODEL reference; it must turn pictures into tokens.
        data: A source.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (done, total).

    Raises:
        UserError: The model has no tokens, or no sample of the source can be used.
    """
    model = loaded(model, device, precision)
    tokenizer = model.system
    if not isinstance(tokenizer, Tokenizes):
        raise UserError(f"{model.name} does not turn pictures into tokens; train one with configs/vq.yaml")
    source = opened(data, model)
    loader, usage = _loader(source, model), CodeUsage(tokenizer.vocab_size)
    noise, likeness = [], []
    for batch in loader.one_epoch():
        assert batch.image is not None
        ids = tokenizer.encode(batch.image.to(model.device))
        made = tokenizer.decode(ids).cpu()
        usage.update(ids)
        noise.append(psnr(made, batch.image))
        likeness.append(ssim(made, batch.image))
        if progress:
            progress(sum(map(len, noise)), len(source))
    if not noise:
        raise UserError(f"{source.name}: no sample can be used: {loader.accounting.describe()}")
    values = {"psnr": torch.cat(noise).double().numpy(), "ssim": torch.cat(likeness).double().numpy()}
    found = bootstrap({name: share(value) for name, value in values.items()}, len(values["psnr"]), seed=0)
    metrics = {name: Interval(one.value, one.low, one.high, "number") for name, one in found.items()}
    metrics["codebook_usage"] = Interval(usage.usage, usage.usage, usage.usage)
    metrics["perplexity"] = Interval(usage.perplexity, usage.perplexity, usage.perplexity, "number")
    rows, columns = tokenizer.grid
    facts = {
        "tokens": f"{rows} x {columns} of {tokenizer.vocab_size} codes",
        "psnr": "decibels, mean over pictures",
        "interval": f"95 % bootstrap over pictures, {RESAMPLES} resamples, seed 0; usage and perplexity are counts",
    }
    return Result(metrics, stamp(model, source, loader.accounting.describe()) | facts)


def evaluate_generation(
    model: str | Path | Model,
    data: str | Source,
    *,
    judge: str | Path | Model,
    limit: int = 100,
    ranker: str | Path | Model | None = "emoji-clip",
    best_of: int = 8,
    train: str | Source | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
    on_made: Callable[[Sequence[Painting]], None] | None = None,
) -> Result:
    """Pictures of a labelled source's class names, looked at by a judge that had no part in making or choosing them.

    Args:
        model: A loaded model or a MODEL reference; it must be able to paint.
        data: A labelled source: its names are the prompts, its pictures the real ones.
        judge: A model with a shared space that shares neither weights nor seed nor architecture with model and ranker.
        limit: Number of prompts, drawn with ``seed`` among the classes that the source has pictures of.
        ranker: Chooses the best of ``best_of`` candidates; None for ``best_of`` 1.
        best_of: Candidates of each prompt.
        train: What the model was trained on, to see whether it copies; default: the source that its card names.
        seed: Of prompts and pictures.
        sampling: Guidance, temperature and so on.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (done, total) while painting.
        on_made: Receives the chosen pictures.

    Returns:
        ``clip_rank5`` and ``clip_rank5_real`` with subset suffixes, ``clipscore``, ``kid`` (and ``fid`` where there are enough
        pictures), ``precision``, ``recall``, ``nearest_train``, ``nearest_train_real``, ``copies``, ``seconds_per_image``.

    Raises:
        UserError: The models cannot do what is asked of them, or the source has no labels.
    """
    painter, critic = loaded(model, device, precision), loaded(judge, device, precision)
    chooser = loaded(ranker, device, precision) if ranker is not None and best_of > 1 else None
    _independent(critic, painter, chooser)
    source = opened(data, painter)
    task = label_task(source)
    encoded = encode(critic, source)
    fields = [sample["fields"] for sample in encoded.samples]
    rows, labels = labelled(fields, task, source)
    prompts = _prompts(labels, limit, seed)
    names = [task.classes[label] for label in prompts.tolist()]
    begun = time.perf_counter()
    made = generate(
        painter,
        names,
        seed=seed,
        sampling=sampling,
        best_of=best_of if chooser else 1,
        ranker=chooser,
        progress=progress,
    )
    seconds = (time.perf_counter() - begun) / len(made)
    if on_made:
        on_made(made)
    real = torch.isin(labels, prompts)
    real_rows, real_labels = torch.tensor(rows)[real], labels[real]
    texts = class_vectors(critic.embed_texts, task.classes, critic.processor.templates)
    vectors, real_vectors = critic.embed_images([one.pixels for one in made]), encoded.images[real_rows]
    first_row = {int(label): row for row, label in reversed(list(zip(real_rows.tolist(), real_labels.tolist(), strict=True)))}
    k = RANK if len(task.classes) > RANK else 1
    result = rank_of_prompt(
        vectors, texts, prompts, k=k, subsets=_splits([first_row[p] for p in prompts.tolist()], fields, task)
    )
    result |= rank_of_prompt(
        real_vectors, texts, real_labels, k=k, suffix="_real", subsets=_splits(real_rows.tolist(), fields, task)
    )
    result |= clip_score(vectors, critic.embed_texts([f"A photo depicts {name}" for name in names]))
    if min(len(vectors), len(real_vectors)) >= MIN_SET:
        features = f"unit vectors of {critic.name}, {critic.processor.stamp()['resize']}"
        result |= distances(vectors, real_vectors, features=features)
    result |= _copies(painter, made, source, real_rows.tolist(), train)
    timing = Result({"seconds_per_image": Interval(seconds, seconds, seconds, "number")}, {})
    facts = {
        "prompts": f"{len(names)} class names of {source.name}, seed {seed}",
        "judge": f"{critic.name} {critic.fingerprint[:16]}",
        "chosen": f"best of {best_of} by {chooser.name}" if chooser else "the first picture of each prompt",
        "sampling": str(sampling or Sampling()),
    }
    return Result({}, stamp(painter, source, encoded.accounting) | facts) | result | timing


def _independent(judge: Model, painter: Model, ranker: Model | None) -> None:
    """A judge that is the ranker, or part of the painter, would praise what it chose itself."""
    for other, role in ((ranker, "chooses"), (painter, "paints")):
        if other is not None and other.fingerprint == judge.fingerprint:
            raise UserError(f"judge: {judge.name} also {role}; judging needs a model of its own, see configs/judge.yaml")


def _prompts(labels: Tensor, limit: int, seed: int) -> Tensor:
    """Classes that have pictures, ``limit`` of them, in the order of their numbers."""
    present = sorted(set(labels.tolist()))
    chosen = sorted(present, key=lambda label: derive_seed(seed, "prompt", label))[:limit]
    return torch.tensor(sorted(chosen))


def _splits(rows: Sequence[int], fields: Sequence[Mapping[str, Any]], task: LabelTask) -> dict[str, np.ndarray]:
    """Masks of the task's subsets, where there is more than one."""
    masks = subset_masks([fields[row] for row in rows], task)
    return {name: np.array(mask) for name, mask in masks.items()} if len(masks) > 1 else {}


def _copies(
    painter: Model, made: Sequence[Painting], source: Source, rows: Sequence[int], train: str | Source | None
) -> Result:
    """How near the pictures are to the model's training pictures, beside real pictures; nothing where those are unknown."""
    train = train or painter.card.get("train")
    if train is None:
        return Result({}, {"copies": "not measured: give the training source"})
    known, real = _small(opened(train, painter), painter), _small(source, painter)
    ours = _thumbnails(torch.stack([one.pixels for one in made]))
    return copying(ours, real[list(rows)], known, features=f"pictures of {SIDE} x {SIDE} pixels")


def _small(source: Source, model: Model) -> Tensor:
    """Every picture of a source that can be used, prepared for the model, then at 16 x 16 pixels."""
    return torch.cat([_thumbnails(batch.image) for batch in _loader(source, model).one_epoch() if batch.image is not None])


def _thumbnails(pictures: Tensor) -> Tensor:
    return F.interpolate(pictures.float(), (SIDE, SIDE), mode="area").round().to(torch.uint8)


def _loader(source: Source, model: Model) -> Loader:
    preparation = EvalPreparation(model.processor)
    return Loader(
        source, preparation, preparation.collate, batch_size=BATCH_SIZE, seed=0, tail="short", shuffle=False, substitute=False
    )
