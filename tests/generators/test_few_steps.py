"""Few steps: the solver for consistent networks, what teachers show, and students of a known mixture of three Gaussians."""

import itertools
from typing import Any

import pytest
import torch
from test_diffusion import MEANS, PATHS, SHARES, SPREAD, exact
from torch import Tensor, nn

from mm.generators.diffusion import diffuse, gaussian_noise
from mm.generators.few_steps import Network, Student, Teacher, consistency_loss, reflow_loss
from mm.generators.sampling import sample_generators
from mm.losses.consistency import consistent, distance
from mm.losses.diffusion import NUM_STEPS, DiffusionPath, Path, StraightPath, output_of
from mm.types import Sampling

MEAN, WIDTH = torch.tensor([1.5, -0.5]), 0.4


def told_at_once(path: Path) -> Any:
    """The consistency function of one Gaussian, whose way from noise to data is known."""

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        moment = time / NUM_STEPS if isinstance(path, StraightPath) else (time + 1) / NUM_STEPS
        alpha, sigma = path.coefficients(moment)
        data = MEAN + WIDTH / ((alpha * WIDTH) ** 2 + sigma**2).sqrt() * (x - alpha * MEAN)
        return output_of(path, "velocity", data, x, moment)

    return denoise


def last(denoise: Any, path: Path, seeds: Any, **options: Any) -> Tensor:
    *_, step = diffuse(denoise, path, "velocity", (2,), seeds, Sampling(**({"guidance": 1.0} | options)))
    return step.sample


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", PATHS)
def test_a_consistent_network_gives_the_distribution_in_any_number_of_steps(name: str, steps: int) -> None:
    """Mean and spread of 4000 samples within 4 standard errors, 0.026 and 0.018."""
    drawn = last(told_at_once(PATHS[name]), PATHS[name], range(4000), solver="lcm", steps=steps)
    torch.testing.assert_close(drawn.mean(0), MEAN, rtol=0, atol=0.026)
    torch.testing.assert_close(drawn.std(0), torch.full((2,), WIDTH), rtol=0, atol=0.018)


def test_noise_between_the_steps_belongs_to_the_sample() -> None:
    denoise, path = told_at_once(StraightPath()), StraightPath()
    together = last(denoise, path, [3, 4, 5], solver="lcm", steps=4)
    torch.testing.assert_close(last(denoise, path, [4], solver="lcm", steps=4), together[1:2])
    first = last(denoise, path, [4], solver="lcm", steps=1)
    assert not torch.allclose(first, together[1:2], atol=0.01), "later noise is not the first one again"


def test_the_solver_is_that_of_diffusers() -> None:
    """On a diffusion, at the moments that both choose in 5 of 50 steps; diffusers mixes in at most 1 % of the noisy sample."""
    path = DiffusionPath("linear")
    ours, theirs = (last(exact(path, "velocity"), path, range(50), solver=solver, steps=5) for solver in ("lcm", "LCM"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", PATHS)
def test_steps_of_a_teacher_are_those_of_the_solver(name: str) -> None:
    """One after the other, guided, with a moment for each sample."""
    path = PATHS[name]

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        time = time.expand(len(x))[:, None]
        away = 0.3 * torch.ones(len(x), 1)
        away[len(x) // 2 if guided else 0 :] = 0
        return x * (0.5 + time / 2000) + away

    teacher, seeds = Teacher(denoise, path, "velocity"), range(4)
    for guidance in (1.0, 2.5):
        x, times = gaussian_noise(sample_generators(seeds), (2,)), path.schedule(6)
        for time, later in itertools.pairwise(times):
            x = teacher.step(x, time.expand(4), later.expand(4), guidance)
        torch.testing.assert_close(x, last(denoise, path, seeds, solver="euler", steps=6, guidance=guidance))


def test_pairs_are_noise_and_what_becomes_of_it() -> None:
    path = StraightPath()

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        """The true velocity of the way of one Gaussian."""
        alpha, sigma = path.coefficients(time / NUM_STEPS)
        data = MEAN + alpha * WIDTH**2 / ((alpha * WIDTH) ** 2 + sigma**2) * (x - alpha * MEAN)
        return output_of(path, "velocity", data, x, time / NUM_STEPS)

    torch.manual_seed(0)
    noise, sample = Teacher(denoise, path, "velocity").pairs((2,), 200, Sampling(1.0, steps=100, solver="heun"))
    torch.testing.assert_close(sample, MEAN + WIDTH * noise, rtol=0, atol=0.01)
    other, _ = Teacher(denoise, path, "velocity").pairs((2,), 200, Sampling(1.0, steps=1))
    assert not torch.equal(noise, other)


def test_distances() -> None:
    first, second = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0], [0.0, 0.0]])
    torch.testing.assert_close(distance(first, second, "l2"), torch.tensor([4.5, 0.0]))
    torch.testing.assert_close(distance(first, second), torch.tensor([4.5, 0.0]).sqrt(), rtol=0, atol=1e-3)
    near = torch.full((1, 2), 1e-5, requires_grad=True)
    distance(near, torch.zeros(1, 2)).sum().backward()
    assert near.grad is not None
    assert 0 < near.grad.abs().max() < 0.02, "no jump of the gradient at 0"


