"""Paths between data and noise: predictions mean each other, losses are what the papers say, variances are diffusers'."""

import pytest
import torch

from mm.draws import Draws
from mm.losses.diffusion import (
    NUM_STEPS,
    DiffusionPath,
    Path,
    Prediction,
    StraightPath,
    Weighting,
    loss,
    mixed,
    output_of,
    predicted_sample,
    target,
)

PATHS: dict[str, Path] = {
    "flow": StraightPath(),
    "cosine": DiffusionPath(),
    "scaled": DiffusionPath("scaled_linear", 0.00085, 0.012),
}
PREDICTIONS: tuple[Prediction, ...] = ("velocity", "noise", "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_a_right_prediction_means_the_data(name: str, prediction: Prediction) -> None:
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    sample, noise = torch.randn(2, 50, 3, 4, 4, generator=generator)
    time = torch.linspace(0.02, 0.9, 50)
    x = mixed(path, sample, noise, time)
    output = target(path, prediction, sample, noise, time)
    torch.testing.assert_close(predicted_sample(path, prediction, output, x, time), sample, rtol=0, atol=2e-4)
    torch.testing.assert_close(output_of(path, prediction, sample, x, time), output, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PATHS)
def test_moments_go_from_data_to_noise(name: str) -> None:
    path = PATHS[name]
    alpha, sigma = path.coefficients(torch.tensor([0.0, 1.0]))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert alpha[1] < 0.07
    times = path.schedule(7)
    assert times.shape == (8,)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()
    assert (path.schedule(7, shift=3.0)[1:-1] > times[1:-1]).all()
    torch.manual_seed(0)
    drawn = path.draw(Draws(None, 4000, torch.device("cpu")))
    assert drawn.min() > 0
    assert drawn.max() <= 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)


def test_logit_normal_moments_are_denser_in_the_middle() -> None:
    torch.manual_seed(0)
    drawn = StraightPath().draw(Draws(None, 20_000, torch.device("cpu")))
    inside = ((drawn > 0.25) & (drawn < 0.75)).float().mean().item()
    assert inside == pytest.approx(2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(3.0).log()).item() - 1, abs=0.01)
    even = StraightPath(std=0).draw(Draws(None, 20_000, torch.device("cpu")))
    assert ((even > 0.25) & (even < 0.75)).float().mean().item() == pytest.approx(0.5, abs=0.01)
    assert StraightPath(shift=3.0).draw(Draws(None, 20_000, torch.device("cpu"))).mean() > 0.65


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "cosine"])
def test_variances_are_those_of_diffusers(betas: str) -> None:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    names = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
    reference = DDPMScheduler(NUM_STEPS, beta_schedule=names[betas])
    path = DiffusionPath(betas)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(path.variances.float(), reference.betas, rtol=1e-5, atol=1e-8)
    steps = torch.tensor([0, 1, 500, 998])
    alpha, sigma = path.coefficients((steps + 1) / NUM_STEPS)
    torch.testing.assert_close(alpha, reference.alphas_cumprod[steps].sqrt(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(sigma, (1 - reference.alphas_cumprod[steps]).sqrt(), rtol=0, atol=1e-5)
    assert torch.equal(path.read((steps + 1) / NUM_STEPS), steps.float())


@pytest.mark.parametrize("weighting", ["velocity", "min_snr"])
@pytest.mark.parametrize("name", PATHS)
def test_weights_make_errors_comparable(name: str, weighting: Weighting) -> None:
    """The same error of the data costs the same whatever is predicted."""
    path, generator = PATHS[name], torch.Generator().manual_seed(0)
    sample, noise, error = torch.randn(3, 20, 3, 4, 4, generator=generator)
    time = torch.linspace(0.2, 0.9, 20)
    x = mixed(path, sample, noise, time)
    costs = []
    for prediction in PREDICTIONS:
        output = output_of(path, prediction, sample + 0.1 * error, x, time)
        costs.append(loss(path, prediction, output, sample, noise, time, weighting))
    torch.testing.assert_close(costs[1], costs[0], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(costs[2], costs[0], rtol=2e-3, atol=1e-6)
    if weighting == "velocity":
        plain = loss(path, "velocity", output_of(path, "velocity", sample + 0.1 * error, x, time), sample, noise, time)
        torch.testing.assert_close(costs[0], plain, rtol=1e-4, atol=1e-7)


def test_min_snr_is_the_papers() -> None:
    path, time = DiffusionPath("linear"), torch.tensor([0.01, 0.3, 0.9])
    alpha, sigma = path.coefficients(time)
    snr = (alpha / sigma) ** 2
    zeros, ones = torch.zeros(3, 4), torch.ones(3, 4)
    of_noise = loss(path, "noise", zeros, ones, ones, time, "min_snr")
    torch.testing.assert_close(of_noise, snr.clamp(max=5) / snr)
    of_velocity = loss(path, "velocity", target(path, "velocity", ones, ones, time)[:, :1] + ones, ones, ones, time, "min_snr")
    torch.testing.assert_close(of_velocity, snr.clamp(max=5) / (snr + 1), rtol=1e-4, atol=1e-6)
