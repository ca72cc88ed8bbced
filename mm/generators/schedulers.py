"""Any scheduler of diffusers in place of the suite's own solvers.

A scheduler is named by its class, such as ``DDIMScheduler`` or ``UniPCMultistep``; the last word may be left out. It is given
the path's own variances, so that a network is sampled as it was trained; its other options are those that the model brings, as
far as it knows them, else diffusers' defaults, except that nothing is clipped.
"""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from mm.config import StrictConfig
from mm.errors import UserError
from mm.losses.diffusion import NUM_STEPS, DiffusionPath, Path, Prediction, StraightPath, output_of, predicted_sample
from mm.types import Sampling

LAST_WORD = "Scheduler"
OTHER_TASKS = ("Inverse", "CogVideoX", "Helios")
"""In the names of schedulers that go from data to noise, or that single video models need."""

NAMES: Mapping[Prediction, str] = {"velocity": "v_prediction", "noise": "epsilon"}
"""The predictions of a diffusion in diffusers' terms."""


class SchedulerConfig(StrictConfig):
    """How a model is sampled where nobody says otherwise.

    Args:
        solver: See `mm.types.Sampling`.
        options: Arguments of diffusers' schedulers, such as ``{timestep_spacing: trailing, steps_offset: 1}``, for any that is
            chosen and knows them; not those that follow from the path and the prediction.
    """

    solver: str = "dpm++"
    options: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it


def check_scheduler(name: str) -> None:
    """Raises `UserError` where diffusers has no such scheduler."""
    _scheduler_class(name)


def remaining_steps(sampling: Sampling) -> int:
    """Steps that are gone where a picture is changed, at least one."""
    return max(1, round(sampling.strength * sampling.steps))


def library_steps(
    predict: Callable[[Tensor, Tensor, float], Tensor],
    path: Path,
    prediction: Prediction,
    noise: Tensor,
    start: Tensor | None,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    options: Mapping[str, Any],
) -> Iterator[tuple[Tensor, float]]:
    """Samples as far as they can be told and the progress, step by step; the last is the result.

    Args:
        predict: ``x_t``, moment and progress to the network's output.
        path: What the network was trained on.
        prediction: What it predicts.
        noise: ``(B, ...)``.
        start: Data to change, see `mm.generators.diffusion.diffuse`.
        sampling: Steps, solver, strength.
        generators: One a sample, for schedulers that add noise on the way.
        options: See `SchedulerConfig`.

    Raises:
        UserError: The scheduler does not go with the path or the prediction.
    """
    scheduler, wanted = scheduler_for(sampling, path, prediction, options)
    timing: dict[str, Any] = {"num_inference_steps": sampling.steps}
    if isinstance(path, StraightPath) and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        # diffusers' own end is a thousandth before the data
        timing = {"sigmas": torch.linspace(1, 0, sampling.steps + 1)[:-1].numpy()}
    try:
        scheduler.set_timesteps(**timing, device=noise.device)
    except ValueError as error:
        raise UserError(f"solver {sampling.solver}, steps {sampling.steps}: {' '.join(str(error).split())}") from None
    moments = scheduler.timesteps
    if start is None:
        x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    else:
        first = (sampling.steps - remaining_steps(sampling)) * scheduler.order
        moments = moments[first:]
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        rows = moments[:1].expand(len(noise))
        x = (
            scheduler.scale_noise(start, rows, noise)
            if hasattr(scheduler, "scale_noise")
            else scheduler.add_noise(start, noise, rows)
        )
    random: dict[str, Any] = (
        {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    )
    count = len(moments)
    for i, moment in enumerate(moments):
        scaled = scheduler.scale_model_input(x, moment) if hasattr(scheduler, "scale_model_input") else x
        time = _time(path, moment)
        output = predict(scaled, time, i / max(1, count - 1))
        sample = predicted_sample(path, prediction, output, scaled, time)
        if wanted != prediction:
            output = output_of(path, wanted, sample, scaled, time)
        x = scheduler.step(output, moment, x, return_dict=False, **random)[0]
        yield x if i == count - 1 else sample, (i + 1) / count


def scheduler_for(sampling: Sampling, path: Path, prediction: Prediction, given: Mapping[str, Any]) -> tuple[Any, Prediction]:
    """A scheduler of diffusers for a path, with given options as far as it knows them, and the prediction that it wants."""
    kind = _scheduler_class(sampling.solver)
    known = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in {"clip_sample": False, **given}.items() if name in known}
    if isinstance(path, StraightPath):
        shift = path.shift * sampling.shift
        if "use_flow_sigmas" in known:
            names = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
            return kind(**options | names), "velocity"
        if kind.__name__.startswith("FlowMatch"):
            return kind(shift=shift), "velocity"
        raise UserError(f"solver {sampling.solver}: has no straight paths; take FlowMatchEulerDiscrete or UniPCMultistep")
    if not isinstance(path, DiffusionPath) or not {"trained_betas", "prediction_type"} <= known.keys():
        raise UserError(f"solver {sampling.solver}: has no diffusion of given variances; take DDIM or DPMSolverMultistep")
    if sampling.shift != 1:
        raise UserError(
            f"solver {sampling.solver}: knows no shift on a diffusion; take euler, heun or dpm++, or leave shift out"
        )
    wanted = "velocity" if prediction == "sample" else prediction  # which some schedulers do not know
    names = {"num_train_timesteps": NUM_STEPS, "trained_betas": path.variances.numpy(), "prediction_type": NAMES[wanted]}
    return kind(**options | names), wanted


def _time(path: Path, moment: Tensor) -> Tensor:
    """The moment on a path that a scheduler's timestep stands for."""
    return moment.float() / NUM_STEPS if isinstance(path, StraightPath) else (moment.double() + 1) / NUM_STEPS


def _scheduler_class(name: str) -> Any:
    try:
        from diffusers import schedulers
    except ImportError:
        raise UserError(
            f"solver '{name}' needs diffusers; pip install \"mm-suite[diffusion]\", or take euler, heun, dpm++"
        ) from None
    whole = name if name.endswith(LAST_WORD) else name + LAST_WORD
    every = [known for known in dir(schedulers) if known.endswith(LAST_WORD) and not any(word in known for word in OTHER_TASKS)]
    if whole not in every:
        near = difflib.get_close_matches(whole, every, n=1)
        hint = (
            f"did you mean '{near[0].removesuffix(LAST_WORD)}'?"
            if near
            else "take euler, heun, dpm++ or a scheduler of diffusers"
        )
        raise UserError(f"solver '{name}': there is none; {hint}")
    return getattr(schedulers, whole)
