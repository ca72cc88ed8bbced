"""Random numbers by sample: the same in any company, evenly spread, unrelated between samples, draws and places."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from mm.draws import Draws, sample_seeds

CPU = torch.device("cpu")
IDS = [f"sample-{i}" for i in range(64)]


def draws(ids: list[str], step: int = 0) -> Draws:
    return Draws(sample_seeds(ids, 3, "step", step), len(ids), CPU)


def drawn(random: Draws) -> list[Tensor]:
    return [random.uniform(), random.normal(3, 5), random.uniform(7), random.below(10, 4), random.normal()]


def test_a_sample_draws_the_same_in_any_company() -> None:
    whole, parts = drawn(draws(IDS)), [drawn(draws(IDS[:5])), drawn(draws(IDS[5:]))]
    for all_of_them, first, second in zip(whole, *parts, strict=True):
        assert torch.equal(all_of_them, torch.cat([first, second]))


def test_longer_rows_begin_like_shorter_ones() -> None:
    """So that padding, which differs among processes, changes nothing."""
    assert torch.equal(draws(IDS).uniform(9)[:, :4], draws(IDS).uniform(4))


def test_numbers_are_spread_as_they_should_be() -> None:
    uniform, normal = draws(IDS).uniform(4000), draws(IDS).normal(4001)
    assert uniform.min() > 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten().numpy(), "norm").pvalue > 1e-3
    counts = draws(IDS).below(10, 4000).flatten().bincount(minlength=10)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_samples_draws_places_and_steps_have_nothing_in_common() -> None:
    random = draws(IDS)
    first, second, later = random.normal(4000), random.normal(4000), draws(IDS, step=1).normal(4000)
    pairs = [(first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, second), (first, later)]
    for a, b in (*pairs, (first[:, :2000], first[:, 2000:])):
        correlation = (a * b).mean().item()
        assert abs(correlation) < 5 / math.sqrt(a.numel())


def test_without_seeds_torchs_generators_are_drawn_from() -> None:
    torch.manual_seed(5)
    uniform, normal = Draws(None, 4, CPU).uniform(2), Draws(None, 4, CPU).normal(2)
    torch.manual_seed(5)
    assert torch.equal(uniform, torch.rand(4, 2))
    assert torch.equal(normal, torch.randn(4, 2))


@pytest.mark.parametrize("numbers", [1, 2, 7])
def test_shapes(numbers: int) -> None:
    assert draws(IDS).normal(numbers, 3).shape == (64, numbers, 3)
    assert draws(IDS).below(2, numbers).dtype == torch.int64
