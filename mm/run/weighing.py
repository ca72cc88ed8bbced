"""How well texts fit a picture, by whichever way a model joins the two: as vectors, read together, or as one sequence."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mm.errors import UserError
from mm.hub import Model
from mm.run.evaluation import loaded
from mm.types import Embeds, Expects, Matches

Strategy = Literal["dual tower", "single tower", "cross-attention"]
"""Two vectors are compared; words and picture are one sequence; words attend to the picture."""


@dataclass(frozen=True)
class Fit:
    """How well one text fits a picture.

    Args:
        text: In words.
        score: See `Weighed.measure`.
        probability: Among the texts that were given together, the softmax of the model's logits.
    """

    text: str
    score: float
    probability: float


@dataclass(frozen=True)
class Weighed:
    """How well texts fit a picture.

    Args:
        strategy: How the model joins pictures and texts.
        measure: What the scores are: ``cosine``; ``match``, how likely the two belong together; or ``log-likelihood``, the mean
            of the picture's tokens behind the text, in nats.
        fits: In the order of the texts.
    """

    strategy: Strategy
    measure: Literal["cosine", "match", "log-likelihood"]
    fits: tuple[Fit, ...]


def strategy(capabilities: Set[str], modalities: Set[str]) -> Strategy | None:
    """How a model with such capabilities and a shared space of such modalities joins pictures with texts; None where not."""
    if "matches" in capabilities:
        return "cross-attention" if "embeds" in capabilities else "single tower"
    if "expects" in capabilities:
        return "single tower"
    return "dual tower" if {"image", "text"} <= modalities else None


def weigh(
    model: str | Path | Model, image: Any, texts: Sequence[str], *, device: str = "auto", precision: str = "auto"
) -> Weighed:
    """Tell how well each text fits a picture.

    Args:
        model: A loaded model or a MODEL reference.
        image: Whatever `mm.media.image.open_image` takes.
        texts: At least one.
        device: Where to compute; ``auto`` chooses.
        precision: See `mm.hub.load`.

    Raises:
        UserError: The model joins no pictures with texts, there is no text, or the picture cannot be read.
    """
    model = loaded(model, device, precision)
    system = model.system
    way = strategy(model.capabilities, system.encoders().keys() if isinstance(system, Embeds) else frozenset())
    if way is None:
        able = ", ".join(sorted(model.capabilities)) or "nothing yet"
        raise UserError(
            f"{model.name} does not weigh texts against a picture (it can: {able}); take a model such as emoji-clip"
        )
    if not texts:
        raise UserError("texts: give at least one to weigh")
    if way == "dual tower":
        vectors, words = model.embed_images([image]), model.embed_texts(texts)
        scores, logits, measure = (vectors @ words.T)[0], model.scores(vectors, words)[0], "cosine"
    elif isinstance(system, Matches):
        logits = _matched(model, system, image, texts)
        scores, measure = logits.sigmoid(), "match"
    else:
        assert isinstance(system, Expects)
        pixels = model.processor.image(image).expand(len(texts), -1, -1, -1).to(model.device)
        logits = system.picture_likelihoods(pixels, model.processor.text(texts).to(model.device)).cpu()
        scores, measure = logits, "log-likelihood"
    rows = zip(texts, scores.tolist(), logits.softmax(0).tolist(), strict=True)
    return Weighed(way, measure, tuple(Fit(*row) for row in rows))


@torch.no_grad()
def _matched(model: Model, system: Matches, image: Any, texts: Sequence[str]) -> Tensor:
    """Logits of one picture with each text, ``(N,)``; the picture is encoded once."""
    picture = system.encode_image(model.processor.image(image)[None].to(model.device))
    words = system.encode_text(model.processor.text(texts).to(model.device))
    return system.match(picture[torch.zeros(len(texts), dtype=torch.int64, device=model.device)], words).float().cpu()
