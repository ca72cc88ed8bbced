"""Parallel decoding: all hidden tokens are predicted at once, the surest stay, and the rest are predicted again.

Papers: MaskGIT https://arxiv.org/abs/2202.04200 (schedule and confidence), Muse https://arxiv.org/abs/2301.00704 (guidance that
grows with the progress).

Shapes: B pictures, N tokens of a picture, R rows of a prediction, V tokens of the vocabulary.
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.generators.sampling import check_sampling, draw, guided, guided_range, gumbel_noise, sample_generators
from mm.types import Sampling

Predict = Callable[[Int64[Tensor, "r n"]], Float[Tensor, "r n v"]]
"""Ids, with the mask id where a token is hidden, to the logits of all tokens. R is B in steps without guidance; with it R
is 2 B, the first B rows conditional and the last B, of the same ids, unconditional."""

OnTokens = Callable[[Int64[Tensor, "b n"], Bool[Tensor, "b n"], float], None]
"""Called after each step with a complete guess at the ids, True where it will be drawn again, and the progress in 0..1."""

CHOICE_TEMPERATURE = 4.5
"""Of the noise on the confidence, as in MaskGIT's published code."""


@torch.no_grad()
def generate(
    predict: Predict,
    ids: Int64[Tensor, "b n"],
    seeds: Sequence[int],
    sampling: Sampling,
    *,
    mask_id: int,
    choice_temperature: float = CHOICE_TEMPERATURE,
    on_tokens: OnTokens | None = None,
) -> Int64[Tensor, "b n"]:
    """Draw all tokens that are hidden.

    Each step draws every hidden token from its prediction; its confidence is the log-probability of what was drawn (of the
    guided logits, before temperature, top-k and top-p) plus Gumbel noise that fades to 0 with the last step. The least sure
    ones are hidden again, as many as `hidden_counts` says. The noise of a picture depends on its seed alone, not on the batch.

    Args:
        predict: Logits of all tokens, of the vocabulary without the mask id.
        ids: Known tokens, which never change, and ``mask_id`` where a token is to be drawn; not changed in place.
        seeds: One a picture.
        sampling: ``steps``, ``temperature``, ``top_k``, ``top_p``, ``guidance``, its interval and its ramp; step i of S has
            progress ``i / (S - 1)``.
        mask_id: Stands for a hidden token; not below V.
        choice_temperature: Scale of the noise on the confidence at the start; 0 always keeps the surest.
        on_tokens: See `OnTokens`.

    Returns:
        The ids without any ``mask_id``.

    Raises:
        UserError: `check_sampling`, or another number of seeds than of pictures.
    """
    check_sampling(sampling)
    if len(seeds) != len(ids):
        raise UserError(f"{len(seeds)} seeds for {len(ids)} pictures; give one each")
    hidden, active = ids == mask_id, guided_range(sampling, sampling.steps)
    if not hidden.any():
        return ids.clone()
    counts = torch.tensor([hidden_counts(number, sampling.steps) for number in hidden.sum(1).tolist()]).to(ids.device)
    generators = sample_generators(seeds)
    for step in range(sampling.steps):
        progress = (step + 1) / sampling.steps
        logits = _logits(predict, ids, _scale(sampling, step) if step in active else 1.0)
        assert logits.shape[-1] <= mask_id, "the mask id must not be drawn"
        drawn = draw(logits, generators, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        guess = torch.where(hidden, drawn, ids)
        sure = logits.log_softmax(-1).gather(-1, drawn[..., None]).squeeze(-1)
        sure += choice_temperature * (1 - progress) * gumbel_noise(generators, sure.shape[1:], sure.device)
        sure.masked_fill_(~hidden, torch.inf)
        hidden = sure.argsort(dim=1, stable=True).argsort(dim=1) < counts[:, step, None]
        ids = guess.masked_fill(hidden, mask_id)
        if on_tokens:
            on_tokens(guess.clone(), hidden.clone(), progress)
    return ids


def hidden_counts(number: int, steps: int) -> list[int]:
    """Of ``number`` tokens that are hidden at the start, how many still are after each step; after the last one none.

    After the share r of the steps it is ``number cos(pi r / 2)`` rounded down, but at least 1, so that no step has nothing to
    do, and fewer than before, so that each step decides something, unless only one is left.
    """
    counts = [number]
    for step in range(1, steps):
        wanted = math.floor(number * math.cos(math.pi / 2 * step / steps))
        counts.append(min(counts[-1], max(1, min(counts[-1] - 1, wanted))))
    return [*counts[1:], 0]


def _scale(sampling: Sampling, step: int) -> float:
    """The guidance scale of a step within the interval."""
    ramp = step / max(1, sampling.steps - 1) if sampling.guidance_ramp else 1.0
    return 1 + (sampling.guidance - 1) * ramp


def _logits(predict: Predict, ids: Tensor, scale: float) -> Tensor:
    """fp32 logits ``(B, N, V)``; the unconditional half is computed only where it counts."""
    if scale == 1:
        return predict(ids.clone()).float()
    conditional, unconditional = predict(torch.cat([ids, ids])).float().chunk(2)
    return guided(conditional, unconditional, scale)
