"""Two processes, each with half of the batch, against one process with all of it: losses, gradients and queues."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mm.config import validate
from mm.fusion.dual_tower import DualTower
from mm.losses.contrastive import info_nce, siglip, supervised_contrastive
from mm.losses.distillation import Views, distilled_contrastive
from mm.losses.gather import Gather, current_gather
from mm.losses.queue import FeatureQueue, Queued
from mm.systems import albef
from mm.systems.albef import AlbefConfig
from mm.systems.clip import Clip
from mm.types import Batch, Encoded, System, TextBatch

NUM_RANKS, NUM_ROWS, WIDTH = 2, 8, 5
WAYS = ("gathered", "ring")
GROUPS = torch.tensor([0, 1, 2, 0, 3, 1, 1, 4])  # positives lie on the same rank and on the other one

Loss = Callable[..., Tensor]


def losses(chunk_size: int) -> dict[str, Loss]:
    """Each kind of loss as a function of features, scale, bias, groups and ranks."""
    past = Queued(inputs(seed=9)[0].detach()[:4], torch.tensor([2, 3, 50, 51]))
    return {
        "one positive": lambda a, b, s, _bias, _g, gather: info_nce(a, b, s, chunk_size=chunk_size, gather=gather),
        "groups": lambda a, b, s, _bias, g, gather: info_nce(
            a, b, s, groups=g, chunk_size=chunk_size, label_smoothing=0.1, negatives=(past, past), gather=gather
        ),
        "siglip": lambda a, b, s, bias, g, gather: siglip(a, b, s, bias, groups=g, chunk_size=chunk_size, gather=gather),
        "siglip one positive": lambda a, b, s, bias, _g, gather: siglip(a, b, s, bias, chunk_size=chunk_size, gather=gather),
        "distilled": lambda a, b, s, _bias, g, gather: distilled_contrastive(
            Views(a, b), Views(b.flip(1), a.flip(1)), s, g, alpha=0.3, queued=(past, past), gather=gather
        ),
        "supervised": lambda a, _b, s, _bias, g, gather: supervised_contrastive(a, s, g, chunk_size=chunk_size, gather=gather),
    }


def inputs(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, NUM_ROWS, WIDTH, dtype=torch.float64, generator=generator))


def parameters() -> list[Tensor]:
    """One weight matrix a tower, the log of the scale, and the bias."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    values = (*weights, torch.tensor(2.0).double(), torch.tensor(-3.0).double())
    return [value.clone().requires_grad_() for value in values]


def loss_and_gradients(loss: Loss, rows: slice, gather: Gather | None) -> list[Tensor]:
    """What data-parallel training has on this rank before gradients are averaged."""
    learned = parameters()
    a, b = (nn.functional.normalize(x[rows] @ w, dim=1) for x, w in zip(inputs(), learned, strict=False))
    value = loss(a, b, learned[2].exp(), learned[3], GROUPS[rows], gather)
    gradients = torch.autograd.grad(value, learned, allow_unused=True)
    zeros = map(torch.zeros_like, learned)
    return [value.detach(), *(zero if gradient is None else gradient for gradient, zero in zip(gradients, zeros, strict=True))]


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


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)), 0)
        return made


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    size = NUM_ROWS // NUM_RANKS
    rows = slice(rank * size, (rank + 1) * size)
    results = {
        f"{name} {chunk_size} {way}": loss_and_gradients(loss, rows, Gather(ring=way == "ring"))
        for way in WAYS
        for chunk_size in (0, 3)
        for name, loss in losses(chunk_size).items()
    }
    for way in WAYS:
        a, b = (x[rows].requires_grad_() for x in inputs())
        with LargestTensor() as watch:
            info_nce(a, b, torch.tensor(2.0).double(), groups=GROUPS[rows], gather=Gather(ring=way == "ring")).backward()
        results[f"largest {way}"] = [torch.tensor(watch.numbers)]
    torch.save(results | {"clip": train_clip(rows), "albef": train_albef(rows)}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(functools.partial(worker, folder=folder), nprocs=NUM_RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_RANKS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk_size", [0, 3])
@pytest.mark.parametrize("name", list(losses(0)))
def test_average_over_ranks_is_the_global_batch(
    name: str, chunk_size: int, way: str, by_rank: list[dict[str, list[Tensor]]]
) -> None:
    alone = loss_and_gradients(losses(0)[name], slice(None), None)
    ranks = (results[f"{name} {chunk_size} {way}"] for results in by_rank)
    averages = (sum(parts) / NUM_RANKS for parts in zip(*ranks, strict=True))
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


def test_no_rank_ever_holds_what_all_have_in_a_ring(by_rank: list[dict[str, list[Tensor]]]) -> None:
    own = NUM_ROWS // NUM_RANKS * WIDTH
    for results in by_rank:
        gathered, ring = (int(results[f"largest {way}"][0]) for way in WAYS)
        assert ring <= own < gathered


def test_a_single_process_gathers_nothing() -> None:
    assert current_gather() is None
