"""Pipeline parallelism: each process holds consecutive layers of every stack of layers, and all else like the others.

Parts of the batch, microbatches, pass through the stages one behind the other. Where a stack ends all stages are given its
result, so whatever surrounds it, heads, losses that couple the whole batch, other stacks, is computed by all alike and needs to
know nothing of stages. A contrastive loss has no gradient before all microbatches are through. What a stage keeps until then:

| Schedule | Forward pass keeps           | Backward pass            | Activations at once | Costs |
|----------|------------------------------|--------------------------|---------------------|-------|
| gpipe    | all activations              | one backward after the other | of M microbatches | -     |
| 1f1b     | what arrived at the stage, and the activations of the last microbatch | one forward again, one backward, in turn | of 1 microbatch | M - 1 forward passes of M |

PipeDream's 1F1B (https://arxiv.org/abs/1806.03377, section 3.2) keeps as many microbatches as there are stages behind this one,
because a microbatch must pass them before its gradient comes back. Here they have been there already: each stage has the inputs
of all microbatches, computes the next one again while it waits for that one's gradient, and never needs to be further ahead.

GPipe: https://arxiv.org/abs/1811.06965. Shapes: B samples of a process, M microbatches.
"""  # noqa: E501 - a table

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mm.errors import ConfigError, UserError
from mm.nn.masks import EVERYTHING, Mask
from mm.nn.transformer import Transformer
from mm.ranks import Peers, sum_over
from mm.seeding import derive_seed

Shared = tuple[Tensor | None, ...]
Run = Callable[[slice, Tensor, Shared], Tensor]
"""Own layers: rows of the batch, their input, and their part of what all layers read, to the output."""

Schedule = Literal["gpipe", "1f1b"]


class Pipeline:
    """The stages that a stack runs through.

    Args:
        peers: The processes, in the order of the layers.
        microbatches: M, fewer for batches of fewer samples.
        schedule: What is kept for the backward pass, see above.
        name: Of the stack.
    """

    def __init__(self, peers: Peers, microbatches: int, schedule: Schedule = "gpipe", name: str = "") -> None:
        self.peers, self.microbatches, self.schedule = peers, microbatches, schedule
        self._name = name
        self._state, self._passes = b"", 0

    def seed(self) -> int:
        """For what a pass draws: of the generator's state, which stays as it is, and of the passes before in that state."""
        state = torch.get_rng_state().numpy().tobytes()
        self._passes = self._passes + 1 if state == self._state else 0
        self._state = state
        return derive_seed(zlib.crc32(state), self._name, self._passes)

    @contextmanager
    def draws(self, seed: int, microbatch: int, device: torch.device) -> Iterator[None]:
        """Random numbers of this stage's own, the same for the same arguments; afterwards generators are as they were."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(derive_seed(seed, microbatch, self.peers.rank))
            yield

    def layers(self, num_layers: int, stage: int) -> range:
        """Those of a stage, of so many."""
        return range(num_layers * stage // self.peers.size, num_layers * (stage + 1) // self.peers.size)

    def own(self, num_layers: int) -> range:
        """Those of this process."""
        return self.layers(num_layers, self.peers.rank)

    def rows(self, size: int) -> list[slice]:
        """The microbatches of ``size`` samples."""
        count = min(self.microbatches, size)
        return [slice(size * i // count, size * (i + 1) // count) for i in range(count)]

    def __call__(self, run: Run, x: Tensor, shared: Shared, learns: bool) -> Tensor:
        """The result of all stages, on all of them.

        Args:
            run: Own layers; they keep the shape and the type of ``x``.
            x: ``(B, ...)``, alike on all stages.
            shared: Other tensors of B rows that layers read, alike on all stages.
            learns: Whether any layer of any stage is trained.
        """
        learns = learns or any(value is not None and value.requires_grad for value in (x, *shared))
        anchor = torch.zeros((), requires_grad=learns and torch.is_grad_enabled())  # even if only layers learn
        return _Staged.apply(self, run, anchor, x, *shared)  # pyright: ignore[reportReturnType]

    def receive(self, like: Tensor, step: int) -> Tensor:
        """What the stage ``step`` places further on sends."""
        arrived = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(arrived, group=self.peers.group, group_src=self.peers.rank + step)
        return arrived

    def send(self, value: Tensor, step: int) -> tuple[Any, Tensor]:
        """Begin to send to the stage ``step`` places further on: what to wait for, and what must be kept until then."""
        value = value.contiguous()
        return dist.isend(value, group=self.peers.group, group_dst=self.peers.rank + step), value

    def from_stage(self, value: Tensor, stage: int) -> Tensor:
        """A tensor of a stage, on all of them."""
        dist.broadcast(value, group=self.peers.group, group_src=stage)
        return value


def stage_layers(network: nn.Module, peers: Peers, microbatches: int, schedule: Schedule = "gpipe") -> None:
    """Leave this process its layers of every stack, in place; those of other stages are on the meta device from then on.

    Stacks are `Transformer` and the blocks of picture towers. What has fewer layers than there are stages stays whole, as do
    blocks with batch normalisation, whose statistics would be of one stage alone.

    Raises:
        ConfigError: There is no stack of as many layers as there are stages.
    """
    found = False
    for name, part in list(network.named_modules()):
        pipeline = Pipeline(peers, microbatches, schedule, name)
        transformer = isinstance(part, Transformer)
        stack: Any = part.blocks if transformer else part
        sequence = isinstance(part, nn.Sequential) and name.endswith("blocks")
        normed = any(isinstance(inner, _NormBase) for inner in part.modules())
        if not (transformer or sequence) or len(stack) < peers.size or normed:
            continue
        found = True
        for stage in range(peers.size):
            for layer in pipeline.layers(len(stack), stage):
                _belongs(stack[layer], stage, peers)
        if transformer:
            _belongs(part.final_norm, peers.size - 1, peers)
        part.forward = partial(_transformer if transformer else _sequence, pipeline, part, part.forward)
    if not found:
        raise ConfigError(f"parallel.pipeline {peers.size}: this system has no stack of so many layers; take fewer stages")


def _belongs(part: nn.Module, stage: int, peers: Peers) -> None:
    """Note whose it is, and let go of what is another stage's."""
    for module in part.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            kept: Any = parameter
            if stage != peers.rank:
                kept = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
                vars(kept).update(vars(parameter))
                setattr(module, name, kept)
            kept.stage = stage
    if stage != peers.rank:
        part.forward = _absent


