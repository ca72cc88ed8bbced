"""The losses of one process against open_clip's."""

import open_clip.loss as open_clip_loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.losses.contrastive import info_nce, siglip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = F.normalize(torch.randn(2, 96, 32, generator=generator), dim=2)
    return [tensor.clone().requires_grad_() for tensor in (a, b, torch.tensor(30.0), torch.tensor(-10.0))]


@pytest.mark.parametrize("chunk_size", [0, 10, 96])
def test_info_nce(chunk_size: int) -> None:
    a, b, scale, _ = inputs()
    compare(info_nce(a, b, scale, chunk_size=chunk_size), open_clip_loss.ClipLoss()(a, b, scale), [a, b, scale])


@pytest.mark.parametrize("chunk_size", [0, 10, 96])
def test_siglip(chunk_size: int) -> None:
    a, b, scale, bias = inputs()
    compare(
        siglip(a, b, scale, bias, chunk_size=chunk_size), open_clip_loss.SigLipLoss()(a, b, scale, bias), [a, b, scale, bias]
    )


def compare(ours: Tensor, theirs: Tensor, tensors: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    pairs = zip(torch.autograd.grad(ours, tensors), torch.autograd.grad(theirs, tensors), strict=True)
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
