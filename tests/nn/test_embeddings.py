"""Positions: rotary depends on distances only, offsets continue where they left off, hidden words keep their place."""

import pytest
import torch
from torch import nn

from mm.nn.embeddings import LearnedPositions, Rotary, SinusoidalPositions, TokenEmbedding, rotate


def test_rotary_is_a_rotation_of_complex_pairs() -> None:
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    frequencies = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turns = torch.polar(torch.ones(5, 4, dtype=torch.float64), torch.arange(3, 8)[:, None] * frequencies)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turns
    expected = torch.cat([turned.real, turned.imag], -1)
    torch.testing.assert_close(rotate(x, Rotary(8)(5, offset=3)), expected, atol=1e-5, rtol=1e-5)


def test_rotary_scores_depend_on_distance_only() -> None:
    query, key, rotary = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8), Rotary(8)
    here, there = ((rotate(query, turn) @ rotate(key, turn).mT) for turn in (rotary(4), rotary(4, offset=100)))
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


def test_rotary_keeps_the_type_and_works_with_cast_weights() -> None:
    rotary = Rotary(8).bfloat16()
    assert rotate(torch.randn(1, 1, 4, 8, dtype=torch.bfloat16), rotary(4)).dtype == torch.bfloat16


@pytest.mark.parametrize("positions", [LearnedPositions(9, 8), SinusoidalPositions(8)])
def test_offset_continues_the_sequence(positions: nn.Module) -> None:
    for parameter in positions.parameters():
        nn.init.normal_(parameter)
    assert torch.equal(torch.cat([positions(4), positions(5, 4)]), positions(9))


def test_sinusoidal_positions_are_the_published_ones() -> None:
    table = SinusoidalPositions(6)(50)
    for position, i in [(0, 0), (7, 1), (49, 2)]:
        angle = torch.tensor(position / 10_000 ** (2 * i / 6))
        torch.testing.assert_close(table[position, [i, i + 3]], torch.stack([angle.sin(), angle.cos()]), atol=1e-5, rtol=1e-5)


def test_positions_beyond_the_table_are_refused() -> None:
    with pytest.raises(AssertionError, match="9 positions, 10"):
        LearnedPositions(9, 8)(4, offset=6)


def test_positions_never_decay() -> None:
    assert LearnedPositions(4, 8).weight.no_decay  # pyright: ignore[reportAttributeAccessIssue]


def test_hidden_words_leave_their_position() -> None:
    embedding = TokenEmbedding(5, 8, positions=SinusoidalPositions(8), norm=nn.LayerNorm(8))
    ids = torch.tensor([[1, 2, 3]])
    hidden = embedding(ids, keep=torch.tensor([[[1.0], [0.0], [1.0]]]))
    torch.testing.assert_close(hidden[0, 1], nn.functional.layer_norm(SinusoidalPositions(8)(3)[1], (8,)))
    assert torch.equal(hidden[0, [0, 2]], embedding(ids)[0, [0, 2]])
