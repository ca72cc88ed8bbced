"""Retrieval ranks against plain loops, ties included, for any order, sizes and block edges."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.errors import UserError
from mm.evaluation import retrieval as module
from mm.evaluation.retrieval import ranks, ranks_of_scores, retrieval


def loops(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sort by (score descending, index ascending) and look where the right answers are."""
    scores = (texts @ images.T).tolist()
    num_images, num_texts = len(images), len(texts)
    text_to_image = []
    for j in range(num_texts):
        order = sorted(range(num_images), key=lambda i: (-scores[j][i], i))
        text_to_image.append(order.index(int(owner[j])))
    image_to_text = []
    for i in range(num_images):
        order = sorted(range(num_texts), key=lambda j: (-scores[j][i], j))
        places = [place for place, j in enumerate(order) if int(owner[j]) == i]
        image_to_text.append(min(places, default=num_texts))
    return image_to_text, text_to_image


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 12),
    num_texts=st.integers(1, 30),
    levels=st.integers(1, 4),
    block=st.tuples(st.integers(1, 5), st.integers(1, 7)),
    seed=st.integers(0, 2**16),
)
def test_ranks_equal_plain_loops_with_ties(
    num_images: int, num_texts: int, levels: int, block: tuple[int, int], seed: int
) -> None:
    """Small integers make most scores equal, and any picture may have none, one or many captions in any order."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(-levels, levels + 1, (num_images, 3), generator=random).float()
    texts = torch.randint(-levels, levels + 1, (num_texts, 3), generator=random).float()
    owner = torch.randint(0, num_images, (num_texts,), generator=random)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_IMAGES", block[0])
        patch.setattr(module, "BLOCK_TEXTS", block[1])
        patch.setattr(module, "TILE", 3 * block[1])
        found = ranks(images, texts, owner)
    image_to_text, text_to_image = loops(images, texts, owner)
    assert found.image_to_text.tolist() == image_to_text
    assert found.text_to_image.tolist() == text_to_image


def karpathy(num_images: int, captions: int, width: int, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(num_images, width, generator=random), dim=1)
    owner = torch.arange(num_images).repeat_interleave(captions)
    texts = images[owner] + noise * F.normalize(torch.randn(len(owner), width, generator=random), dim=1)
    return images, F.normalize(texts, dim=1), owner


def test_blocks_do_not_change_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, owner = karpathy(300, 3, 48, noise=2.5)
    whole = ranks(images, texts, owner)
    monkeypatch.setattr(module, "BLOCK_IMAGES", 96)
    monkeypatch.setattr(module, "BLOCK_TEXTS", 100)
    monkeypatch.setattr(module, "TILE", 5000)
    tiled = ranks(images, texts, owner)
    assert torch.equal(whole.image_to_text, tiled.image_to_text)
    assert torch.equal(whole.text_to_image, tiled.text_to_image)
    assert len(whole.text_to_image.unique()) > 20


def test_order_of_captions_does_not_matter() -> None:
    images, texts, owner = karpathy(200, 5, 32, noise=2.0)
    shuffled = torch.randperm(len(owner), generator=torch.Generator().manual_seed(1))
    straight, mixed = ranks(images, texts, owner), ranks(images, texts[shuffled], owner[shuffled])
    assert torch.equal(straight.image_to_text, mixed.image_to_text)
    assert torch.equal(straight.text_to_image[shuffled], mixed.text_to_image)


@pytest.mark.parametrize("copies", [3, 50, 131])
def test_equal_pictures_are_ranked_by_index(copies: int) -> None:
    """Identical art under several names: copy k of the picture stands behind the k copies before it."""
    image = F.normalize(torch.randn(1, 37, generator=torch.Generator().manual_seed(0)), dim=1)
    found = ranks(image.expand(copies, -1), image.expand(copies, -1), torch.arange(copies))
    assert found.text_to_image.tolist() == list(range(copies))
    assert found.image_to_text.tolist() == list(range(copies))


def test_recalls_and_medians_of_a_small_case() -> None:
    """Two pictures, three captions; the second caption of picture 0 is nearer to picture 1."""
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0.1], [0.3, 0.9], [0.2, 1.0]])
    result = retrieval(images, texts, torch.tensor([0, 0, 1]), ks=(1, 2, 3), resamples=20)
    values = {name: interval.value for name, interval in result.metrics.items()}
    assert values == {
        "image_to_text_r1": 1.0,
        "image_to_text_r2": 1.0,
        "image_to_text_r3": 1.0,
        "image_to_text_median_rank": 1.0,
        "text_to_image_r1": pytest.approx(2 / 3),
        "text_to_image_r2": 1.0,
        "text_to_image_median_rank": 1.0,
    }
    assert result.metrics["text_to_image_median_rank"].unit == "number"
    assert "2 images and 3 texts" in result.protocol["task"]


def test_subsets_ask_less_among_the_same_candidates() -> None:
    images, texts, owner = karpathy(120, 4, 24, noise=2.0)
    chosen = torch.arange(120) % 3 == 0
    whole, found = retrieval(images, texts, owner, subsets={"novel": chosen}, resamples=20), ranks(images, texts, owner)
    hits = (found.text_to_image < 5)[chosen[owner]].float().mean()
    assert whole.metrics["text_to_image_r5_novel"].value == pytest.approx(float(hits))
    hits = (found.image_to_text < 1)[chosen].float().mean()
    assert whole.metrics["image_to_text_r1_novel"].value == pytest.approx(float(hits))
    assert whole.metrics["text_to_image_r5"].value == pytest.approx(float((found.text_to_image < 5).float().mean()))


def test_pictures_without_caption_stay_candidates_and_ask_nothing() -> None:
    images = torch.eye(3)
    result = retrieval(images, torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([1]), modalities=("image", "audio"), resamples=5)
    assert result.metrics["image_to_audio_r1"].value == 1.0
    assert result.metrics["audio_to_image_r1"].value == 0.0
    assert result.protocol["without_caption"] == 2


def test_wrong_input_is_refused() -> None:
    images, texts, owner = karpathy(4, 2, 8)
    with pytest.raises(UserError, match="picture of each caption: values go from 0 to 4"):
        retrieval(images, texts, owner + (owner == 3).long())
    with pytest.raises(UserError, match="picture of each caption: expected 8 integers"):
        retrieval(images, texts, owner[:5])
    texts[6] = torch.nan
    with pytest.raises(UserError, match="text vectors: 1 of 8 vectors hold NaN"):
        retrieval(images, texts, owner)


def test_intervals_of_the_usual_size_take_little_time() -> None:
    """5k pictures with 25k captions: far below the time of one epoch of anything, however busy the machine."""
    random = np.random.default_rng(0)
    units = np.repeat(np.arange(5000), 5)
    statistics = module._figures(random.geometric(0.1, 25000) - 1, units, [1, 5, 10])
    start = time.process_time()
    intervals = module.bootstrap(statistics, 5000)
    assert time.process_time() - start < 5
    assert intervals["r10"].low < intervals["r10"].value < intervals["r10"].high


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_ranks_of_given_scores_are_those_of_the_vectors_that_make_them(num_images: int, num_texts: int, seed: int) -> None:
    """Small whole numbers, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-2, 3, (num_images, 3), generator=generator).float()
    texts = torch.randint(-2, 3, (num_texts, 3), generator=generator).float()
    owner = torch.randint(0, num_images, (num_texts,), generator=generator)
    of_vectors, of_scores = ranks(images, texts, owner), ranks_of_scores(images @ texts.T, owner)
    assert of_scores.image_to_text.equal(of_vectors.image_to_text)
    assert of_scores.text_to_image.equal(of_vectors.text_to_image)
