"""Retrieval recalls equal those of CLIP_benchmark's own function."""

import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_retrieval as peer

from mm.evaluation.retrieval import retrieval


@pytest.mark.parametrize(("num_images", "captions", "noise"), [(150, 5, 3.0), (97, 1, 2.0), (64, 3, 0.2)])
def test_recalls_equal_at_every_k(num_images: int, captions: int, noise: float) -> None:
    random = torch.Generator().manual_seed(num_images)
    images = F.normalize(torch.randn(num_images, 64, generator=random), dim=1)
    owner = torch.arange(num_images).repeat_interleave(captions)
    texts = F.normalize(images[owner] + noise * F.normalize(torch.randn(len(owner), 64, generator=random), dim=1), dim=1)
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(owner)), owner] = True
    ours = retrieval(images, texts, owner, resamples=10).metrics
    for k in (1, 5, 10):
        to_image = peer.batchify(peer.recall_at_k, scores, positive, 64, "cpu", k=k)
        to_text = peer.batchify(peer.recall_at_k, scores.T, positive.T, 64, "cpu", k=k)
        assert ours[f"text_to_image_r{k}"].value == pytest.approx((to_image > 0).double().mean().item(), abs=1e-12)
        assert ours[f"image_to_text_r{k}"].value == pytest.approx((to_text > 0).double().mean().item(), abs=1e-12)
