"""Two processes, each with half of the batch, against one process with all of it: losses, gradients and queues."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contrastive_cases import GROUPS, NUM_ROWS, loss_and_gradients, losses, ranks
from torch import Tensor, multiprocessing, nn

from mm.config import validate
from mm.fusion.dual_tower import DualTower
from mm.losses.gather import current_gather
from mm.losses.queue import FeatureQueue
from mm.systems import albef
from mm.systems.albef import AlbefConfig
from mm.systems.clip import Clip
from mm.types import Batch, Encoded, System, TextBatch

NUM_RANKS = 2


class Tower(nn.Module):
    def forward(self, value: Any) -> Encoded:
        pooled = (value.ids if isinstance(value, TextBatch) else value.flatten(1)).float() / 255
        return Encoded(pooled[:, None], torch.ones(len(pooled), 1, dtype=torch.bool), pooled)


def train_clip(rows: slice) -> list[Tensor]:
    """Final weights and queues of a small CLIP after steps whose gradients are averaged over ranks."""
    torch.manual_seed(0)
    towers = DualTower({name: (Tower(), nn.Linear(12, 6, bias=False)) for name in ("image", "text")})
    queues = {name: FeatureQueue(12, 6) for name in ("image", "text")}
    model = Clip(towers, queues=queues, label_smoothing=0.1, image_image_weight=0.3)
    return train(model, rows, lambda image: image.to(torch.uint8).view(NUM_ROWS, 3, 2, 2), lr=0.5)


def train_albef(rows: slice) -> list[Tensor]:
    """The same of a small ALBEF that only aligns, momentum encoders and queues included."""
    torch.manual_seed(0)
    image = {"backbone": "convnext_atto", "image_size": 32, "options": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
    sizes = {"vocab_size": 256, "context_length": 12, "width": 8, "heads": 2, "text_layers": 1, "fusion_layers": 1}
    options = {"embed_dim": 6, "momentum": 0.7, "queue_size": 12, "distillation_ramp_steps": 2}
    tasks = {"matching_weight": 0.0, "masked_weight": 0.0}
    model = albef.build(validate(AlbefConfig, {"image": image, **sizes, **options, **tasks}, "test"))
    return train(model, rows, lambda image: image.to(torch.uint8).view(NUM_ROWS, 3, 2, 2).repeat(1, 1, 16, 16), lr=0.05)


def train(model: System, rows: slice, picture: Callable[[Tensor], Tensor], lr: float) -> list[Tensor]:
    """Final state after steps whose gradients are averaged over ranks."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        image, ids = torch.randint(0, 256, (2, NUM_ROWS, 12), generator=generator)
        whole = Batch(
            ids=tuple(f"{step}/{i}" for i in range(NUM_ROWS)),
            image=picture(image),
            text=TextBatch(ids, torch.full((NUM_ROWS,), 12)),
            groups=GROUPS + step,
        )
        optimizer.zero_grad()
        model(whole[rows], step).total.backward()
        for parameter in model.parameters():
            if dist.is_initialized() and parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= NUM_RANKS
        optimizer.step()
        model.after_step(step)
    return list(model.state_dict().values())


def worker(rank: int, folder: Path) -> None:
    with ranks(rank, NUM_RANKS, folder):
        size = NUM_ROWS // NUM_RANKS
        rows = slice(rank * size, (rank + 1) * size)
        results = {
            f"{name} {chunk_size}": loss_and_gradients(loss, rows, current_gather())
            for chunk_size in (0, 3)
            for name, loss in losses(chunk_size).items()
        }
        torch.save(results | {"clip": train_clip(rows), "albef": train_albef(rows)}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(functools.partial(worker, folder=folder), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("chunk_size", [0, 3])
@pytest.mark.parametrize("name", list(losses(0)))
def test_average_over_ranks_is_the_global_batch(name: str, chunk_size: int, by_rank: list[dict[str, list[Tensor]]]) -> None:
    alone = loss_and_gradients(losses(0)[name], slice(None), None)
    averages = (sum(parts) / NUM_RANKS for parts in zip(*(results[f"{name} {chunk_size}"] for results in by_rank), strict=True))
    for average, expected in zip(averages, alone, strict=True):
        torch.testing.assert_close(average, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "trained"), [("clip", train_clip), ("albef", train_albef)])
def test_systems_with_queues_train_alike(
    name: str, trained: Callable[[slice], list[Tensor]], by_rank: list[dict[str, list[Tensor]]]
) -> None:
    alone = trained(slice(None))
    for results in by_rank:
        for mine, expected in zip(results[name], alone, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-6)


def test_a_single_process_gathers_nothing() -> None:
    assert current_gather() is None
