"""Imagen and DALL-E 2: what should learn does and what is held stays, seeds decide, each stage honours what it is given."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mm
from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.fusion.dual_tower import unit
from mm.generators.diffusion import gaussian_noise
from mm.generators.sampling import sample_generators
from mm.hub import Model
from mm.processor import Processor
from mm.systems import build, read_system
from mm.systems.dalle2 import Dalle2, Dalle2Config
from mm.systems.imagen import Imagen, ImagenConfig, Stage, shrunk
from mm.tokenizers.text import TextTokenizer
from mm.types import Batch, Sampling, System, TextBatch, capabilities

TEXT = {"width": 16, "layers": 1, "heads": 2, "context_length": 6, "vocab_size": 20, "causal": False, "pooling": "mean"}
TOWER = {"backbone": "test_resnet", "image_size": 32, "pool": "avg"}
CLIP: dict[str, Any] = {"name": "clip", "image": TOWER, "text": TEXT, "embed_dim": 12}
WORDS = {"width": 16, "layers": 1, "heads": 2, "context_length": 8, "vocab_size": 20}
LANGUAGE = {"name": "language-model", "network": WORDS}
DIT = {"width": 16, "layers": 2, "heads": 2, "patch": 4, "words_every": 2}
UNET = {
    "kind": "unet",
    "options": {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    },
}
BASE = {"image_size": 8, "denoiser": DIT}
LARGER = {"image_size": 16, "denoiser": DIT}
UPSCALERS: dict[str, dict[str, Any]] = {
    "base": {"upscalers": []},
    "own-text": {"upscalers": [], "text": TEXT},
    "upscaler": {"upscalers": [LARGER]},
    "unet-of-ddpm": {"upscalers": [LARGER | {"denoiser": UNET, "path": {"kind": "diffusion"}}], "text": LANGUAGE},
}
QUICK: dict[str, Any] = {
    "base": {"image_size": 4, "denoiser": DIT | {"width": 32, "patch": 1}},
    "upscalers": [{"image_size": 8, "denoiser": DIT | {"width": 32, "patch": 2}}],
}
"""Learns pictures by heart in seconds."""

DALLE2 = {"text": CLIP, "latents": {"image_size": 16}, "denoiser": DIT, "prior": {"width": 16, "layers": 2, "heads": 2}}


def imagen(variant: str, **options: Any) -> Imagen:
    torch.manual_seed(0)
    return build(validate(ImagenConfig, {"text": CLIP, "base": BASE} | UPSCALERS[variant] | options, "test"))  # pyright: ignore[reportReturnType]


def dalle2(**options: Any) -> Dalle2:
    torch.manual_seed(0)
    return build(validate(Dalle2Config, DALLE2 | options, "test"))  # pyright: ignore[reportReturnType]


def spread(system: Any) -> Any:
    """Weights large enough that everything makes a difference."""
    torch.manual_seed(1)
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return system.eval()


def texts(*lengths: int) -> TextBatch:
    generator = torch.Generator().manual_seed(3)
    return TextBatch(torch.randint(1, 20, (len(lengths), 6), generator=generator), torch.tensor(lengths))


def batch(side: int, size: int = 4) -> Batch:
    """Smooth pictures with a text each."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    image = (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).to(torch.uint8)
    return Batch(tuple(map(str, range(size))), image, texts(*[6, 3, 5, 4][:size]))


