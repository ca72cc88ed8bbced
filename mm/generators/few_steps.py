"""Generators of few steps: what a teacher of many shows, and what a student's answers cost.

Sources: reflow https://arxiv.org/abs/2209.03003, consistency with guidance in it https://arxiv.org/abs/2310.04378.

Shapes: B samples, the rest of a sample's shape is arbitrary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mm.draws import Draws
from mm.generators.diffusion import Denoise, diffuse, gaussian_noise
from mm.generators.sampling import guided, sample_generators
from mm.losses.consistency import Distance, consistent, distance
from mm.losses.diffusion import Path, Prediction, Weighting, advanced, loss, mixed, predicted_sample
from mm.types import Sampling

LARGEST_SEED = 2**62

Network = Callable[[Tensor, Tensor], Tensor]
"""``x_t`` and moments as networks read them, one a sample, to what a student answers, its prompts being known."""


@dataclass(frozen=True)
class Student:
    """A network that learns.

    Args:
        network: Answers, with gradients.
        path: What it answers about.
        prediction: What it predicts.
    """

    network: Network
    path: Path
    prediction: Prediction


@dataclass(frozen=True)
class Teacher:
    """A network that is only asked.

    Args:
        denoise: The network with the prompts of a batch.
        path: What it was trained on.
        prediction: What it predicts.
    """

    denoise: Denoise
    path: Path
    prediction: Prediction

    @torch.no_grad()
    def pairs(
        self, shape: Sequence[int], count: int, sampling: Sampling, device: torch.device | str = "cpu"
    ) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
        """Fresh noise ``(count, *shape)``, drawn by torch's generator, and the data that the teacher makes of it, fp32.

        The solver of ``sampling`` must not add noise on the way, or the noise at the start would not decide the data.
        """
        seeds = torch.randint(LARGEST_SEED, (count,)).tolist()
        noise = gaussian_noise(sample_generators(seeds), shape, device)
        *_, last = diffuse(self.denoise, self.path, self.prediction, shape, seeds, sampling, device=device)
        return noise, last.sample

    @torch.no_grad()
    def step(self, x: Float[Tensor, "b ..."], time: Tensor, later: Tensor, guidance: float) -> Float[Tensor, "b ..."]:
        """``x_t`` brought from ``time`` to ``later``, ``(B,)`` each, along the teacher's guided way, by one step of DDIM."""
        if guidance == 1:
            output = self.denoise(x, self.path.read(time), guided=False).float()
        else:
            both = self.denoise(torch.cat([x, x]), self.path.read(torch.cat([time, time])), guided=True).float()
            with_prompt, without = both.chunk(2)
            output = guided(with_prompt, without, guidance)
        return advanced(self.path, x, predicted_sample(self.path, self.prediction, output, x, time), time, later)


def reflow_loss(
    student: Student, noise: Float[Tensor, "b ..."], sample: Float[Tensor, "b ..."], weighting: Weighting = "uniform"
) -> Float[Tensor, " b"]:
    """Error of the student on the lines between noise and what a teacher makes of it, `Teacher.pairs`, at moments drawn at
    random."""
    path, time = student.path, student.path.draw(Draws(None, len(sample), sample.device))
    output = student.network(mixed(path, sample, noise, time), path.read(time))
    return loss(path, student.prediction, output, sample, noise, time, weighting)


def consistency_loss(
    student: Student,
    follower: Network,
    teacher: Teacher,
    sample: Float[Tensor, "b ..."],
    moments: Float[Tensor, " s"],
    guidance: float,
    kind: Distance = "huber",
    draws: Draws | None = None,
) -> Float[Tensor, " b"]:
    """Distance between the data that a student tells from a moment, and those told from the next one on the teacher's way.

    Args:
        student: Learns to tell the data.
        follower: Tells what it should have told, without gradients: its average, or itself.
        teacher: On the student's path.
        sample: Data.
        moments: From noise to data, such as `mm.losses.diffusion.Path.schedule` gives; pairs of neighbours are drawn.
        guidance: Of the teacher.
        kind: See `mm.losses.consistency.distance`.
        draws: Random numbers; None draws from torch's generators.
    """
    draws = draws or Draws(None, len(sample), sample.device)
    path, prediction = student.path, student.prediction
    drawn = draws.below(len(moments) - 1)
    time, later = moments[drawn], moments[drawn + 1]
    x = mixed(path, sample, draws.normal(*sample.shape[1:]), time)
    told = consistent(path, prediction, student.network(x, path.read(time)).float(), x, time)
    with torch.no_grad():
        x = teacher.step(x, time, later, guidance)
        target = consistent(path, prediction, follower(x, path.read(later)).float(), x, later)
    return distance(told, target, kind)
