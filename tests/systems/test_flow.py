"""Flow: it learns, what is prepared once changes nothing, seeds decide, parts are kept, pictures are changed and varied."""

from typing import Any

import pytest
import torch

from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.generators.denoiser import joined
from mm.systems import build
from mm.systems.clip import ClipConfig
from mm.systems.flow import Flow, FlowConfig
from mm.types import Batch, Sampling, System, TextBatch, capabilities

VQ = {
    "name": "vq",
    "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16], "quantizer": {"kind": "fsq", "levels": [5, 5, 3]}},
}
TEXT = {"width": 16, "layers": 1, "heads": 2, "context_length": 6, "vocab_size": 20, "causal": False, "pooling": "mean"}
TOWER = {"backbone": "test_resnet", "image_size": 32, "pool": "avg"}
CLIP = {"name": "clip", "image": TOWER, "text": TEXT, "embed_dim": 12}
LIBRARY_TOWER = {
    "library": "open_clip",
    "architecture": "tiny",
    "config": {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}},
    "image_size": 32,
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
DIT = {"width": 16, "layers": 3, "heads": 2, "words_every": 2}
PIXELS = {"image_size": 16}
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
VARIANTS: dict[str, dict[str, Any]] = {
    "latents": {"latents": VQ, "text": TEXT},
    "pixels": {
        "latents": PIXELS,
        "text": CLIP,
        "denoiser": DIT | {"patch": 4},
        "prediction": "sample",
        "weighting": "velocity",
    },
    "unet": {"latents": VQ, "text": CLIP, "denoiser": UNET},
    "ddpm": {"latents": VQ, "text": CLIP, "path": {"kind": "diffusion"}, "weighting": "min_snr", "vector_condition": False},
}


def small(variant: str, parts: dict[str, System] | None = None, **options: Any) -> Flow:
    torch.manual_seed(0)
    return build(validate(FlowConfig, {"denoiser": DIT} | VARIANTS[variant] | options, "test"), parts)  # pyright: ignore[reportReturnType]


def spread(system: Flow) -> Flow:
    """Weights large enough that everything makes a difference."""
    torch.manual_seed(1)
    for parameter in system.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return system.eval()


