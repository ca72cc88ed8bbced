"""Choosing from logits: guidance, temperature, top-k, top-p, and noise that belongs to a sample, not to its batch.

A sample's noise is drawn on the CPU in fp32 from its own generator, so that its tokens depend neither on the batch nor on the
device. Drawing is by the Gumbel-max trick: the likeliest token after noise. Between batch sizes logits differ in their last
bits, which changes a choice only where two perturbed logits are that close; an inverse distribution function would add up such
differences over the vocabulary.

Shapes: B samples, V vocabulary.
Sources: https://arxiv.org/abs/2207.12598 (guidance), https://arxiv.org/abs/1805.04833 (top-k), https://arxiv.org/abs/1904.09751
(top-p), https://arxiv.org/abs/1411.0030 (Gumbel-max).
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mm.errors import UserError
from mm.types import Sampling

SMALLEST = torch.finfo(torch.float32).tiny


def check_sampling(sampling: Sampling) -> None:
    """Raises `UserError` for a setting that means nothing."""
    low, high = sampling.guidance_interval
    if not (math.isfinite(sampling.guidance) and sampling.guidance >= 0):
        raise UserError(f"guidance is {sampling.guidance}; take 1 for none, or more to follow the prompt more closely")
    if not 0 <= low <= high <= 1:
        raise UserError(f"guidance_interval is {low} to {high}; give two shares of the progress, 0 to 1, the smaller first")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise UserError(f"temperature is {sampling.temperature}; take 0 for the likeliest token, or more")
    if sampling.top_k < 0:
        raise UserError(f"top_k is {sampling.top_k}; take 0 for all tokens, or the number of the likeliest")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p is {sampling.top_p}; take a probability above 0, or 1 for all tokens")
    if sampling.steps < 1:
        raise UserError(f"steps is {sampling.steps}; take at least 1")


def guided_range(sampling: Sampling, count: int) -> range:
    """Of ``count`` choices in a row, evenly spread over the progress from 0 to 1, those with guidance; none at scale 1.

    Raises:
        UserError: The interval falls between two choices.
    """
    low, high = sampling.guidance_interval
    inside = [i for i in range(count) if low <= i / max(1, count - 1) <= high]
    if sampling.guidance == 1:
        return range(0)
    if not inside:
        raise UserError(f"guidance_interval {low} to {high} holds none of the {count} choices; widen it, or take guidance 1")
    return range(inside[0], inside[-1] + 1)


def sample_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One source of noise a sample, on the CPU."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def gumbel_noise(
    generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "b ..."]:
    """Standard Gumbel noise ``(B, *shape)`` in fp32, the row of a sample from its own generator."""
    uniform = torch.empty(len(generators), *shape)
    for row, generator in zip(uniform, generators, strict=True):
        row.uniform_(generator=generator)
    return uniform.clamp_(min=SMALLEST).log_().neg_().log_().neg_().to(device)


def guided(conditional: Float[Tensor, "*b v"], unconditional: Float[Tensor, "*b v"], scale: float) -> Float[Tensor, "*b v"]:
    """Classifier-free guidance of logits: scale 1 is the conditional alone, 0 the unconditional, above 1 exaggerates."""
    return torch.lerp(unconditional, conditional, scale)


def keep_top_k(logits: Float[Tensor, "*b v"], k: int) -> Float[Tensor, "*b v"]:
    """Minus infinity for all but the ``k`` largest logits and what equals the smallest of them; 0 keeps all."""
    if not 0 < k < logits.shape[-1]:
        return logits
    smallest = logits.topk(k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Float[Tensor, "*b v"], p: float) -> Float[Tensor, "*b v"]:
    """Minus infinity for all but the fewest likeliest tokens whose probabilities add up to ``p``, and what equals their last.

    The likeliest token is kept for every ``p`` in 0..1; 1 keeps all.
    """
    if p >= 1:
        return logits
    ordered = logits.sort(dim=-1, descending=True).values
    probabilities = ordered.softmax(-1)
    likelier = probabilities.cumsum(-1) - probabilities  # probability of all that come before
    last = (likelier < p).sum(-1, keepdim=True).clamp(min=1) - 1
    return logits.masked_fill(logits < ordered.gather(-1, last), -torch.inf)


def restricted(
    logits: Float[Tensor, "*b v"], *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "*b v"]:
    """Logits that may be drawn from: divided by the temperature (above 0), then `keep_top_k`, then `keep_top_p`."""
    return keep_top_p(keep_top_k(logits / temperature, top_k), top_p)


def draw(
    logits: Float[Tensor, "b *n v"],
    generators: Sequence[torch.Generator],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Tensor, "b *n"]:
    """Ids drawn from ``softmax(logits / temperature)`` among those that `restricted` leaves.

    Args:
        logits: One row, or N rows, a sample.
        generators: One a sample; equally many numbers are taken from each. Untouched at temperature 0.
        temperature: 0 takes the largest logit, at equality the first.
        top_k: See `keep_top_k`.
        top_p: See `keep_top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    noise = gumbel_noise(generators, logits.shape[1:], logits.device)
    return (restricted(logits.float(), temperature=temperature, top_k=top_k, top_p=top_p) + noise).argmax(-1)
