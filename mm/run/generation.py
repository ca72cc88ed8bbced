"""Making pictures of texts: several per prompt, the best of many by another model's eyes, finishing a given picture."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors
from mm.generators.sampling import check_sampling
from mm.hub import Model
from mm.run.canvas import Canvas, Part, canvas
from mm.run.evaluation import loaded
from mm.seeding import derive_seed
from mm.types import Embeds, OnPicture, Paints, Sampling, Varies

Progress = Callable[[int, int], None]
OnCut = Callable[[str, str], None]
"""Called with a prompt that is longer than the model reads, and the part of it that is read."""

OnBatch = Callable[[int, float], None]
"""Called with the number of pictures of a batch and the seconds that the painter took for all of them."""

BATCH_SIZE = 64
"""Pictures that are painted together."""


@dataclass(frozen=True)
class Painting:
    """One generated picture.

    With the same seed, prompt and settings, the picture is made again wherever at least ``number + 1`` candidates of the prompt
    are: ``generate(model, [prompt], count=number + 1, seed=seed)[number]`` is this one; in fp32, whatever else is made along
    with it.

    Args:
        prompt: What was asked for.
        pixels: uint8 ``(3, H, W)``.
        seed: The one that the caller gave.
        number: Of the picture among those of its prompt, from 0, candidates that were not chosen included.
        score: Cosine of picture and prompt to the ranker, where there is one.
    """

    prompt: str
    pixels: Tensor
    seed: int
    number: int
    score: float | None = None


def generate(
    model: str | Path | Model,
    prompts: Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    best_of: int = 1,
    ranker: str | Path | Model | None = None,
    image: Any = None,
    keep: Part | str | Path | Tensor | None = None,
    paste: bool = True,
    negative: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_picture: OnPicture | None = None,
    on_cut: OnCut | None = None,
    on_batch: OnBatch | None = None,
    progress: Progress | None = None,
) -> list[Painting]:
    """Make ``count`` pictures of each prompt. All that can be wrong with what is given is found before anything is painted.

    Args:
        model: A loaded model or a MODEL reference; it must be able to paint.
        prompts: What to paint; one that is given twice gets twice as many pictures, all different.
        count: Pictures of each prompt.
        seed: With the prompt and the picture's number it decides every picture; in fp32, whatever else is made along with it.
        sampling: Guidance, temperature and so on.
        best_of: Candidates of each picture, of which ``ranker`` chooses.
        ranker: A model with a shared space of pictures and texts, for ``best_of`` above 1.
        image: A picture to be finished, or without ``keep`` one to be changed, by ``sampling.strength``.
        keep: What stays of it: half of it, its border, a mask ``(H, W)`` at the model's picture size, True where it stays, or a
            picture file, white where it stays, of the size of ``image`` or of the model's pictures.
        paste: Lay the kept pixels of ``image`` over the result, which the model itself gives only as far as its tokens can.
        negative: What guidance leads away from; nothing in particular if None.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        on_picture: Receives pictures in the making, of one batch at a time.
        on_cut: See `OnCut`; called before anything is painted.
        on_batch: See `OnBatch`.
        progress: Called with (candidates done, in all).

    Returns:
        The pictures, prompt by prompt. Of the candidates only those of one batch are held at a time.

    Raises:
        UserError: The model cannot paint, the ranker has no shared space, there is nothing to paint, or the settings do not go
            together.
    """
    model = loaded(model, device, precision, painting=True)
    painter, sampling = _painter(model), sampling or Sampling()
    _check(prompts, count, best_of, ranker, sampling, negative)
    chooser = None if ranker is None else ranking(loaded(ranker, device, precision))
    given = canvas(model, image, keep)
    finish = given.pasted if given and paste else _as_it_is
    if on_cut:
        for prompt, read in cut_prompts(model, prompts):
            on_cut(prompt, read)
    jobs = list(_jobs(prompts, count * best_of))
    chosen: list[Painting] = []
    waiting: list[Painting] = []
    for start in range(0, len(jobs), BATCH_SIZE):
        rows = jobs[start : start + BATCH_SIZE]
        begun = time.perf_counter()
        pictures = _paint(model, painter, rows, seed, sampling, given, finish, on_picture, negative)
        if on_batch:
            on_batch(len(rows), time.perf_counter() - begun)
        for (prompt, number), pixels in zip(rows, pictures, strict=True):
            waiting.append(Painting(prompt, pixels.clone(), seed, number))  # a view would keep the whole batch alive
        whole = len(waiting) // best_of * best_of
        chosen += best(waiting[:whole], chooser, best_of) if chooser else waiting[:whole]
        waiting = waiting[whole:]
        if progress:
            progress(start + len(rows), len(jobs))
    return chosen


def best(paintings: Sequence[Painting], ranker: Model, best_of: int = 1) -> list[Painting]:
    """Of every ``best_of`` consecutive paintings of a prompt the one that the ranker finds nearest to the prompt."""
    if not paintings:
        return []
    names = list(dict.fromkeys(painting.prompt for painting in paintings))
    texts = class_vectors(ranker.embed_texts, names, ranker.processor.templates)
    vectors = ranker.embed_images([painting.pixels for painting in paintings])
    rows = torch.tensor([names.index(painting.prompt) for painting in paintings])
    scores = (vectors * texts[rows]).sum(1).tolist()
    scored = [replace(painting, score=score) for painting, score in zip(paintings, scores, strict=True)]
    groups = [scored[start : start + best_of] for start in range(0, len(scored), best_of)]
    return [max(group, key=lambda painting: painting.score or 0.0) for group in groups]


def ranking(ranker: Model) -> Model:
    """The model itself, where it can choose among pictures. Raises `UserError` where it has no shared space."""
    if not isinstance(ranker.system, Embeds) or not {"image", "text"} <= ranker.system.encoders().keys():
        raise UserError(f"ranker {ranker.name}: has no shared space of pictures and texts; take a model such as emoji-clip")
    return ranker


def cut_prompts(model: Model, prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Prompts that are longer than the model reads, each once, with the part that it reads, as its tokenizer gives it back."""
    tokenizer = model.processor.tokenizer
    room = model.processor.context_length - sum(token is not None for token in (tokenizer.start, tokenizer.end))
    ids = {prompt: tokenizer.encode(prompt) for prompt in prompts}
    return [(prompt, tokenizer.decode(tokens[:room])) for prompt, tokens in ids.items() if len(tokens) > room]