class Small(nn.Module):
    """A student of points."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(10, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        )
        self.output = nn.Linear(width, 2)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        waves = time.expand(len(x))[:, None] / NUM_STEPS * torch.tensor([0.5, 1.0, 2.0, 4.0]) * torch.pi
        return self.output(self.layers(torch.cat([x, waves.sin(), waves.cos()], 1)))


PATH = StraightPath(std=0.0)
TEACHER = Teacher(exact(PATH, "velocity"), PATH, "velocity")


def learned(loss: Any, steps: int) -> Small:
    torch.manual_seed(0)
    network = Small()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(Student(network, PATH, "velocity")).mean().backward()
        optimizer.step()
        schedule.step()
    return network.eval().requires_grad_(False)


def sampled(network: Network, seeds: range, **options: Any) -> Tensor:
    return last(lambda x, time, guided: network(x, time), PATH, seeds, **options)


@pytest.fixture(scope="module")
def straightened() -> Small:
    def loss(student: Student) -> Tensor:
        noise, sample = TEACHER.pairs((2,), 128, Sampling(1.0, steps=16))
        return reflow_loss(student, noise.repeat(4, 1), sample.repeat(4, 1))

    return learned(loss, 500)


@pytest.fixture(scope="module")
def consistent_one() -> Small:
    moments = PATH.schedule(24)

    def loss(student: Student) -> Tensor:
        mode = torch.multinomial(SHARES, 512, replacement=True)
        sample = MEANS[mode] + SPREAD * torch.randn(512, 2)
        return consistency_loss(student, student.network, TEACHER, sample, moments, 1.0)

    return learned(loss, 800)


def test_reflow_makes_one_step_right(straightened: Small) -> None:
    """Of the distance to what the teacher makes of the same noise in 100 steps, one step leaves less than a quarter."""
    seeds = range(1000)
    wanted = last(exact(PATH, "velocity"), PATH, seeds, solver="heun", steps=100)
    before = (last(exact(PATH, "velocity"), PATH, seeds, steps=1) - wanted).norm(dim=1).mean()
    after = (sampled(straightened, seeds, steps=1) - wanted).norm(dim=1).mean()
    assert after < before / 4


def test_consistency_tells_the_same_all_along_the_way(consistent_one: Small) -> None:
    """At moment 0 exactly what is there; from elsewhere on the way less than half as various as what the teacher says."""
    x = torch.randn(100, 2)
    now = torch.zeros(100)
    assert torch.equal(consistent(PATH, "velocity", consistent_one(x, now), x, now), x)
    noise, times = torch.randn(500, 2), PATH.schedule(100)
    way = [noise]
    for time, later in itertools.pairwise(times):
        way.append(TEACHER.step(way[-1], time.expand(500), later.expand(500), 1.0))

    def variety(network: Network) -> Tensor:
        told = [
            consistent(PATH, "velocity", network(x, PATH.read(time.expand(500))), x, time.expand(500))
            for x, time in zip(way[::10], times[::10], strict=True)
        ]
        return torch.stack(told).std(0).mean()

    assert variety(consistent_one) < 0.5 * variety(lambda x, time: exact(PATH, "velocity")(x, time, guided=False))


def test_a_consistent_student_paints_the_mixture_in_one_step(consistent_one: Small) -> None:
    for steps in (1, 2):
        drawn = sampled(consistent_one, range(2000), solver="lcm", steps=steps)
        shares = torch.cdist(drawn, MEANS).argmin(1).bincount(minlength=3) / 2000
        torch.testing.assert_close(shares, SHARES, rtol=0, atol=0.06)
