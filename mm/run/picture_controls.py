"""What figures about generated pictures are held against: real pictures through tokens, training pictures given as own work.

A painter that copies can score higher than real pictures by an artist whom the judge does not know, because the judge has seen
the training artists. So the retrieval control plays such a painter, and every figure about it stands beside the painter's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.config import validate
from mm.data.config import DataConfig
from mm.data.labels import label_of
from mm.data.loader import Loader
from mm.data.sources import open_training_source
from mm.errors import UserError
from mm.evaluation.inception import Inception
from mm.hub import Model, load
from mm.run.evaluation import opened
from mm.run.prompts import labels_or_captions
from mm.run.reading import BATCH_SIZE, evaluation_loader
from mm.seeding import derive_seed
from mm.systems.settings import SystemSettings
from mm.types import Compresses, Source, Tokenizes

SIDE = 16
"""Of the pictures that are compared for copies, pixels."""

THUMBNAILS = f"pictures of {SIDE} x {SIDE} pixels, blurred over 3 x 3"


@dataclass(frozen=True)
class Training:
    """What is known of the pictures that a painter learned from.

    Args:
        thumbnails: See the function of that name; None where the training source is not known.
        retrieved: One picture for each prompt that is also a name of the source, by prompt, uint8 ``(3, H, W)``.
        note: Why something is not known, for the protocol; else the name of the source.
    """

    thumbnails: Tensor | None
    retrieved: Mapping[str, Tensor]
    note: str


@dataclass(frozen=True)
class RealPictures:
    """Real pictures, prepared for a painter.

    Args:
        thumbnails: See the function of that name, ``(m, 3, 16, 16)``.
        token_vectors: The judge's unit vectors of what is left of them behind the painter's tokenizer, ``(m, D)``; or None.
        inception: Their Inception features ``(m, 2048)``, where these are asked for.
    """

    thumbnails: Tensor
    token_vectors: Tensor | None
    inception: Tensor | None


def thumbnails(pictures: Tensor) -> Tensor:
    """Pictures ``(B, 3, H, W)`` at 16 x 16 pixels, blurred, so that small shifts count little; uint8."""
    small = F.interpolate(pictures.float(), (SIDE, SIDE), mode="area")
    return F.avg_pool2d(small, 3, stride=1, padding=1, count_include_pad=False).round().to(torch.uint8)


def through_tokens(painter: Model, pictures: Tensor) -> Tensor | None:
    """What the painter's tokens or latents leave of pictures, uint8 ``(B, 3, H, W)``: all it could paint. None without."""
    tokenizer, latents = (getattr(painter.system, name, None) for name in ("tokenizer", "latents"))
    if isinstance(tokenizer, Tokenizes):
        back_and_forth = lambda part: tokenizer.decode(tokenizer.encode(part))  # noqa: E731
    elif isinstance(latents, Compresses):
        back_and_forth = lambda part: latents.from_latents(latents.to_latents(part))  # noqa: E731
    else:
        return None
    return torch.cat([back_and_forth(part.to(painter.device)).cpu() for part in pictures.split(BATCH_SIZE)])


def real_pictures(
    painter: Model, judge: Model, source: Source, rows: Sequence[int], inception: Inception | None
) -> RealPictures:
    """Look at some of the usable pictures of a source, in one pass; ``rows`` counts them, in ascending order."""
    wanted, position = set(rows), 0
    small, vectors, features = [], [], []
    for batch in picture_loader(source, painter, max_bad_fraction=1).one_epoch():
        assert batch.image is not None
        here = [row for row in range(len(batch)) if position + row in wanted]
        position += len(batch)
        if not here:
            continue
        pictures = batch.image[here]
        small.append(thumbnails(pictures))
        coded = through_tokens(painter, pictures)
        if coded is not None:
            vectors.append(judge.embed_images(list(coded)))
        if inception is not None:
            features.append(inception(pictures))
    return RealPictures(
        thumbnails=torch.cat(small),
        token_vectors=torch.cat(vectors) if vectors else None,
        inception=torch.cat(features) if features else None,
    )


def training_pictures(
    painter: Model, train: str | Source | None, prompts: Sequence[str], *, label: str | None, seed: int
) -> Training:
    """Thumbnails of all pictures that a painter learned from, and one picture of each prompt, drawn by the seed.

    Args:
        painter: The model; its card or the configuration of its run may say what it learned from.
        train: The source, where the caller knows it.
        prompts: Names whose pictures are wanted.
        label: Field that holds the names; default: the source's own, if any.
        seed: Names the draw.

    Raises:
        UserError: ``train`` cannot be read. What the model itself says is only a hint: if it is not there, the note says so.
    """
    if train is not None:
        return _studied(opened(train, painter), painter, prompts, label, seed)
    try:
        source = recorded_training(painter)
        return Training(None, {}, "not known, give it") if source is None else _studied(source, painter, prompts, label, seed)
    except UserError as error:
        return Training(None, {}, f"cannot be read ({error})")


def stand_in(painter: Model, training: Training, prompts: Sequence[str]) -> tuple[list[str], Tensor] | None:
    """What a painter that copies would give: the training pictures of the prompts, through the tokenizer where there is one.

    Returns:
        The prompts that have one and their pictures, uint8 ``(r, 3, H, W)``; None where there is none.
    """
    names = [name for name in dict.fromkeys(prompts) if name in training.retrieved]
    if not names:
        return None
    pictures = torch.stack([training.retrieved[name] for name in names])
    coded = through_tokens(painter, pictures)
    return names, pictures if coded is None else coded


