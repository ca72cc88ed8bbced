"""The pixel baseline: exact distances, ties, indifference to where the content stands."""

import numpy as np
import pytest
import torch

from mm.errors import UserError
from mm.evaluation.baseline import nearest, pixel_baseline, thumbnails


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_nearest_equals_plain_distances() -> None:
    index, queries = noise(700), noise(600, seed=1)
    distances = ((queries[:, None].int() - index[None].int()) ** 2).flatten(2).sum(2)
    assert torch.equal(nearest(index, queries), distances.min(1).indices)


def test_of_equal_pictures_the_lowest_index_wins() -> None:
    index = noise(1).repeat(33, 1, 1, 1)
    index[:5] = noise(5, seed=2)
    assert nearest(index, noise(1).repeat(7, 1, 1, 1)).tolist() == [5] * 7


def test_thumbnail_shows_the_content_wherever_it_stands() -> None:
    shape = torch.zeros(4, 40, 40, dtype=torch.uint8)
    shape[0, 4:20, 6:22] = 200
    shape[3, 4:20, 6:22] = 255
    moved = shape.roll((17, 12), dims=(1, 2))
    small = thumbnails([shape, moved])
    assert torch.equal(small[0], small[1])
    assert small[0, 0, 2:14, 2:14].unique().tolist() == [200]
    assert small[0, 1:].unique().tolist() == [0]


def test_share_of_right_labels_and_subsets() -> None:
    index = noise(6)
    queries = index[[0, 1, 2, 3]].clone()
    queries[:, 0, 0, 0] ^= 1
    labels = ["cat", "dog", "cat", "owl", "fox", "bee"]
    asked = ["cat", "dog", "dog", "owl"]
    subsets = {"novel": np.array([False, False, True, True])}
    result = pixel_baseline(index, labels, queries, asked, subsets=subsets, protocol={"split": "x"}, resamples=20)
    assert result.metrics["baseline_top1"].value == 0.75
    assert result.metrics["baseline_top1_novel"].value == 0.5
    assert result.protocol["split"] == "x"


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="queries: 2 pictures and 1 labels"):
        pixel_baseline(noise(3), ["a", "b", "c"], noise(2), ["a"])
    with pytest.raises(UserError, match="index: 0 pictures"):
        pixel_baseline(noise(3)[:0], [], noise(2), ["a", "b"])
    with pytest.raises(UserError, match="no picture"):
        thumbnails([])