def _paint(
    model: Model,
    painter: Paints,
    rows: Sequence[tuple[str, int]],
    seed: int,
    sampling: Sampling,
    given: Canvas | None,
    finish: Callable[[Tensor], Tensor],
    on_picture: OnPicture | None,
    negative: str | None,
) -> Tensor:
    """One batch of pictures, uint8 ``(B, 3, H, W)`` on the CPU."""
    text = model.processor.text([prompt for prompt, _ in rows]).to(model.device)
    seeds = [derive_seed(seed, prompt, number) for prompt, number in rows]
    image = None if given is None else given.image.expand(len(rows), -1, -1, -1).to(model.device)
    keep = None if given is None or given.keep is None else given.keep.expand(len(rows), -1, -1).to(model.device)
    away = None if negative is None else model.processor.text([negative] * len(rows)).to(model.device)

    def show(pictures: Tensor, progress: float) -> None:
        assert on_picture is not None
        on_picture(finish(pictures), progress)

    shown = None if on_picture is None else show
    return finish(painter.paint(text, seeds, sampling, image=image, keep=keep, on_picture=shown, negative=away)).cpu()


def vary(
    model: str | Path | Model,
    images: Sequence[Any],
    *,
    count: int = 1,
    seed: int = 0,
    sampling: Sampling | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_picture: OnPicture | None = None,
    progress: Progress | None = None,
) -> list[Painting]:
    """Make ``count`` other pictures of what each picture shows.

    Args:
        model: A loaded model or a MODEL reference; it must be able to vary pictures.
        images: Whatever `mm.media.image.open_image` takes.
        count: Pictures of each.
        seed: With the picture's place in the list and the number it decides every picture.
        sampling: Guidance, steps and so on.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        on_picture: Receives pictures in the making, of one batch at a time.
        progress: Called with (pictures done, in all).

    Returns:
        The pictures, one given picture after the other; the prompt is the given picture's name.

    Raises:
        UserError: The model cannot vary pictures, or a picture cannot be read.
    """
    model, sampling = loaded(model, device, precision), sampling or Sampling()
    if not isinstance(model.system, Varies) or "varies" not in model.capabilities:
        raise UserError(f"{model.name} cannot vary pictures (it can: {_abilities(model)}); take emoji-flow")
    if not images or count < 1:
        raise UserError(f"{len(images)} pictures, {count} of each: nothing to make")
    check_sampling(sampling)
    given = model.processor.images(images)
    jobs = [(row, number) for row in range(len(images)) for number in range(count)]
    made: list[Painting] = []
    for start in range(0, len(jobs), BATCH_SIZE):
        rows = jobs[start : start + BATCH_SIZE]
        seeds = [derive_seed(seed, f"picture {row}", number) for row, number in rows]
        chosen = given[torch.tensor([row for row, _ in rows])].to(model.device)
        pictures = model.system.vary(chosen, seeds, sampling, on_picture=on_picture).cpu()
        for (row, number), pixels in zip(rows, pictures, strict=True):
            made.append(Painting(_name(images[row], row), pixels.clone(), seed, number))
        if progress:
            progress(len(made), len(jobs))
    return made


def _name(image: Any, row: int) -> str:
    return Path(image).stem if isinstance(image, str | Path) else f"picture {row + 1}"


def _as_it_is(pictures: Tensor) -> Tensor:
    return pictures


def _jobs(prompts: Sequence[str], each: int) -> Iterator[tuple[str, int]]:
    """Every candidate's prompt and number; the numbers of a prompt that is given again go on."""
    met: Counter[str] = Counter()
    for prompt in prompts:
        for _ in range(each):
            yield prompt, met[prompt]
            met[prompt] += 1


def _painter(model: Model) -> Paints:
    if not isinstance(model.system, Paints):
        raise UserError(
            f"{model.name} cannot paint (it can: {_abilities(model)}); take emoji-flow, or train one with configs/flow.yaml"
        )
    return model.system


def _abilities(model: Model) -> str:
    return ", ".join(sorted(model.capabilities)) or "nothing yet"


def _check(prompts: Sequence[str], count: int, best_of: int, ranker: object, sampling: Sampling, negative: str | None) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("nothing to paint: give at least one prompt that is not empty")
    if count < 1 or best_of < 1:
        raise UserError(f"count {count} and best_of {best_of} must be at least 1")
    if best_of > 1 and ranker is None:
        raise UserError("best_of needs a ranker that chooses; give one such as emoji-clip")
    check_sampling(sampling)
    if negative is not None and (sampling.guidance == 1 or not negative.strip()):
        raise UserError("negative: is what guidance leads away from; give some words, and guidance other than 1")
