"""How far two sets of pictures are apart as distributions of features: FID, KID, improved precision and recall.

FID https://arxiv.org/abs/1706.08500, KID https://arxiv.org/abs/1801.01401, precision and recall
https://arxiv.org/abs/1904.06991. A figure compares only with figures of the same features (network, weights, resize), so
`distances` takes their name and states it in the protocol.

Shapes: n generated and m real pictures, D features. All sums are in float64, on the CPU.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import Interval, Result, bootstrap, share
from mm.evaluation.scores import checked
from mm.seeding import generator

SUBSETS, SUBSET_SIZE = 100, 1000
"""Of KID: number of random subsets, and pictures of each."""

DEGREE = 3
"""Of KID's polynomial kernel."""

NEIGHBOURS = 3
"""Whose distance is the radius of a picture's ball, for precision and recall."""

HALVES = 20
"""Random halves of the pictures that FID is measured on for its interval."""

KERNEL_HALVES = 100
"""The same for KID, where they cost little: the kernel of each pair of pictures is computed once."""

ROWS = 512
"""Of distances, held at once."""


def frechet_distance(made: Float[Tensor, "n d"], real: Float[Tensor, "m d"]) -> float:
    """Fréchet distance of the Gaussians with the means and covariances (of n - 1) of both sets; at least 0.

    With ``C = R^T R``, R the triangle of the centred features, the trace of the root of the product of both covariances is the
    sum of the singular values of ``R_made R_real^T``: no matrix root, no complex numbers, and no loss of half the digits where
    a covariance is singular.

    Raises:
        UserError: fewer than 2 pictures, widths that differ, NaN or infinity.
    """
    made, real = _pair(made, real, 2)
    factors = [_covariance_factor(features) for features in (made, real)]
    spread = sum(float(factor.square().sum()) for factor in factors)
    shared = float(torch.linalg.svdvals(factors[0] @ factors[1].T).sum())
    apart = float((made.mean(0) - real.mean(0)).square().sum())
    return max(0.0, apart + spread - 2 * shared)


def kernel_distance(
    made: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = 0,
) -> tuple[float, float]:
    """Unbiased squared maximum mean discrepancy under the kernel ``(x.y / D + 1)^3``; by chance below 0 where the sets agree.

    Args:
        made: Features of the generated pictures.
        real: Features of the real ones.
        subsets: Number of random subsets.
        subset_size: Pictures of each, drawn without replacement; all pictures where there are fewer.
        seed: Names the draws.

    Returns:
        Mean and standard deviation over the subsets; the deviation says nothing where each subset holds all pictures.

    Raises:
        UserError: fewer than 2 pictures or subsets, widths that differ, NaN or infinity.
    """
    made, real = _pair(made, real, 2)
    if subsets < 2 or subset_size < 2:
        raise UserError(f"kernel distance: {subsets} subsets of {subset_size}; take at least 2 subsets of at least 2 pictures")
    size = min(subset_size, len(made), len(real))
    random = generator(seed, "kernel distance")
    draws = [[torch.from_numpy(random.permutation(len(side))[:size]) for side in (made, real)] for _ in range(subsets)]
    values = np.array([_discrepancy(made[ours], real[theirs]) for ours, theirs in draws])
    return float(values.mean()), float(values.std(ddof=1))


def precision_recall(
    made: Float[Tensor, "n d"], real: Float[Tensor, "m d"], k: int = NEIGHBOURS
) -> tuple[Bool[Tensor, " n"], Bool[Tensor, " m"]]:
    """Which generated pictures look real, and which real ones could have been generated; the shares are precision and recall.

    A picture belongs to a set if it lies in the ball around any member that reaches to the member's k-th nearest other member.

    Raises:
        UserError: not more than k pictures, widths that differ, NaN or infinity.
    """
    made, real = _pair(made, real, k + 1)
    return _inside(made, real, k), _inside(real, made, k)


