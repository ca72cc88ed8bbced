"""Media among words: what is put where equals a loop over positions, and each word sees the picture before it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mm.errors import UserError
from mm.fusion.interleaving import (
    NOTHING,
    behind_last_medium,
    by_text,
    following,
    in_front,
    last_row,
    preceding_medium,
    spread,
    stands,
)
from mm.fusion.prefix import PooledPrefix, ResampledPrefix, TokenPrefix
from mm.nn.resampler import Resampler
from mm.types import MEDIUM, Encoded, Interleaved, TextBatch

WIDTH, VOCABULARY = 3, 20
rows_of_ids = st.lists(st.lists(st.sampled_from([MEDIUM, 3, 4, 5, 6]), min_size=1, max_size=7), min_size=1, max_size=4)


def text(rows: list[list[int]]) -> TextBatch:
    """Padded with what would do harm if it were read."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [MEDIUM] * (longest - len(row)) for row in rows])
    return TextBatch(ids, torch.tensor(list(map(len, rows))))


@settings(max_examples=60, deadline=None)
@given(rows_of_ids, st.integers(1, 3), st.randoms())
def test_spread_equals_a_loop(rows, most, random) -> None:
    words = nn.Embedding(VOCABULARY, WIDTH)
    count = sum(row.count(MEDIUM) for row in rows)
    media = torch.randn(count, most, WIDTH)
    lengths = torch.tensor([random.randint(1, most) for _ in range(count)], dtype=torch.int64)
    found = spread(text(rows), words, media, lengths)
    number = 0
    for row, ids in enumerate(rows):
        vectors: list[Tensor] = []
        expected_ids: list[int] = []
        for token in ids:
            if token == MEDIUM:
                own = int(lengths[number])
                vectors += list(media[number, :own])
                expected_ids += [MEDIUM] * own
                number += 1
            else:
                vectors.append(words.weight[token])
                expected_ids.append(token)
        assert found.text.lengths[row] == len(vectors)
        assert found.text.ids[row, : len(vectors)].tolist() == expected_ids
        torch.testing.assert_close(found.vectors[row, : len(vectors)], torch.stack(vectors), rtol=0, atol=0)
        assert not found.vectors[row, len(vectors) :].any()


@settings(max_examples=60, deadline=None)
@given(rows_of_ids)
def test_only_words_behind_a_picture_are_predicted(rows) -> None:
    batch = text(rows)
    wanted, last = following(batch), behind_last_medium(batch)
    for row, ids in enumerate(rows):
        for place in range(1, batch.ids.shape[1]):
            predicted = place < len(ids) and MEDIUM in ids[:place] and ids[place] != MEDIUM
            assert wanted[row, place - 1] == (ids[place] if predicted else NOTHING)
            if predicted:
                assert last[row, place - 1] == (MEDIUM not in ids[place:])


@settings(max_examples=60, deadline=None)
@given(rows_of_ids, st.integers(1, 3))
def test_each_position_sees_the_picture_before_it_alone(rows, num_vectors) -> None:
    batch = text(rows)
    places = stands(batch)
    media = torch.arange(int(places.sum()), dtype=torch.float32)[:, None, None].expand(-1, num_vectors, WIDTH)
    context = by_text(media, places)
    mask = preceding_medium(places, num_vectors, context.shape[1])
    number = -1
    for row, ids in enumerate(rows):
        seen: int | None = None
        for place, token in enumerate(ids):
            if token == MEDIUM:
                number += 1
                seen = number
            assert mask.empty[row, 0, place, 0] == (seen is None)
            if seen is not None:
                visible = context[row, mask.allowed[row, 0, place]]
                assert visible.tolist() == [[float(seen)] * WIDTH] * num_vectors
    last = last_row(mask, batch.lengths)
    for row, length in enumerate(batch.lengths.tolist()):
        assert torch.equal(last.allowed[row, :, 0], mask.allowed[row, :, length - 1])
        assert torch.equal(last.empty[row, :, 0], mask.empty[row, :, length - 1])


def test_pictures_and_places_must_agree() -> None:
    with pytest.raises(UserError, match="2 pictures for 1 places"):
        spread(text([[MEDIUM, 4]]), nn.Embedding(VOCABULARY, WIDTH), torch.zeros(2, 1, WIDTH))


def test_a_slice_of_interleaved_texts_takes_its_own_pictures() -> None:
    batch = Interleaved(text([[4, MEDIUM, MEDIUM], [5], [MEDIUM, 6]]), torch.arange(3)[:, None, None, None].expand(3, 3, 2, 2))
    assert batch[1:].image[:, 0, 0, 0].tolist() == [2]
    assert batch[:2].image[:, 0, 0, 0].tolist() == [0, 1]
    assert len(batch[1:2].image) == 0


def test_a_place_in_front() -> None:
    captioned = in_front(2, TextBatch(torch.tensor([[1, 5, 2], [1, 2, 0]]), torch.tensor([3, 2])))
    assert captioned.ids.tolist() == [[MEDIUM, 1, 5, 2], [MEDIUM, 1, 2, 0]]
    assert captioned.lengths.tolist() == [4, 3]


def sound(lengths: list[int]) -> Encoded:
    """What an encoder of recordings of unequal length returns."""
    tokens = torch.randn(len(lengths), max(lengths), 5)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Encoded(tokens, mask, (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "prefix",
    [
        PooledPrefix(5, WIDTH, 2),
        TokenPrefix(5, WIDTH),
        ResampledPrefix(Resampler(5, WIDTH, num_latents=2, num_layers=2, num_heads=1)),
    ],
)
def test_any_encoders_result_becomes_a_prefix(prefix: nn.Module) -> None:
    """Recordings of unequal length stand among words as they do alone, and what pads them changes nothing."""
    prefix.eval()
    heard, words = sound([4, 2, 3]), nn.Embedding(VOCABULARY, WIDTH)
    rows = [[MEDIUM, 7], [8, MEDIUM, 9, MEDIUM]]
    together = spread(text(rows), words, *prefix(heard))
    shorter = Encoded(heard.tokens[1:2, :2], heard.mask[1:2, :2], heard.pooled[1:2])
    vectors, lengths = prefix(shorter)
    own = vectors[0, : lengths[0]]
    torch.testing.assert_close(together.vectors[1, 1 : 1 + len(own)], own)
    assert together.text.lengths[0] == prefix(heard)[1][0] + 1
