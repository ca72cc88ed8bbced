"""Contrastive losses against their definitions, whole and chunked, with groups, smoothing and queued negatives."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.losses.contrastive import info_nce, siglip, supervised_contrastive
from mm.losses.queue import Queued

NUM_ROWS, WIDTH = 11, 5
GROUPS = torch.tensor([0, 0, 1, 2, 3, 3, 3, 4, 5, 6, 7])
CHUNK_SIZES = [0, 1, 4, 11, 50]


def vectors(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, WIDTH, dtype=torch.float64, generator=generator), dim=1)


@pytest.fixture
def inputs() -> list[Tensor]:
    """Features ``a`` and ``b``, scale and bias, fp64."""
    scale, bias = torch.tensor([20.0, -4.0], dtype=torch.float64)
    return [tensor.requires_grad_() for tensor in (vectors(NUM_ROWS, 1), vectors(NUM_ROWS, 2), scale.clone(), bias.clone())]


def soft_targets(groups: Tensor | None, smoothing: float, num_extra: int) -> Tensor:
    """Target distribution of each row over the batch and, with no weight, over the extra columns."""
    groups = torch.arange(NUM_ROWS) if groups is None else groups
    same = (groups[:, None] == groups).double()
    targets = (1 - smoothing) * same / same.sum(1, keepdim=True) + smoothing / NUM_ROWS
    return torch.cat([targets, torch.zeros(NUM_ROWS, num_extra, dtype=torch.float64)], 1)


def defined_info_nce(
    a: Tensor, b: Tensor, scale: Tensor, groups: Tensor | None, smoothing: float, negatives: tuple[Queued, Queued] | None
) -> Tensor:
    """Cross-entropy with soft targets, direction by direction, masking what a queue holds of a row's own group."""
    losses = []
    past_a, past_b = negatives or (None, None)
    for rows, columns, past in ((a, b, past_b), (b, a, past_a)):
        logits = scale * rows @ columns.T
        extra = 0
        if past is not None and groups is not None:
            queued = (scale * rows @ past.features.T).masked_fill(groups[:, None] == past.ids, -1e9)
            logits, extra = torch.cat([logits, queued], 1), len(past.ids)
        losses.append(F.cross_entropy(logits, soft_targets(groups, smoothing, extra)))
    return (losses[0] + losses[1]) / 2


def assert_same(actual: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Equal values and equal gradients for all inputs."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    pairs = zip(*(torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (actual, expected)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("case", ["one positive", "groups", "queue"])
def test_info_nce_is_its_definition(case: str, smoothing: float, chunk_size: int, inputs: list[Tensor]) -> None:
    a, b, scale, _ = inputs
    groups = None if case == "one positive" else GROUPS
    negatives = None
    if case == "queue":
        negatives = Queued(vectors(6, 3), torch.tensor([0, 3, 90, 91, 7, 92])), Queued(vectors(3, 4), torch.tensor([3, 3, 93]))
    actual = info_nce(a, b, scale, groups=groups, chunk_size=chunk_size, label_smoothing=smoothing, negatives=negatives)
    assert_same(actual, defined_info_nce(a, b, scale, groups, smoothing, negatives), [a, b, scale])


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["one positive", "groups"])
def test_siglip_is_its_definition(groups: Tensor | None, chunk_size: int, inputs: list[Tensor]) -> None:
    a, b, scale, bias = inputs
    numbers = torch.arange(NUM_ROWS) if groups is None else groups
    logits = scale * a @ b.T + bias
    same = (numbers[:, None] == numbers).double()
    expected = F.binary_cross_entropy_with_logits(logits, same, reduction="sum") / NUM_ROWS
    assert_same(siglip(a, b, scale, bias, groups=groups, chunk_size=chunk_size), expected, inputs)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
def test_supervised_contrastive_is_its_definition(chunk_size: int, inputs: list[Tensor]) -> None:
    a, _, scale, _ = inputs
    logits = scale * a @ a.T
    losses = []
    for i in range(NUM_ROWS):
        others = [j for j in range(NUM_ROWS) if j != i]
        positives = [j for j in others if GROUPS[j] == GROUPS[i]]
        if positives:
            losses.append(logits[i, others].logsumexp(0) - logits[i, positives].mean())
    expected = torch.stack(losses).mean()
    assert_same(supervised_contrastive(a, scale, GROUPS, chunk_size=chunk_size), expected, [a, scale])