def _absent(*_: Any, **__: Any) -> Any:
    raise UserError("parallel.pipeline: this system asks single layers, which other stages hold; set it to 1")


def _sequence(pipeline: Pipeline, part: nn.Sequential, _: Any, x: Tensor) -> Tensor:
    own = [part[layer] for layer in pipeline.own(len(part))]

    def run(rows: slice, x: Tensor, shared: Shared) -> Tensor:
        for block in own:
            x = block(x)
        return x

    return pipeline(run, x, (), _learns(part))


def _transformer(
    pipeline: Pipeline,
    part: Transformer,
    forward: Callable[..., Tensor],
    x: Tensor,
    context: Any = None,
    *,
    mask: Mask | Sequence[Mask] = EVERYTHING,
    context_mask: Mask = EVERYTHING,
    condition: Tensor | None = None,
    token_ids: Tensor | None = None,
    layers: range | None = None,
    **options: Any,
) -> Tensor:
    """`Transformer.forward` in training."""
    if isinstance(context, tuple) or any(value is not None for value in options.values()):
        raise UserError("parallel.pipeline: layers of other stages neither decode nor give attention maps; set it to 1")
    size, asked = len(x), layers or range(len(part.blocks))
    whole = pipeline.own(len(part.blocks))
    own = range(max(whole.start, asked.start), min(whole.stop, asked.stop))

    def run(rows: slice, x: Tensor, shared: Shared) -> Tensor:
        masks = _rows(mask, rows, size) if isinstance(mask, Mask) else [_rows(layer, rows, size) for layer in mask]
        told = {"mask": masks, "context_mask": _rows(context_mask, rows, size), "condition": shared[1]}
        told["token_ids"] = None if token_ids is None else token_ids[rows]
        return forward(x, shared[0], **told, layers=own) if len(own) else x

    return pipeline(run, x, (context, condition), _learns(part))


def _learns(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())


