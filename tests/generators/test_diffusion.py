"""From noise to data: known distributions come back, solvers agree with diffusers', guidance and kept parts act as they say."""

import sys
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mm.errors import UserError
from mm.generators.diffusion import Known, diffuse, dynamically_clipped, rescaled
from mm.losses.diffusion import DiffusionPath, Path, Prediction, StraightPath, output_of
from mm.types import Sampling, Solver

MEANS = torch.tensor([[-2.0, 0.0], [2.0, 1.0], [0.5, -2.0]])
SHARES = torch.tensor([0.2, 0.5, 0.3])
SPREAD = 0.3
PATHS: dict[str, Path] = {"flow": StraightPath(), "ddpm": DiffusionPath("linear")}


def exact(path: Path, prediction: Prediction) -> Any:
    """A network that knows the Gaussian mixture: its prediction is the conditional mean."""

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        moment = time / 1000 if isinstance(path, StraightPath) else (time + 1) / 1000
        alpha, sigma = (part.reshape(-1, 1, 1) for part in path.coefficients(moment))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        distance = (x[:, None] - alpha * MEANS).square().sum(-1)
        weights = (SHARES.log() - distance / (2 * variance[..., 0])).softmax(-1)
        means = MEANS + (alpha * SPREAD**2 / variance) * (x[:, None] - alpha * MEANS)
        return output_of(path, prediction, (weights[..., None] * means).sum(1), x, moment)

    return denoise


def run(path: Path, prediction: Prediction, count: int = 4000, **options: Any) -> Tensor:
    sampling = Sampling(guidance=1.0, **options)
    steps = list(diffuse(exact(path, prediction), path, prediction, (2,), range(count), sampling))
    assert [step.progress for step in steps] == sorted(step.progress for step in steps)
    assert steps[-1].progress == 1
    return steps[-1].sample


CASES = [(name, prediction) for name in PATHS for prediction in get_args(Prediction) if (name, prediction) != ("flow", "noise")]


@pytest.mark.parametrize("solver", ["euler", "heun", "dpm++", "scheduler"])
@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_a_gaussian_mixture_comes_back(name: str, prediction: Prediction, solver: str) -> None:
    """Shares of the modes within 0.03 (sampling error 0.008), their means within 0.05, their spreads within 0.03."""
    library = {"flow": "FlowMatchEulerDiscrete", "ddpm": "DDIM"}[name]
    drawn = run(PATHS[name], prediction, solver=library if solver == "scheduler" else solver, steps=60)
    nearest = torch.cdist(drawn, MEANS).argmin(1)
    for mode in range(3):
        members = drawn[nearest == mode]
        assert len(members) / len(drawn) == pytest.approx(SHARES[mode].item(), abs=0.03)
        torch.testing.assert_close(members.mean(0), MEANS[mode], rtol=0, atol=0.05)
        torch.testing.assert_close(members.std(0), torch.full((2,), SPREAD), rtol=0, atol=0.03)


FOR_FLOWS = "DEISMultistep DPMSolverMultistep DPMSolverSinglestep FlowMatchHeunDiscrete FlowMatchLCM SASolver UniPCMultistep"
FOR_DIFFUSIONS = (
    "DDIM DDPM DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerAncestralDiscrete EulerDiscrete HeunDiscrete "
    "KDPM2AncestralDiscrete KDPM2Discrete LCM LMSDiscrete PNDM SASolver TCD UniPCMultistep"
)


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # inside of diffusers
@pytest.mark.parametrize(
    ("name", "library"), [("flow", one) for one in FOR_FLOWS.split()] + [("ddpm", one) for one in FOR_DIFFUSIONS.split()]
)
def test_every_scheduler_of_diffusers_goes_to_the_data(name: str, library: str) -> None:
    """In 30 steps; shares within 0.06, spreads within 0.07, or 0.13 where a scheduler is made for few steps."""
    drawn = run(PATHS[name], "sample", 1000, solver=library, steps=30)
    nearest = torch.cdist(drawn, MEANS).argmin(1)
    for mode in range(3):
        members = drawn[nearest == mode]
        assert len(members) / len(drawn) == pytest.approx(SHARES[mode].item(), abs=0.06)
        assert members.std(0).mean().item() == pytest.approx(SPREAD, abs=0.13 if "LCM" in library else 0.08)


