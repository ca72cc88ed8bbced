"""Fit to the prompt, and copying: both CLIPScores, the prompt's rank, the nearest training picture."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.generation import clip_score, copying, nearest_train, rank_of_prompt


def unit(n: int, d: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def at_angle(*cosines: float) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors with these cosines."""
    texts = torch.tensor([[1.0, 0.0]]).expand(len(cosines), -1)
    return torch.tensor([[cosine, math.sqrt(1 - cosine**2)] for cosine in cosines]), texts


def test_both_conventions_of_clip_score() -> None:
    images, texts = at_angle(0.4, -0.2, 0.1)
    original = clip_score(images, texts, protocol={"clip": "emoji-judge"})
    assert original.metrics["clipscore"].value == pytest.approx(2.5 * (0.4 + 0 + 0.1) / 3)
    assert original.protocol["clipscore"] == "2.5 max(cosine, 0) of each pair, captions behind 'A photo depicts '"
    assert original.protocol["clip"] == "emoji-judge"
    library = clip_score(images, texts, convention="torchmetrics")
    assert library.metrics["clipscore_torchmetrics"].value == pytest.approx(100 * (0.4 - 0.2 + 0.1) / 3)
    assert library.protocol["clipscore_torchmetrics"] == "100 times the mean cosine, at least 0, captions as they are"
    assert not library.metrics.keys() & original.metrics.keys()


@pytest.mark.parametrize("convention", ["original", "torchmetrics"])
def test_clip_score_is_never_negative_nor_is_its_interval(convention: Literal["original", "torchmetrics"]) -> None:
    interval = next(iter(clip_score(*at_angle(-0.4, -0.1, 0.02), convention=convention).metrics.values()))
    assert 0 <= interval.low <= interval.value <= interval.high


def test_rank_of_prompt_counts_places_by_brute_force() -> None:
    images, texts, labels = unit(60, 6, 0), unit(20, 6, 1), torch.arange(60) % 20
    scores = (images @ texts.T).tolist()
    for k in (1, 5):
        hits = [
            label in sorted(range(20), key=lambda c, row=row: -row[c])[:k] for row, label in zip(scores, labels, strict=True)
        ]
        chosen = np.arange(60) < 15
        metrics = rank_of_prompt(images, texts, labels, k=k, subsets={"compositional": chosen}, suffix="_real").metrics
        assert metrics[f"clip_rank{k}_real"].value == pytest.approx(np.mean(hits))
        assert metrics[f"clip_rank{k}_real_compositional"].value == pytest.approx(np.mean(hits[:15]))


def test_equal_texts_share_no_place() -> None:
    texts = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    images = torch.tensor([[1.0, 0.0]]).expand(4, -1)
    assert rank_of_prompt(images, texts, torch.arange(4), k=2).metrics["clip_rank2"].value == 0.5


def test_pictures_of_a_prompt_are_drawn_together() -> None:
    images, texts, labels = unit(30, 4, 0), unit(30, 4, 1), torch.arange(30)
    once = rank_of_prompt(images, texts, labels).metrics["clip_rank5"]
    four_times = rank_of_prompt(images.repeat(4, 1), texts, labels.repeat(4)).metrics["clip_rank5"]
    assert 0 < once.value < 1
    assert four_times == once, "the same pictures again tell nothing new"


@pytest.mark.parametrize("k", [0, 4])
def test_a_place_that_does_not_exist_is_one_line(k: int) -> None:
    with pytest.raises(UserError, match=f"k is {k}, with 3 texts it can be 1 to 3"):
        rank_of_prompt(unit(3, 4, 0), unit(3, 4, 1), torch.arange(3), k=k)


def test_nearest_train_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.evaluation.generation.ROWS", 7)
    made, train = unit(20, 5, 0).double(), unit(50, 5, 1).double()
    found = nearest_train(made, train)
    for row, distance, index in zip(made, found.distances, found.indices, strict=True):
        every = [math.dist(row.tolist(), other.tolist()) for other in train]
        assert distance == pytest.approx(min(every), rel=1e-12)
        assert index == np.argmin(every)


def test_a_copy_is_at_distance_zero_and_the_first_of_equals_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.evaluation.generation.ROWS", 30)
    features = unit(40, 64, 0)
    found = nearest_train(features, torch.cat([features, features]))
    assert found.distances.eq(0).all()
    pixels = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = nearest_train(pixels, torch.cat([pixels, pixels]))
    assert found.distances.eq(0).all()
    assert found.indices.tolist() == list(range(40))
    assert nearest_train(pixels[:1], 255 - pixels[:1]).distances.item() == pytest.approx(
        float((2 * pixels[0].double() - 255).norm())
    )


def test_copying_shows_and_fresh_pictures_do_not() -> None:
    train, fresh, held_out = unit(400, 16, 0), unit(300, 16, 1), unit(300, 16, 2)
    honest = copying(fresh, held_out, train, features="vectors").metrics
    assert honest["copies"].low <= 0.05 <= honest["copies"].high
    assert honest["nearest_train"].value == pytest.approx(honest["nearest_train_real"].value, rel=0.05)
    thief = copying(train[:300] + 0.01, held_out, train, features="vectors")
    assert thief.metrics["copies"].value == 1
    assert thief.metrics["nearest_train"].value < 0.2 * thief.metrics["nearest_train_real"].value
    assert thief.protocol["pictures_compared"] == {"generated": 300, "real": 300, "training": 400}
    half = copying(torch.cat([train[:150], fresh[:150]]), held_out, train, features="vectors").metrics
    assert half["copies"].value == pytest.approx(0.5, abs=0.06)


def test_mirrored_copies_show_and_the_control_says_whether_copies_can() -> None:
    random = torch.Generator().manual_seed(0)
    train, fresh, held_out = (torch.randint(0, 256, (60, 3, 4, 4), dtype=torch.uint8, generator=random) for _ in range(3))
    options: dict[str, Any] = {"features": "pixels", "retrieved": torch.cat([train[:30], fresh[:30]])}
    plain = copying(train.flip(-1), held_out, train, **options).metrics
    found = copying(train.flip(-1), held_out, train, mirrored=True, **options)
    assert plain["copies"].value < 0.2
    assert found.metrics["copies"].value == 1
    assert found.metrics["nearest_train"].value == 0
    assert found.metrics["copies_retrieved"].value == pytest.approx(0.5, abs=0.07)
    assert found.protocol["pictures_compared"] == {"generated": 60, "real": 60, "training": 60, "retrieved": 60}
    honest = copying(fresh, held_out, train, features="pixels", mirrored=True)
    assert honest.metrics["copies"].low <= 0.05 <= honest.metrics["copies"].high
    assert "copies_retrieved" not in honest.metrics


def test_what_cannot_be_compared_is_one_line() -> None:
    with pytest.raises(UserError, match="pictures of 4 numbers, training pictures of 5"):
        nearest_train(torch.ones(2, 4), torch.ones(2, 5))
    with pytest.raises(UserError, match="training pictures: expected features or pixels of at least one"):
        nearest_train(torch.ones(2, 4), torch.ones(0, 4))
    with pytest.raises(UserError, match="pictures: 2 of 2 vectors hold NaN"):
        nearest_train(torch.full((2, 4), torch.nan), torch.ones(2, 4))
    with pytest.raises(UserError, match="3 pictures and 2 captions"):
        clip_score(unit(3, 4, 0), unit(2, 4, 0))
