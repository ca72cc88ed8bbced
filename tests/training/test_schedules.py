"""Both schedules of a pipeline compute the same to the bit; 1F1B holds the activations of one microbatch at a time."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from several import join, run_together
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from mm.nn.attention import MultiHeadAttention
from mm.nn.masks import Mask
from mm.nn.stages import Schedule, stage_layers
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.ranks import Peers

ROWS, LENGTH, WIDTH = 2, 6, 16
"""Rows of a microbatch."""


def stage(rank: int, microbatches: int, schedule: Schedule) -> Transformer:
    """Two of four layers with everything that a layer can be told or draw."""
    torch.manual_seed(0)

    def block(_: int) -> Block:
        def attention() -> MultiHeadAttention:
            return MultiHeadAttention(WIDTH, 2, dropout=0.2)

        return Block(
            attention=attention(),
            cross_attention=attention(),
            feed_forward=FeedForward(WIDTH, 32, nn.GELU()),
            norm=lambda: nn.LayerNorm(WIDTH),
            dropout=0.2,
        )

    network = Transformer(block, 4)
    stage_layers(network, Peers(rank, 2), microbatches, schedule)
    return network


@contextmanager
def held() -> Iterator[list[int]]:
    """Tensors that graphs hold, parameters apart, whenever one more is."""
    live: weakref.WeakSet[Held] = weakref.WeakSet()
    counts = [0]

    def pack(tensor: Tensor) -> Held:
        kept = Held(tensor)
        if not isinstance(tensor, nn.Parameter):
            live.add(kept)
            counts.append(len(live))
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept.tensor):
        yield counts


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def gradients(rank: int, microbatches: int, schedule: Schedule) -> tuple[dict[str, Tensor], int]:
    """Of two passes through the stack and a loss that couples all samples, in bf16; and the most tensors held at once."""
    network = stage(rank, microbatches, schedule)
    size = ROWS * microbatches
    x, context = (torch.randn(size, LENGTH, WIDTH).requires_grad_() for _ in range(2))
    allowed = torch.rand(size, 1, LENGTH, LENGTH) < 0.8
    allowed[..., 0] = True
    torch.manual_seed(1)
    with held() as counts:
        with torch.autocast("cpu", torch.bfloat16):
            once = network(x, context, mask=Mask(allowed))
            again = network(x, context, mask=Mask(allowed))
            assert not torch.equal(once, again), "nothing was drawn"
            features = once.mean(1)
            loss = (features @ features.T).logsumexp(1).sum() + (once * again).sum()
        loss.backward()
    found = {"output": once.detach(), "x": x.grad, "context": context.grad, "next draw": torch.rand(4)}
    found |= {name: parameter.grad for name, parameter in network.named_parameters() if not parameter.is_meta}
    assert all(value is not None for value in found.values())
    return {name: value for name, value in found.items() if value is not None}, max(counts)


def draws_follow_the_generator(rank: int) -> None:
    """Each pass draws anew, each microbatch, too; where the generator is put back, the same is drawn again."""
    network = stage(rank, 2, "1f1b")
    x = torch.ones(4, LENGTH, WIDTH)
    state = torch.get_rng_state()
    first, second = (network(x, x) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(())
    third = network(x, x)
    torch.set_rng_state(state)
    assert torch.equal(network(x, x), first)
    assert not torch.equal(first, third)
    assert not torch.equal(first, second)
    assert not torch.equal(first[:2], first[2:]), "microbatches draw alike"


def worker(rank: int, size: int, folder: Path) -> None:
    join(rank, size, folder)
    for schedule in get_args(Schedule):
        for microbatches in (4, 8):
            tensors, most = gradients(rank, microbatches, schedule)
            save_file(tensors | {"held": torch.tensor(most)}, folder / f"{schedule}-{microbatches}-{rank}.safetensors")
    draws_follow_the_generator(rank)
    dist.destroy_process_group()


def test_schedules_agree_to_the_bit_and_hold_what_they_say(tmp_path: Path) -> None:
    run_together(worker, tmp_path)
    for rank in range(2):
        found = {
            (schedule, microbatches): load_file(tmp_path / f"{schedule}-{microbatches}-{rank}.safetensors")
            for schedule in get_args(Schedule)
            for microbatches in (4, 8)
        }
        most = {case: int(tensors.pop("held")) for case, tensors in found.items()}
        print(f"stage {rank}: tensors held at once {most}")
        for microbatches in (4, 8):
            kept, again = found["gpipe", microbatches], found["1f1b", microbatches]
            assert len(kept) > 30
            assert kept["x"].any()
            assert all(torch.equal(kept[name], again[name]) for name in kept)
        assert most["1f1b", 8] == most["1f1b", 4]
        assert most["gpipe", 8] > 1.9 * most["gpipe", 4] > 5 * most["1f1b", 4]
