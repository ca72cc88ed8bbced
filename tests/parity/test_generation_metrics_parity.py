"""FID, KID, PSNR and SSIM equal torchmetrics' on the same features and pixels."""

import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

from mm.evaluation.fid import frechet_distance, kernel_distance
from mm.evaluation.reconstruction import psnr, ssim


class AsTheyAre(nn.Module):
    """A feature extractor for what are features already."""

    num_features = 6

    def forward(self, features: Tensor) -> Tensor:
        return features


def features(n: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=random, dtype=torch.float64) @ torch.randn(6, 6, generator=random, dtype=torch.float64)


def pictures(seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    real = torch.randint(0, 256, (4, 3, 20, 28), dtype=torch.uint8, generator=random)
    noise = torch.randint(-40, 41, real.shape, generator=random)
    return (real + noise).clamp(0, 255).to(torch.uint8), real


def test_fid() -> None:
    made, real = features(50, 0), features(70, 1) + 0.5
    theirs = FrechetInceptionDistance(feature=AsTheyAre(), antialias=True).set_dtype(torch.float64)
    theirs.update(made, real=False)
    theirs.update(real, real=True)
    assert frechet_distance(made, real) == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_kid() -> None:
    made, real = features(30, 0), features(30, 1) + 0.5
    assert kernel_distance(made, real, subsets=2)[0] == pytest.approx(float(poly_mmd(made, real)), rel=1e-9)


def test_psnr_and_ssim_of_each_picture() -> None:
    made, real = pictures(0)
    for i in range(len(made)):
        pair = made[i : i + 1].double() / 255, real[i : i + 1].double() / 255
        assert psnr(made, real)[i].item() == pytest.approx(float(peak_signal_noise_ratio(*pair, data_range=1.0)), rel=1e-6)
        full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True)[1]
        inside = full[..., 5:-5, 5:-5].mean()  # theirs has windows beyond the border, too, which it fills by reflection
        assert ssim(made, real)[i].item() == pytest.approx(inside.item(), rel=1e-6)
