"""From the log-probabilities of a CTC network to tokens: the likeliest path, or the likeliest tokens over all their paths.

A path has a token or the blank at each frame; its tokens are what is left when repetitions are merged, then blanks left out.

Source: prefix beam search, https://arxiv.org/abs/1408.2873, without a language model.

Shapes: N frames, V tokens.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Tokens = tuple[int, ...]
Prefixes = dict[Tokens, tuple[float, float]]
"""Log-probability of all paths with these tokens that end in a blank, and of those that end in the last token."""

PART_FRAMES = 1_000
"""20 seconds at 50 frames a second."""


def best_path(shares: Float[Tensor, "n v"], blank: int) -> Tokens:
    """Tokens of the likeliest path."""
    path = torch.unique_consecutive(shares.argmax(-1)).tolist()
    return tuple(token for token in path if token != blank)


def prefix_search(shares: Float[Tensor, "n v"], beams: int, blank: int) -> list[tuple[Tokens, float]]:
    """The likeliest tokens, best first, each with its log-likelihood over all paths that the search has followed.

    It is exact where ``beams`` is at least the number of all sequences of tokens that ``n`` frames can hold.

    Args:
        shares: Log-probabilities.
        beams: Sequences that are kept from frame to frame.
        blank: Id of the blank.
    """
    kept: Prefixes = {(): (0.0, -math.inf)}
    for frame in shares.tolist():
        grown: Prefixes = {}
        for tokens, (rested, spoken) in kept.items():
            either = _sum(rested, spoken)
            _add(grown, tokens, rested=either + frame[blank])
            if tokens:
                _add(grown, tokens, spoken=spoken + frame[tokens[-1]])
            for token, share in enumerate(frame):
                before = rested if tokens and token == tokens[-1] else either  # a repetition needs a blank between
                if token != blank and before > -math.inf:
                    _add(grown, (*tokens, token), spoken=before + share)
        kept = dict(sorted(grown.items(), key=lambda item: -_sum(*item[1]))[:beams])
    return [(tokens, _sum(*ends)) for tokens, ends in kept.items()]


def at_rests(shares: Float[Tensor, "n v"], blank: int, longest: int = PART_FRAMES) -> list[Float[Tensor, "m v"]]:
    """Frames in parts of at most ``longest``, cut where the blank is likeliest in the second half of what may be a part.

    A frame that is surely blank parts what is before it from what is behind, so a search over each part finds what one over all
    would, in a time that grows with the number of frames instead of its square.
    """
    parts = []
    while len(shares) > longest:
        half = longest // 2
        end = half + int(shares[half:longest, blank].argmax()) + 1
        parts.append(shares[:end])
        shares = shares[end:]
    return [*parts, shares]


def _add(grown: Prefixes, tokens: Tokens, *, rested: float = -math.inf, spoken: float = -math.inf) -> None:
    before = grown.get(tokens, (-math.inf, -math.inf))
    grown[tokens] = (_sum(before[0], rested), _sum(before[1], spoken))


def _sum(a: float, b: float) -> float:
    """Of two probabilities by their logarithms."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