@pytest.mark.parametrize("chunk_size", [0, 1])
def test_supervised_contrastive_without_any_positive_is_zero(chunk_size: int, inputs: list[Tensor]) -> None:
    a, _, scale, _ = inputs
    for rows in (1, NUM_ROWS):
        loss = supervised_contrastive(a[:rows], scale, torch.arange(rows), chunk_size=chunk_size)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, [a, scale]))


@pytest.mark.parametrize("chunk_size", [0, 3])
def test_gradients_are_derivatives(chunk_size: int) -> None:
    a, b = vectors(5, 1).requires_grad_(), vectors(5, 2).requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 1, 1, 2, 3])
    past = Queued(vectors(3, 5), torch.tensor([1, 8, 9]))
    kept = {"groups": groups, "chunk_size": chunk_size}
    torch.autograd.gradcheck(lambda *x: info_nce(*x, **kept, label_smoothing=0.1, negatives=(past, past)), (a, b, scale))
    torch.autograd.gradcheck(lambda *x: siglip(*x, **kept), (a, b, scale, bias))
    torch.autograd.gradcheck(lambda *x: supervised_contrastive(*x, **kept), (a, scale))


@pytest.mark.parametrize("trained", [("a",), ("b",), ("scale",), ("a", "scale"), ("b", "scale")])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[str, ...], inputs: list[Tensor]) -> None:
    """A locked tower needs no gradient; leaving it out must not change the others'."""
    tensors = dict(zip(("a", "b", "scale", "bias"), inputs, strict=True))
    wanted = [tensors[name] for name in trained]
    for loss in (
        lambda x: info_nce(x["a"], x["b"], x["scale"], chunk_size=4),
        lambda x: siglip(x["a"], x["b"], x["scale"], x["bias"], chunk_size=4),
    ):
        complete = torch.autograd.grad(loss(tensors), wanted)
        detached = {name: value if name in trained else value.detach() for name, value in tensors.items()}
        for mine, expected in zip(torch.autograd.grad(loss(detached), wanted), complete, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert not info_nce(*inputs[:3], chunk_size=4).requires_grad
        assert not siglip(*inputs, chunk_size=4).requires_grad


def test_autocast_does_not_reach_the_loss(inputs: list[Tensor]) -> None:
    a, b, scale, bias = (tensor.detach().float().requires_grad_() for tensor in inputs)
    for chunk_size in (0, 4):
        plain = info_nce(a, b, scale, groups=GROUPS, chunk_size=chunk_size), siglip(a, b, scale, bias, chunk_size=chunk_size)
        with torch.autocast("cpu", torch.bfloat16):
            inside = (
                info_nce(a, b, scale, groups=GROUPS, chunk_size=chunk_size),
                siglip(a, b, scale, bias, chunk_size=chunk_size),
            )
        assert plain == inside


def test_order_of_the_batch_and_names_of_the_groups_do_not_matter(inputs: list[Tensor]) -> None:
    a, b, scale, bias = inputs
    order = torch.randperm(NUM_ROWS, generator=torch.Generator().manual_seed(0))
    renamed = (GROUPS * 7919 - 5)[order]
    for chunk_size in (0, 4):
        torch.testing.assert_close(
            info_nce(a[order], b[order], scale, groups=renamed, chunk_size=chunk_size), info_nce(a, b, scale, groups=GROUPS)
        )
        torch.testing.assert_close(
            siglip(a[order], b[order], scale, bias, groups=renamed, chunk_size=chunk_size),
            siglip(a, b, scale, bias, groups=GROUPS),
        )


@pytest.mark.parametrize("chunk_size", [0, 4])
def test_non_finite_features_give_a_non_finite_loss(chunk_size: int, inputs: list[Tensor]) -> None:
    a, b, scale, bias = (tensor.detach().clone() for tensor in inputs)
    b[3, 0] = torch.nan
    assert info_nce(a, b, scale, chunk_size=chunk_size).isnan()
    assert siglip(a, b, scale, bias, chunk_size=chunk_size).isnan()


def test_wrong_use_is_refused(inputs: list[Tensor]) -> None:
    a, b, scale, _ = inputs
    with pytest.raises(ValueError, match=r"both must be \(B, D\)"):
        info_nce(a, b[:-1], scale)
    past = Queued(a.detach(), torch.arange(NUM_ROWS))
    with pytest.raises(ValueError, match="need groups"):
        info_nce(a, b, scale, negatives=(past, past))
