"""Zero-shot figures against plain loops, the tie rule, prompt ensembles, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors, label_ranks, ranked, zero_shot


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_figures_equal_plain_loops() -> None:
    images, classes = unit(300, 24), unit(13, 24, seed=1)
    labels = torch.randint(0, 13, (300,), generator=torch.Generator().manual_seed(2))
    images = F.normalize(images + 0.4 * classes[labels], dim=1)
    result = zero_shot(images, classes, labels, resamples=50)
    order = np.argsort(-(images.double() @ classes.double().T).numpy(), axis=1, kind="stable")
    right = order == labels.numpy()[:, None]
    assert result.metrics["top1"].value == pytest.approx(right[:, 0].mean())
    assert result.metrics["top5"].value == pytest.approx(right[:, :5].any(1).mean())
    recalls = [right[labels.numpy() == c, 0].mean() for c in range(13)]
    assert result.metrics["mean_per_class"].value == pytest.approx(np.mean(recalls))
    assert 0.2 < result.metrics["top1"].value < 0.95


def test_mean_per_class_ignores_how_many_pictures_a_class_has() -> None:
    classes = torch.eye(2)
    images = torch.tensor([[1.0, 0.0]] * 9 + [[1.0, 0.0]])
    result = zero_shot(images, classes, torch.tensor([0] * 9 + [1]), resamples=10)
    assert result.metrics["top1"].value == 0.9
    assert result.metrics["mean_per_class"].value == 0.5


def test_top5_is_left_out_below_five_classes() -> None:
    assert "top5" not in zero_shot(unit(8, 6), unit(4, 6), torch.zeros(8, dtype=torch.long), resamples=5).metrics
    assert "top5" in zero_shot(unit(8, 6), unit(5, 6), torch.zeros(8, dtype=torch.long), resamples=5).metrics


@pytest.mark.parametrize("num_classes", [2, 7, 33, 97, 200])
@pytest.mark.parametrize("num_images", [1, 5, 41])
def test_of_equal_classes_the_lowest_index_wins_at_every_shape(num_images: int, num_classes: int) -> None:
    """Matrix kernels treat odd edges differently; equal vectors must tie exactly all the same."""
    images = unit(num_images, 37)
    classes = unit(1, 37, seed=5).expand(num_classes, 37)
    labels = torch.arange(num_images) * 31 % num_classes
    assert torch.equal(label_ranks(images, classes, labels), labels)
    assert torch.equal(ranked(images, classes, num_classes)[0], torch.arange(num_classes).expand(num_images, -1))


def test_ranked_agrees_with_label_ranks() -> None:
    images, classes = unit(50, 16), unit(120, 16, seed=1)
    order, scores = ranked(images, classes, 120)
    assert torch.equal(label_ranks(images, classes, order[:, 7]), torch.full((50,), 7))
    assert torch.allclose(scores, (images @ classes.T).sort(descending=True).values, atol=1e-6)


def test_figures_do_not_depend_on_reduced_precision_settings() -> None:
    images, classes, labels = unit(64, 512), unit(200, 512, seed=1), torch.zeros(64, dtype=torch.long)
    exact = label_ranks(images, classes, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(label_ranks(images, classes, labels), exact)


def test_subsets_count_their_pictures_only() -> None:
    classes = torch.eye(6)
    labels = torch.arange(6)
    images = classes.clone()
    images[3:] = classes[0]
    subsets = {"seen": labels < 3, "novel": [False] * 3 + [True] * 3}
    result = zero_shot(images, classes, labels, subsets=subsets, protocol={"split": "s"}, resamples=5)
    assert [result.metrics[f"top1{suffix}"].value for suffix in ("", "_seen", "_novel")] == [0.5, 1.0, 0.0]
    assert {"top5_seen", "mean_per_class_novel"} <= set(result.metrics)
    assert result.protocol["subsets"] == {"seen": 3, "novel": 3}
    assert result.protocol["split"] == "s"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_not_finite_vectors_are_errors(value: float, side: int) -> None:
    sides = [unit(4, 8), unit(6, 8)]
    sides[side][2, 3] = value
    with pytest.raises(UserError, match=r"NaN or infinity \(first at index 2\)"):
        zero_shot(*sides, torch.zeros(4, dtype=torch.long))


def test_wrong_shapes_and_labels_are_errors() -> None:
    with pytest.raises(UserError, match="width 9 does not fit width 8"):
        zero_shot(unit(4, 8), unit(6, 9), torch.zeros(4, dtype=torch.long))
    with pytest.raises(UserError, match="labels: values go from 0 to 6, allowed are 0 to 5"):
        zero_shot(unit(2, 8), unit(6, 8), torch.tensor([0, 6]))
    with pytest.raises(UserError, match="labels: expected 2 integers"):
        zero_shot(unit(2, 8), unit(6, 8), torch.tensor([0.0, 1.0]))
    with pytest.raises(UserError, match="overflow"):
        zero_shot(unit(2, 8) * 1e30, unit(6, 8), torch.tensor([0, 1]))


class Letters:
    """A text tower whose vectors have varying lengths, and that counts what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.batches.append(texts)
        return torch.stack([torch.tensor([text.count(letter) for letter in "abcdef"]).float() + len(text) for text in texts])


def test_prompts_are_normalised_averaged_and_normalised_again() -> None:
    tower, names, templates = Letters(), ["a", "bee", "cafe"], ["{}", "a face of {}", "{} and {}"]
    vectors = class_vectors(tower, names, templates, batch_size=4)
    for name, vector in zip(names, vectors, strict=True):
        prompts = F.normalize(Letters()([template.replace("{}", name) for template in templates]), dim=1)
        assert torch.allclose(vector, F.normalize(prompts.mean(0), dim=0), atol=1e-6)
    assert all(len(batch) <= 4 for batch in tower.batches)


def test_equal_prompts_are_embedded_once_and_give_equal_vectors() -> None:
    tower = Letters()
    vectors = class_vectors(tower, ["missile", "bee", "missile"], ["a {}"])
    assert sum(map(len, tower.batches)) == 2
    assert torch.equal(vectors[0], vectors[2])


def test_bad_prompts_are_errors() -> None:
    with pytest.raises(UserError, match=r"write \{\} where the class name goes"):
        class_vectors(Letters(), ["a"], ["a photo"])
    with pytest.raises(UserError, match="at least one"):
        class_vectors(Letters(), [], ["{}"])
    with pytest.raises(UserError, match="class 'x': its prompts"):
        class_vectors(lambda texts: torch.tensor([[1.0], [-1.0]]), ["x"], ["{}", "a {}"])
    with pytest.raises(UserError, match="NaN"):
        class_vectors(lambda texts: torch.full((len(texts), 2), torch.nan), ["x"], ["{}"])
