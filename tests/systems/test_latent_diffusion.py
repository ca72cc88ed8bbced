"""Latent diffusion: the whole way from a folder of diffusers through fine-tuning and back to one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_stable_diffusion import LENGTH, SIDE, write_folder

import mm
from mm.errors import ConfigError, UserError
from mm.export import export
from mm.run.config import CONFIGS
from mm.run.conversion import convert
from mm.run.generation import generate
from mm.run.latents import rescaled
from mm.run.training import assemble, load_run_config
from mm.systems.flow import Flow, FlowPathConfig
from mm.systems.latent_diffusion import LatentDiffusionConfig
from mm.types import Sampling, TextBatch

diffusers = pytest.importorskip("diffusers")

CONFIG = CONFIGS / "latent_diffusion.yaml"
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures of one colour each, with captions."""
    place = tmp_path_factory.mktemp("data")
    rows = ["image,caption"]
    for name, colour in {"red": (220, 20, 20), "green": (20, 200, 30), "blue": (10, 30, 230), "white": (250, 250, 250)}.items():
        Image.new("RGB", (SIDE, SIDE), colour).save(place / f"{name}.png")
        rows.append(f"{name}.png,{name} square")
    (place / "captions.csv").write_text("\n".join(rows) + "\n")
    return place / "captions.csv"


def changes(folder: Path, data: Path, **more: Any) -> list[str]:
    """Of the configuration, for a short run."""
    values = {
        "init_from": folder,
        "data.train": data,
        "train.steps": STEPS,
        "train.batch_size": 4,
        "train.lr": 0.02,
        "train.warmup_steps": 0,
        "train.log_every": 1,
        "train.tensorboard": "false",
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def loss(model: Any, folder: Path, data: Path) -> float:
    """Of the training data, over many moments and noises that are the same each time."""
    run = assemble(load_run_config(CONFIG, changes(folder, data)))
    torch.manual_seed(0)
    batch = next(iter(run.stream))
    with torch.no_grad():
        return float(torch.stack([model.system.loss(batch, 0).total for _ in range(40)]).mean())


def test_from_a_folder_through_lora_to_a_folder(folder: Path, data: Path, tmp_path: Path) -> None:
    start = mm.load(folder, device="cpu")
    mm.train(CONFIG, changes(folder, data), out=tmp_path / "run")
    tuned = mm.load(tmp_path / "run", device="cpu")
    assert loss(tuned, folder, data) < 0.95 * loss(start, folder, data)
    before, after = start.system.state_dict(), tuned.system.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    attentions = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.0.weight")
    assert changed == {name for name in before if name.startswith("denoiser.") and name.endswith(attentions)}
    counts = tuned.card["parameters"]
    assert 0 < counts["trained"] < 0.2 * counts["total"]

    out = export(tuned, tmp_path / "out", "diffusers")
    names = {"denoiser.network." + name: tensor for name, tensor in load_file(_weights(out, "unet")).items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in names.items())
    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    system: Any = tuned.system
    noise = torch.randn(1, *system.latents.latent_shape, generator=torch.Generator().manual_seed(3))
    given = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = torch.from_numpy(pipeline("red square", output_type="np", **given).images * 255).round().permute(0, 3, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mm.generators.diffusion.gaussian_noise", lambda *_: noise)
        [ours] = generate(tuned, ["red square"], sampling=Sampling(guidance=3.0, steps=4))
    assert (ours.pixels.float() - theirs[0]).abs().max() <= 1
    again = mm.load(out, device="cpu")
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.system.state_dict().items())
    assert json.loads((out / "export.json").read_text())["to"] == "diffusers"


def test_the_whole_unet_can_be_trained_and_nothing_else(folder: Path, data: Path, tmp_path: Path) -> None:
    mm.train(CONFIG, changes(folder, data, tune="full", **{"train.lr": 0.003, "train.steps": 20}), out=tmp_path / "run")
    start, tuned = mm.load(folder, device="cpu"), mm.load(tmp_path / "run", device="cpu")
    assert loss(tuned, folder, data) < 0.9 * loss(start, folder, data)
    before, after = start.system.state_dict(), tuned.system.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("denoiser.")}


def texts(count: int) -> TextBatch:
    ids = torch.randint(0, 500, (count, 7), generator=torch.Generator().manual_seed(1))
    return TextBatch(ids, torch.tensor([7, 4, 6][:count]))