def _rows(mask: Mask, rows: slice, size: int) -> Mask:
    """What some of ``size`` samples may see."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return tensor[rows] if tensor is not None and tensor.ndim == 4 and len(tensor) == size else tensor

    return replace(mask, allowed=cut(mask.allowed), empty=cut(mask.empty))


@dataclass
class _Pass:
    """Own layers with all that their results depend on, to compute a microbatch once, or again.

    Args:
        pipeline: The stages.
        run: Own layers.
        seed: Of random draws, alike on all stages.
        device: Where layers compute.
        precision: Of autocast; None without it.
    """

    pipeline: Pipeline
    run: Run
    seed: int
    device: torch.device
    precision: torch.dtype | None

    def compute(self, microbatch: int, rows: slice, arrived: Tensor, shared: Shared, learns: bool) -> tuple[list[Any], Tensor]:
        """Inputs, and the output with a graph from them if any layer ``learns``.

        Autocast keeps casts of weights, and those made without a graph must not serve a pass that needs one.
        """
        inputs = (arrived, *(value if value is None else value[rows] for value in shared))
        leaves: list[Any] = [None if value is None else value.detach().requires_grad_(learns) for value in inputs]
        precision = torch.autocast(self.device.type, self.precision, enabled=self.precision is not None, cache_enabled=learns)
        with self.pipeline.draws(self.seed, microbatch, self.device), precision, torch.set_grad_enabled(learns):
            output = self.run(rows, leaves[0], tuple(leaves[1:]))
            return leaves, output.to(arrived.dtype)


class _Staged(torch.autograd.Function):
    """Passes through all stages; own layers have graphs of their own, which the backward pass goes through."""

    @staticmethod
    def forward(ctx: Any, pipeline: Pipeline, run: Run, anchor: Tensor, x: Tensor, *shared: Tensor | None) -> Tensor:
        rank, last, learns = pipeline.peers.rank, pipeline.peers.size - 1, anchor.requires_grad
        kind = x.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        own = _Pass(pipeline, run, pipeline.seed(), x.device, precision)
        ctx.own, ctx.arrived, ctx.graphs = own, [], []
        ctx.save_for_backward(x if rank == 0 else None, *shared)
        result, sent, cuts = torch.empty_like(x, memory_format=torch.contiguous_format), [], pipeline.rows(len(x))
        for microbatch, rows in enumerate(cuts):
            keeps = learns and (pipeline.schedule == "gpipe" or microbatch == len(cuts) - 1)
            arrived = x[rows] if rank == 0 else pipeline.receive(x[rows], -1)
            leaves, output = own.compute(microbatch, rows, arrived, shared, keeps)
            if keeps:
                ctx.graphs.append((leaves, output))
            elif learns and rank:
                ctx.arrived.append(arrived)
            if rank < last:
                sent.append(pipeline.send(output.detach(), 1))
            else:
                result[rows] = output.detach()
        for work, _ in sent:
            work.wait()
        return pipeline.from_stage(result, last)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own: _Pass = ctx.own
        pipeline = own.pipeline
        rank, last = pipeline.peers.rank, pipeline.peers.size - 1
        x, *shared = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        of_input = torch.zeros_like(gradient)
        of_shared = [None if value is None else torch.zeros_like(value) for value in shared]
        sent = []
        for microbatch, rows in reversed([*enumerate(pipeline.rows(len(gradient)))]):
            if ctx.graphs:
                leaves, output = ctx.graphs.pop()
            else:
                arrived = x[rows] if rank == 0 else ctx.arrived.pop()
                leaves, output = own.compute(microbatch, rows, arrived, tuple(shared), True)
            arrived = gradient[rows] if rank == last else pipeline.receive(gradient[rows], 1)
            if output.requires_grad:
                torch.autograd.backward(output, arrived)
            of_rows = torch.zeros_like(leaves[0]) if leaves[0].grad is None else leaves[0].grad
            if rank:
                sent.append(pipeline.send(of_rows, -1))
            else:
                of_input[rows] = of_rows
            for total, leaf in zip(of_shared, leaves[1:], strict=True):
                if total is not None and leaf.grad is not None:
                    total[rows] = leaf.grad
        for work, _ in sent:
            work.wait()
        of_shared = [None if total is None else sum_over(total, pipeline.peers.group) for total in of_shared]
        return None, None, None, pipeline.from_stage(of_input, 0), *of_shared
