"""Tiny systems and streams that exercise the training loop without data or encoders."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mm.losses.gather import current_gather
from mm.training.config import TrainConfig
from mm.types import Batch, Losses, System

FEATURES = 12
LABELS = 5


class ToyRegression(System):
    """Predicts ``groups`` from ``image``: dropout, batch normalisation, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 1))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(2, 2))

    def loss(self, batch: Batch, step: int) -> Losses:
        assert batch.image is not None
        assert batch.groups is not None
        error = self.net(_features(batch)).squeeze(1) - batch.groups.float()
        loss = error.square().mean()
        return Losses(loss, {"mse": loss.detach()})


class ToyClip(System):
    """A two-tower contrastive system whose both modalities are views of ``image``; `scale` enters the loss directly."""

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(FEATURES, 16), nn.LayerNorm(16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, 6))
        self.right = nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(dropout), nn.Tanh(), nn.Linear(16, 6))
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def represent(self, batch: Batch) -> dict[str, Tensor]:
        features = _features(batch)
        return {"left": _unit(self.left(features)), "right": _unit(self.right(features.flip(1)))}

    def loss_from(self, representations: Mapping[str, Tensor], batch: Batch, step: int) -> Losses:
        left, right, gather = representations["left"], representations["right"], current_gather()
        lefts, rights = (left, right) if gather is None else (gather(left), gather(right))
        targets = torch.arange(len(left)) + (0 if gather is None else gather.own(len(left)).start)
        scale = self.logit_scale.exp()
        there = nn.functional.cross_entropy(scale * left @ rights.T, targets)
        back = nn.functional.cross_entropy(scale * right @ lefts.T, targets)
        loss = (there + back) / 2
        return Losses(loss, {"contrastive": loss.detach(), "guessing": torch.tensor(len(rights)).log()})

    def loss(self, batch: Batch, step: int) -> Losses:
        return self.loss_from(self.represent(batch), batch, step)

    def embed_image(self, image: Tensor) -> Tensor:
        return _unit(self.left(image.flatten(1).float() / 255))

    def embed_text(self, text: Any) -> Tensor:
        raise AssertionError("the toy reads no text")

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        return self.logit_scale.exp() * queries @ items.T


class ToyStream:
    """Batch k is a pure function of k; ids tell the batch and the row of the global batch."""

    def __init__(
        self,
        batch_size: int = 8,
        *,
        rank: int = 0,
        world_size: int = 1,
        poison: frozenset[int] = frozenset(),
        poison_with: float = float("nan"),
    ) -> None:
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.poison, self.poison_with = poison, poison_with
        self.cursor = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.cursor += 1
            yield self.batch(self.cursor - 1)

    def batch(self, k: int) -> Batch:
        generator = torch.Generator().manual_seed(k)
        pixels = torch.randint(0, 256, (self.batch_size, 3, 2, 2), generator=generator, dtype=torch.uint8)
        groups = torch.randint(0, LABELS, (self.batch_size,), generator=generator)
        image = pixels.float() / 255
        if k in self.poison:
            image[-1] = self.poison_with
        share = self.batch_size // self.world_size
        ids = tuple(f"{k}-{row}" for row in range(self.batch_size))
        return Batch(ids, image * 255, groups=groups)[self.rank * share : (self.rank + 1) * share]

    def state(self) -> dict[str, Any]:
        return {"cursor": self.cursor, "accounting": {"delivered": self.cursor * self.batch_size}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.cursor = state["cursor"]


def toy_config(**changes: Any) -> TrainConfig:
    """A configuration for toys: short, silent, on the CPU in fp32."""
    values: dict[str, Any] = {
        "steps": 20,
        "batch_size": 8,
        "lr": 1e-2,
        "warmup_steps": 4,
        "device": "cpu",
        "precision": "fp32",
        "checkpoint_every_steps": 5,
        "checkpoint_every_minutes": 0,
        "log_every": 4,
        "tensorboard": False,
    }
    return TrainConfig.model_validate(values | changes)


def make(kind: Callable[[], System], seed: int = 0) -> Any:
    """A toy with the same weights every time."""
    torch.manual_seed(seed)
    return kind()


def newest(run: Path) -> Path:
    """The newest checkpoint folder of a run."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def weights(run: Path) -> dict[str, dict[str, Tensor]]:
    """All tensors of the newest checkpoint by file stem."""
    return {path.stem: load_file(path) for path in newest(run).glob("*.safetensors")}


def lines(path: Path, *without: str) -> list[dict[str, Any]]:
    """Records of a JSON lines file, less the keys that tell time."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in without} for record in records]


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs ended in the same bits and told the same story."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() == {"model", "ema", "optimizer"}
    for stem in first:
        assert first[stem].keys() == second[stem].keys()
        for name, tensor in first[stem].items():
            assert torch.equal(tensor, second[stem][name]), (stem, name)
    assert (a / "ids.jsonl").read_bytes() == (b / "ids.jsonl").read_bytes()
    clock = ("samples_per_second", "seconds", "mfu", "peak_memory", "energy_kwh")
    assert lines(a / "metrics.jsonl", *clock) == lines(b / "metrics.jsonl", *clock)


def _features(batch: Batch) -> Tensor:
    assert batch.image is not None
    return batch.image.flatten(1).float() / 255


def _unit(vectors: Tensor) -> Tensor:
    return nn.functional.normalize(vectors.float(), dim=-1)
