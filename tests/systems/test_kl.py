"""The autoencoder: it learns, its losses are what they say, its latents are standard, and generators work in them."""

import math
from typing import Any

import pytest
import torch

from mm.config import validate
from mm.systems.flow import FlowConfig
from mm.systems.flow import build as build_flow
from mm.systems.kl import Kl, KlConfig, build
from mm.types import Batch, Compresses, Losses, Sampling, TextBatch, Tokenizes, capabilities

SMALL = {"image_size": 16, "patch": 2, "widths": [8, 16], "num_blocks": 2, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"autoencoder": SMALL, "reconstruction": "psnr"},
    "adversarial": {"autoencoder": SMALL, "adversarial_weight": 0.5, "discriminator_width": 8},
}


def small(variant: str = "plain", **options: Any) -> Kl:
    torch.manual_seed(0)
    return build(validate(KlConfig, VARIANTS[variant] | options, "test"))


def batch(size: int = 4, seed: int = 1) -> Batch:
    coarse = torch.rand(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return Batch(tuple(map(str, range(size))), (torch.nn.functional.interpolate(coarse, 16) * 255).to(torch.uint8))


def train(system: Kl, steps: int) -> list[Losses]:
    optimizer, found = torch.optim.Adam(system.parameter_groups(), lr=3e-3), []
    for step in range(steps):
        optimizer.zero_grad()
        found.append(system.train().loss(batch(), step))
        found[-1].total.backward()
        optimizer.step()
        system.after_step(step)
    return found


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns_and_pictures_come_back(variant: str) -> None:
    system = small(variant)
    found = train(system, 100)
    system.zero_grad()
    system.loss(batch(), 3).total.backward()
    without = {n for n, p in system.named_parameters() if p.grad is None or not p.grad.any()}
    assert without <= {"discriminator.layers.8.bias"}, "see test_vq"
    assert float(found[-1].parts["psnr"]) > float(found[0].parts["psnr"]) + 3


def test_the_divergence_is_that_of_normal_distributions() -> None:
    from torch.distributions import Normal, kl_divergence

    system, data = small(kl_weight=0.5, reconstruction="l2"), batch()
    train(system, 5)
    assert data.image is not None
    torch.manual_seed(0)
    losses = system.loss(data, 0)
    mean, log_variance = system.autoencoder.posterior(system.autoencoder.normalise(data.image))
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum() / 4
    torch.testing.assert_close(losses.parts["divergence"], expected)
    summed = losses.parts["reconstruction"] * 3 * 16 * 16 + 0.5 * expected
    torch.testing.assert_close(losses.total, summed / (3 * 16 * 16), msg="both sums over the number of pixels and channels")


def test_extreme_variances_stay_finite() -> None:
    system, data = small(), batch()
    last = [module for module in system.autoencoder.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    for value in (-1e4, 1e4):
        torch.nn.init.constant_(last.bias, value)
        assert torch.isfinite(system.loss(data, 0).parts["divergence"])


def test_shift_and_scale_are_those_of_the_last_batches() -> None:
    system = small(statistics_decay=0.9).train()
    images = [batch(3, seed).image for seed in range(4)]
    for number, image in enumerate(images):
        for part in (image[:1], image[1:]):  # slices of one step count together
            system.loss(Batch(("a",), part), number)
        system.after_step(number)
    coder = system.autoencoder
    cells = torch.stack([coder.posterior(coder.normalise(image))[0].transpose(0, 1).flatten(1) for image in images])
    rates = [10 / (10 + n) for n in range(4)]
    weights = torch.tensor([rate * math.prod(1 - later for later in rates[n + 1 :]) for n, rate in enumerate(rates)])
    assert float(weights.sum()) == pytest.approx(1)
    shares = (weights / cells.shape[-1])[:, None, None]
    mean = (shares * cells).sum((0, 2))
    torch.testing.assert_close(coder.mean, mean)
    torch.testing.assert_close(coder.variance, (shares * (cells - mean[:, None]).square()).sum((0, 2)))
    latents = system.eval().to_latents(images[3])
    before = coder.posterior(coder.normalise(images[3]))[0]
    torch.testing.assert_close(latents, (before - mean[:, None, None]) / coder.variance.sqrt()[:, None, None])

    with torch.no_grad():
        system.loss(batch(), 9)
    system.train(False).loss(batch(), 9)
    before = coder.mean.clone()
    system.after_step(9)
    assert torch.equal(coder.mean, before), "what is not training counts for nothing"
    white = torch.full((3, 3, 16, 16), 255, dtype=torch.uint8)
    for step in range(200):
        system.train().loss(Batch(("a",), white), step)
        system.after_step(step)
    only = coder.posterior(coder.normalise(white))[0].transpose(0, 1).flatten(1)
    torch.testing.assert_close(coder.mean, only.mean(1), rtol=1e-3, atol=1e-4)


def test_latents_are_read_back_whatever_shift_and_scale_are() -> None:
    system, data = small(), batch()
    train(system, 10)
    system.eval()
    assert isinstance(system, Compresses)
    assert not isinstance(system, Tokenizes)
    assert system.latent_shape == (4, 4, 4)
    before = system.from_latents(system.to_latents(data.image))
    system.autoencoder.mean += 3
    system.autoencoder.variance *= 7
    assert (system.from_latents(system.to_latents(data.image)).int() - before.int()).abs().max() <= 1
    assert before.dtype == torch.uint8
    alone = system.to_latents(data.image[2:3])
    torch.testing.assert_close(alone, system.to_latents(data.image)[2:3], rtol=1e-4, atol=1e-5)
    again = small()
    again.load_state_dict(system.state_dict())
    assert torch.equal(again.eval().to_latents(data.image), system.to_latents(data.image)), "statistics are saved"


def test_a_generator_on_top_trains_and_paints() -> None:
    trained = small()
    train(trained, 5)
    trained.zero_grad()
    settings = {
        "latents": trained.config.model_dump(),
        "text": {"width": 16, "layers": 1, "heads": 2, "context_length": 6, "vocab_size": 20},
        "denoiser": {"width": 16, "layers": 1, "heads": 2},
    }
    config = validate(FlowConfig, settings, "test")
    text, image = TextBatch(torch.ones(4, 5, dtype=torch.int64), torch.tensor([5, 3, 4, 2])), batch().image
    for parts in ({}, {"latents": trained}):
        flow = build_flow(config, parts).train()
        held = {name: tensor.clone() for name, tensor in flow.latents.state_dict().items()}
        flow.loss(Batch(tuple("abcd"), image, text), 0).total.backward()
        flow.after_step(0)
        assert all(parameter.grad is None for parameter in flow.latents.parameters())
        assert all(torch.equal(held[name], tensor) for name, tensor in flow.latents.state_dict().items())
        assert any(parameter.grad is not None and parameter.grad.any() for parameter in flow.denoiser.parameters())
        assert capabilities(flow) == {"paints"}
        assert flow.eval().paint(text, range(4), Sampling(steps=2)).shape == (4, 3, 16, 16)
