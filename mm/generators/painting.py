"""A network that denoises, with what it was trained on: its loss, its samples, its pictures.

Shapes: B samples, the rest of a sample's shape is arbitrary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from mm.draws import Draws
from mm.generators.denoiser import Condition, joined, without_padding
from mm.generators.diffusion import Denoise, Known, Step, diffuse
from mm.generators.schedulers import SchedulerConfig
from mm.losses import diffusion as objective
from mm.losses.diffusion import Path, Prediction, Weighting
from mm.types import Compresses, OnPicture, Sampling

USUAL = SchedulerConfig()


@dataclass(frozen=True)
class Denoising:
    """What a network is asked about noise.

    Args:
        path: How data becomes noise.
        prediction: What the network predicts, see `mm.losses.diffusion`.
        weighting: What its errors cost, see there.
        scheduler: How to sample where nobody says otherwise.
    """

    path: Path
    prediction: Prediction = "velocity"
    weighting: Weighting = "uniform"
    scheduler: SchedulerConfig = USUAL

    def loss(
        self, denoiser: Any, sample: Float[Tensor, "b ..."], condition: Condition, draws: Draws, **options: Any
    ) -> tuple[Float[Tensor, " b"], Tensor | None]:
        """The weighted error of each sample at a moment drawn at random, and what else the network gives.

        Args:
            denoiser: A `mm.generators.denoiser.Denoiser`.
            sample: Data.
            condition: What the network is told.
            draws: Random numbers.
            options: Passed on to the network.
        """
        time, noise = self.path.draw(draws), draws.normal(*sample.shape[1:])
        x = objective.mixed(self.path, sample, noise, time)
        output = denoiser(x, self.path.read(time), without_padding(condition), **options)
        output, further = output if isinstance(output, tuple) else (output, None)
        return objective.loss(self.path, self.prediction, output, sample, noise, time, self.weighting), further

    def steps(
        self,
        denoiser: Any,
        shape: Sequence[int],
        condition: Condition,
        other: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        start: Float[Tensor, "b ..."] | None = None,
        known: Known | None = None,
    ) -> Iterator[Step]:
        """Samples of ``shape``, step by step, see `mm.generators.diffusion.diffuse`; guidance leads away from ``other``."""
        denoise = with_prompts(denoiser, condition, other)
        options = {"device": condition.words.device, "start": start, "known": known, "usual": self.scheduler}
        return diffuse(denoise, self.path, self.prediction, shape, seeds, sampling, **options)

    def paint(
        self,
        denoiser: Any,
        latents: Compresses,
        condition: Condition,
        other: Condition,
        seeds: Sequence[int],
        sampling: Sampling,
        *,
        image: UInt8[Tensor, "b 3 h w"] | None = None,
        keep: Bool[Tensor, "b h w"] | None = None,
        on_picture: OnPicture | None = None,
    ) -> UInt8[Tensor, "b 3 h w"]:
        """Pictures, see `mm.types.Paints`: an ``image`` alone is changed, by `Sampling.strength`; with ``keep``, what is not
        kept is made anew."""
        shape = latents.latent_shape
        given = None if image is None else latents.to_latents(image)
        known = None if given is None or keep is None else Known(given, whole_cells(keep, shape[1:])[:, None])
        start = given if sampling.strength < 1 else None
        step = None
        for step in self.steps(denoiser, shape, condition, other, seeds, sampling, start=start, known=known):
            if on_picture is not None and step.progress < 1:
                on_picture(latents.from_latents(step.sample), step.progress)
        assert step is not None, "there is at least one step"
        made = latents.from_latents(step.sample)
        if on_picture is not None:
            on_picture(made, 1.0)
        return made


def with_prompts(denoiser: Any, condition: Condition, other: Condition) -> Denoise:
    """A network with what it is told of prompts, and what instead where guidance leads away from it."""
    both = denoiser.prepare(without_padding(joined(condition, other)))
    single, device = both[: len(condition.words)], condition.words.device

    def denoise(x: Tensor, time: Tensor, *, guided: bool) -> Tensor:
        return denoiser(x, time.to(device), both if guided else single)

    return denoise


def whole_cells(keep: Bool[Tensor, "b h w"], grid: tuple[int, int]) -> Bool[Tensor, "b r c"]:
    """Cells of a grid all of whose pixels are kept."""
    return F.adaptive_avg_pool2d(keep.float()[:, None], grid)[:, 0] == 1
