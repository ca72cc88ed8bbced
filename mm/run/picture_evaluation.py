"""Measuring models that make pictures: reconstruction through tokens, generation from prompts."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.fid import distances
from mm.evaluation.generation import CLIP_SCORE_PREFIX, clip_score, copying, rank_of_prompt
from mm.evaluation.inception import Inception, open_inception
from mm.evaluation.metrics import RESAMPLES, Interval, Result, bootstrap, share
from mm.evaluation.reconstruction import psnr, reconstructed, ssim
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.nn.quantize import CodeUsage
from mm.run.evaluation import EncodedSource, encode, loaded, opened, stamp
from mm.run.generation import BATCH_SIZE, Painting, generate, ranking
from mm.run.picture_controls import (
    THUMBNAILS,
    RealPictures,
    Training,
    check_independent,
    half_mirrored,
    picture_loader,
    real_pictures,
    stand_in,
    thumbnails,
    training_pictures,
)
from mm.run.prompts import Classes, Prompts, labels_or_captions, prompts
from mm.types import Compresses, Sampling, Source, Tokenizes

Progress = Callable[[int, int | None], None]

RANK = 5
"""Places that count for the judge; the first alone where there are no more classes than that."""

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
    """Pictures to tokens or latents and back: PSNR and SSIM with intervals, and of tokens the share of codes that are used and
    their perplexity.

    Args:
        model: A loaded model or a MODEL reference; it must turn pictures into tokens or latents.
        data: A source.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (done, total).

    Raises:
        UserError: The model has neither, or no sample of the source can be used.
    """
    model = loaded(model, device, precision)
    system = model.system
    if not isinstance(system, Tokenizes | Compresses):
        raise UserError(f"{model.name} does not turn pictures into tokens; take emoji-vq, or train one with configs/vq.yaml")
    source = opened(data, model)
    loader = picture_loader(source, model)
    usage = CodeUsage(system.vocab_size) if isinstance(system, Tokenizes) else None
    noise, likeness = [], []
    for batch in loader.one_epoch():
        assert batch.image is not None
        made, ids = reconstructed(system, batch.image.to(model.device))
        if usage is not None and ids is not None:
            usage.update(ids)
        noise.append(psnr(made.cpu(), batch.image))
        likeness.append(ssim(made.cpu(), batch.image))
        if progress:
            progress(sum(map(len, noise)), len(source))
    if not noise:
        raise UserError(f"{source.name}: no sample can be used: {loader.accounting.describe()}")
    values = {"psnr": torch.cat(noise).double().numpy(), "ssim": torch.cat(likeness).double().numpy()}
    found = bootstrap({name: share(value) for name, value in values.items()}, len(values["psnr"]), seed=0)
    metrics = {name: Interval(one.value, one.low, one.high, "number") for name, one in found.items()}
    interval = f"95 % bootstrap over pictures, {RESAMPLES} resamples, seed 0"
    facts = {"psnr": "decibels, mean over pictures", "interval": interval}
    if not isinstance(system, Tokenizes):
        channels, rows, columns = system.latent_shape
        facts["latents"] = f"{rows} x {columns} of {channels} numbers"
    elif usage is not None:
        metrics["codebook_usage"] = Interval(usage.usage, usage.usage, usage.usage)
        metrics["perplexity"] = Interval(usage.perplexity, usage.perplexity, usage.perplexity, "number")
        rows, columns = system.grid
        facts["tokens"] = f"{rows} x {columns} of {system.vocab_size} codes"
        facts["interval"] += "; usage and perplexity are counts"
    return Result(metrics, stamp(model, source, loader.accounting.describe()) | facts)


def evaluate_generation(
    model: str | Path | Model,
    data: str | Source,
    *,
    judge: str | Path | Model = "emoji-judge",
    limit: int = 100,
    ranker: str | Path | Model | None = "emoji-clip",
    best_of: int = 8,
    train: str | Source | None = None,
    features: str | Path | None = None,
    label: str | None = None,
    image_field: str | None = None,
    text_field: str | None = None,
    seed: int = 0,
    sampling: Sampling | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Progress | None = None,
    on_made: Callable[[Sequence[Painting]], None] | None = None,
) -> Result:
    """Pictures of a source's class names or captions, looked at by a judge that had no part in making or choosing them.

    Prompts are the names of the source's classes; where it has none, captions, one each of ``limit`` pictures. Everything that
    can be wrong with what is given is found before anything is painted.

    Args:
        model: A loaded model or a MODEL reference; it must be able to paint.
        data: A labelled or captioned source: its names or captions are the prompts, its pictures the real ones.
        judge: A model with a shared space that shares neither weights nor architecture with the ranker, nor weights with the
            model and what taught it.
        limit: Number of prompts, drawn with ``seed`` among the classes that the source has pictures of, or its captions.
        ranker: Chooses the best of ``best_of`` candidates; None for ``best_of`` 1.
        best_of: Candidates of each prompt.
        train: What the model was trained on, to see whether it copies; default: what its card or its run says.
        features: Weight file of the FID Inception (`mm.evaluation.inception`), for ``fid_inception`` and its like.
        label: Field that holds the class name, ``txt`` for the caption; default: the source's own.
        image_field: Column of a table that holds the picture files, where its name is not a usual one.
        text_field: Column or field that holds the captions, likewise; given without ``label``, captions are the prompts.
        seed: Of prompts and pictures.
        sampling: Guidance, temperature and so on.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        progress: Called with (done, total) while painting.
        on_made: Receives the chosen pictures.

    Returns:
        For class names, with subset suffixes (5 is 1 where there are no more than 5 classes):

        - ``clip_rank5``: share of pictures of whose names the judge finds the right one among the five nearest.
        - ``clip_rank5_real``: the same of the source's pictures.
        - ``clip_rank5_real_tokens``: the same of these behind the model's own tokenizer, all that it could reach by painting
          them; only for models that have one.
        - ``clip_rank5_retrieved``, where the training source is known and has the names: the same of a painter that copies a
          training picture of each name. It can exceed ``clip_rank5_real``, because the judge knows the training artists; so
          can the model's, as far as it copies, which is why ``copies`` stands beside it.

        For all prompts:

        - ``clipscore`` and ``clipscore_torchmetrics``: see `mm.evaluation.generation.clip_score`, by the judge.
        - ``kid``, ``precision``, ``recall``, and ``fid`` where there are enough pictures, of the judge's features; with the
          suffix ``_inception`` of the FID Inception's, the real pictures being prepared for the model. Never to be mixed.
        - ``nearest_train``, ``nearest_train_real``, ``copies``, where the training source is known: whether the pictures,
          blurred at 16 x 16 pixels, are nearer to training pictures or their mirror images than real ones are.
        - ``nearest_train_retrieved``, ``copies_retrieved``: the same of the painter that copies, half of whose pictures are
          mirrored; what is far below 1 here cannot show copies.
        - ``seconds_per_candidate``: in the painter alone; ``seconds_per_image``: all candidates of a picture and choosing one.

    Raises:
        UserError: The models cannot do what is asked of them, or the source has neither labels nor captions.
    """
    painter, critic = loaded(model, device, precision), loaded(judge, device, precision)
    chooser = ranking(loaded(ranker, device, precision)) if ranker is not None and best_of > 1 else None
    check_independent(critic, painter, chooser)
    inception = None if features is None else open_inception(features, painter.device)
    source, task = labels_or_captions(opened(data, painter, image_field=image_field, text_field=text_field), label, text_field)
    encoded = encode(critic, source)
    asked = prompts(source, encoded, task, limit, seed)
    real = real_pictures(painter, critic, source, asked.rows, inception)
    training = training_pictures(painter, train, asked.texts, label=label, seed=seed)
    clock = _Clock()
    made = generate(
        painter,
        asked.texts,
        seed=seed,
        sampling=sampling,
        best_of=best_of if chooser else 1,
        ranker=chooser,
        on_cut=clock.cut,
        on_batch=clock.batch,
        progress=progress,
    )
    timing = clock.result(len(made), best_of if chooser else 1)
    if on_made:
        on_made(made)
    facts = {
        "prompts": f"{len(asked.texts)} {asked.kind} of {source.name}, seed {seed}",
        "judge": f"{critic.name} {critic.fingerprint[:16]}",
        "chosen": f"best of {best_of} by {chooser.name}" if chooser else "the first picture of each prompt",
        "sampling": str(sampling or Sampling()),
    }
    result = Result({}, stamp(painter, source, encoded.accounting) | facts)
    copied = stand_in(painter, training, asked.texts)
    vectors = critic.embed_images([one.pixels for one in made])
    if asked.classes is not None:
        result |= _ranks(critic, vectors, asked, asked.classes, encoded, real, copied)
    result |= _fit(critic, vectors, asked, encoded)
    if inception is not None:
        result |= _inception_distances(inception, made, real)
    return result | _copies(made, real, training, copied) | timing


class _Clock:
    """Counts what the painter was asked for and how long it took."""

    def __init__(self) -> None:
        self._begun, self._candidates, self._seconds, self._cut = time.perf_counter(), 0, 0.0, 0

    def cut(self, prompt: str, read: str) -> None:
        self._cut += 1

    def batch(self, pictures: int, seconds: float) -> None:
        self._candidates += pictures
        self._seconds += seconds

    def result(self, pictures: int, best_of: int) -> Result:
        """Figures of all so far, for so many pictures that were chosen."""
        times = {
            "seconds_per_candidate": self._seconds / self._candidates,
            "seconds_per_image": (time.perf_counter() - self._begun) / pictures,
        }
        facts = {
            "seconds_per_candidate": f"in the painter alone, {BATCH_SIZE} at a time",
            "seconds_per_image": f"{best_of} candidates of each picture and choosing one",
        }
        cut = {"prompts_cut": f"{self._cut} are longer than the model reads"} if self._cut else {}
        return Result({name: Interval(value, value, value, "number") for name, value in times.items()}, facts | cut)


def _ranks(
    judge: Model,
    vectors: Tensor,
    asked: Prompts,
    classes: Classes,
    encoded: EncodedSource,
    real: RealPictures,
    copied: tuple[list[str], Tensor] | None,
) -> Result:
    """Whether the judge finds the prompts of generated, of real and of copied pictures among the names of all classes."""
    names = classes.task.classes
    texts = class_vectors(judge.embed_texts, names, judge.processor.templates)
    k = RANK if len(names) > RANK else 1
    result = rank_of_prompt(vectors, texts, classes.asked, k=k, subsets=classes.asked_subsets)
    for suffix, seen in (("_real", encoded.images[list(asked.rows)]), ("_real_tokens", real.token_vectors)):
        if seen is not None:
            result |= rank_of_prompt(seen, texts, classes.real, k=k, suffix=suffix, subsets=classes.real_subsets)
    if copied is not None:
        found, pictures = copied
        labels = classes.asked[[asked.texts.index(name) for name in found]]
        result |= rank_of_prompt(judge.embed_images(list(pictures)), texts, labels, k=k, suffix="_retrieved")
    return result


def _fit(judge: Model, vectors: Tensor, asked: Prompts, encoded: EncodedSource) -> Result:
    """CLIPScore in both conventions, and distances between the sets of the judge's vectors."""
    result = Result({}, {})
    for convention, prefix in CLIP_SCORE_PREFIX.items():
        captions = judge.embed_texts([prefix + text for text in asked.texts])
        result |= clip_score(vectors, captions, convention=convention)
    real = encoded.images[list(asked.rows)]
    if min(len(vectors), len(real)) < MIN_SET:
        return result
    return result | distances(vectors, real, features=f"unit vectors of {judge.name}, {judge.processor.stamp()['resize']}")


def _inception_distances(inception: Inception, made: Sequence[Painting], real: RealPictures) -> Result:
    assert real.inception is not None
    if min(len(made), len(real.inception)) < MIN_SET:
        return Result({}, {"features_inception": f"left out: fewer than {MIN_SET} pictures"})
    pictures = torch.stack([one.pixels for one in made])
    side = pictures.shape[-1]
    name = f"{inception.name}; generated pictures and real ones prepared for the painter at {side} px"
    return distances(inception(pictures), real.inception, features=name, suffix="_inception")


def _copies(
    made: Sequence[Painting], real: RealPictures, training: Training, copied: tuple[list[str], Tensor] | None
) -> Result:
    """How near the pictures are to the model's training pictures, beside real pictures and beside copies."""
    if training.thumbnails is None:
        return Result({}, {"copies": f"not measured: the training source is {training.note}; give it with --train"})
    return copying(
        thumbnails(torch.stack([one.pixels for one in made])),
        real.thumbnails,
        training.thumbnails,
        features=THUMBNAILS,
        retrieved=None if copied is None else thumbnails(half_mirrored(copied[1])),
        mirrored=True,
        protocol={"training": training.note},
    )
