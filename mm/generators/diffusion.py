"""From noise to data: one loop for every path, prediction and solver, with guidance, thresholds and kept parts.

The suite's own solvers work on predicted data and need no library to be imported; any scheduler of diffusers can take their
place by its class name.

Shapes: B samples, the rest of a sample's shape is arbitrary.
Sources: DDIM https://arxiv.org/abs/2010.02502, Heun https://arxiv.org/abs/2206.00364, DPM-Solver++
https://arxiv.org/abs/2211.01095, consistency in several steps https://arxiv.org/abs/2310.04378, guidance
https://arxiv.org/abs/2207.12598, its interval https://arxiv.org/abs/2404.07724, its rescaling https://arxiv.org/abs/2305.08891,
dynamic thresholds https://arxiv.org/abs/2205.11487.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm.errors import UserError
from mm.generators.sampling import guided, guided_range, sample_generators
from mm.generators.schedulers import SchedulerConfig, check_scheduler, library_steps, remaining_steps
from mm.losses.diffusion import NUM_STEPS, DiffusionPath, Path, Prediction, advanced, mixed, output_of, predicted_sample
from mm.types import Sampling, Solver


class Denoise(Protocol):
    """A network that says what is noise and what is data."""

    def __call__(self, x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        """The network's output for ``x``.

        Args:
            x: Samples at a moment, ``(B, ...)``, or ``(2 B, ...)`` where ``guided``: the same ones twice.
            time: The moment as networks read it, ``()``, or one a row of ``x``.
            guided: The second half is to be answered without the prompt, or with the negative one.
        """
        ...


@dataclass(frozen=True)
class Known:
    """What is given of the samples.

    Args:
        sample: Data, ``(B, ...)``.
        keep: True where it stays, broadcastable to the data.
    """

    sample: Float[Tensor, "b ..."]
    keep: Bool[Tensor, "b ..."]


@dataclass(frozen=True)
class Step:
    """Where sampling stands.

    Args:
        sample: The data as far as it can be told, ``(B, ...)``; at the end, the result.
        progress: In 0..1; 1 at the end.
    """

    sample: Float[Tensor, "b ..."]
    progress: float


def gaussian_noise(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "b ..."]:
    """Standard normal noise ``(B, *shape)`` in fp32, that of a sample from its own generator, drawn on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


def diffuse(
    denoise: Denoise,
    path: Path,
    prediction: Prediction,
    shape: Sequence[int],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    device: torch.device | str = "cpu",
    start: Float[Tensor, "b ..."] | None = None,
    known: Known | None = None,
    usual: SchedulerConfig | None = None,
) -> Iterator[Step]:
    """Samples ``(B, *shape)``, step by step; in fp32 a sample depends on its seed, not on the batch.

    Args:
        denoise: The network with its prompts.
        path: What it was trained on.
        prediction: What it predicts.
        shape: Of a sample.
        seeds: One a sample.
        sampling: Steps, solver, guidance.
        device: Where the network is.
        start: Data to change (https://arxiv.org/abs/2108.01073): of the way from noise only the last part is gone, the share
            `Sampling.strength`.
        known: What stays as it is: the prediction is corrected there at every step, so that the rest fits it.
        usual: The solver where ``sampling`` names none, and options of diffusers' schedulers.

    Raises:
        UserError: Settings that do not go together.
    """
    usual = SchedulerConfig() if usual is None else usual
    sampling = sampling if sampling.solver else replace(sampling, solver=usual.solver)
    check_diffusion(sampling)
    guided_range(sampling, sampling.steps if start is None else remaining_steps(sampling))
    if isinstance(path, DiffusionPath) and sampling.steps >= NUM_STEPS:
        raise UserError(f"steps is {sampling.steps}; a diffusion of {NUM_STEPS} steps is sampled in fewer")
    generators = sample_generators(seeds)
    noise = gaussian_noise(generators, shape, device)

    def predict(x: Tensor, time: Tensor, progress: float) -> Tensor:
        """The network's output, guided, and corrected where something is known of the data."""
        low, high = sampling.guidance_interval
        guide = sampling.guidance != 1 and low <= progress <= high
        if guide:
            both = denoise(torch.cat([x, x]), path.read(time), guided=True).float()
            with_prompt, without = both.chunk(2)
            output = guided(with_prompt, without, sampling.guidance)
            output = rescaled(output, with_prompt, sampling.rescale) if sampling.rescale else output
        else:
            output = denoise(x, path.read(time), guided=False).float()
        if not sampling.threshold and known is None:
            return output
        sample = predicted_sample(path, prediction, output, x, time)
        sample = dynamically_clipped(sample, sampling.threshold) if sampling.threshold else sample
        sample = sample if known is None else torch.where(known.keep, known.sample, sample)
        return output_of(path, prediction, sample, x, time)

    if sampling.solver not in get_args(Solver):
        for sample, progress in library_steps(predict, path, prediction, noise, start, sampling, generators, usual.options):
            yield Step(sample, progress)
        return
    times = path.schedule(sampling.steps, sampling.shift).to(device)
    if not bool((times.diff() < 0).all()):
        raise UserError(
            f"steps {sampling.steps} with shift {sampling.shift} meet a moment twice; take fewer steps or less shift"
        )
    if start is None:
        yield from _solve(predict, path, prediction, noise, times, sampling, generators)
    else:
        times = times[-1 - remaining_steps(sampling) :]
        mixture = mixed(path, start, noise, times[0])
        yield from _solve(predict, path, prediction, mixture, times, sampling, generators)


