"""Accumulation through cached representations gives the gradients of the whole batch."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from toy_training import FEATURES, ToyClip, ToyRegression, ToyStream, make

from mm.training.devices import autocast, seed_everything
from mm.training.gradcache import cached_backward, slices
from mm.training.gradients import backward
from mm.types import Batch, Losses

CPU = torch.device("cpu")


def gradients(system: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in system.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 3, 8, 100])
def test_equals_whole_batch(accumulate: int) -> None:
    batch = ToyStream(8).batch(0)
    whole, sliced = ToyClip(dropout=0), ToyClip(dropout=0)
    sliced.load_state_dict(whole.state_dict())
    expected = backward(whole, batch, 0, 1, nullcontext)
    found = backward(sliced, batch, 0, accumulate, nullcontext)
    assert torch.allclose(expected.total, found.total, atol=1e-6)
    assert torch.allclose(expected.parts["contrastive"], found.parts["contrastive"], atol=1e-6)
    want, have = gradients(whole), gradients(sliced)
    assert want.keys() == have.keys() == dict(whole.named_parameters()).keys()
    for name, gradient in want.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(gradient, have[name], rtol=1e-5, atol=1e-7), name


def test_plain_averaging_would_be_wrong() -> None:
    """What the cache is for: slices that do not see each other's negatives have another gradient."""
    batch, system = ToyStream(8).batch(0), ToyClip(dropout=0)
    backward(system, batch, 0, 1, nullcontext)
    exact = gradients(system)["logit_scale"].clone()
    system.zero_grad()
    for rows in slices(8, 2):
        (system.loss(batch[rows], 0).total / 2).backward()
    assert not torch.allclose(exact, gradients(system)["logit_scale"], rtol=0.05)


def _represented(system: ToyClip, batch: Batch, cuts: list[slice]) -> list[Any]:
    """Of slices, with the random numbers of `cached_backward`: one draw before each slice but the last."""
    parts = []
    for rows in cuts:
        if rows != cuts[-1]:
            torch.rand(())
        parts.append(system.represent(batch[rows]))
    return parts


def test_dropout_is_the_same_in_both_passes() -> None:
    """With dropout, the gradient is that of the very loss that was reported: compare with one graph over the same masks."""
    batch, system = ToyStream(8).batch(0), make(ToyClip)
    cuts = slices(8, 3)
    seed_everything(7, CPU)
    parts = _represented(system, batch, cuts)
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    expected = system.loss_from(joined, batch, 0)
    expected.total.backward()
    want = {name: gradient.clone() for name, gradient in gradients(system).items()}
    system.zero_grad()
    seed_everything(7, CPU)
    found = cached_backward(system, batch, 0, 3, nullcontext)
    after = torch.rand(3)
    assert torch.equal(expected.total, found.total)
    for name, gradient in gradients(system).items():
        assert torch.allclose(want[name], gradient, rtol=1e-5, atol=1e-7), name
    seed_everything(7, CPU)
    _represented(system, batch, cuts)
    assert torch.equal(after, torch.rand(3)), "the generator stands elsewhere than after one pass"


def test_gradients_survive_bf16_autocast() -> None:
    """Autocast keeps cast weights; casts made without a graph must not serve the second pass."""
    batch, system = ToyStream(8).batch(0), ToyClip(dropout=0)
    backward(system, batch, 0, 2, lambda: autocast(CPU, torch.bfloat16))
    sliced = {name: gradient.clone() for name, gradient in gradients(system).items()}
    system.zero_grad()
    backward(system, batch, 0, 1, lambda: autocast(CPU, torch.bfloat16))
    for name, gradient in gradients(system).items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), sliced[name].flatten(), dim=0) > 0.99, name


class NormedClip(ToyClip):
    """A contrastive toy with running statistics."""

    def __init__(self) -> None:
        super().__init__(dropout=0)
        self.norm = nn.BatchNorm1d(FEATURES)

    def represent(self, batch: Batch) -> dict[str, torch.Tensor]:
        assert batch.image is not None
        features = self.norm(batch.image.flatten(1).float() / 255)
        return {"left": self.left(features), "right": self.right(features)}


def test_running_statistics_count_each_slice_once() -> None:
    batch, system = ToyStream(8).batch(0), NormedClip()
    backward(system, batch, 0, 4, nullcontext)
    assert int(system.norm.num_batches_tracked) == 4


def test_frozen_tower_and_plain_systems() -> None:
    batch, clip = ToyStream(8).batch(0), ToyClip(dropout=0)
    clip.left.requires_grad_(False)
    backward(clip, batch, 0, 2, nullcontext)
    assert all(p.grad is None for p in clip.left.parameters())
    assert all(p.grad is not None for p in clip.right.parameters())

    whole, sliced = make(ToyRegression).eval(), make(ToyRegression).eval()  # no dropout: a mean over samples is exact
    expected = backward(whole, batch, 0, 1, nullcontext)
    found = backward(sliced, batch, 0, 3, nullcontext)
    assert isinstance(found, Losses)
    assert torch.allclose(expected.total, found.total)
    assert torch.allclose(expected.parts["mse"], found.parts["mse"])
    for name, gradient in gradients(whole).items():
        assert torch.allclose(gradient, gradients(sliced)[name], atol=1e-6), name


@pytest.mark.parametrize(("rows", "parts"), [(1, 1), (7, 3), (3, 7), (256, 5)])
def test_slices_cover_all_rows_once(rows: int, parts: int) -> None:
    cuts = slices(rows, parts)
    assert [row for cut in cuts for row in range(rows)[cut]] == list(range(rows))
    lengths = [cut.stop - cut.start for cut in cuts]
    assert min(lengths) >= 1
    assert max(lengths) - min(lengths) <= 1
