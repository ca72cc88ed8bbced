"""Shares of right answers, resampled by query picture."""

import pytest
import torch

from mm.errors import UserError
from mm.evaluation.few_shot import chosen_right, few_shot


def test_the_likeliest_of_equals_is_the_first() -> None:
    likelihoods = torch.tensor([[-1.0, -2.0], [-1.0, -1.0], [-1.0, -1.0]])
    assert chosen_right(likelihoods, torch.tensor([0, 0, 1])).tolist() == [True, True, False]
    with pytest.raises(UserError, match="not a number"):
        chosen_right(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))


def test_figures_and_subsets() -> None:
    right = {"accuracy_1shot": [True, False, True, True]}
    result = few_shot(right, ["a", "a", "b", "c"], subsets={"novel": [True, True, False, False]})
    assert result.metrics["accuracy_1shot"].value == 0.75
    assert result.metrics["accuracy_1shot_novel"].value == 0.5
    low_high = result.metrics["accuracy_1shot_novel"]
    assert (low_high.low, low_high.high) == (0.5, 0.5)  # both episodes are of one picture
    assert result.protocol["query_pictures"] == 3
    with pytest.raises(UserError, match="4 episodes but 1"):
        few_shot({"x": [True]}, ["a"] * 4)
    with pytest.raises(UserError, match="nothing to evaluate"):
        few_shot({}, [])