def check_diffusion(sampling: Sampling) -> None:
    """Raises `UserError` for settings of a diffusion that mean nothing."""
    if sampling.solver not in get_args(Solver):
        check_scheduler(sampling.solver)
    if not 0 < sampling.strength <= 1:
        raise UserError(f"strength is {sampling.strength}; take a share of the way from noise above 0, or 1 for all of it")
    if not 0 <= sampling.rescale <= 1:
        raise UserError(f"rescale is {sampling.rescale}; take 0 for none to 1")
    if sampling.threshold and not 0.5 <= sampling.threshold <= 1:
        raise UserError(f"threshold is {sampling.threshold}; take 0 for none, or a share of the pixels from 0.5 to 1")
    if not 0 < sampling.shift < math.inf:
        raise UserError(f"shift is {sampling.shift}; take 1 for none, or more to spend more steps on noise")


def rescaled(output: Tensor, with_prompt: Tensor, share: float) -> Tensor:
    """Bring a guided output part of the way back to the spread that it has without guidance."""
    axes = tuple(range(1, output.ndim))
    spread = with_prompt.std(axes, keepdim=True) / output.std(axes, keepdim=True)
    return torch.lerp(output, output * spread, share)


def dynamically_clipped(sample: Tensor, share: float) -> Tensor:
    """Pixels in -1..1 again: each sample is clipped to what ``share`` of its absolute values lie within, at least 1, and
    divided by it."""
    bound = sample.abs().flatten(1).quantile(share, dim=1).clamp(min=1).reshape(-1, *[1] * (sample.ndim - 1))
    return sample.clamp(-bound, bound) / bound


Predict = Callable[[Tensor, Tensor, float], Tensor]
"""``x_t``, moment and progress to the network's output."""


def _solve(
    predict: Predict,
    path: Path,
    prediction: Prediction,
    x: Tensor,
    times: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
) -> Iterator[Step]:
    """The suite's own solvers.

    Each holds data constant from a moment to the next (`advanced`): what the network says of them, or in the second-order
    methods a better guess. "lcm" takes what it says for the data themselves, and adds new noise to them.
    """
    count = len(times) - 1
    alphas, sigmas = path.coefficients(times)
    earlier: tuple[Tensor, Tensor] | None = None
    for i in range(count):
        time, later, progress, last = times[i], times[i + 1], i / max(1, count - 1), i == count - 1
        sample = predicted_sample(path, prediction, predict(x, time, progress), x, time)
        guess = sample
        if sampling.solver == "dpm++" and earlier is not None and not last:
            before, log_ratio = earlier
            now = torch.log(alphas[i] / sigmas[i])
            step, step_before = torch.log(alphas[i + 1] / sigmas[i + 1]) - now, now - log_ratio
            guess = sample + (sample - before) * (step / (2 * step_before))
        elif sampling.solver == "heun" and not last:
            ahead = advanced(path, x, sample, time, later)
            corrected = predicted_sample(path, prediction, predict(ahead, later, progress), ahead, later)
            guess = (sample + corrected) / 2
        if sampling.solver == "lcm":
            x = sample if last else mixed(path, sample, gaussian_noise(generators, x.shape[1:], x.device), later)
        else:
            x = advanced(path, x, guess, time, later)
        earlier = sample, torch.log(alphas[i] / sigmas[i])
        yield Step(x if last else sample, (i + 1) / count)
