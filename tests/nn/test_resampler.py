"""The resampler's attention is over the tokens and the latents themselves; what is masked changes nothing."""

import torch
import torch.nn.functional as F

from mm.nn.resampler import Resampler
from mm.types import Encoded


def resampler() -> Resampler:
    torch.manual_seed(0)
    made = Resampler(6, 8, num_latents=3, num_layers=2, num_heads=2)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def media(lengths: list[int]) -> Encoded:
    tokens = torch.randn(len(lengths), 5, 6)
    return Encoded(tokens, torch.arange(5) < torch.tensor(lengths)[:, None], tokens[:, 0])


def test_it_equals_the_paper_written_out() -> None:
    made, seen = resampler(), media([5, 3])
    found = made(seen)
    for row, length in enumerate([5, 3]):
        x, latents = made.project(seen.tokens[row, :length]), made.latents
        for layer in made.layers:
            own, tokens = layer.latent_norm(latents), layer.token_norm(x)
            sources = torch.cat([tokens, own])
            heads = lambda v: v.view(len(v), 2, 4).transpose(0, 1)  # noqa: E731
            key, value = layer.attention.key_value(sources).chunk(2, -1)
            weights = (heads(layer.attention.query(own)) @ heads(key).mT / 2).softmax(-1)
            latents = latents + layer.attention.output((weights @ heads(value)).transpose(0, 1).flatten(1))
            hidden = F.gelu(layer.feed_forward.input(layer.norm(latents)))
            latents = latents + layer.feed_forward.output(hidden)
        torch.testing.assert_close(found[row], made.norm(latents), atol=1e-5, rtol=1e-4)


def test_gradients_reach_every_parameter() -> None:
    made = resampler()
    made(media([5, 3])).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())
