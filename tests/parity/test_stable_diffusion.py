"""Folders in Stable Diffusion's format, written by diffusers: the same pictures of the same noise, whatever the scheduler."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_stable_diffusion import SIDE, tiny_vae, write_folder
from torch import Tensor

import mm
from mm.errors import UserError
from mm.generators import diffusion
from mm.hub import Model
from mm.run.generation import generate
from mm.tokenizers.library_vae import LibraryVaeConfig, measured
from mm.types import Compresses, Sampling

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers, with NumPy 2

TOLERANCE = 1e-4
STEPS, GUIDANCE = 6, 4.0
PROMPTS, NEGATIVE = ["a red cat", "Two DOGS, a bird & much more than fits"], "blurry"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The noise that pictures begin with, filled in as it is drawn."""
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


VARIANTS: dict[str, dict[str, Any]] = {
    "velocity, trailing": {"scheduler": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"}},
    "Stable Diffusion 2": {"activation": "gelu", "use_linear_projection": True, "attention_head_dim": [2, 4]},
    "linear betas, between steps": {"scheduler": {"beta_schedule": "linear", "timestep_spacing": "linspace"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_options_are_honoured(variant: str, tmp_path: Path, latents: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model", **VARIANTS[variant])
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    euler = variant == "linear betas, between steps"
    if euler:
        pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    _, ours = painted(mm.load(folder, device="cpu"), latents, monkeypatch, solver="EulerDiscrete" if euler else "")
    torch.testing.assert_close(ours, expected(pipeline, latents[0])[1], atol=TOLERANCE, rtol=0)


def test_padding_may_be_another_token(folder: Path, tmp_path: Path) -> None:
    """Stable Diffusion 2 fills texts up with exclamation marks."""
    other = copied(folder, tmp_path)
    edit(other / "tokenizer" / "tokenizer_config.json", pad_token="!</w>")
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(other)
    model: Any = mm.load(other, device="cpu")
    with torch.no_grad():
        words = model.system.condition(model.processor.text(PROMPTS)).words
    wanted, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(words, wanted, atol=TOLERANCE, rtol=0)
    unlike: Any = mm.load(folder, device="cpu")
    assert not torch.equal(words, unlike.system.condition(unlike.processor.text(PROMPTS)).words)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_an_autoencoder_alone(shift: float | None, tmp_path: Path) -> None:
    vae = tiny_vae(shift_factor=shift)
    vae.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({older(name): tensor for name, tensor in load_file(weights).items()}, weights)
    model = mm.load(tmp_path, device="cpu", precision="bf16")
    assert model.capabilities == {"compresses"}
    system = model.system
    assert isinstance(system, Compresses)
    assert system.latent_shape == (4, SIDE // 2, SIDE // 2)
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = (vae.encode(pixels / 127.5 - 1).latent_dist.mean - (shift or 0)) * vae.config.scaling_factor
        made = vae.decode(wanted / vae.config.scaling_factor + (shift or 0)).sample
    torch.testing.assert_close(system.to_latents(pixels), wanted, atol=1e-5, rtol=0)
    expected_pixels = ((made / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (system.from_latents(wanted).float() - expected_pixels).abs().max() <= 1


def older(name: str) -> str:
    """A weight of attention under the name that diffusers' first releases gave it, as most published folders have it."""
    parts = {"group_norm": "group_norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in parts.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name


def test_scale_is_the_inverse_of_the_spread() -> None:
    config = LibraryVaeConfig(image_size=16, scaling_factor=0.5, shift_factor=1.0)
    raw = torch.tensor([[1.0, 3.0, 5.0, 7.0]])
    found = measured(config, [((raw - 1.0) * 0.5)[..., None, None]], shifted=True)
    assert (found.shift_factor, found.scaling_factor) == pytest.approx((4.0, 5**-0.5))
    assert measured(config, [((raw - 1.0) * 0.5)[..., None, None]]).shift_factor == 0
    with pytest.raises(UserError, match="no picture"):
        measured(config, [])


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def renamed(file: str, to: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).rename(folder / to)


def edited(file: str, **values: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder / file, **values)


UNET_FILE, SCHEDULER_FILE = "unet/config.json", "scheduler/scheduler_config.json"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no UNet": (lambda folder: shutil.rmtree(folder / "unet"), "has no folder unet"),
    "no weights": (lambda folder: (folder / "vae/diffusion_pytorch_model.safetensors").unlink(), "vae: holds no weights"),
    "pickled": (
        renamed("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.bin"),
        "unet: holds only pickled weights (diffusion_pytorch_model.bin)",
    ),
    "another pipeline": (edited("model_index.json", _class_name="StableDiffusionXLPipeline"), "is a StableDiffusionXLPipeline"),
    "another text encoder": (
        edited("model_index.json", text_encoder=["transformers", "T5EncoderModel"]),
        "its text_encoder is a T5EncoderModel; only CLIPTextModel is supported",
    ),
    "code of its own": (edited("model_index.json", unet=["my_unet", "MyUNet"]), "its unet is a MyUNet"),
    "inpainting": (edited(UNET_FILE, in_channels=9), "in_channels is 9, not 4"),
    "of another text encoder": (edited(UNET_FILE, cross_attention_dim=24), "cross_attention_dim is 24, not 16"),
    "guided by a vector": (edited(UNET_FILE, time_cond_proj_dim=8), "time_cond_proj_dim 8 is not supported"),
    "an unknown option": (edited(UNET_FILE, colour="red"), "unexpected keyword argument 'colour'"),
    "other sizes": (edited(UNET_FILE, block_out_channels=[8, 24]), "denoiser.network."),
    "an unknown scheduler": (edited(SCHEDULER_FILE, _class_name="os.system"), "has no scheduler 'os.system'"),
    "no noise": (edited(SCHEDULER_FILE, rescale_betas_zero_snr=True), "rescale_betas_zero_snr True is not supported"),
    "fewer steps": (edited(SCHEDULER_FILE, num_train_timesteps=500), "num_train_timesteps 500 is not supported"),
    "hidden padding": (edited("text_encoder/config.json", use_attention_mask=True), "use_attention_mask is not supported"),
    "shorter texts": (edited("tokenizer/tokenizer_config.json", model_max_length=10), "up to 10 tokens"),
    "a shift": (edited("vae/config.json", shift_factor=0.5), "shift_factor 0.5"),
    "damaged": (lambda folder: (folder / UNET_FILE).write_text("{"), UNET_FILE),
    "no list": (lambda folder: (folder / "model_index.json").write_text("[]"), "model_index.json"),
    "no size": (edited(UNET_FILE, sample_size=None), "model"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_honoured_is_refused_in_one_line(fault: str, folder: Path, tmp_path: Path) -> None:
    damage, message = FAULTS[fault]
    broken = copied(folder, tmp_path)
    damage(broken)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        mm.load(broken, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_earlier_download_serves_offline(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / commit
    shutil.copytree(folder, snapshot)
    assert mm.load(f"someone/some-model@{commit}", device="cpu").config == mm.load(folder, device="cpu").config