def test_dropped_captions_are_the_empty_prompt(folder: Path) -> None:
    model = mm.load(folder, device="cpu")
    system: Any = model.system
    assert isinstance(system, Flow)
    assert "no_words" not in system.state_dict()
    condition, empty = system.condition(texts(3)), system.condition(model.processor.text([""]))
    assert condition.words.shape == (3, LENGTH, 16)
    assert condition.known.all()
    dropped = system._without(condition, torch.tensor([True, False, True]))
    torch.testing.assert_close(dropped.words, torch.stack([empty.words[0], condition.words[1], empty.words[0]]))
    assert torch.equal(system._without(condition).words, empty.words.expand(3, -1, -1))


def test_a_negative_prompt_is_another_than_none(folder: Path) -> None:
    model, sampling = mm.load(folder, device="cpu"), Sampling(guidance=5.0, steps=3)
    plain, away = (generate(model, ["cat"], sampling=sampling, negative=text)[0].pixels for text in (None, "dog"))
    assert not torch.equal(plain, away)


def test_the_autoencoder_serves_other_generators_with_a_scale_of_its_own(folder: Path, data: Path, tmp_path: Path) -> None:
    vae = mm.load(folder / "vae", device="cpu")
    own = rescaled(vae, str(data))
    saved = mm.load(mm.save(own, tmp_path / "vae"), device="cpu")
    system: Any = saved.system
    pictures = torch.stack([saved.processor.image(file) for file in sorted(data.parent.glob("*.png"))])
    assert system.to_latents(pictures).std(correction=0) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(system.from_latents(system.to_latents(pictures)), _through(vae, pictures))
    flow = {"system.latents": tmp_path / "vae", "system.text": "{width: 16, layers: 1, heads: 2}"}
    small = {"system.denoiser": "{width: 16, layers: 1, heads: 2}", "processor.fit": "squash"}
    short = {"data.train": data, "train.steps": 2, "train.batch_size": 4, "train.tensorboard": "false"}
    overrides = [f"{key}={value}" for key, value in (flow | small | short).items()]
    (tmp_path / "flow.yaml").write_text("system: {name: flow}\ndata: {train: x}\n")
    mm.train(tmp_path / "flow.yaml", overrides, out=tmp_path / "run")
    assert mm.load(tmp_path / "run", device="cpu").capabilities == {"paints"}
    with pytest.raises(UserError, match="no KL autoencoder"):
        rescaled(mm.load(folder, device="cpu"), str(data))


def test_shift_and_scale_bring_mean_and_spread(folder: Path, data: Path, tmp_path: Path) -> None:
    own = mm.load(convert(folder / "vae", tmp_path / "vae", rescale=str(data), shifted=True), device="cpu")
    assert own.card["format"]
    assert own.card["rescaled"]["shifted"]
    system: Any = own.system
    pictures = torch.stack([own.processor.image(file) for file in sorted(data.parent.glob("*.png"))])
    latents = system.to_latents(pictures)
    assert float(latents.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(latents.std(correction=0)) == pytest.approx(1.0, rel=1e-4)
    with pytest.raises(UserError, match="give their pictures with --rescale"):
        convert(folder / "vae", tmp_path / "other", shifted=True)
    with pytest.raises(UserError, match="no KL autoencoder"):
        convert(folder, tmp_path / "other", rescale=str(data))
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no latent diffusion"):
        export("emoji-clip", tmp_path / "out", "diffusers")
    model = mm.load(folder, device="cpu")
    assert isinstance(model.config, LatentDiffusionConfig)
    for changed, message in (
        ({"path": FlowPathConfig(), "prediction": "velocity"}, "goes a straight path, which StableDiffusionPipeline cannot"),
        ({"prediction": "sample"}, "predicts the sample, which not all schedulers know, only velocity or noise"),
    ):
        with pytest.raises(UserError, match=message):
            export(replace(model, config=model.config.model_copy(update=changed)), tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="empty_prompt"):
        load_run_config(CONFIG, [f"init_from={folder}", "system.text.attend_padding=false"])
    with pytest.raises(ConfigError, match="held fixed"):
        mm.load(folder / "vae", device="cpu").system.loss(None, 0)  # pyright: ignore[reportArgumentType]


def _weights(folder: Path, part: str) -> Path:
    return folder / part / "diffusion_pytorch_model.safetensors"


def _through(model: Any, pictures: torch.Tensor) -> torch.Tensor:
    return model.system.from_latents(model.system.to_latents(pictures))
