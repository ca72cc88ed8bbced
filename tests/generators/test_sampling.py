"""Choosing from logits: brute-force definitions of top-k and top-p, drawn frequencies, noise that belongs to its sample."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.errors import UserError
from mm.generators.sampling import (
    check_sampling,
    draw,
    guided,
    guided_range,
    gumbel_noise,
    keep_top_k,
    keep_top_p,
    restricted,
    sample_generators,
)
from mm.types import Sampling

rows = st.lists(st.integers(-6, 6), min_size=1, max_size=9)  # small numbers, so that there are ties
fast = settings(deadline=None, max_examples=150)


def kept(logits: Tensor) -> list[int]:
    return logits.isfinite().nonzero().flatten().tolist()


@fast
@given(rows, st.integers(0, 10))
def test_top_k_keeps_what_fewer_than_k_tokens_exceed(row: list[int], k: int) -> None:
    logits = torch.tensor(row, dtype=torch.float32)
    expected = [i for i, value in enumerate(row) if k == 0 or sum(other > value for other in row) < k]
    result = keep_top_k(logits, k)
    assert kept(result) == expected
    assert torch.equal(result[expected], logits[expected])


@fast
@given(rows, st.floats(0.001, 0.999))
def test_top_p_keeps_the_smallest_likely_set(row: list[int], p: float) -> None:
    logits = torch.tensor(row, dtype=torch.float32)
    order = sorted(range(len(row)), key=lambda i: -row[i])
    exact = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    sums = [sum(exact[i] for i in order[:count]) for count in range(1, len(row) + 1)]
    if min(abs(total - p) for total in sums) < 1e-6:
        return  # rounding may decide either way
    last = row[order[next((count for count, total in enumerate(sums) if total >= p), len(row) - 1)]]
    result = keep_top_p(logits, p)
    assert kept(result) == [i for i, value in enumerate(row) if value >= last]
    assert keep_top_p(logits, 1.0) is logits


def test_restrictions_treat_every_row_alone() -> None:
    logits = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(0))
    together = restricted(logits, temperature=0.7, top_k=7, top_p=0.8)
    for i in range(3):
        for j in range(4):
            torch.testing.assert_close(together[i, j], restricted(logits[i, j], temperature=0.7, top_k=7, top_p=0.8))
    assert together.isfinite().sum(-1).max() <= 7
    assert (together.isfinite().sum(-1) >= 1).all()


def test_drawn_frequencies_are_the_probabilities() -> None:
    logits, draws = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0]), 40_000
    for options in ({}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}):
        (ids,) = draw(logits.expand(1, draws, 5), sample_generators([0]), **options)
        expected = restricted(logits, **options).softmax(0)
        found = ids.bincount(minlength=5) / draws
        torch.testing.assert_close(found, expected, atol=4 * (0.25 / draws) ** 0.5, rtol=0)
        assert not found[expected == 0].any()


def test_temperature_zero_takes_the_first_of_the_largest_and_no_noise() -> None:
    (generator,) = sample_generators([5])
    before = generator.get_state()
    assert draw(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), [generator], temperature=0, top_k=2).tolist() == [1]
    assert torch.equal(generator.get_state(), before)


def test_noise_belongs_to_the_sample() -> None:
    together = gumbel_noise(sample_generators([3, 1, 2]), (4, 7))
    alone = torch.cat([gumbel_noise(sample_generators([seed]), (4, 7)) for seed in (3, 1, 2)])
    assert torch.equal(together, alone)
    assert together.isfinite().all()
    assert len(together.unique()) == together.numel()


def test_noise_has_the_moments_of_a_standard_gumbel() -> None:
    noise = gumbel_noise(sample_generators([0]), (100_000,))
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.05


def test_guidance_goes_from_unconditional_through_conditional_beyond() -> None:
    conditional, unconditional = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    torch.testing.assert_close(guided(conditional, unconditional, 4.0), 4 * conditional - 3 * unconditional)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -2}, "top_k is -2"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval is 0.6 to 0.4"),
        ({"guidance_interval": (0.0, 1.5)}, "guidance_interval is 0.0 to 1.5"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_meaningless_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    check_sampling(Sampling())
    with pytest.raises(UserError, match=message):
        check_sampling(Sampling(**setting))


def test_an_interval_between_two_choices_is_refused() -> None:
    assert guided_range(Sampling(guidance=2.0, guidance_interval=(0.4, 0.7)), 11) == range(4, 8)
    assert guided_range(Sampling(guidance=1.0, guidance_interval=(0.51, 0.52)), 11) == range(0)
    with pytest.raises(UserError, match="holds none of the 11 choices"):
        guided_range(Sampling(guidance=2.0, guidance_interval=(0.51, 0.52)), 11)
