"""Two-stage ranks against plain sorting: candidates, ties, answers outside the candidates, any k."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.errors import UserError
from mm.evaluation.reranking import BothWays, candidates, nearest, reranked
from mm.evaluation.retrieval import ranks, ranks_of_scores


def sorted_by(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def loops(first: list[float], second: list[float], k: int) -> list[int]:
    """The final order of items: the k best by the first score, sorted by the second, then the rest."""
    order = sorted_by(first)
    return sorted(order[:k], key=lambda i: (-second[i], i)) + order[k:]


@settings(max_examples=50, deadline=None)
@given(
    num_images=st.integers(1, 9),
    num_texts=st.integers(1, 14),
    levels=st.integers(1, 4),
    k=st.integers(1, 16),
    seed=st.integers(0, 2**16),
)
def test_ranks_are_those_of_sorting(num_images: int, num_texts: int, levels: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(-levels, levels + 1, (num_images, 2), generator=generator).float()
    texts = torch.randint(-levels, levels + 1, (num_texts, 2), generator=generator).float()
    second = torch.randint(0, levels + 1, (num_images, num_texts), generator=generator).float()
    owner = torch.randint(0, num_images, (num_texts,), generator=generator)
    found = candidates(images, texts, k)
    assert found.texts.shape == (num_images, min(k, num_texts))
    assert found.images.shape == (num_texts, min(k, num_images))
    scores = BothWays(second.gather(1, found.texts), second.T.gather(1, found.images))
    result = reranked(ranks(images, texts, owner), found, scores, owner)
    first = images @ texts.T
    for i in range(num_images):
        order = loops(first[i].tolist(), second[i].tolist(), k)
        right = [order.index(j) for j in range(num_texts) if owner[j] == i]
        assert int(result.image_to_text[i]) == min(right, default=num_texts)
    for j in range(num_texts):
        order = loops(first[:, j].tolist(), second[:, j].tolist(), k)
        assert int(result.text_to_image[j]) == order.index(int(owner[j]))
    if k >= max(num_images, num_texts):
        whole = ranks_of_scores(second, owner)
        assert torch.equal(result.image_to_text, whole.image_to_text)
        assert torch.equal(result.text_to_image, whole.text_to_image)


def test_nearest_of_equal_scores_are_the_lowest_indices() -> None:
    queries, items = torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.5], [-0.0], [0.5], [0.0], [-2.0], [0.5]])
    assert nearest(queries, items, 4).tolist() == [[0, 2, 5, 1], [4, 1, 3, 0]]


def test_scores_that_are_no_numbers_are_an_error() -> None:
    images = torch.eye(3)
    found, owner = candidates(images, images, 2), torch.arange(3)
    bad = BothWays(torch.full((3, 2), torch.nan), torch.zeros(3, 2))
    with pytest.raises(UserError, match="scores"):
        reranked(ranks(images, images, owner), found, bad, owner)
