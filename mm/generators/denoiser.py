"""What networks that denoise have in common, whatever they are made of.

Shapes: B samples, C channels, K channels beside them, h and w their grid, T words, D width of a word, E width of a condition
vector.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mm.nn.freeze import folded_weights
from mm.nn.stacked import stacked

LENGTH_MULTIPLE = 32
"""Compiled networks see numbers of words that are multiples of it, where some rows have fewer than others."""


@dataclass(frozen=True)
class Condition:
    """What a network is told beside the noisy sample.

    Args:
        words: Features of the prompt's words, ``(B, T, D)``.
        known: Which of them are there, ``(B, T)``.
        vector: One vector for the whole prompt, or for a picture in its place, ``(B, E)``; None for networks without.
        prepared: What a network made of the words once for all steps, by `Denoiser.prepare`.
        beside: Channels that the network sees beside the sample's, such as a smaller picture brought to its size.
    """

    words: Float[Tensor, "b t d"]
    known: Bool[Tensor, "b t"]
    vector: Float[Tensor, "b e"] | None = None
    prepared: Any = None
    beside: Float[Tensor, "b k h w"] | None = None

    def __getitem__(self, rows: slice) -> "Condition":
        """Some samples; of what is prepared, too."""
        vector = None if self.vector is None else self.vector[rows]
        beside = None if self.beside is None else self.beside[rows]
        return Condition(self.words[rows], self.known[rows], vector, _rows(self.prepared, rows), beside)


def joined(first: Condition, second: Condition) -> Condition:
    """Both one after the other; neither may be prepared."""
    assert first.prepared is None
    assert second.prepared is None
    vector = None if first.vector is None or second.vector is None else torch.cat([first.vector, second.vector])
    beside = None if first.beside is None or second.beside is None else torch.cat([first.beside, second.beside])
    return Condition(stacked(first.words, second.words), stacked(first.known, second.known), vector, beside=beside)


def seen(x: Float[Tensor, "b c h w"], condition: Condition) -> Float[Tensor, "b c+k h w"]:
    """The sample's channels and those beside it."""
    return x if condition.beside is None else torch.cat([x, condition.beside.to(x.dtype)], 1)


def without_words(condition: Condition, no_words: Float[Tensor, " d"], dropped: Bool[Tensor, " b"] | None = None) -> Condition:
    """In the rows that are dropped, all if None, one vector, which is learned, takes the place of the words."""
    known = condition.known
    dropped = torch.ones_like(known[:, 0]) if dropped is None else dropped
    first = torch.zeros_like(known)
    first[:, 0] = True
    words = torch.where(dropped[:, None, None], no_words.to(condition.words.dtype), condition.words)
    return replace(condition, words=words, known=torch.where(dropped[:, None], first, known))


def without_vector(condition: Condition, dropped: Bool[Tensor, " b"] | None = None) -> Condition:
    """In the rows that are dropped, all if None, zeros take the place of the vector."""
    if condition.vector is None:
        return condition
    dropped = torch.ones_like(condition.known[:, 0]) if dropped is None else dropped
    return replace(condition, vector=condition.vector.masked_fill(dropped[:, None], 0.0))


def repeated(condition: Condition, times: int) -> Condition:
    """All samples so many times, one round after the other; not prepared."""
    assert condition.prepared is None
    vector = None if condition.vector is None else condition.vector.repeat(times, 1)
    return Condition(condition.words.repeat(times, 1, 1), condition.known.repeat(times, 1), vector)


class Denoiser(Protocol):
    """A network that answers noisy samples."""

    def __call__(self, x: Float[Tensor, "b c h w"], time: Tensor, condition: Condition) -> Float[Tensor, "b c h w"]:
        """What it predicts, see `mm.losses.diffusion`.

        Args:
            x: Noisy samples.
            time: Moments as networks read them, ``(B,)`` or ``()``.
            condition: What it is told.
        """
        ...

    def prepare(self, condition: Condition) -> Condition:
        """The same condition with what every step would compute of it again."""
        ...


class Compiled:
    """A network that denoises, compiled by torch.compile, once for each number of rows and of words. Keep it for later calls.

    Args:
        network: Its weights must not change any more: on CPUs they become part of what is compiled, in the layout that suits
            it.
    """

    def __init__(self, network: Denoiser) -> None:
        self._network = network
        self._compiled = torch.compile(network, dynamic=False)

    def __call__(self, x: Float[Tensor, "b c h w"], time: Tensor, condition: Condition) -> Float[Tensor, "b c h w"]:
        """See `Denoiser`; the condition must be prepared."""
        with folded_weights(x.device):
            return self._compiled(x, time, condition)

    def prepare(self, condition: Condition) -> Condition:
        """See `Denoiser`; the words are filled up to one of a few numbers of them, unless none of any row is missing."""
        missing = 0 if bool(condition.known.all()) else -condition.words.shape[1] % LENGTH_MULTIPLE
        words, known = F.pad(condition.words, [0, 0, 0, missing]), F.pad(condition.known, [0, missing])
        return self._network.prepare(replace(condition, words=words, known=known))


def without_padding(condition: Condition) -> Condition:
    """The same words without positions that hold none of any row."""
    longest = max(1, int(condition.known.sum(1).max()))
    return replace(condition, words=condition.words[:, :longest], known=condition.known[:, :longest])


def _rows(prepared: Any, rows: slice) -> Any:
    """Some rows of tensors in tuples."""
    if isinstance(prepared, tuple):
        return tuple(_rows(part, rows) for part in prepared)
    return prepared if prepared is None else prepared[rows]
