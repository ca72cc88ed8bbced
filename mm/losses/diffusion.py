"""Diffusion and flow matching: how data becomes noise, what a network is asked about it, and what its errors cost.

A path mixes data x and Gaussian noise e at a moment t, from 0 (data) to 1 (noise): ``x_t = alpha(t) x + sigma(t) e``. All that
differs between flow matching and diffusion is the path; what a network predicts is a choice on either.

| Prediction | Flow (https://arxiv.org/abs/2209.03003)   | Diffusion (https://arxiv.org/abs/2006.11239) |
|------------|-------------------------------------------|----------------------------------------------|
| "velocity" | e - x                                     | alpha e - sigma x (https://arxiv.org/abs/2202.00512) |
| "noise"    | e                                         | e                                            |
| "sample"   | x                                         | x                                            |

Shapes: B samples, the rest of a sample's shape is arbitrary.
"""

import functools
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mm.draws import Draws

Prediction = Literal["velocity", "noise", "sample"]
Weighting = Literal["uniform", "min_snr", "velocity"]
Betas = Literal["linear", "scaled_linear", "cosine"]

MIN_SNR = 5.0
"""Largest signal-to-noise ratio that counts (https://arxiv.org/abs/2303.09556)."""

MIN_SIGMA = 0.05
"""Noise below which errors of a predicted sample stop counting more as errors of a velocity (https://arxiv.org/abs/2511.13720)."""

NUM_STEPS = 1000
"""Of a diffusion, and the moments that networks read: 0 to about 1000 for all of them."""


ROUNDING = 1e-4
"""Of a moment in fp32, in steps."""


