"""Every evaluation by the name that the command line and `evaluate` know it by."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.hub import Model
from mm.run.answering import evaluate_vqa
from mm.run.captioning import evaluate_captioning
from mm.run.evaluation import evaluate_compositional, evaluate_retrieval, evaluate_zero_shot, loaded, opened
from mm.run.matching import evaluate_matching
from mm.run.picture_evaluation import evaluate_generation, evaluate_reconstruction
from mm.run.reranking import TOP_K, evaluate_reranked
from mm.types import Source


def evaluate_any_retrieval(
    model: str | Path | Model,
    data: str | Source,
    *,
    image_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    score: str | None = None,
    itm_weight: float | None = None,
    top_k: int | None = None,
    cache: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> Result:
    """Retrieval by what a model can: by vectors, by reading all pairs, or in two stages where it can do both.

    Arguments as `evaluate_retrieval`; ``score`` (itm if None), ``itm_weight`` and ``top_k`` as `evaluate_reranked`.

    Raises:
        UserError: A score for a model that does not both embed and match; what the evaluation itself raises.
    """
    model = loaded(model, device, precision)
    embeds, matches = (name in model.capabilities for name in ("embeds", "matches"))
    for name, value in (("score", score), ("itm_weight", itm_weight), ("top_k", top_k)):
        if value is not None and not (embeds and matches):
            raise UserError(f"{model.name}: {name} '{value}' is for models that both embed and match; leave it out")
    source = opened(data, model, image_field=image_field, text_field=text_field)
    if embeds and matches:
        return evaluate_reranked(
            model,
            source,
            score=score or "itm",
            itm_weight=1.0 if itm_weight is None else itm_weight,
            top_k=TOP_K if top_k is None else top_k,
            cache=cache,
            progress=progress,
        )
    if matches:
        return evaluate_matching(model, source, progress=progress)
    return evaluate_retrieval(model, source, cache=cache, progress=progress)


TASKS: Mapping[str, Callable[..., Result]] = {
    "zero-shot": evaluate_zero_shot,
    "retrieval": evaluate_any_retrieval,
    "compositional": evaluate_compositional,
    "reconstruction": evaluate_reconstruction,
    "generation": evaluate_generation,
    "vqa": evaluate_vqa,
    "captioning": evaluate_captioning,
}


def evaluate(task: str, model: str | Path | Model, data: str | Source, **options: Any) -> Result:
    """Measure a model: ``task`` is a name in `TASKS`; options are those of the function of that task.

    Raises:
        UserError: An unknown task, or what the task's own function raises.
    """
    if task not in TASKS:
        raise UserError(f"'{task}': no such evaluation; there are {', '.join(TASKS)}")
    return TASKS[task](model, data, **options)
