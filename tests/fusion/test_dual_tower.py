"""The dual tower: unit vectors from any input, a clamped scale, encoders that can be locked."""

import math

import pytest
import torch
from torch import Tensor, nn

from mm.fusion.dual_tower import MAX_LOGIT_SCALE, DualTower, unit
from mm.types import Encoded

WIDTH, EMBED_DIM = 6, 4


class Encoder(nn.Module):
    """Batch normalisation and dropout, so that evaluation mode can be told from training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))

    def forward(self, value: Tensor) -> Encoded:
        pooled = self.layers(value)
        return Encoded(pooled[:, None], torch.ones(len(value), 1, dtype=torch.bool), pooled)


def towers(**options: object) -> DualTower:
    torch.manual_seed(0)
    names = ("image", "text", "audio")
    return DualTower({name: (Encoder(), nn.Linear(WIDTH, EMBED_DIM, bias=False)) for name in names}, **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("magnitude", [0.0, 1e-42, 1e-30, 1.0, 1e30, 3e38])
def test_unit_vectors_have_length_one_whatever_the_magnitude(magnitude: float) -> None:
    vectors = (torch.tensor([[1.0, -0.5, 0.25, 0.0]]) * magnitude).requires_grad_()
    result = unit(vectors)
    torch.testing.assert_close(result.norm(dim=1), torch.ones(1))
    if magnitude > 1e-40:
        torch.testing.assert_close(result, torch.tensor([[1.0, -0.5, 0.25, 0.0]]) / math.sqrt(1.3125))
    result[0, 1].backward()
    assert vectors.grad is not None
    assert not vectors.grad.isnan().any()


def test_unit_has_the_gradient_of_normalisation() -> None:
    values = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(4.0)
    gradients = []
    for normalise in (unit, lambda x: nn.functional.normalize(x, dim=-1)):
        vectors = values.clone().requires_grad_()
        gradients.append(torch.autograd.grad((normalise(vectors) * weights).sum(), vectors)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_vectors_are_not_hidden(bad: float) -> None:
    result = unit(torch.tensor([[1.0, bad], [0.0, 2.0]]))
    assert result[0].isnan().any()
    torch.testing.assert_close(result[1], torch.tensor([0.0, 1.0]))


def test_any_number_of_towers_meet_in_one_space() -> None:
    model = towers().eval()
    value = torch.randn(2, 3)
    vectors = [model.embed(name, value) for name in ("image", "text", "audio")]
    assert {tuple(vector.shape) for vector in vectors} == {(2, EMBED_DIM)}
    torch.testing.assert_close(model.scores(vectors[0], vectors[2]), vectors[0] @ vectors[2].T / 0.07)
    biased = towers(logit_scale=math.log(10), logit_bias=-10.0)
    torch.testing.assert_close(biased.scores(vectors[0], vectors[2]), 10 * vectors[0] @ vectors[2].T - 10)


def test_scores_are_fp32_under_autocast() -> None:
    model = towers()
    a, b = unit(torch.randn(3, EMBED_DIM)), unit(torch.randn(2, EMBED_DIM))
    with torch.autocast("cpu", torch.bfloat16):
        inside = model.scores(a, b)
    assert torch.equal(inside, model.scores(a, b))


@pytest.mark.parametrize(("value", "expected"), [(-3.0, 0.0), (2.0, 2.0), (9.0, MAX_LOGIT_SCALE)])
def test_scale_stays_in_range(value: float, expected: float) -> None:
    model = towers(logit_scale=value)
    model.clamp_()
    assert model.logit_scale.item() == pytest.approx(expected)
    assert model.scale().item() == pytest.approx(math.exp(expected), rel=1e-6)


def test_locked_encoders_neither_learn_nor_change() -> None:
    model = towers(locked=("image",))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.encoders["image"].state_dict().items()}
    value = torch.randn(4, 3)
    assert torch.equal(model.embed("image", value), model.embed("image", value))  # no dropout
    (model.embed("image", value) + model.embed("text", value))[:, 0].sum().backward()
    assert all(parameter.grad is None for parameter in model.encoders["image"].parameters())
    assert all(parameter.grad is not None for parameter in model.projections["image"].parameters())
    assert all(parameter.grad is not None for parameter in model.encoders["text"].parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.encoders["image"].state_dict().items())
