"""Row and column log-partitions: exact in fp32 for logits of any size, bounded in memory, robust to what is left out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.losses import partition
from mm.losses.partition import DENSE_LIMIT, TILE_LIMIT, Excluded, automatic_chunk_size, log_partitions


def correlated(count: int, noise: float) -> tuple[Tensor, Tensor]:
    """Unit vectors whose corresponding rows have a cosine of about ``1 / (1 + noise ** 2)``, fp32."""
    generator = torch.Generator().manual_seed(0)
    shared, first, second = F.normalize(torch.randn(3, count, 16, generator=generator), dim=2)
    return F.normalize(shared + noise * first, dim=1), F.normalize(shared + noise * second, dim=1)


def outlier() -> tuple[Tensor, Tensor]:
    """One row that is opposite to every column: its sum is tiny beside the others'."""
    a, b = correlated(40, 0.1)
    direction = F.normalize(torch.ones(16), dim=0)
    a, b = F.normalize(a + 2 * direction, dim=1), F.normalize(b + 2 * direction, dim=1)
    a[7] = -direction
    return a, b


@pytest.mark.parametrize(
    ("features", "scale", "expected_shift"),
    [
        (correlated(40, 2.0), 14.0, 0.0),
        (correlated(40, 2.0), 100.0, 13.0),
        (correlated(40, 0.1), 100.0, 39.0),
        (correlated(40, 0.5), 1000.0, None),
        (outlier(), 100.0, None),
    ],
    ids=["initial", "trained", "saturated", "far beyond", "outlier"],
)
def test_fp32_is_exact_whatever_the_range_of_the_logits(
    features: tuple[Tensor, Tensor], scale: float, expected_shift: float | None
) -> None:
    """All ways of shifting are met, and each agrees with the dense form in fp64 for values and gradients."""
    results = []
    for dtype, chunk_size in ((torch.float32, 16), (torch.float64, 0)):
        a, b, factor = (tensor.to(dtype).requires_grad_() for tensor in (*features, torch.tensor(scale)))
        row, column = log_partitions(a, b, factor, chunk_size=chunk_size)
        weights = torch.linspace(0.1, 1.0, 40, dtype=dtype)
        gradients = torch.autograd.grad((row * weights).sum() + (column * weights.flip(0)).sum(), [a, b, factor])
        results.append([row, column, *gradients])
        if chunk_size:
            shift = row.grad_fn.shift  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            assert shift == (None if expected_shift is None else pytest.approx(expected_shift, abs=2))
    for single, double in zip(*results, strict=True):
        error = (single.double() - double).abs().max() / double.abs().max()
        assert error < 1e-5 * max(1, scale / 100)  # rounding of a logit is proportional to its size


@pytest.mark.parametrize("chunk_size", [0, 2])
@pytest.mark.parametrize("scale", [5.0, 500.0])
def test_excluded_pairs_take_no_part(chunk_size: int, scale: float) -> None:
    a, b = (x[:6].double().requires_grad_() for x in correlated(6, 1.0))
    factor = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.tensor([0, 1, 2, 3, 4, 5]), torch.tensor([0, 0, 3, 3, 9, 9])
    row, _ = log_partitions(a, b, factor, excluded=Excluded(rows, columns), chunk_size=chunk_size)
    for i in range(6):
        kept = [j for j in range(6) if columns[j] != rows[i]]
        torch.testing.assert_close(row[i], (factor * a[i] @ b[kept].T).logsumexp(0))
    everything = torch.zeros(6, dtype=torch.int64)
    empty_row, empty_column = log_partitions(a, b, factor, excluded=Excluded(rows, everything), chunk_size=chunk_size)
    assert empty_row[0] == -torch.inf
    assert empty_row[1:].isfinite().all()
    finite = torch.autograd.grad(empty_row[1:].sum() + empty_column.sum(), [a, b, factor])
    assert all(gradient.isfinite().all() for gradient in finite)


def saved_numbers(chunk_size: int | None, a: Tensor, b: Tensor) -> int:
    """Size of the largest tensor that autograd keeps for the backward pass."""
    sizes = [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.untyped_storage().size() // tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        log_partitions(a, b, torch.tensor(10.0, requires_grad=True), chunk_size=chunk_size)
    return max(sizes)


def test_large_matrices_are_not_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = F.normalize(torch.randn(2, 2100, 4, generator=generator), dim=2).requires_grad_()
    assert len(a) * len(b) > DENSE_LIMIT
    assert saved_numbers(0, a, b) == len(a) * len(b)
    assert saved_numbers(None, a, b) <= max(a.untyped_storage().size() // 4, a.numel())


def test_automatic_choice() -> None:
    assert automatic_chunk_size(256, 256) == 0
    assert automatic_chunk_size(16384, 16384) == TILE_LIMIT // 16384
    assert automatic_chunk_size(2048, 2048) == partition.MAX_TILE_ROWS
    assert automatic_chunk_size(10**6, 10**6) == partition.MIN_TILE_ROWS


def test_no_columns_give_minus_infinity() -> None:
    a = torch.ones(3, 2)
    for chunk_size in (0, 2, None):
        row, column = log_partitions(a, torch.empty(0, 2), torch.tensor(1.0), chunk_size=chunk_size)
        assert (row == -torch.inf).all()
        assert len(column) == 0