@pytest.mark.parametrize("name", PATHS)
def test_second_order_needs_fewer_steps(name: str) -> None:
    fine = run(PATHS[name], "velocity", 500, solver="heun", steps=400)
    errors = {
        solver: (run(PATHS[name], "velocity", 500, solver=solver, steps=20) - fine).norm(dim=1).mean().item()
        for solver in get_args(Solver)
    }
    assert errors["heun"] < 0.85 * errors["euler"]
    assert errors["dpm++"] < 0.85 * errors["euler"]


def test_solvers_are_those_of_diffusers() -> None:
    """On straight paths, where both can be given the same moments."""
    for options in ({}, {"shift": 3.0}):
        ours, theirs = (
            run(StraightPath(), "velocity", 50, solver=solver, steps=16, **options)
            for solver in ("euler", "FlowMatchEulerDiscreteScheduler")
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_samples_depend_on_their_seed_alone() -> None:
    path, sampling = StraightPath(), Sampling(guidance=1.0)

    def last(seeds: list[int]) -> Tensor:
        *_, step = diffuse(exact(path, "velocity"), path, "velocity", (2,), seeds, sampling)
        return step.sample

    together = last([3, 4, 5])
    assert torch.equal(last([4]), together[1:2])
    assert not torch.equal(last([6]), together[1:2])


def test_guidance_one_is_none_and_the_interval_limits_it() -> None:
    path, calls = StraightPath(), []

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        calls.append(guided)
        half = len(x) // 2 if guided else len(x)
        return torch.cat([x[:half] * 0.5, x[half:] * 0.1])

    def last(**options: Any) -> Tensor:
        calls.clear()
        *_, step = diffuse(denoise, path, "velocity", (2,), [0, 1], Sampling(steps=9, **options))
        return step.sample

    without = last(guidance=1.0)
    assert not any(calls)
    guided = last(guidance=3.0)
    assert all(calls)
    assert not torch.equal(guided, without)
    last(guidance=3.0, guidance_interval=(0.25, 0.5))
    assert calls == [False, False, True, True, True, False, False, False, False]
    with pytest.raises(UserError, match="holds none of the 9 choices"):
        last(guidance=3.0, guidance_interval=(0.3, 0.3))


def test_what_is_known_stays_and_strength_keeps_the_rest_near() -> None:
    path = StraightPath()
    given = torch.tensor([[2.0, 1.0], [0.5, -2.0]])
    keep = torch.tensor([[True, False], [True, False]])
    *_, step = diffuse(
        exact(path, "velocity"), path, "velocity", (2,), [0, 1], Sampling(guidance=1.0), known=Known(given, keep)
    )
    assert torch.equal(step.sample[:, 0], given[:, 0])
    assert not torch.equal(step.sample[:, 1], given[:, 1])
    distances = []
    for strength in (0.1, 0.5, 1.0):
        sampling = Sampling(guidance=1.0, strength=strength, steps=20)
        many = given.repeat(100, 1)
        *_, step = diffuse(exact(path, "velocity"), path, "velocity", (2,), range(200), sampling, start=many)
        distances.append((step.sample - many).norm().item())
    assert distances[0] < distances[1] < distances[2]


def test_thresholds_and_rescaling() -> None:
    sample = torch.tensor([[0.5, -0.5, 3.0, -1.0], [0.2, 0.1, 0.0, 0.4]])
    clipped = dynamically_clipped(sample, 1.0)
    torch.testing.assert_close(clipped[0], sample[0] / 3)
    assert torch.equal(clipped[1], sample[1])
    output, plain = torch.randn(2, 3, 100, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 1.0])[:, None, None]
    torch.testing.assert_close(rescaled(output, plain, 1.0).std(1), plain.std(1))
    assert torch.equal(rescaled(output, plain, 0.0), output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "DIM"}, "did you mean 'DDIM'"),
        ({"solver": "DDIM"}, "has no straight paths"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"rescale": 2.0}, "rescale is 2.0"),
        ({"threshold": 0.2}, "threshold is 0.2"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": float("inf")}, "shift is inf"),
    ],
)
def test_bad_settings_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(StraightPath(), "velocity", 2, **options)


def test_without_diffusers_its_schedulers_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"needs diffusers; pip install"):
        run(StraightPath(), "velocity", 2, solver="DDIM")
    assert run(StraightPath(), "velocity", 2, solver="euler").shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1000}, "is sampled in fewer"),
        ({"steps": 200, "shift": 10.0}, "meet a moment twice"),
        ({"solver": "DDIM", "shift": 2.0}, "knows no shift on a diffusion"),
        ({"solver": "LCM", "steps": 60}, "solver LCM, steps 60"),
    ],
)
def test_what_a_diffusion_cannot_do_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(PATHS["ddpm"], "velocity", 2, **options)
