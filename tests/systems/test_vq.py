"""The picture tokenizer: every variant learns, tokens are well defined, adversarial losses reach their own side alone."""

import pytest
import torch

from mm.config import validate
from mm.errors import ConfigError
from mm.run.training import _adopt
from mm.systems.vq import Vq, VqConfig, build
from mm.types import Batch, Tokenizes

SMALL = {"image_size": 16, "patch": 2, "widths": [8, 16], "num_blocks": 2, "num_heads": 2}
QUANTIZERS = {
    "fsq": {"kind": "fsq", "levels": [5, 5, 3]},
    "vq": {"kind": "vq", "codebook_size": 24, "width": 4},
    "vq-learned": {"kind": "vq", "codebook_size": 24, "width": 4, "ema_decay": 0.0},
    "gumbel": {"kind": "gumbel", "codebook_size": 12, "width": 6, "kl_weight": 0.01, "anneal_steps": 10, "kl_steps": 5},
}
VARIANTS: dict[str, dict[str, object]] = {
    **{name: {"tokenizer": SMALL | {"quantizer": quantizer}} for name, quantizer in QUANTIZERS.items()},
    "dvae": {"tokenizer": SMALL | {"quantizer": QUANTIZERS["gumbel"], "pixels": "laplace"}},
    "vqgan": {"tokenizer": SMALL | {"quantizer": QUANTIZERS["vq"]}, "adversarial_weight": 0.5, "discriminator_width": 8},
}


def small(variant: str = "fsq", **options: object) -> Vq:
    torch.manual_seed(0)
    return build(validate(VqConfig, VARIANTS[variant] | options, "test"))


