"""Every evaluation by the name that the command line and `evaluate` know it by."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.hub import Model
from mm.run.answering import evaluate_vqa
from mm.run.evaluation import evaluate_compositional, evaluate_retrieval, evaluate_zero_shot, loaded, opened
from mm.run.matching import evaluate_matching
from mm.run.picture_evaluation import evaluate_generation, evaluate_reconstruction
from mm.types import Source


def evaluate_any_retrieval(
    model: str | Path | Model,
    data: str | Source,
    *,
    image_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    cache: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
) -> Result:
    """Retrieval by vectors, or by reading all pairs where a model has no shared space; arguments as `evaluate_retrieval`."""
    model = loaded(model, device, precision)
    source = opened(data, model, image_field=image_field, text_field=text_field)
    if "matches" in model.capabilities and "embeds" not in model.capabilities:
        return evaluate_matching(model, source, progress=progress)
    return evaluate_retrieval(model, source, cache=cache, progress=progress)


TASKS: Mapping[str, Callable[..., Result]] = {
    "zero-shot": evaluate_zero_shot,
    "retrieval": evaluate_any_retrieval,
    "compositional": evaluate_compositional,
    "reconstruction": evaluate_reconstruction,
    "generation": evaluate_generation,
    "vqa": evaluate_vqa,
}


def evaluate(task: str, model: str | Path | Model, data: str | Source, **options: Any) -> Result:
    """Measure a model: ``task`` is a name in `TASKS`; options are those of the function of that task.

    Raises:
        UserError: An unknown task, or what the task's own function raises.
    """
    if task not in TASKS:
        raise UserError(f"'{task}': no such evaluation; there are {', '.join(TASKS)}")
    return TASKS[task](model, data, **options)
