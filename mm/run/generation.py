"""Making pictures of texts: several per prompt, the best of many by another model's eyes, finishing a given picture."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.run.evaluation import loaded
from mm.seeding import derive_seed
from mm.types import Embeds, OnPicture, Paints, Sampling

Progress = Callable[[int, int], None]
Part = Literal["top", "bottom", "left", "right", "border"]

BATCH_SIZE = 64


@dataclass(frozen=True)
class Painting:
    """One generated picture.

    Args:
        prompt: What was asked for.
        pixels: uint8 ``(3, H, W)``.
        seed: Makes the same picture again, with the same prompt and settings.
        score: Cosine of picture and prompt to the ranker, where there is one.
    """

    prompt: str
    pixels: Tensor
    seed: int
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
    keep: Part | Tensor | None = None,
    device: str = "auto",
    precision: str = "auto",
    on_picture: OnPicture | None = None,
    progress: Progress | None = None,
) -> list[Painting]:
    """Make ``count`` pictures of each prompt.

    Args:
        model: A loaded model or a MODEL reference; it must be able to paint.
        prompts: What to paint.
        count: Pictures of each prompt.
        seed: With the prompt and the picture's number it decides every picture, whatever else is made along with it.
        sampling: Guidance, temperature and so on.
        best_of: Candidates of each picture, of which ``ranker`` chooses.
        ranker: A model with a shared space of pictures and texts, for ``best_of`` above 1.
        image: A picture to be finished or changed.
        keep: What stays of it: half of it, its border, or a mask ``(H, W)`` at the model's picture size.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.
        on_picture: Receives pictures in the making, of one batch at a time.
        progress: Called with (done, in all).

    Raises:
        UserError: The model cannot paint, there is nothing to paint, or the settings do not go together.
    """
    model = loaded(model, device, precision)
    painter = _painter(model)
    _check(prompts, count, best_of, ranker, image, keep)
    jobs = [(prompt, derive_seed(seed, prompt, n) % 2**63) for prompt in prompts for n in range(count * best_of)]
    start = None if image is None else model.processor.image(image)
    mask = None if start is None else _mask(keep, start)
    made: list[Tensor] = []
    for rows in _batches(jobs):
        text = model.processor.text([prompt for prompt, _ in rows]).to(model.device)
        given = None if start is None else start.expand(len(rows), -1, -1, -1).to(model.device)
        kept = None if mask is None else mask.expand(len(rows), -1, -1).to(model.device)
        seeds = [one for _, one in rows]
        pictures = painter.paint(text, seeds, sampling or Sampling(), image=given, keep=kept, on_picture=on_picture)
        made += list(pictures.cpu())
        if progress:
            progress(len(made), len(jobs))
    paintings = [Painting(prompt, pixels, one) for (prompt, one), pixels in zip(jobs, made, strict=True)]
    if ranker is None:
        return paintings
    return best(paintings, loaded(ranker, device, precision), best_of)


def best(paintings: Sequence[Painting], ranker: Model, best_of: int = 1) -> list[Painting]:
    """Of every ``best_of`` consecutive paintings of a prompt the one that the ranker finds nearest to the prompt."""
    if not isinstance(ranker.system, Embeds):
        raise UserError(f"ranker {ranker.name}: has no shared space of pictures and texts; take a model such as emoji-clip")
    names = list(dict.fromkeys(painting.prompt for painting in paintings))
    texts = class_vectors(ranker.embed_texts, names, ranker.processor.templates)
    vectors = ranker.embed_images([painting.pixels for painting in paintings])
    rows = torch.tensor([names.index(painting.prompt) for painting in paintings])
    scores = (vectors * texts[rows]).sum(1).tolist()
    scored = [Painting(one.prompt, one.pixels, one.seed, score) for one, score in zip(paintings, scores, strict=True)]
    groups = [scored[start : start + best_of] for start in range(0, len(scored), best_of)]
    return [max(group, key=lambda painting: painting.score or 0.0) for group in groups]


def _painter(model: Model) -> Paints:
    if not isinstance(model.system, Paints):
        able = ", ".join(sorted(model.capabilities)) or "nothing yet"
        raise UserError(f"{model.name} cannot paint (it can: {able}); train one with configs/dalle.yaml")
    return model.system


def _check(prompts: Sequence[str], count: int, best_of: int, ranker: object, image: object, keep: object) -> None:
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise UserError("nothing to paint: give at least one prompt that is not empty")
    if count < 1 or best_of < 1:
        raise UserError(f"count {count} and best_of {best_of} must be at least 1")
    if best_of > 1 and ranker is None:
        raise UserError("best_of needs a ranker that chooses; give one such as emoji-clip")
    if (image is None) != (keep is None):
        raise UserError("a picture to finish and the part of it to keep are given together (image and keep)")


def _batches(jobs: Sequence[tuple[str, int]]) -> Iterator[Sequence[tuple[str, int]]]:
    return (jobs[start : start + BATCH_SIZE] for start in range(0, len(jobs), BATCH_SIZE))


def _mask(keep: Part | Tensor | None, image: Tensor) -> Tensor:
    """True for the pixels that stay, ``(H, W)``."""
    height, width = image.shape[1:]
    if isinstance(keep, Tensor):
        if keep.shape != (height, width):
            raise UserError(f"keep: the mask is {tuple(keep.shape)}, the model's pictures are {(height, width)}")
        return keep.bool()
    mask = torch.zeros(height, width, dtype=torch.bool)
    parts = {
        "top": (slice(0, height // 2), slice(None)),
        "bottom": (slice(height // 2, None), slice(None)),
        "left": (slice(None), slice(0, width // 2)),
        "right": (slice(None), slice(width // 2, None)),
        "border": (slice(height // 4, -(height // 4)), slice(width // 4, -(width // 4))),
    }
    if keep not in parts:
        raise UserError(f"keep: '{keep}' is none of {', '.join(parts)}")
    mask[parts[keep]] = True
    return ~mask if keep == "border" else mask
