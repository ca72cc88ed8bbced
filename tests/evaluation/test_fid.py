"""FID, KID, precision and recall: closed forms, brute force, invariances, and intervals that tell the spread of repetitions."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.fid import (
    _half_kernel_distances,
    _halves,
    distances,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from mm.seeding import generator


def gaussian(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(samples: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """The samples moved and stretched so that their mean and their covariance ``factor factor^T`` are exactly these."""
    centred = samples - samples.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(centred.T.cov()), centred.T, upper=False).T
    return whitened @ factor.T + mean


def test_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    d = 5
    mean_a, mean_b = gaussian(2, d, 0)
    deviation_a, deviation_b = gaussian(2, d, 1).abs() + 0.1
    a = exactly(gaussian(40, d, 2), mean_a, torch.diag(deviation_a))
    b = exactly(gaussian(60, d, 3), mean_b, torch.diag(deviation_b))
    expected = float((mean_a - mean_b).square().sum() + (deviation_a - deviation_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_equals_the_matrix_root_and_is_symmetric() -> None:
    a, b = gaussian(50, 4, 0) @ gaussian(4, 4, 1), gaussian(70, 4, 2) @ gaussian(4, 4, 3) + 0.5
    product = a.T.cov() @ b.T.cov()
    root = float(torch.linalg.eigvals(product).sqrt().real.sum())
    expected = float((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace()) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [3, 30])  # 3: covariances of rank 2 in 8 dimensions
def test_frechet_distance_is_zero_on_itself_and_blind_to_rotation_and_shift(n: int) -> None:
    a, b = gaussian(n, 8, 0), gaussian(n + 1, 8, 1) * 2
    rotation = torch.linalg.qr(gaussian(8, 8, 2)).Q
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(frechet_distance(a, b), rel=1e-10)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4, rel=1e-10)


def brute_force_discrepancy(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_of_whole_sets_is_the_double_loop() -> None:
    a, b = gaussian(12, 3, 0), gaussian(12, 3, 1) + 0.3
    mean, deviation = kernel_distance(a, b, subsets=3)
    assert mean == pytest.approx(brute_force_discrepancy(a, b), rel=1e-10)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_over_subsets_of_any_size() -> None:
    a, b = gaussian(40, 3, 0), gaussian(60, 3, 1) + 0.3
    mean, deviation = kernel_distance(a, b, subsets=2000, subset_size=5)
    error = deviation / math.sqrt(2000)
    assert mean == pytest.approx(brute_force_discrepancy(a, b), abs=4 * error)
    assert 4 * error < 1, "pictures compared with themselves would add about 3 to either side"
    assert (mean, deviation) == kernel_distance(a, b, subsets=2000, subset_size=5)
    assert (mean, deviation) != kernel_distance(a, b, subsets=2000, subset_size=5, seed=1)


def brute_force_inside(points: Tensor, members: Tensor, k: int) -> list[bool]:
    radii = [
        sorted(math.dist(x.tolist(), y.tolist()) for j, y in enumerate(members) if j != i)[k - 1] for i, x in enumerate(members)
    ]
    return [
        any(math.dist(point.tolist(), member.tolist()) <= radius for member, radius in zip(members, radii, strict=True))
        for point in points
    ]


def test_precision_and_recall_are_the_definition() -> None:
    made, real = gaussian(40, 2, 0) + 1, gaussian(50, 2, 1)
    precise, recalled = precision_recall(made, real)
    assert precise.tolist() == brute_force_inside(made, real, 3)
    assert recalled.tolist() == brute_force_inside(real, made, 3)
    assert 0 < precise.float().mean() < 1, "the case must tell inside from outside"
    assert 0 < recalled.float().mean() < 1


def test_dropped_modes_cost_recall_and_noise_costs_precision() -> None:
    real = torch.cat([gaussian(100, 2, 0), gaussian(100, 2, 1) + 20])
    one_mode, noisy = gaussian(200, 2, 2), torch.cat([gaussian(100, 2, 2), gaussian(100, 2, 3) - 20])
    precise, recalled = precision_recall(one_mode, real)
    assert precise.float().mean() > 0.8
    assert recalled.float().mean() == pytest.approx(0.5, abs=0.1)
    assert precision_recall(noisy, real)[0].float().mean() == pytest.approx(0.5, abs=0.1)


def test_distances_say_what_they_were_measured_on() -> None:
    made, real = gaussian(40, 8, 0), gaussian(50, 8, 1)
    result = distances(made, real, features="emoji-judge, 64 px", protocol={"split": "test"})
    assert result.metrics.keys() == {"fid", "kid", "precision", "recall"}
    assert result.metrics["fid"].value == frechet_distance(made, real)
    assert result.metrics["precision"].value == precision_recall(made, real)[0].double().mean()
    assert result.protocol["features"] == "emoji-judge, 64 px"
    assert result.protocol["split"] == "test"
    few = distances(made[:15], real, features="emoji-judge, 64 px")
    assert "fid" not in few.metrics
    assert few.protocol["fid"] == "left out: 15 pictures are fewer than twice the 8 features, read kid"


@pytest.mark.parametrize(("n", "m"), [(120, 120), (60, 600), (600, 60)])
def test_intervals_have_the_width_of_repetitions(n: int, m: int) -> None:
    repetitions = [
        distances(gaussian(n, 4, seed), gaussian(m, 4, seed + 100) + 0.8, features="numbers").metrics for seed in range(30)
    ]
    for name in ("fid", "kid"):
        spread = np.std([metrics[name].value for metrics in repetitions], ddof=1)
        claimed = np.mean([(metrics[name].high - metrics[name].low) / 2 / 1.96 for metrics in repetitions])
        assert 0.7 < claimed / spread < 1.4, name


def test_halves_of_unequal_sets_are_compared_without_bias() -> None:
    made, real = gaussian(9, 3, 0), gaussian(6, 3, 1) + 0.3
    found = _half_kernel_distances(made, real, seed=5)
    random = generator(5, "kernel distance halves")
    ours, theirs = (_halves(n, random) for n in (9, 6))
    for value, a, b in zip(found, ours.T, theirs.T, strict=True):
        assert a.sum() == 4
        assert b.sum() == 3
        assert value == pytest.approx(brute_force_discrepancy(made[a.bool()], real[b.bool()]), rel=1e-9)


def test_figures_of_several_kinds_of_features_do_not_meet() -> None:
    made, real = gaussian(40, 8, 0), gaussian(50, 8, 1)
    ours = distances(made, real, features="emoji-judge")
    both = ours | distances(made + 1, real, features="Inception", suffix="_inception")
    assert both.metrics.keys() == {f"{name}{s}" for name in ("fid", "kid", "precision", "recall") for s in ("", "_inception")}
    assert both.metrics["kid"] == ours.metrics["kid"]
    assert both.protocol["features"] == "emoji-judge"
    assert both.protocol["features_inception"] == "Inception"


@pytest.mark.parametrize(
    ("made", "real", "message"),
    [
        (torch.ones(9, 3), torch.ones(9, 4), "width 4 does not fit width 3"),
        (torch.ones(3, 3), torch.ones(9, 3), "3 generated pictures are too few"),
        (torch.ones(9, 3), torch.ones(9, 3).fill_(torch.nan), "features of the real pictures: 9 of 9 vectors hold NaN"),
        (torch.ones(9), torch.ones(9, 3), "expected vectors of shape"),
    ],
)
def test_what_cannot_be_compared_is_one_line(made: Tensor, real: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        distances(made, real, features="numbers")
    with pytest.raises(UserError, match="features: name the network"):
        distances(torch.ones(9, 3), torch.ones(9, 3), features=" ")
    with pytest.raises(UserError, match="take at least 2 subsets"):
        kernel_distance(torch.ones(9, 3), torch.ones(9, 3), subsets=1)