def texts(*lengths: int) -> TextBatch:
    generator = torch.Generator().manual_seed(3)
    return TextBatch(torch.randint(1, 20, (len(lengths), 6), generator=generator), torch.tensor(lengths))


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Batch(tuple(map(str, range(size))), image, texts(*[6, 3, 5, 4][:size]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_learns_and_the_parts_stay(variant: str) -> None:
    system = small(variant, caption_dropout=0.5).train()
    held = {name: tensor.clone() for name, tensor in system.state_dict().items() if name.startswith(("latents.", "text."))}
    if variant == "latents":
        held = {name: tensor for name, tensor in held.items() if name.startswith("latents.")}
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    reached: set[str] = set()
    for step in range(12):
        optimizer.zero_grad()
        system.loss(batch(), step).total.backward()
        reached |= {n for n, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert {n for n, p in system.named_parameters() if p.requires_grad} == reached
    assert all(torch.equal(tensor, system.state_dict()[name]) for name, tensor in held.items())
    assert not system.latents.training


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(variant: str) -> None:
    """The pictures of a learned batch come back from their texts."""
    denoiser = VARIANTS[variant].get("denoiser", DIT) | {"width": 32 if variant == "latents" else 64}
    system, data = small(variant, caption_dropout=0.0, denoiser=denoiser, text=TEXT).train(), batch()
    optimizer = torch.optim.Adam([p for p in system.parameters() if p.requires_grad], lr=3e-3)
    large = Batch(
        data.ids * 8, data.image.repeat(8, 1, 1, 1), TextBatch(data.text.ids.repeat(8, 1), data.text.lengths.repeat(8))
    )
    for step in range(250 if variant == "latents" else 400):
        optimizer.zero_grad()
        system.loss(large, step).total.backward()
        optimizer.step()
    made = system.eval().paint(data.text, [0] * 4, Sampling(guidance=1.0, steps=16))
    wanted = system.latents.from_latents(system.latents.to_latents(data.image))
    errors = (made[:, None].float() - wanted[None].float()).square().mean((2, 3, 4))
    assert torch.equal(errors.argmin(1), torch.arange(4)), "each is nearest to its own picture"
    others = errors[~torch.eye(4, dtype=torch.bool)].mean()
    assert errors.diagonal().mean() < 0.3 * others


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_prepared_once_changes_nothing(variant: str) -> None:
    system = spread(small(variant))
    shape = system.latents.latent_shape
    x, time = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 400.0, 999.0])
    condition = system.condition(texts(6, 2, 4))
    plain = system.denoiser(x, time, condition)
    torch.testing.assert_close(system.denoiser(x, time, system.denoiser.prepare(condition)), plain, rtol=0, atol=1e-5)
    both = system.denoiser.prepare(joined(condition, system.condition(texts(1, 1, 1))))
    torch.testing.assert_close(system.denoiser(x, time, both[:3]), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_pictures_depend_on_their_seed_and_text_not_on_their_batch(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents within 1e-4: sums of other shapes differ in their last bits."""
    system = spread(small(variant))
    made: list[torch.Tensor] = []
    decode = system.latents.from_latents
    monkeypatch.setattr(system.latents, "from_latents", lambda latents: (made.append(latents), decode(latents))[1])
    text, seeds, sampling = texts(6, 2, 4), [5, 6, 7], Sampling(guidance=2.0, steps=5)
    together = system.paint(text, seeds, sampling)
    for row in range(3):
        system.paint(text[row : row + 1], seeds[row : row + 1], sampling)
        torch.testing.assert_close(made[-1][0], made[0][row], rtol=1e-4, atol=1e-4)
    assert torch.equal(system.paint(text, seeds, sampling), together)
    system.paint(text, [8, 9, 10], sampling)
    assert not torch.allclose(made[-1], made[0])
    system.paint(texts(1, 1, 1), seeds, sampling)
    assert not torch.allclose(made[-1], made[0])


def test_guidance_and_negative_prompts() -> None:
    system = spread(small("pixels"))
    text, seeds = texts(6, 2, 4), [1, 2, 3]
    plain, guided = (system.paint(text, seeds, Sampling(guidance=g, steps=4)) for g in (1.0, 4.0))
    assert not torch.equal(plain, guided)
    away = system.paint(text, seeds, Sampling(guidance=4.0, steps=4), negative=texts(3, 5, 6))
    assert not torch.equal(away, guided)
    itself = system.paint(text, seeds, Sampling(guidance=4.0, steps=4), negative=text)
    assert (itself.int() - plain.int()).abs().max() <= 1, "away from the prompt and towards it cancel out"


@pytest.mark.parametrize("variant", ["latents", "pixels"])
def test_what_is_kept_stays_and_previews_come(variant: str) -> None:
    system, data = spread(small(variant)), batch(2)
    keep = torch.zeros(2, 16, 16, dtype=torch.bool)
    keep[:, :9] = True
    seen: list[tuple[torch.Tensor, float]] = []
    made = system.paint(
        texts(6, 2), [1, 2], Sampling(steps=6), image=data.image, keep=keep, on_picture=lambda *given: seen.append(given)
    )
    if variant == "pixels":
        assert torch.equal(made[:, :, :9], data.image[:, :, :9])
        assert all(torch.equal(picture[:, :, :9], data.image[:, :, :9]) for picture, _ in seen)
    else:
        known = system.latents.to_latents(data.image)
        torch.testing.assert_close(system.latents.latent_shape, known.shape[1:])
    assert not torch.equal(made[:, :, 9:], data.image[:, :, 9:])
    assert torch.equal(seen[-1][0], made)
    assert [progress for _, progress in seen] == pytest.approx([(i + 1) / 6 for i in range(6)])


def test_a_picture_is_changed_by_its_strength() -> None:
    system, data = spread(small("pixels")), batch(2)
    distances = []
    for strength in (0.1, 1.0):
        made = system.paint(texts(6, 2), [1, 2], Sampling(steps=10, strength=strength), image=data.image)
        distances.append((made.float() - data.image.float()).abs().mean().item())
    assert distances[0] < distances[1]


def test_pictures_are_varied_by_their_vectors() -> None:
    system, data = spread(small("pixels")), batch(2)
    assert capabilities(system) == {"paints", "varies"}
    made = system.vary(data.image, [1, 2], Sampling(steps=4))
    assert made.shape == data.image.shape
    assert not torch.equal(made, system.vary(data.image.flip(0), [1, 2], Sampling(steps=4)))
    assert capabilities(small("ddpm")) == {"paints"}
    with pytest.raises(UserError, match="does not know vectors"):
        small("ddpm").vary(data.image, [1, 2], Sampling())


def test_features_are_drawn_towards_another_model() -> None:
    clip = build(validate(type(small("pixels").config), {"denoiser": DIT} | VARIANTS["pixels"], "test")).text
    system = small("latents", {"align": clip}, align={"model": "some-clip", "layer": 2, "weight": 3.0}).train()
    torch.manual_seed(0)
    losses = system.loss(batch(), 0)
    torch.testing.assert_close(losses.total.detach(), losses.parts["denoising"] + 3 * losses.parts["alignment"])
    optimizer = torch.optim.Adam([p for p in system.parameters() if p.requires_grad], lr=3e-3)
    first = losses.parts["alignment"]
    for step in range(60):
        optimizer.zero_grad()
        losses = system.loss(batch(), step)
        losses.total.backward()
        optimizer.step()
    assert losses.parts["alignment"] < 0.5 * first
    assert not any("align." in name for name in system.state_dict() if not name.startswith("alignment."))


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="prediction: noise"):
        validate(FlowConfig, {"prediction": "noise"}, "test")
    with pytest.raises(ConfigError, match="multiple of 4 times heads"):
        validate(FlowConfig, {"denoiser": {"width": 20, "heads": 2}}, "test")
    with pytest.raises(ConfigError, match="does not divide"):
        small("latents", denoiser=DIT | {"patch": 3})
    with pytest.raises(ConfigError, match="does not compress"):
        small("latents", {"latents": torch.nn.Identity()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="no text tower"):
        small("latents", {"text": torch.nn.Identity()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="no transformer of so many layers"):
        small("latents", align={"model": "x", "layer": 4})
    library = build(validate(ClipConfig, CLIP | {"image": LIBRARY_TOWER, "image_projection": "none", "embed_dim": 16}, "test"))
    for model, message in ((library, "picture tower of 'x' is a library's own"), (torch.nn.Identity(), "no picture tower")):
        with pytest.raises(ConfigError, match=message):
            small("latents", {"align": model}, align={"model": "x", "layer": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="threshold: is for pixels"):
        spread(small("latents")).paint(texts(3), [0], Sampling(threshold=0.99))
