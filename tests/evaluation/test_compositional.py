"""Compositional scores by hand: what counts as right, ties, categories, refusals."""

import pytest
import torch
import torch.nn.functional as F

from mm.errors import UserError
from mm.evaluation.compositional import pair_scores, sugarcrepe, winoground


def example(a: float, b: float, c: float, d: float) -> torch.Tensor:
    """Scores of picture 0 with captions 0 and 1, and of picture 1 with them."""
    return torch.tensor([[a, b], [c, d]])


RIGHT = example(0.9, 0.1, 0.2, 0.8)
TEXT_ONLY = example(0.5, 0.4, 0.8, 0.9)
"""Each picture prefers its caption, but caption 0 prefers picture 1."""
IMAGE_ONLY = example(0.5, 0.8, 0.4, 0.9)
WRONG = example(0.1, 0.9, 0.8, 0.2)


def test_each_score_by_hand() -> None:
    result = winoground(torch.stack([RIGHT, TEXT_ONLY, TEXT_ONLY, IMAGE_ONLY, WRONG]), resamples=50)
    assert {name: interval.value for name, interval in result.metrics.items()} == pytest.approx(
        {"text_score": 3 / 5, "image_score": 2 / 5, "group_score": 1 / 5}
    )
    assert all(interval.low <= interval.value <= interval.high for interval in result.metrics.values())
    assert result.protocol["examples"] == 5


@pytest.mark.parametrize("place", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_an_equal_score_is_a_failure(place: tuple[int, int]) -> None:
    scores = RIGHT.clone()
    row, column = place
    scores[row, column] = scores[row, 1 - column]
    assert winoground(scores[None], resamples=5).metrics["text_score"].value == 0
    scores = RIGHT.clone()
    scores[row, column] = scores[1 - row, column]
    assert winoground(scores[None], resamples=5).metrics["image_score"].value == 0
    assert winoground(torch.full((3, 2, 2), 0.25), resamples=5).metrics["group_score"].value == 0


def test_random_scores_have_the_published_chance_levels() -> None:
    scores = torch.rand(60_000, 2, 2, generator=torch.Generator().manual_seed(0))
    metrics = winoground(scores, resamples=20).metrics
    assert metrics["text_score"].value == pytest.approx(1 / 4, abs=0.01)
    assert metrics["image_score"].value == pytest.approx(1 / 4, abs=0.01)
    assert metrics["group_score"].value == pytest.approx(1 / 6, abs=0.01)


def test_subsets_of_examples() -> None:
    result = winoground(torch.stack([RIGHT, WRONG]), subsets={"Object": [True, False]}, resamples=5)
    assert result.metrics["group_score_Object"].value == 1
    assert result.metrics["group_score"].value == 0.5


def test_accuracy_by_category() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.3], [0.5, 0.5], [0.8, 0.7]])
    result = sugarcrepe(scores, ["add_att", "add_att", "swap_obj", "swap_obj"], resamples=20)
    assert {name: interval.value for name, interval in result.metrics.items()} == {
        "accuracy": 0.5,
        "accuracy_add_att": 0.5,
        "accuracy_swap_obj": 0.5,
    }
    assert result.protocol["subsets"] == {"add_att": 2, "swap_obj": 2}


def test_scores_of_pairs_are_dot_products_and_equal_vectors_tie() -> None:
    random = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(37, 2, 65, generator=random), dim=-1)
    texts = F.normalize(torch.randn(37, 3, 65, generator=random), dim=-1)
    texts[:, 2] = texts[:, 0]
    scores = pair_scores(images, texts)
    torch.testing.assert_close(scores, torch.einsum("eid,ecd->eic", images, texts))
    assert torch.equal(scores[..., 0], scores[..., 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: winoground(torch.zeros(0, 2, 2)), "expected the shape"),
        (lambda: winoground(torch.zeros(4, 2)), "expected the shape"),
        (lambda: winoground(torch.full((4, 2, 2), torch.nan)), "NaN or infinity"),
        (lambda: sugarcrepe(torch.zeros(4, 3), ["a"] * 4), "expected the shape"),
        (lambda: sugarcrepe(torch.zeros(4, 2), ["a"] * 3), "4 examples and 3 categories"),
        (lambda: pair_scores(torch.zeros(4, 2, 8), torch.zeros(3, 2, 8)), "expected vectors of shape"),
        (lambda: pair_scores(torch.zeros(4, 2, 8), torch.zeros(4, 2, 9)), "width 9 does not fit width 8"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
