"""Every contrastive loss with its gradients on a rank's share of one small batch, for tests over several processes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm.losses.contrastive import info_nce, siglip, supervised_contrastive
from mm.losses.distillation import Views, distilled_contrastive
from mm.losses.gather import Gather
from mm.losses.queue import Queued

NUM_ROWS, WIDTH = 8, 5
GROUPS = torch.tensor([0, 1, 2, 0, 3, 1, 1, 4])  # positives lie on the same rank and on others

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


@contextmanager
def ranks(rank: int, size: int, folder: Path) -> Iterator[None]:
    """This process among others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{size}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()