class Path(Protocol):
    """How data becomes noise."""

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at moments in 0..1, fp32."""
        ...

    def velocity_coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """What data and noise are multiplied by in a velocity."""
        ...

    def draw(self, draws: Draws) -> Float[Tensor, " b"]:
        """Moments to train on, one a sample."""
        ...

    def schedule(self, steps: int, shift: float = 1.0) -> Float[Tensor, " s"]:
        """``steps + 1`` moments from noise to data, the last being 0."""
        ...

    def read(self, time: Tensor) -> Tensor:
        """A moment as networks read it."""
        ...


@dataclass(frozen=True)
class StraightPath:
    """Flow matching along straight lines: ``alpha = 1 - t``, ``sigma = t``.

    Args:
        mean: Of the logit of the moments that are trained on, normally distributed (https://arxiv.org/abs/2403.03206).
        std: Of that logit; 0 draws moments evenly.
        shift: Spends more time on noise, above 1, in training and in sampling, which larger pictures need.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path`."""
        return 1 - time.float(), time.float()

    def velocity_coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path`."""
        ones = torch.ones_like(time, dtype=torch.float32)
        return -ones, ones

    def draw(self, draws: Draws) -> Float[Tensor, " b"]:
        """See `Path`."""
        if self.std == 0:
            return _shifted(draws.uniform(), self.shift)
        return _shifted(torch.sigmoid(self.mean + self.std * draws.normal()), self.shift)

    def schedule(self, steps: int, shift: float = 1.0) -> Float[Tensor, " s"]:
        """See `Path`."""
        return _shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), self.shift * shift).float()

    def read(self, time: Tensor) -> Tensor:
        """See `Path`."""
        return NUM_STEPS * time.float()


@dataclass(frozen=True)
class DiffusionPath:
    """A variance-preserving diffusion of `NUM_STEPS` steps; moment t is behind step ``1000 t``, so that 0 is the data itself.

    Args:
        betas: Variances of the steps: "linear" (DDPM), "scaled_linear" (Stable Diffusion) or "cosine"
            (https://arxiv.org/abs/2102.09672).
        beta_start: The first, except for "cosine".
        beta_end: The last, except for "cosine".
    """

    betas: Betas = "cosine"
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path`."""
        kept = self.signal.to(time.device)[(time.double() * NUM_STEPS).round().long()]
        return kept.sqrt().float(), (1 - kept).sqrt().float()

    def velocity_coefficients(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """See `Path`."""
        alpha, sigma = self.coefficients(time)
        return -sigma, alpha

    def draw(self, draws: Draws) -> Float[Tensor, " b"]:
        """See `Path`."""
        return (1 + draws.below(NUM_STEPS)) / NUM_STEPS

    def schedule(self, steps: int, shift: float = 1.0) -> Float[Tensor, " s"]:
        """See `Path`. Evenly spaced from the very last step on (https://arxiv.org/abs/2305.08891); ``shift`` as for flows."""
        even = _shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift)
        return ((even * NUM_STEPS).round() / NUM_STEPS).float()

    def read(self, time: Tensor) -> Tensor:
        """See `Path`. Networks count the steps from 0; moments between two steps, which some schedulers take, stay there."""
        steps = time.double() * NUM_STEPS
        whole = steps.round()
        return torch.where((steps - whole).abs() < ROUNDING, whole, steps).float() - 1

    @property
    def signal(self) -> Float[Tensor, " s"]:
        """Share of the variance that is left of the data behind 0, 1, ... 1000 steps, fp64."""
        return _signal(self.betas, self.beta_start, self.beta_end)

    @property
    def variances(self) -> Float[Tensor, " n"]:
        """The variances of the steps, fp64."""
        signal = self.signal
        return 1 - signal[1:] / signal[:-1]


def mixed(path: Path, sample: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], time: Tensor) -> Float[Tensor, "b ..."]:
    """``x_t``, at one moment or one a sample."""
    alpha, sigma = (_beside(part, sample) for part in path.coefficients(time))
    return alpha * sample + sigma * noise


def target(path: Path, prediction: Prediction, sample: Tensor, noise: Tensor, time: Tensor) -> Float[Tensor, "b ..."]:
    """What a network should predict."""
    if prediction == "velocity":
        of_sample, of_noise = (_beside(part, sample) for part in path.velocity_coefficients(time))
        return of_sample * sample + of_noise * noise
    return noise if prediction == "noise" else sample


def predicted_sample(path: Path, prediction: Prediction, output: Tensor, x: Tensor, time: Tensor) -> Float[Tensor, "b ..."]:
    """The data that a network's output means, given ``x_t``.

    At a moment of noise alone (``alpha`` 0) a predicted noise says nothing about the data; those moments are left out of
    diffusions that train on it.
    """
    if prediction == "sample":
        return output
    alpha, sigma = (_beside(part, x) for part in path.coefficients(time))
    if prediction == "noise":
        return (x - sigma * output) / alpha
    of_sample, of_noise = (_beside(part, x) for part in path.velocity_coefficients(time))
    return (of_noise * x - sigma * output) / (alpha * of_noise - sigma * of_sample)


def output_of(path: Path, prediction: Prediction, sample: Tensor, x: Tensor, time: Tensor) -> Float[Tensor, "b ..."]:
    """The output that would mean ``sample``: the inverse of `predicted_sample`; ``sigma`` must be above 0."""
    alpha, sigma = (_beside(part, x) for part in path.coefficients(time))
    return target(path, prediction, sample, (x - alpha * sample) / sigma, time)


def advanced(path: Path, x: Tensor, sample: Tensor, time: Tensor, later: Tensor) -> Float[Tensor, "b ..."]:
    """``x_s`` at a moment nearer to the data, given ``x_t`` and data that stay the same on the way, at moments above 0.

    The exact solution is ``x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) data``: DDIM
    (https://arxiv.org/abs/2010.02502), which on straight paths is Euler's method. Moments are one for all or one a sample.
    """
    alpha, sigma = (_beside(part, x) for part in path.coefficients(time))
    alpha_later, sigma_later = (_beside(part, x) for part in path.coefficients(later))
    kept = sigma_later / sigma
    return kept * x + (alpha_later - alpha * kept) * sample


def loss(
    path: Path,
    prediction: Prediction,
    output: Float[Tensor, "b ..."],
    sample: Tensor,
    noise: Tensor,
    time: Float[Tensor, " b"],
    weighting: Weighting = "uniform",
) -> Float[Tensor, " b"]:
    """Weighted mean squared error of each sample, fp32.

    | Weighting  | Factor of the squared error of the prediction |
    |------------|-----------------------------------------------|
    | "uniform"  | 1                                             |
    | "min_snr"  | of a sample: the signal-to-noise ratio, at most 5 (https://arxiv.org/abs/2303.09556), for other predictions what this is of theirs |
    | "velocity" | what makes it the error of a velocity; noise below 0.05 counts as 0.05 |
    """  # noqa: E501 - a table
    error = (output.float() - target(path, prediction, sample, noise, time)).square().flatten(1).mean(1)
    if weighting in ("uniform", prediction):
        return error
    alpha, sigma = path.coefficients(time)
    of_sample, of_noise = path.velocity_coefficients(time)
    volume = (alpha * of_noise - sigma * of_sample).abs()  # 1 for both paths
    # An error d of the sample is one of alpha d / sigma of the noise and of volume d / sigma of the velocity.
    in_sample = {"sample": torch.ones_like(alpha), "noise": sigma / alpha.clamp(min=1e-6), "velocity": sigma / volume}[
        prediction
    ]
    if weighting == "velocity":
        return error * (in_sample * volume / sigma.clamp(min=MIN_SIGMA)).square()
    snr = (alpha / sigma.clamp(min=1e-6)).square()
    if prediction == "noise":  # written out: the factors above overflow where there is hardly any signal
        return error * (MIN_SNR / snr.clamp(min=MIN_SNR))
    return error * snr.clamp(max=MIN_SNR) * in_sample.square()


def _shifted(time: Tensor, shift: float) -> Tensor:
    return shift * time / (1 + (shift - 1) * time)


def _beside(values: Tensor, x: Tensor) -> Tensor:
    """Numbers, one or one a sample, in a shape that multiplies samples."""
    return values.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


@functools.cache
def _signal(betas: Betas, start: float, end: float) -> Tensor:
    if betas == "cosine":

        def level(share: float) -> float:
            return math.cos((share + 0.008) / 1.008 * math.pi / 2) ** 2

        variances = torch.tensor(
            [min(1 - level((i + 1) / NUM_STEPS) / level(i / NUM_STEPS), 0.999) for i in range(NUM_STEPS)], dtype=torch.float64
        )
    elif betas == "linear":
        variances = torch.linspace(start, end, NUM_STEPS, dtype=torch.float64)
    else:
        variances = torch.linspace(start**0.5, end**0.5, NUM_STEPS, dtype=torch.float64).square()
    return torch.cat([torch.ones(1, dtype=torch.float64), (1 - variances).cumprod(0)])
