"""The one mask function against the plain definition of each kind, and the fast paths it promises."""

import itertools

import pytest
import torch
from torch import Tensor

from mm.nn.masks import EVERYTHING, Mask, Raster, RasterPattern, attention_mask, dalle_layer_pattern

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
    with pytest.raises(AssertionError, match="restrict a causal mask"):
        attention_mask(4, pattern=Raster("row", 2, 2))


NUM_TEXT, ROWS, COLUMNS = 3, 5, 6
PATTERNS: list[RasterPattern] = ["row", "column", "convolutional"]


def raster_sees(pattern: RasterPattern, query: int, key: int, columns: int, kernel: int) -> bool:
    """Figure 11 of the DALL-E paper in words, for positions in a picture of unlimited height."""
    if key > query:
        return False
    if pattern == "row":
        return key in range(query - columns, query + 1)
    if pattern == "column":
        return key in range(query, -1, -columns)
    half = kernel // 2
    return any(key == query + down * columns + right for down in range(-half, 1) for right in range(-half, half + 1))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("columns", [2, 3, 6])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("num_queries", [1, 4, NUM_TEXT + 30])
def test_raster_patterns_equal_their_definition(pattern: RasterPattern, columns: int, kernel: int, num_queries: int) -> None:
    num_keys = NUM_TEXT + 30
    mask = attention_mask(num_queries, num_keys, causal=True, pattern=Raster(pattern, NUM_TEXT, columns, kernel))
    expected = torch.zeros(num_queries, num_keys, dtype=torch.bool)
    for q, k in itertools.product(range(num_queries), range(num_keys)):
        query = num_keys - num_queries + q - NUM_TEXT
        if query < 0 or k < NUM_TEXT:
            expected[q, k] = k <= query + NUM_TEXT
        else:
            expected[q, k] = raster_sees(pattern, query, k - NUM_TEXT, columns, kernel)
    assert torch.equal(visible(mask, 1, num_queries, num_keys)[0], expected)


def test_convolutional_pattern_wraps_around_row_ends_as_in_the_paper() -> None:
    mask = attention_mask(NUM_TEXT + 16, causal=True, pattern=Raster("convolutional", NUM_TEXT, 4, 3))
    seen = visible(mask, 1, NUM_TEXT + 16, NUM_TEXT + 16)[0, NUM_TEXT + 8, NUM_TEXT:].nonzero().flatten()
    assert seen.tolist() == [3, 4, 5, 7, 8]  # the first of the third row sees the ends of the rows before


@pytest.mark.parametrize("pattern", PATTERNS)
def test_raster_patterns_respect_padding(pattern: RasterPattern) -> None:
    length = NUM_TEXT + ROWS * COLUMNS
    keys = torch.ones(2, length, dtype=torch.bool)
    keys[1, 1:NUM_TEXT] = False
    raster = Raster(pattern, NUM_TEXT, COLUMNS, 3)
    free = visible(attention_mask(length, causal=True, pattern=raster), 2, length, length)
    padded = visible(attention_mask(length, causal=True, pattern=raster, keys=keys), 2, length, length)
    assert torch.equal(padded, free & keys[:, None])


def test_a_row_layer_and_a_column_layer_reach_every_earlier_position() -> None:
    length = NUM_TEXT + ROWS * COLUMNS
    row, column = (
        visible(attention_mask(length, causal=True, pattern=Raster(pattern, NUM_TEXT, COLUMNS)), 1, length, length)[0].int()
        for pattern in PATTERNS[:2]
    )
    everything = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(row @ column > 0, everything)
    assert torch.equal(column @ row > 0, everything)
    assert not torch.equal(row @ row > 0, everything)


def test_layers_have_the_patterns_of_the_paper() -> None:
    kinds = [dalle_layer_pattern(layer, 64) for layer in range(64)]
    assert kinds[:4] == ["row", "column", "row", "row"]
    assert [layer + 1 for layer, kind in enumerate(kinds) if kind == "column"] == list(range(2, 64, 4))
    assert [layer for layer, kind in enumerate(kinds) if kind == "convolutional"] == [63]