def batch(size: int = 4, side: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    image = (torch.nn.functional.interpolate(coarse, side) * 255).to(torch.uint8)
    return Batch(tuple(map(str, range(size))), image)


def train(system: Vq, steps: int, lr: float = 3e-3) -> list[float]:
    data, found = batch(), []
    optimizer = torch.optim.Adam(system.parameter_groups(), lr=lr)
    system.train()
    for step in range(steps):
        optimizer.zero_grad()
        losses = system.loss(data, step)
        losses.total.backward()
        optimizer.step()
        system.after_step(step)
        found.append(float(losses.parts["reconstruction"]))
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trainable_parameter_learns(variant: str) -> None:
    system = small(variant)
    train(system, 3)
    system.zero_grad()
    system.loss(batch(), 3).total.backward()
    without = {n for n, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    # inside the margin the hinge pulls the last bias up for real patches exactly as much as down for made ones
    assert without <= {"discriminator.layers.8.bias"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_overfits_one_batch(variant: str) -> None:
    found = train(small(variant), 80)
    first, last = found[0], sum(found[-5:]) / 5
    assert last < first - 0.35 * abs(first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_in_range_and_pictures_are_pixels(variant: str) -> None:
    system, data = small(variant).eval(), batch()
    assert isinstance(system, Tokenizes)
    ids = system.encode(data.image)
    assert ids.shape == (4, 16)
    assert system.grid == (4, 4)
    assert 0 <= int(ids.min()) <= int(ids.max()) < system.vocab_size
    made = system.decode(ids)
    assert made.dtype == torch.uint8
    assert made.shape == data.image.shape
    assert torch.equal(system.encode(data.image[2:3]), ids[2:3]), "a picture's tokens do not depend on its batch"


def test_each_side_of_the_adversarial_loss_reaches_its_own_parameters_alone() -> None:
    system, data = small("vqgan").train(), batch()
    assert system.discriminator is not None
    own = dict(system.discriminator.named_parameters())
    pixels = system.tokenizer.normalise(data.image)
    output = system.tokenizer.reconstruct(system.tokenizer.quantize(pixels).codes)
    losses = system._adversarial(output, data.image, (output - pixels).square().mean(), 0)
    deception = torch.autograd.grad(losses["deception"], list(own.values()), retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in deception)
    others = list(system.tokenizer.parameters())
    discriminator = torch.autograd.grad(losses["discriminator"], others, retain_graph=True, allow_unused=True)
    assert all(gradient is None for gradient in discriminator)
    assert any(g is not None and g.any() for g in torch.autograd.grad(losses["deception"], others, allow_unused=True))


def test_the_deception_is_balanced_against_the_distance_at_the_last_layer() -> None:
    system, data = small("vqgan").train(), batch()
    pixels = system.tokenizer.normalise(data.image)
    output = system.tokenizer.reconstruct(system.tokenizer.quantize(pixels).codes)
    distance = (output - pixels).square().mean()
    deception = system._adversarial(output, data.image, distance, 0)["deception"]
    last = system.tokenizer.decoder.output.weight
    norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (distance, deception)]
    torch.testing.assert_close(norms[1], 0.5 * norms[0], rtol=0.05, atol=0)


def test_the_discriminator_is_not_listened_to_before_its_time() -> None:
    system = small("vqgan", adversarial_from=10)
    assert float(system.loss(batch(), 9).parts["deception"]) == 0
    assert float(system.loss(batch(), 10).parts["deception"]) != 0


def test_the_temperature_falls_and_the_divergence_rises() -> None:
    system = small("gumbel")
    quantizer = system.tokenizer.quantizer
    temperatures = []
    for step in range(12):
        system.loss(batch(), step)
        temperatures.append(quantizer.temperature)
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(1 / 16)
    assert [system._quantizer_weight(step) for step in (0, 4, 100)] == pytest.approx([0.002, 0.01, 0.01])


def test_logit_laplace_is_a_density() -> None:
    from mm.losses.reconstruction import logit_laplace

    grid = torch.linspace(1e-4, 1 - 1e-4, 20001, dtype=torch.float64)
    target = grid.float().view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    output = torch.tensor([0.7, 0.7, 0.7, -0.5, -0.5, -0.5]).view(1, 6, 1, 1)
    likelihood = [float(torch.exp(-logit_laplace(output, value[None]))) for value in target[::100]]
    assert sum(likelihood) * 100 * (grid[1] - grid[0]).item() == pytest.approx(1.0, abs=0.02)


def test_perceptual_distances_come_from_a_picture_encoder() -> None:
    from mm.encoders.image import ImageEncoderConfig, build_image_encoder

    torch.manual_seed(0)
    options = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    encoder = build_image_encoder(ImageEncoderConfig(backbone="convnext_atto", image_size=64, options=options)).eval()
    config = validate(VqConfig, {"tokenizer": SMALL | {"image_size": 64}, "perceptual": "emoji-clip"}, "test")

    class Embedder:
        embed_image = embed_text = scores = print

        def encoders(self) -> dict[str, torch.nn.Module]:
            return {"image": encoder}

    system = build(config, {"perceptual": Embedder()}).train()
    losses = system.loss(batch(side=64), 0)
    assert float(losses.parts["perceptual"]) > 0
    assert not any("perceptual" in name for name in system.state_dict())
    losses.total.backward()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in encoder.parameters())
    assert not encoder.training
    system.to("meta")
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    with pytest.raises(ConfigError, match="no picture encoder with feature maps"):
        build(config, {"perceptual": small()})


def test_gumbel_temperature_depends_on_the_step_alone() -> None:
    """So a resumed run goes on as if nothing had happened."""
    system, resumed = small("gumbel").train(), small("gumbel").train()
    for step in range(4):
        system.loss(batch(), step)
        system.after_step(step)
    torch.manual_seed(0)
    live = system.loss(batch(), 4).total
    torch.manual_seed(0)
    assert torch.equal(resumed.loss(batch(), 4).total, live)


def test_a_collapsing_codebook_is_told_once_with_its_remedy() -> None:
    from mm.training.guard import Collapse

    watcher = Collapse()
    assert not any(watcher.message(step, {"batch_usage": 0.05}) for step in range(1, 201)), "the first steps are not judged"
    message = watcher.message(201, {"batch_usage": 0.05})
    assert message is not None
    assert "collapsing" in message
    assert "fsq" in message
    assert watcher.message(202, {"batch_usage": 0.05}) is None
    healthy = Collapse()
    assert not any(healthy.message(step, {"batch_usage": 0.6}) for step in range(1, 400))
    assert Collapse().message(500, {"contrastive": 1.0}) is None


@pytest.mark.parametrize("variant", ["fsq", "vq"])
def test_a_trained_decoder_is_given_blocks_and_its_tokens_stay(variant: str) -> None:
    trained = small(variant)
    train(trained, 5)
    trained.eval()
    pixels = batch().image
    assert pixels is not None
    ids = trained.encode(pixels)
    tokenizer = VARIANTS[variant]["tokenizer"]
    assert isinstance(tokenizer, dict)
    grown = small(variant, tokenizer=tokenizer | {"refinement": 2}, fixed_tokens=True)
    _adopt(grown, trained, "trained")
    grown.eval()
    assert torch.equal(grown.encode(pixels), ids)
    assert torch.equal(grown.decode(ids), trained.decode(ids)), "added blocks change nothing at first"
    train(grown, 5)
    grown.eval()
    assert torch.equal(grown.encode(pixels), ids)
    assert not torch.equal(grown.decode(ids), trained.decode(ids))
    own, before = grown.state_dict(), trained.state_dict()
    moved = {name for name in before if not torch.equal(own[name], before[name])}
    assert moved
    assert all(name.startswith("tokenizer.decoder.") for name in moved)
    grown.zero_grad()
    grown.loss(batch(), 0).total.backward()
    without = {n for n, p in grown.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert not without
    with pytest.raises(ConfigError, match="another network"):
        _adopt(small(variant), grown, "grown")
