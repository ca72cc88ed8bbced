"""The one mask function against the plain definition of each kind, and the fast paths it promises."""

import itertools

import pytest
import torch
from torch import Tensor

from mm.nn.masks import EVERYTHING, Mask, attention_mask

CPU = torch.device("cpu")


def visible(mask: Mask, batch_size: int, num_queries: int, num_keys: int) -> Tensor:
    """What the mask lets through, rows that see nothing included, ``(B, Q, K)``."""
    allowed = mask.tensor(num_queries, num_keys, CPU)
    allowed = torch.ones(num_queries, num_keys, dtype=torch.bool) if allowed is None else allowed
    if mask.empty is not None:
        allowed = allowed & ~mask.empty
    return torch.broadcast_to(allowed, (batch_size, 1, num_queries, num_keys))[:, 0]


@pytest.mark.parametrize(
    ("causal", "prefix", "padded", "blocked", "num_queries"),
    [
        case
        for case in itertools.product([False, True], [0, 3, "rows"], [False, True], [False, True], [1, 2, 8])
        if case[0] or case[1] == 0
    ],
)
def test_every_combination_is_the_intersection_of_its_rules(
    causal: bool, prefix: int | str, padded: bool, blocked: bool, num_queries: int
) -> None:
    num_keys, rows = 8, [0, 5]
    prefixes = rows if prefix == "rows" else [prefix, prefix]
    keys = torch.tensor([[True] * 5 + [False] * 3, [False] * 4 + [True] * 4]) if padded else None
    blocks = torch.tensor([[True, False, True, False]]) if blocked else None
    mask = attention_mask(
        num_queries,
        num_keys,
        causal=causal,
        prefix=torch.tensor(rows) if prefix == "rows" else int(prefix),
        keys=keys,
        blocks=blocks,
    )
    expected = torch.ones(2, num_queries, num_keys, dtype=torch.bool)
    for b, q, k in itertools.product(range(2), range(num_queries), range(num_keys)):
        position = num_keys - num_queries + q
        sees = not causal or k <= position or k < int(prefixes[b])
        sees = sees and (keys is None or bool(keys[b, k])) and (blocks is None or bool(blocks[0, k // 2]))
        expected[b, q, k] = sees
    assert torch.equal(visible(mask, 2, num_queries, num_keys), expected)


def test_common_cases_need_no_tensor() -> None:
    assert attention_mask(7) is EVERYTHING
    assert attention_mask(7, causal=True) == Mask(causal=True)
    assert attention_mask(1, 9, causal=True) is EVERYTHING


def test_blocks_divide_queries_and_keys() -> None:
    mask = attention_mask(4, 6, blocks=torch.tensor([[True, False], [False, True]]))
    expected = torch.tensor([[1, 1, 1, 0, 0, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2, dtype=torch.bool)
    assert torch.equal(visible(mask, 1, 4, 6)[0], expected)


def test_impossible_masks_are_refused() -> None:
    with pytest.raises(AssertionError, match="exception to a causal mask"):
        attention_mask(4, prefix=2)
    with pytest.raises(AssertionError, match="last positions"):
        attention_mask(4, 3, causal=True)
