"""Masked language modelling: hide some words of a text and predict them from what is left.

Source: BERT https://arxiv.org/abs/1810.04805, section 3.1 (15 % of the tokens; of these 80 % hidden, 10 % replaced, 10 % kept).

Shapes: B batch, T positions, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mm.draws import Draws
from mm.losses.gather import Gather, average_count
from mm.types import TextBatch

MASK_RATE = 0.15
HIDDEN_SHARE, REPLACED_SHARE = 0.8, 0.1
"""Of the chosen tokens; the rest is kept, so that the network cannot rely on visible words being right."""


class MaskedTokens(NamedTuple):
    """Ids with some of them changed, the ids before, and True for the positions to be predicted."""

    ids: Int[Tensor, "b t"]
    targets: Int[Tensor, "b t"]
    chosen: Bool[Tensor, "b t"]


def mask_tokens(
    ids: Int[Tensor, "b t"],
    maskable: Bool[Tensor, "b t"],
    *,
    mask_id: int,
    vocab_size: int,
    rate: float = MASK_RATE,
    words: Int[Tensor, "b t"] | None = None,
    draws: Draws | None = None,
) -> MaskedTokens:
    """Choose tokens, at least one in every row that has a maskable one, and change them.

    Args:
        ids: Token ids; not changed.
        maskable: False for special tokens and padding, which are never chosen.
        mask_id: Stands for a hidden token.
        vocab_size: Replacements are drawn from the ids below.
        rate: Share of the tokens, or of the words, to choose.
        words: Number of the word of its row that a token is part of, in ``0..T-1``: whole words are chosen
            (https://arxiv.org/abs/2102.03334, section 3.3). None chooses tokens.
        draws: Random numbers; None draws from torch's generators.
    """
    draws = draws or Draws(None, len(ids), ids.device)
    length = ids.shape[1]
    order = draws.uniform(length)
    if words is not None:
        order = order.gather(1, words)
    order = order.masked_fill(~maskable, torch.inf)
    chosen = maskable & (order <= order.amin(1, keepdim=True).clamp(min=rate))
    kind = draws.uniform(length)
    changed = torch.where(kind < HIDDEN_SHARE, mask_id, draws.below(vocab_size, length))
    changed = torch.where(chosen & (kind < HIDDEN_SHARE + REPLACED_SHARE), changed, ids)
    return MaskedTokens(changed, ids, chosen)


def hide_words(
    text: TextBatch, vocab_size: int, *, rate: float = MASK_RATE, whole: bool = False, draws: Draws | None = None
) -> MaskedTokens:
    """`mask_tokens` of a batch of texts, its start and end left alone; the id behind the vocabulary stands for a hidden token.

    Args:
        text: With its words, where whole ones are hidden.
        vocab_size: V.
        rate: Share of the tokens, or of the words, to choose.
        whole: Choose words.
        draws: See `mask_tokens`.

    Raises:
        ValueError: Whole words of a text that comes without.
    """
    if whole and text.words is None:
        raise ValueError("whole words are to be hidden, but the batch does not say which tokens make a word")
    words = text.words if whole else None
    options = {"rate": rate, "words": words, "draws": draws}
    return mask_tokens(text.ids, text.inner(), mask_id=vocab_size, vocab_size=vocab_size, **options)


def masked_cross_entropy(
    features: Float[Tensor, "b t d"],
    masked: MaskedTokens,
    head: Callable[[Tensor], Tensor],
    *,
    teacher: Float[Tensor, "m v"] | None = None,
    alpha: float = 0.0,
    gather: Gather | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy of the chosen positions in nats, of all ranks together; 0 where there are none.

    With a teacher the target is ``alpha * softmax(teacher) + (1 - alpha) * one-hot`` (https://arxiv.org/abs/2107.07651,
    equation 7): several words may fit a gap.

    Args:
        features: Of the changed text.
        masked: From `mask_tokens`.
        head: Features ``(M, D)`` to logits ``(M, V)``; computed for the M chosen positions only.
        teacher: Logits of a momentum encoder for the same positions, in their order; no gradient passes through them.
        alpha: Share of the teacher, in 0..1.
        gather: Ranks whose gradients are averaged; None for this process alone.
    """
    logits, targets = head(features[masked.chosen]).float(), masked.targets[masked.chosen]
    total = F.cross_entropy(logits, targets, reduction="sum")
    if teacher is not None:
        soft = F.cross_entropy(logits, teacher.detach().float().softmax(-1), reduction="sum")
        total = (1 - alpha) * total + alpha * soft
    return total / average_count(len(targets), gather, total.device)
