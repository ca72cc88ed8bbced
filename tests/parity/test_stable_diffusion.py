"""Folders in Stable Diffusion's format, written by diffusers: the same pictures of the same noise, whatever the scheduler."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stable_diffusion import write_folder
from torch import Tensor

import mm
from mm.generators import diffusion
from mm.hub import Model
from mm.run.generation import generate
from mm.types import Sampling

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with NumPy 2

TOLERANCE = 1e-4
STEPS, GUIDANCE = 6, 4.0
PROMPTS, NEGATIVE = ["a red cat", "Two DOGS, a bird & much more than fits"], "blurry"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Noise, then the latents that pictures are made of."""
    seen: list[Tensor] = []
    draw = diffusion.gaussian_noise
    monkeypatch.setattr(diffusion, "gaussian_noise", lambda *given: (noise := draw(*given), seen.append(noise))[0])
    return seen


def painted(model: Model, latents: list[Tensor], monkeypatch: pytest.MonkeyPatch, **sampling: Any) -> tuple[Tensor, Tensor]:
    """Pictures and latents."""
    system: Any = model.system
    made: list[Tensor] = []
    decode = system.latents.from_latents
    with monkeypatch.context() as patch:
        patch.setattr(system.latents, "from_latents", lambda given: (made.append(given), decode(given))[1])
        settings = Sampling(guidance=GUIDANCE, steps=STEPS, **sampling)
        pictures = generate(model, PROMPTS, sampling=settings, negative=NEGATIVE)
    return torch.stack([picture.pixels for picture in pictures]), made[-1]


def expected(pipeline: Any, noise: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The same by diffusers."""
    given = {
        "negative_prompt": [NEGATIVE] * len(PROMPTS),
        "latents": noise,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        **options,
    }
    pictures = pipeline(PROMPTS, output_type="np", **given).images
    pixels = torch.from_numpy(pictures * 255).round().to(torch.uint8).permute(0, 3, 1, 2)
    return pixels, pipeline(PROMPTS, output_type="latent", **given).images


SCHEDULERS = {
    "": None,
    "DDIM": "DDIMScheduler",
    "EulerDiscrete": "EulerDiscreteScheduler",
    "PNDM": "PNDMScheduler",
    "DPMSolverMultistepScheduler": "DPMSolverMultistepScheduler",
}


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_the_same_noise_becomes_the_same_picture(
    solver: str, folder: Path, latents: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    if name := SCHEDULERS[solver]:
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    pictures, ours = painted(mm.load(folder, device="cpu"), latents, monkeypatch, solver=solver)
    theirs, wanted = expected(pipeline, latents[0])
    torch.testing.assert_close(ours, wanted, atol=TOLERANCE, rtol=0)
    assert wanted.std() > 0.5
    assert (pictures.int() - theirs.int()).abs().max() <= 1
