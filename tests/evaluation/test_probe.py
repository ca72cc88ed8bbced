"""Classifiers on frozen vectors, against scikit-learn and against brute force."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.errors import UserError
from mm.evaluation.probe import fit_logistic, linear_probe, nearest_neighbours, tip_adapter

CLASSES, WIDTH = 4, 12


def blobs(count: int, seed: int, noise: float = 1.2) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, CLASSES, (count,), generator=random)
    return F.normalize(centres[labels] + noise * torch.randn(count, WIDTH, generator=random), dim=1), labels


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
def test_logistic_regression_is_scikit_learns(penalty: float) -> None:
    vectors, labels = blobs(120, 0)
    weight, bias = fit_logistic(vectors, labels, CLASSES, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(vectors)), tol=1e-10, max_iter=5000).fit(vectors.double(), labels)
    scores, expected = vectors.double() @ weight.T + bias, theirs.decision_function(vectors.double())
    np.testing.assert_allclose(scores.softmax(1), torch.from_numpy(expected).softmax(1), atol=1e-4)


def test_the_penalty_is_chosen_without_the_test_set() -> None:
    train, test = blobs(200, 0), blobs(100, 1)
    found = linear_probe(*train, *test, num_classes=CLASSES)
    other = linear_probe(*train, test[0], (test[1] + 1) % CLASSES, num_classes=CLASSES)
    assert found.protocol["penalty"] == other.protocol["penalty"]
    assert found.metrics["top1"].value > 0.6
    assert other.metrics["top1"].value < 0.35


def test_neighbours_vote_as_written_out() -> None:
    (train, labels), (test, truth) = blobs(60, 0), blobs(40, 1)
    found = nearest_neighbours(train, labels, test, truth, num_classes=CLASSES, k=7, temperature=0.1)
    hits = 0
    for query, right in zip(test, truth, strict=True):
        cosines = train @ query
        votes = torch.zeros(CLASSES)
        for row in cosines.argsort(descending=True)[:7]:
            votes[labels[row]] += torch.exp(cosines[row] / 0.1)
        hits += int(votes.argmax() == right)
    assert found.metrics["top1"].value == pytest.approx(hits / 40)


def test_of_equal_votes_the_lowest_class_wins() -> None:
    train, labels = torch.eye(5, 3)[[0, 1, 0, 1, 2]], torch.tensor([2, 1, 2, 1, 0])
    query = F.normalize(torch.tensor([[1.0, 1.0, 0.0]]), dim=1)
    found = nearest_neighbours(train, labels, query, torch.tensor([1]), num_classes=3, k=4)
    assert found.metrics["top1"].value == 1.0


def test_examples_help_where_names_are_poor_and_are_not_needed_where_they_are_good() -> None:
    (train, labels), (test, truth) = blobs(200, 0), blobs(200, 1)
    poor = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5))
    alone = ((test @ F.normalize(poor, dim=1).T).argmax(1) == truth).float().mean().item()
    together = tip_adapter(train, labels, test, truth, poor)
    assert together.metrics["top1"].value > alone + 0.2
    (clean, clean_labels), good = blobs(100, 2, noise=0.1), torch.stack([train[labels == c].mean(0) for c in range(CLASSES)])
    assert tip_adapter(clean, clean_labels, test, truth, good).protocol["alpha"] == 0


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that is made."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count = max([self.count, *(one.numel() for one in tree_leaves(made) if isinstance(one, torch.Tensor))])
        return made


def test_examples_are_compared_in_tiles_and_votes_are_as_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    (train, labels), (test, truth) = blobs(300, 0), blobs(400, 1)
    names = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(5))
    whole = tip_adapter(train, labels, test, truth, names, scale=30.0)
    limit = 5000
    monkeypatch.setattr("mm.evaluation.probe.MAX_SCORES", limit)
    with Largest() as largest:
        tiled = tip_adapter(train, labels, test, truth, names, scale=30.0)
    assert largest.count <= limit
    assert tiled == whole
    votes = (-tiled.protocol["beta"] * (1 - test @ train.T)).exp() @ F.one_hot(labels, CLASSES).float()
    scores = 30.0 * test @ F.normalize(names, dim=1).T + tiled.protocol["alpha"] * votes
    assert tiled.metrics["top1"].value == pytest.approx((scores.argmax(1) == truth).float().mean().item())
    assert tiled.protocol["scale"] == 30.0


def test_one_example_a_class_is_never_held_out() -> None:
    vectors = F.normalize(torch.randn(30, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    labels = torch.arange(30)
    near = F.normalize(vectors + 0.05, dim=1)
    for found in (
        linear_probe(vectors, labels, near, labels, num_classes=30),
        tip_adapter(vectors, labels, near, labels, torch.ones(30, 64)),
    ):
        assert found.metrics["top1"].value == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": torch.full((60, WIDTH), torch.nan)}, "NaN"),
        ({"num_classes": 1}, "two classes"),
        ({"train_labels": torch.full((60,), 9)}, "0 to 3"),
        ({"test": torch.ones(40, 3)}, "width"),
    ],
)
def test_what_cannot_be_classified_is_refused(change: dict[str, object], message: str) -> None:
    (train, labels), (test, truth) = blobs(60, 0), blobs(40, 1)
    arguments = {"train": train, "train_labels": labels, "test": test, "test_labels": truth, "num_classes": CLASSES} | change
    with pytest.raises(UserError, match=message):
        nearest_neighbours(**arguments)  # pyright: ignore[reportArgumentType]
