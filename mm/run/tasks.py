"""Every evaluation by the name that the command line and `evaluate` know it by."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.hub import Model
from mm.run.answering import evaluate_vqa
from mm.run.captioning import evaluate_captioning
from mm.run.evaluation import (
    Between,
    Captioned,
    evaluate_compositional,
    evaluate_retrieval,
    evaluate_zero_shot,
    loaded,
    opened,
)
from mm.run.few_shot import evaluate_few_shot
from mm.run.matching import evaluate_matching
from mm.run.picture_evaluation import evaluate_generation, evaluate_reconstruction
from mm.run.recognition import evaluate_recognition
from mm.run.reranking import evaluate_reranked, recommended
from mm.types import Source


def evaluate_any_retrieval(
    model: str | Path | Model,
    data: str | Source,
    *,
    between: Between = ("image", "text"),
    image_field: str | None = None,
    audio_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    score: str | None = None,
    itm_weight: float | None = None,
    top_k: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
    on_encoded: Callable[[Captioned], None] | None = None,
) -> Result:
    """Retrieval by what a model can: by vectors, by reading all pairs, or in two stages where it can do both.

    Arguments as `evaluate_retrieval`; ``score``, ``itm_weight`` and ``top_k`` as `evaluate_reranked`; what is None is as the
    model's card recommends (`mm.run.reranking.recommended`), else itm, 1 and 128.

    Raises:
        UserError: A score for a model that does not both embed and match, ``on_encoded`` for one that matches; what the
            evaluation itself raises.
    """
    model = loaded(model, device, precision)
    embeds, matches = (name in model.capabilities for name in ("embeds", "matches"))
    for name, value in (("score", score), ("itm_weight", itm_weight), ("top_k", top_k)):
        if value is not None and not (embeds and matches):
            raise UserError(f"{model.name}: {name} '{value}' is for models that both embed and match; leave it out")
    if matches and on_encoded is not None:
        raise UserError(f"{model.name}: compares pictures and texts by more than vectors; take a model such as emoji-clip")
    source = opened(data, model, image_field=image_field, audio_field=audio_field, text_field=text_field)
    if "audio" in between:
        return evaluate_retrieval(model, source, between=between, cache=cache, progress=progress)
    if embeds and matches:
        given: dict[str, Any] = {"score": score, "itm_weight": itm_weight, "top_k": top_k}
        advice = recommended(model)
        if score not in (None, advice.get("score")):
            advice.pop("itm_weight", None)  # which was chosen for another score
        taken = {name: value for name, value in advice.items() if given[name] is None}
        options = {name: value for name, value in given.items() if value is not None} | taken
        measured = evaluate_reranked(model, source, cache=cache, progress=progress, **options)
        return measured | Result({}, {"recommended": f"{', '.join(taken)} by the card of the model"} if taken else {})
    if matches:
        return evaluate_matching(model, source, progress=progress)
    return evaluate_retrieval(model, source, between=between, cache=cache, progress=progress, on_encoded=on_encoded)


TASKS: Mapping[str, Callable[..., Result]] = {
    "zero-shot": evaluate_zero_shot,
    "retrieval": evaluate_any_retrieval,
    "compositional": evaluate_compositional,
    "reconstruction": evaluate_reconstruction,
    "generation": evaluate_generation,
    "vqa": evaluate_vqa,
    "captioning": evaluate_captioning,
    "few-shot": evaluate_few_shot,
    "recognition": evaluate_recognition,
}


def evaluate(task: str, model: str | Path | Model, data: str | Source, **options: Any) -> Result:
    """Measure a model: ``task`` is a name in `TASKS`; options are those of the function of that task.

    Raises:
        UserError: An unknown task, or what the task's own function raises.
    """
    if task not in TASKS:
        raise UserError(f"'{task}': no such evaluation; there are {', '.join(TASKS)}")
    return TASKS[task](model, data, **options)
