"""Every evaluation by the name that the command line and `evaluate` know it by."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.hub import Model
from mm.run.evaluation import evaluate_compositional, evaluate_retrieval, evaluate_zero_shot
from mm.run.picture_evaluation import evaluate_generation, evaluate_reconstruction
from mm.types import Source

TASKS: Mapping[str, Callable[..., Result]] = {
    "zero-shot": evaluate_zero_shot,
    "retrieval": evaluate_retrieval,
    "compositional": evaluate_compositional,
    "reconstruction": evaluate_reconstruction,
    "generation": evaluate_generation,
}


def evaluate(task: str, model: str | Path | Model, data: str | Source, **options: Any) -> Result:
    """Measure a model: ``task`` is a name in `TASKS`; options are those of the function of that task.

    Raises:
        UserError: An unknown task, or what the task's own function raises.
    """
    if task not in TASKS:
        raise UserError(f"'{task}': no such evaluation; there are {', '.join(TASKS)}")
    return TASKS[task](model, data, **options)