def trained(system: System, data: Batch, steps: int, rate: float = 1e-2, repeats: int = 4) -> set[str]:
    """Names of the parameters that gradients reached."""
    assert data.image is not None
    assert data.text is not None
    text = TextBatch(data.text.ids.repeat(repeats, 1), data.text.lengths.repeat(repeats))
    large = Batch(data.ids * repeats, data.image.repeat(repeats, 1, 1, 1), text)
    optimizer = torch.optim.Adam([p for p in system.parameters() if p.requires_grad], lr=rate)
    reached: set[str] = set()
    system.train()
    for step in range(steps):
        optimizer.zero_grad()
        system.loss(large, step).total.backward()
        reached |= {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    system.eval()
    return reached


@pytest.mark.parametrize("variant", [*UPSCALERS, "dalle2"])
def test_what_should_learn_does_and_the_rest_stays(variant: str) -> None:
    system: Any = dalle2(caption_dropout=0.5) if variant == "dalle2" else imagen(variant, caption_dropout=0.5)
    side = system.config.picture_side
    before = {name: tensor.clone() for name, tensor in system.state_dict().items()}
    reached = trained(system, batch(side), 8, repeats=1)
    assert {n for n, p in system.named_parameters() if p.requires_grad} == reached
    changed = {name.partition(".")[0] for name, tensor in system.state_dict().items() if not torch.equal(tensor, before[name])}
    if variant == "dalle2":
        assert changed == {"prior", "denoiser", "no_words", "no_prompt"}
    else:
        assert changed == ({"stages", "text"} if variant == "own-text" else {"stages"})
        last = f"stages.{len(system.config.upscalers)}."
        assert all(torch.equal(system.state_dict()[n], before[n]) for n in before if n.startswith("stages.") and last not in n)


@pytest.mark.parametrize("variant", ["upscaler", "unet-of-ddpm", "dalle2"])
def test_pictures_depend_on_their_seed_and_text_not_on_their_batch(variant: str) -> None:
    system = spread(dalle2() if variant == "dalle2" else imagen(variant))
    text, seeds, sampling = texts(6, 2, 4), [5, 6, 7], Sampling(guidance=2.0, steps=3, threshold=0.9)
    together = system.paint(text, seeds, sampling)
    for row in range(3):
        alone = system.paint(text[row : row + 1], seeds[row : row + 1], sampling)
        assert (alone[0].int() - together[row].int()).abs().max() <= 1, "sums of other shapes differ in their last bits"
    assert torch.equal(system.paint(text, seeds, sampling), together)
    assert not torch.equal(system.paint(text, [8, 9, 10], sampling), together)
    assert not torch.equal(system.paint(texts(1, 1, 1), seeds, sampling), together)
    assert not torch.equal(system.paint(text, seeds, sampling, negative=texts(3, 5, 6)), together)


def test_the_level_of_the_noise_matters_and_is_told() -> None:
    system = spread(imagen("upscaler"))
    stage: Stage = system.stages[1]
    read, small = system._reader(texts(6, 2)), torch.rand(2, 3, 8, 8) * 2 - 1
    noise, low, high = torch.randn(2, 3, 8, 8), torch.full((2,), 0.1), torch.full((2,), 0.9)
    x, time = torch.randn(2, 3, 16, 16), torch.tensor(500.0)
    given = {level: stage.given(read, small, noise, at) for level, at in (("low", low), ("high", high))}
    clean = stage.given(read, small, noise, torch.zeros(2))
    assert clean.beside is not None
    assert torch.equal(clean.beside, F.interpolate(small, (16, 16), mode="bilinear"))
    told = stage.given(read, small, small, low)
    told_other = stage.given(read, small * 0.9 / 0.1 - small * 0.8 / 0.1, small, high)
    torch.testing.assert_close(told.beside, told_other.beside)
    outputs = [stage.denoiser(x, time, condition) for condition in (given["low"], given["high"], told, told_other)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[2], outputs[3], atol=1e-3), "the same picture, another level"
    assert not torch.equal(*(spread(imagen("upscaler", noise=n)).paint(texts(6), [1], Sampling(steps=2)) for n in (0.1, 0.6)))


def test_an_upscaler_honours_the_smaller_picture() -> None:
    """Made small again, its pictures are those that they were made of; all texts are the same."""
    system, data = imagen("upscaler", **QUICK, caption_dropout=0.0), batch(8)
    data = replace(data, text=texts(6)[torch.zeros(4, dtype=torch.int64)])
    trained(system, data, 150)
    stage: Any = system.stages[1]
    assert data.image is not None
    assert data.text is not None
    small = stage.smaller.to_latents(shrunk(data.image, 4))
    noise = gaussian_noise(sample_generators([1, 2, 3, 4]), (3, 4, 4))
    condition = stage.given(system._reader(data.text), small, noise, torch.full((4,), 0.1))
    sampling = Sampling(guidance=1.0, steps=8)
    with torch.no_grad():
        made = stage.denoising.paint(stage.denoiser, stage.pixels, condition, condition, [0] * 4, sampling)
    errors = (shrunk(made, 4)[:, None].float() - shrunk(data.image, 4)[None].float()).square().mean((2, 3, 4))
    assert torch.equal(errors.argmin(1), torch.arange(4))
    assert errors.diagonal().mean() < 0.3 * errors[~torch.eye(4, dtype=torch.bool)].mean()


@pytest.mark.slow
def test_a_cascade_overfits_one_batch() -> None:
    """Its base learns the texts' pictures, an upscaler that begins with it makes them larger."""
    base = imagen("base", base=QUICK["base"], text=TEXT, caption_dropout=0.0)
    trained(base, batch(4), 300)
    whole, data = imagen("upscaler", **QUICK, text=TEXT, caption_dropout=0.0), batch(8)
    added = [name for name in whole.state_dict() if name.startswith(whole.may_be_added)]
    assert added == [name for name in whole.state_dict() if name not in base.state_dict()]
    whole.load_state_dict(whole.state_dict() | base.state_dict())
    trained(whole, data, 300)
    assert data.text is not None
    assert data.image is not None
    shown: list[tuple[Tensor, float]] = []
    sampling = Sampling(guidance=1.0, steps=8)
    made = whole.paint(data.text, [0] * 4, sampling, on_picture=lambda *given: shown.append(given))
    errors = (made[:, None].float() - data.image[None].float()).square().mean((2, 3, 4))
    assert torch.equal(errors.argmin(1), torch.arange(4)), "each is nearest to its own picture"
    assert [progress for _, progress in shown] == pytest.approx([(i + 1) / 16 for i in range(16)])
    assert all(picture.shape == made.shape for picture, _ in shown)
    assert torch.equal(shown[-1][0], made)


def test_what_is_kept_stays_and_pictures_are_changed() -> None:
    system, data = spread(imagen("upscaler")), batch(16, 2)
    assert data.image is not None
    keep = torch.zeros(2, 16, 16, dtype=torch.bool)
    keep[:, :9] = True
    made = system.paint(texts(6, 2), [1, 2], Sampling(steps=4), image=data.image, keep=keep)
    assert torch.equal(made[:, :, :9], data.image[:, :, :9])
    assert not torch.equal(made[:, :, 9:], data.image[:, :, 9:])
    changed, again = (
        system.paint(texts(6, 2), [1, 2], Sampling(steps=10, strength=strength), image=data.image) for strength in (0.1, 1.0)
    )
    assert not torch.equal(changed, again)


def seen(image: Tensor) -> Tensor:
    """Vectors that tell pictures well apart, which those of fresh towers do not."""
    return unit(F.adaptive_avg_pool2d(image.float() / 127.5 - 1, 2).flatten(1))


def test_a_prior_recovers_a_known_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of pictures that belong to texts are found from the texts alone, and not from other texts."""
    system, data = dalle2(caption_dropout=0.0), batch(16)
    monkeypatch.setattr(system._reader, "of_picture", seen)
    assert data.text is not None
    assert data.image is not None
    trained(system, data, 100)
    found = system.imagine(data.text, [1, 2, 3, 4], Sampling(guidance=1.0, steps=8))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    cosines = found @ seen(data.image).T
    assert torch.equal(cosines.argmax(1), torch.arange(4))
    assert cosines.diagonal().min() > 0.9


def test_the_candidate_nearest_to_the_text_is_painted() -> None:
    one, many = spread(dalle2(candidates=1)), spread(dalle2(candidates=4))
    text, seeds, sampling = texts(6, 2, 4), [1, 2, 3], Sampling(steps=3)
    wanted = one._reader(text).vector
    first, best = ((system.imagine(text, seeds, sampling) * wanted).sum(1) for system in (one, many))
    assert (best >= first - 1e-6).all()
    assert (best > first + 1e-4).any()


@pytest.mark.slow
def test_a_decoder_overfits_pictures_by_their_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"latents": {"image_size": 8}, "denoiser": DIT | {"width": 32, "patch": 2}}
    system, data = dalle2(**options, words_dropout=0.9), batch(8)
    monkeypatch.setattr(system._reader, "of_picture", seen)
    assert data.image is not None
    assert capabilities(system) == {"paints", "varies"}
    trained(system, data, 600)
    made = system.vary(data.image, [0] * 4, Sampling(guidance=1.0, steps=8))
    errors = (made[:, None].float() - data.image[None].float()).square().mean((2, 3, 4))
    assert torch.equal(errors.argmin(1), torch.arange(4)), "each is nearest to its own picture"


@pytest.mark.slow
def test_a_cascade_grows_by_runs_and_paints(tmp_path: Path) -> None:
    """The run of an upscaler begins with that of the base, sees larger pictures, and leaves the base as it was."""
    options = [
        "train.steps=2",
        "train.batch_size=4",
        "train.tensorboard=false",
        "data.validation=null",
        "data.workers=0",
        "train.device=cpu",
    ]
    small = "{denoiser: {patch: 8, width: 16, layers: 1, heads: 2}}"
    mm.train("configs/imagen_base.yaml", [*options, f"system.base={small}"], out=tmp_path / "base")
    stage = "[{image_size: 64, denoiser: {patch: 16, width: 16, layers: 1, heads: 2}}]"
    changes = [*options, f"system.base={small}", f"init_from={tmp_path / 'base'}", f"system.upscalers={stage}"]
    mm.train("configs/imagen_upscaler.yaml", changes, out=tmp_path / "whole")
    base, whole = (mm.load(tmp_path / name, device="cpu", precision="fp32") for name in ("base", "whole"))
    kept = whole.system.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in base.system.state_dict().items())
    assert (base.processor.image_spec.size, whole.processor.image_spec.size) == (32, 64)
    seen: list[float] = []
    sampling = Sampling(steps=2, threshold=0.99)
    shown = mm.generate(whole, ["red heart"], sampling=sampling, on_picture=lambda _, progress: seen.append(progress))
    assert shown[0].pixels.shape == (3, 64, 64)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    again = mm.load(mm.save(whole, tmp_path / "saved"), device="cpu", precision="fp32")
    assert torch.equal(mm.generate(again, ["red heart"], sampling=sampling)[0].pixels, shown[0].pixels)


def test_a_language_model_reads_prompts(tmp_path: Path) -> None:
    """Its words are those of its last layer, its vector that of the last word; its tokenizer comes with it."""
    tokenizer = TextTokenizer.train_bpe(["a red heart", "two blue dogs"] * 3, 300)
    torch.manual_seed(0)
    config = read_system(LANGUAGE | {"network": WORDS | {"vocab_size": tokenizer.vocab_size}}, "test")
    language: Any = build(config)
    text = tokenizer(["a red heart", "dogs"], 8)
    read = language.read_texts(text)
    for row, length in enumerate(text.lengths.tolist()):
        alone = language.network(language.network.embed(text.ids[row : row + 1, :length]))[0]
        torch.testing.assert_close(read.tokens[row, :length], alone)
        torch.testing.assert_close(read.pooled[row], alone[-1])
    processor = Processor(tokenizer=tokenizer, context_length=8)
    model = mm.Model(language.eval(), processor, config, "language")
    folder = mm.save(model, tmp_path / "language")
    options = [
        "train.steps=1",
        "train.batch_size=2",
        "train.tensorboard=false",
        "data.validation=null",
        "data.workers=0",
        "train.device=cpu",
    ]
    small = "system.base={denoiser: {patch: 8, width: 16, layers: 1, heads: 2}}"
    mm.train("configs/imagen_base.yaml", [*options, small, f"system.text={folder}"], out=tmp_path / "run")
    painter = mm.load(tmp_path / "run", device="cpu")
    assert painter.processor.tokenizer.to_json() == tokenizer.to_json()
    assert mm.generate(painter, ["a red heart"], sampling=Sampling(steps=1))[0].pixels.shape == (3, 32, 32)


def test_what_cannot_be_compiled_is_told() -> None:
    for system in (imagen("base"), dalle2()):
        model = Model(system=system, processor=Processor(), config=system.config, name="cascade")
        with pytest.raises(UserError, match="cascade has nothing that can be compiled"):
            model.compile()


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="pictures must grow"):
        imagen("base", upscalers=[BASE])
    with pytest.raises(ConfigError, match="prediction: noise"):
        imagen("base", base=BASE | {"prediction": "noise"})
    with pytest.raises(ConfigError, match="prediction: noise"):
        dalle2(prediction="noise")
    with pytest.raises(ConfigError, match="vectors of texts and of pictures"):
        dalle2(text=LANGUAGE)
    latents = {"name": "vq", "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16]}}
    with pytest.raises(UserError, match="threshold: is for pixels"):
        dalle2(latents=latents, denoiser=DIT | {"patch": 1}).eval().paint(texts(3), [0], Sampling(threshold=0.99))
