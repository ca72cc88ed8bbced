"""Grounding: where in a picture the words of a text are, by Grad-CAM on the cross-attention.

Source: Grad-CAM https://arxiv.org/abs/1610.02391, on the attention of words to picture tokens as in ALBEF
https://arxiv.org/abs/2107.07651.

Shapes: B batch, T words or pieces of words, h and w rows and columns of the picture tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mm.errors import UserError
from mm.types import Encoded

BEST_PART = 0.25
"""Part of the picture whose share of the heat tells how narrow the heat is."""


class Judges(Protocol):
    """Logits ``(B,)`` of pictures and texts, both encoded, belonging together.

    ``maps`` receives the attention weights of each layer, part of the graph, among them "cross_attention" ``(B, H, T, N)``,
    as `mm.fusion.cross_attention.CrossAttention` gives them.
    """

    def __call__(self, image: Encoded, text: Encoded, /, *, maps: list[dict[str, Tensor]]) -> Tensor: ...


def word_heat(judge: Judges, image: Encoded, text: Encoded, layers: Sequence[int]) -> Float[Tensor, "b t h w"]:
    """How much the attention of each piece of a word to each place of a picture speaks for the two belonging together.

    It is the attention times its gradient where that is positive, averaged over heads and layers: about what the logit would
    lose without it. Row i depends on row i of both sides alone. Weights get no gradients, and modes stay as they are.

    Args:
        judge: The part of the computation behind both encoders.
        image: Picture tokens ``(B, N, C)``. ``extras["grid"]`` are their rows and columns, ``extras["prefix"]`` the number of
            tokens before them that stand for no place (class tokens, registers).
        text: Words ``(B, T, D)``.
        layers: Which to average over, counted from 0. One whose words the logit does not look at afterwards gives no heat.

    Returns:
        Heat, not negative, fp32; zero where a text is padding.

    Raises:
        UserError: The picture tokens are no grid.
    """
    grid, prefix = image.extras.get("grid"), image.extras.get("prefix", 0)
    if grid is None:
        raise UserError("grounding needs picture tokens in a grid; take a picture encoder that gives one token a place")
    maps: list[dict[str, Tensor]] = []
    with torch.enable_grad():
        words = replace(text, tokens=text.tokens.detach().requires_grad_())  # so there are gradients with frozen weights, too
        logits = judge(replace(image, tokens=image.tokens.detach()), words, maps=maps)
        attention = [maps[layer]["cross_attention"] for layer in layers]
        gradients = torch.autograd.grad(logits.sum(), attention)
    parts = [weights.detach().float() * slope.float().clamp(min=0) for weights, slope in zip(attention, gradients, strict=True)]
    heat = torch.stack(parts).mean((0, 2))  # over layers and heads
    return heat[..., prefix:].unflatten(-1, tuple(grid))


@dataclass(frozen=True)
class Grounding:
    """Where the words of a text are in a picture.

    Args:
        text: As the model reads it.
        words: Those that are shown, in their order.
        heat: Of each of them, ``(T, h, w)``, not negative: the mean over its pieces, see `word_heat`.
        shares: Of each of them in the heat of all words of the text.
        whole: Heat of the text, the mean over all its words, ``(h, w)``.
        match: How likely picture and text belong together, in 0..1. Of a text that does not fit, the heat tells little.
    """

    text: str
    words: tuple[str, ...]
    heat: Tensor
    shares: tuple[float, ...]
    whole: Tensor
    match: float

    def only(self, words: Sequence[str]) -> "Grounding":
        """Some of the words, each as often as the text has it. Raises `UserError` for one that the text does not have."""
        own, wanted = [word.casefold() for word in self.words], [word.casefold() for word in words]
        missing = [word for word in wanted if word not in own]
        if missing:
            raise UserError(f"'{missing[0]}' is no word of the text; its words are {', '.join(self.words)}")
        rows = [row for row, word in enumerate(own) if word in wanted]
        chosen = tuple(self.words[row] for row in rows)
        return replace(self, words=chosen, heat=self.heat[rows], shares=tuple(self.shares[row] for row in rows))


def ground_words(
    text: str, words: Sequence[tuple[str, Sequence[int]]], pieces: Float[Tensor, "t h w"], match: float
) -> Grounding:
    """Merge the heat of pieces into that of words.

    Args:
        text: As the model reads it.
        words: Each with the positions of its pieces, at least one word with at least one piece each.
        pieces: Their heat.
        match: See `Grounding`.
    """
    heat = torch.stack([pieces[list(places)].mean(0) for _, places in words])
    sums = heat.sum((1, 2))
    shares = sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
    return Grounding(text, tuple(word for word, _ in words), heat, tuple(shares.tolist()), heat.mean(0), match)


def centre(heat: Float[Tensor, "h w"]) -> tuple[float, float] | None:
    """Centre of gravity ``(x, y)`` in 0..1 from the upper left corner of the picture; None where there is no heat."""
    total = float(heat.sum())
    if not total:
        return None
    rows, columns = ((torch.arange(count) + 0.5) / count for count in heat.shape)
    return float(heat.sum(0) @ columns) / total, float(heat.sum(1) @ rows) / total


def focus(heat: Float[Tensor, "h w"]) -> float | None:
    """Share of the heat in the hottest quarter of the picture: 0.25 where it is even, up to 1; None where there is no heat."""
    total = float(heat.sum())
    if not total:
        return None
    falling = heat.flatten().sort(descending=True).values
    room = BEST_PART * len(falling)
    taken = (room - torch.arange(len(falling))).clamp(0, 1)  # of the last place only the part that fits
    return float(falling @ taken) / total