def half_mirrored(pictures: Tensor) -> Tensor:
    """Every second picture in its mirror image, as a usual augmentation would have taught it."""
    mirrored = pictures.clone()
    mirrored[1::2] = pictures[1::2].flip(-1)
    return mirrored


def check_independent(judge: Model, maker: Model, ranker: Model | None, *, makes: str = "paints") -> None:
    """A judge that chose, made what is judged or taught, or that sees as the ranker does, would praise what it knows.

    Args:
        judge: The model that judges.
        maker: The model whose work is judged.
        ranker: The model that chose among its works, if one did.
        makes: What the maker does, for the message.

    Raises:
        UserError: The judge is the ranker or the maker, has the ranker's architecture, or is a part of the maker or of its
            tokenizer, be it for training only, or of one of these models in turn.
    """
    remedy = "judging needs a model of its own, see configs/judge.yaml"
    for other, role in ((ranker, "chooses"), (maker, makes)):
        if other is not None and other.fingerprint == judge.fingerprint:
            raise UserError(f"judge: {judge.name} also {role}; {remedy}")
    if ranker is not None and ranker.config == judge.config:
        raise UserError(f"judge: {judge.name} has the same architecture as {ranker.name}, which chooses; {remedy}")
    if any(_same(part, judge.system) for part in maker.system.children()):
        raise UserError(f"judge: {judge.name} is a part of {maker.name}; {remedy}")
    for teacher, fingerprint in _teachers(maker, judge):
        if teacher == judge.name or fingerprint == judge.fingerprint:
            raise UserError(f"judge: {maker.name} was trained with {teacher}, the same model; {remedy}")


def picture_loader(source: Source, model: Model, max_bad_fraction: float = 0.2) -> Loader:
    """Every picture of a source that can be used, prepared for a model, in the source's order: one epoch."""
    return evaluation_loader(source, model.processor, workers=0, max_bad_fraction=max_bad_fraction)


def recorded_training(model: Model) -> Source | None:
    """What a model's card, or the configuration of its run, says that it learned from. Raises `UserError` if it is gone."""
    if model.card.get("train"):
        return opened(model.card["train"], model)
    if not model.card.get("training_data"):
        return None
    config = validate(DataConfig, model.card["training_data"], f"{model.name} (data)")
    return open_training_source(config, image_size=model.processor.image_spec.size)


def _studied(source: Source, painter: Model, prompts: Sequence[str], label: str | None, seed: int) -> Training:
    """One pass over a training source; of each name the picture with the smallest hash is kept."""
    task = None
    with suppress(UserError):  # names are needed for the control alone
        source, task = labels_or_captions(source, label, None)
    index = {} if task is None else {value: task.classes[position] for value, position in task.index().items()}
    wanted, small = set(prompts), []
    kept: dict[str, tuple[int, Tensor]] = {}
    for batch in picture_loader(source, painter).one_epoch():
        assert batch.image is not None
        small.append(thumbnails(batch.image))
        for identity, fields, picture in zip(batch.ids, batch.fields, batch.image, strict=True):
            value = None if task is None else label_of(fields, task.label)
            name = None if value is None else index.get(value)
            if name is None or name not in wanted:
                continue
            place = derive_seed(seed, "retrieved", identity)
            if name not in kept or place < kept[name][0]:
                kept[name] = place, picture.clone()
    note = source.name if kept else f"{source.name}, which has no pictures of the prompts by name: no retrieval control"
    return Training(torch.cat(small), {name: picture for name, (_, picture) in kept.items()}, note)


def _teachers(maker: Model, like: Model) -> Iterator[tuple[str, str | None]]:
    """Models that a maker was trained with or holds, those that these were, and so on: names and fingerprints.

    A fingerprint is of weights held in the type of another model's; None where the model can no longer be had.
    """
    precision = "bf16" if like.dtype == torch.bfloat16 else "fp32"
    waiting, met = _named(maker), set[str]()
    while waiting:
        name = min(waiting)
        waiting.remove(name)
        met.add(name)
        try:
            teacher = load(name, device="cpu", precision=precision)
        except UserError:
            yield name, None
            continue
        yield name, teacher.fingerprint
        waiting |= _named(teacher) - met


def _named(maker: Model) -> set[str]:
    """Models that the maker, its tokenizer or its latents were trained with or hold, as the configurations name them."""
    parts = [part for name in ("tokenizer", "latents") if (part := getattr(maker.system, name, None)) is not None]
    named = [getattr(maker.config, name, None) for name in ("tokenizer", "latents")]
    configs = (maker.config, *named, *(getattr(part, "config", None) for part in parts))
    known = (config for config in configs if isinstance(config, SystemSettings))
    return {name for config in known for name in (config.training_parts() | config.parts()).values()}


def _same(part: nn.Module, system: nn.Module) -> bool:
    """Whether two networks have the same weights."""
    first, second = part.state_dict(), system.state_dict()
    return first.keys() == second.keys() and all(
        tensor.shape == second[name].shape and torch.equal(tensor.to(second[name]), second[name])
        for name, tensor in first.items()
    )