def distances(
    made: Float[Tensor, "n d"],
    real: Float[Tensor, "m d"],
    *,
    features: str,
    suffix: str = "",
    seed: int = 0,
    protocol: Mapping[str, Any] | None = None,
) -> Result:
    """FID, KID, precision and recall of generated against real pictures, with 95 % intervals.

    FID is left out, and the protocol says why, where either set has fewer than 2 D pictures: its covariance would be singular
    or nearly so, and the figure would tell the number of pictures. The intervals of FID and KID are 1.96 standard errors to
    both sides, by the delete-d jackknife (Shao, Wu, Annals of Statistics 17, 1989) with half of each side left out, where the
    spread over random halves is the standard error, however many pictures either side has. To that of KID the noise of its
    random subsets is added.

    Args:
        made: Features of the generated pictures.
        real: Features of the real ones.
        features: Network, weights, resize and layer of the features, e.g. ``"Inception v3 (TF 2015), pool3, bicubic 299"``.
        suffix: Of the figures' names and of what the protocol says of them, where several kinds of features are measured.
        seed: Names the subsets and resamples.
        protocol: Facts for the stamp that only the caller knows.

    Raises:
        UserError: no name for the features, fewer than 4 pictures, widths that differ, NaN or infinity.
    """
    if not features.strip():
        raise UserError("features: name the network, weights, resize and layer; without them the figures compare with nothing")
    made, real = _pair(made, real, NEIGHBOURS + 1)
    fewest, width = min(len(made), len(real)), made.shape[1]
    size = min(SUBSET_SIZE, fewest // 2)
    mean, deviation = kernel_distance(made, real, subset_size=size, seed=seed)
    error = float(_half_kernel_distances(made, real, seed).var(ddof=1) + deviation**2 / SUBSETS) ** 0.5
    metrics = {f"kid{suffix}": Interval(mean, mean - 1.96 * error, mean + 1.96 * error, "number")}
    if fewest >= 2 * width:
        value, error = frechet_distance(made, real), _half_deviation(made, real, seed)
        metrics[f"fid{suffix}"] = Interval(value, max(0.0, value - 1.96 * error), value + 1.96 * error, "number")
        fid = f"{width} features, covariances of n - 1"
    else:
        fid = f"left out: {fewest} pictures are fewer than twice the {width} features, read kid{suffix}"
    for name, hits in zip(("precision", "recall"), precision_recall(made, real), strict=True):
        metrics |= bootstrap({f"{name}{suffix}": share(hits.numpy())}, len(hits), seed=seed)
    stamp = {
        f"features{suffix}": features,
        "generated": len(made),
        "real": len(real),
        f"fid{suffix}": fid,
        f"kid{suffix}": f"mean of {SUBSETS} subsets of {size}, cubic kernel, seed {seed}",
        "precision_recall": f"balls to neighbour {NEIGHBOURS}",
        "distance_interval": "1.96 standard errors over halves of both sides; bootstrap over pictures for precision and recall",
    }
    return Result(metrics, {**stamp, **(protocol or {})})


def _pair(made: Tensor, real: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    """Both sides, checked, in float64 on the CPU."""
    checked(made, "features of the generated pictures")
    checked(real, "features of the real pictures", made.shape[1])
    for side, what in ((made, "generated"), (real, "real")):
        if len(side) < fewest:
            raise UserError(f"{len(side)} {what} pictures are too few to compare distributions; give at least {fewest}")
    return made.detach().cpu().double(), real.detach().cpu().double()


def _covariance_factor(features: Tensor) -> Tensor:
    """R with ``R^T R`` the covariance."""
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return torch.linalg.qr(centred, mode="r").R


def _discrepancy(made: Tensor, real: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of two sets of equal size."""
    size = len(made)
    within = sum(float(k.sum() - k.trace()) for k in (_kernel(made, made), _kernel(real, real)))
    return within / (size * (size - 1)) - 2 * float(_kernel(made, real).mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** DEGREE


def _half_kernel_distances(made: Tensor, real: Tensor, seed: int) -> np.ndarray:
    """The unbiased discrepancy of random halves of both sides, which may differ in size, ``(KERNEL_HALVES,)``."""
    random = generator(seed, "kernel distance halves")
    ours, theirs = (_halves(len(side), random) for side in (made, real))

    def within(side: Tensor, halves: Tensor) -> Tensor:
        size, alone = len(side) // 2, (side.square().sum(1) / side.shape[1] + 1) ** DEGREE
        return (_kernel_sums(side, side, halves, halves) - alone @ halves) / (size * (size - 1))

    across = _kernel_sums(made, real, ours, theirs) / ((len(made) // 2) * (len(real) // 2))
    return (within(made, ours) + within(real, theirs) - 2 * across).numpy()


def _halves(length: int, random: np.random.Generator) -> Tensor:
    """1 where a thing belongs to a half, one half a column, ``(length, KERNEL_HALVES)`` float64."""
    halves = torch.zeros(length, KERNEL_HALVES, dtype=torch.float64)
    for half in halves.T:
        half[torch.from_numpy(random.permutation(length)[: length // 2])] = 1
    return halves


def _kernel_sums(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
    """For each column the sum of the kernel over all pairs of what is chosen on both sides, ``(KERNEL_HALVES,)``."""
    parts = zip(a.split(ROWS), of_a.split(ROWS), strict=True)
    return torch.stack([(_kernel(rows, b) @ of_b * chosen).sum(0) for rows, chosen in parts]).sum(0)


def _inside(points: Tensor, members: Tensor, k: int) -> Tensor:
    """Which points lie in the ball of any member, ``(number of points,)`` bool."""
    nearest = [torch.cdist(rows, members).kthvalue(k + 1, dim=1).values for rows in members.split(ROWS)]  # the first is itself
    radii = torch.cat(nearest)
    return torch.cat([(torch.cdist(rows, members) <= radii).any(1) for rows in points.split(ROWS)])


def _half_deviation(made: Tensor, real: Tensor, seed: int) -> float:
    """Standard error of FID: its standard deviation over random halves of both sides."""
    random = generator(seed, "fréchet distance")

    def half(side: Tensor) -> Tensor:
        return side[torch.from_numpy(random.permutation(len(side))[: len(side) // 2])]

    return float(np.std([frechet_distance(half(made), half(real)) for _ in range(HALVES)], ddof=1))
