"""Texts in which media stand: vectors of words and of media in one sequence, and which word follows which medium.

Papers: Frozen https://arxiv.org/abs/2106.13884 (a medium is a prefix of vectors among the words), Flamingo
https://arxiv.org/abs/2204.14198 (a medium is one place among the words, which attend to the one before them).

Shapes: B texts of T positions, M media in the order of rows, then of positions, with at most N vectors each, D width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mm.errors import UserError
from mm.nn.masks import Mask
from mm.types import MEDIUM, TextBatch

NOTHING = -100
"""In place of a word where none is predicted."""


class Spread(NamedTuple):
    """Texts in which each vector of a medium has a position of its own.

    Attributes:
        text: Ids, `MEDIUM` at every vector of a medium; what is behind a text means nothing.
        vectors: Of words and media, ``(B, T', D)``, zero behind a text.
    """

    text: TextBatch
    vectors: Tensor


def stands(text: TextBatch) -> Bool[Tensor, "b t"]:
    """Where media stand."""
    return (text.ids == MEDIUM) & text.valid()


def words_of(text: TextBatch) -> Bool[Tensor, "b t"]:
    """Where words stand; they keep their order when media are spread."""
    return (text.ids != MEDIUM) & text.valid()


def spread(
    text: TextBatch,
    embed: Callable[[Int64[Tensor, "b t"]], Float[Tensor, "b t d"]],
    media: Float[Tensor, "m n d"],
    lengths: Int64[Tensor, " m"] | None = None,
) -> Spread:
    """Put the vectors of each medium where it stands among the words.

    Args:
        text: Ids, `MEDIUM` where a medium stands.
        embed: Ids to the vectors of words.
        media: Vectors of all media.
        lengths: How many of its vectors each medium has; default: all.

    Raises:
        UserError: There are more or fewer media than places for them.
    """
    places = stands(text)
    check_media(places, len(media))
    if lengths is None:
        lengths = torch.full((len(media),), media.shape[1], device=media.device)
    spans = text.valid().long().masked_scatter(places, lengths)
    ends = spans.cumsum(1)
    starts, total = ends - spans, ends[:, -1]
    longest = int(total.max())
    words, (word_rows, word_columns) = embed(text.ids.clamp(min=0)), (text.valid() & ~places).nonzero(as_tuple=True)
    medium_rows, medium_columns = places.nonzero(as_tuple=True)
    offsets = torch.arange(media.shape[1], device=media.device)
    real = offsets < lengths[:, None]
    columns = (starts[medium_rows, medium_columns][:, None] + offsets)[real]
    rows = medium_rows[:, None].expand_as(real)[real]
    vectors = words.new_zeros(len(text), longest, words.shape[2])
    vectors[word_rows, starts[word_rows, word_columns]] = words[word_rows, word_columns]
    vectors[rows, columns] = media[real].to(vectors.dtype)
    ids = text.ids.new_zeros(len(text), longest)
    ids[word_rows, starts[word_rows, word_columns]] = text.ids[word_rows, word_columns]
    ids[rows, columns] = MEDIUM
    return Spread(TextBatch(ids, total), vectors)


def check_media(places: Bool[Tensor, "b t"], num_media: int) -> None:
    """Raises `UserError` where there are more or fewer media than places for them."""
    count = int(places.sum())
    if count != num_media:
        raise UserError(f"interleaved text: {num_media} pictures for {count} places; give one for each place, in their order")


def following(text: TextBatch) -> Int64[Tensor, "b s"]:
    """The word that follows each position but the last, ``S = T - 1``, or `NOTHING`: media, padding and what stands before the
    first medium of a text are not predicted."""
    places = stands(text)
    behind = places.cumsum(1)[:, :-1] > 0
    predicted = behind & text.valid()[:, 1:] & ~places[:, 1:]
    return text.ids[:, 1:].masked_fill(~predicted, NOTHING)


def behind_last_medium(text: TextBatch) -> Bool[Tensor, "b s"]:
    """Which of the words of `following` come behind the last medium of their text."""
    count = stands(text).cumsum(1)
    return count[:, 1:] == count[:, -1:]


def by_text(media: Float[Tensor, "m n d"], places: Bool[Tensor, "b t"]) -> Float[Tensor, "b s d"]:
    """The vectors of all media of each text in a row, filled up with zeros to those of the text with most, at least one."""
    counts = places.sum(1)
    most = max(1, int(counts.max()))
    real = torch.arange(most, device=media.device) < counts[:, None]
    rows = media.new_zeros(len(places), most, *media.shape[1:])
    rows[real] = media
    return rows.flatten(1, 2)


def preceding_medium(places: Bool[Tensor, "b t"], num_vectors: int, length: int) -> Mask:
    """Each position sees the vectors of the last medium at or before it, and none where there is no such medium.

    Args:
        places: Where media stand.
        num_vectors: N of each medium.
        length: Of what is seen, as `by_text` gives it.
    """
    current = places.cumsum(1) - 1
    owner = torch.arange(length, device=places.device) // num_vectors
    allowed = (owner == current[..., None])[:, None]
    empty = ~allowed.any(-1, keepdim=True)
    return Mask(allowed | empty, empty)


def last_row(mask: Mask, lengths: Int64[Tensor, " b"]) -> Mask:
    """Of a mask ``(B, 1, T, S)`` what the last position of each text sees."""
    rows = torch.arange(len(lengths), device=lengths.device)
    assert mask.allowed is not None
    assert mask.empty is not None
    allowed, empty = (part[rows, :, lengths - 1][:, :, None] for part in (mask.allowed, mask.empty))
    return Mask(allowed, empty)


def in_front(image_count: int, text: TextBatch) -> TextBatch:
    """Texts, one for each of so many pictures, with a place for the picture in front."""
    assert len(text) == image_count, f"{image_count} pictures and {len(text)} texts"
    return TextBatch(F.pad(text.ids, (1, 0), value=MEDIUM), text.lengths + 1)
