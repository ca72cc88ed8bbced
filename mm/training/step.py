"""One optimizer step on all processes, and the tensors that it changes."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from mm.draws import sample_seeds
from mm.errors import CheckpointError, ConfigError
from mm.placement import blocks, own, whole_shape
from mm.seeding import derive_seed
from mm.training.checkpoint import Checkpoint
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.devices import autocast, choose_dtype, seed_everything
from mm.training.ema import Ema
from mm.training.gradients import backward
from mm.training.layout import Layout
from mm.training.offload import step_by_parts
from mm.training.optim import (
    align_strides,
    build_optimizer,
    load_optimizer_tensors,
    lr_factor,
    optimizer_tensors,
    set_lr,
)
from mm.training.parallel import (
    World,
    broadcast_tensors,
    sum_over_ranks,
)
from mm.training.parameters import outermost_parts
from mm.training.statistics import running_statistics
from mm.types import Batch, Losses, System

BLOCK_VERSIONS = 64
"""Of the code of a block that the compiler keeps: blocks of several stacks, each with and without gradients, share it."""


@dataclass(frozen=True)
class StepReport:
    """What all processes agree happened in a step.

    Args:
        loss: Mean over processes of the total loss.
        grad_norm: Norm of the averaged gradient before clipping.
        parts: Mean over processes of each part of the loss.
        num_samples: Samples of the global batch.
        requests: For each request, whether any process made it.
    """

    loss: float
    grad_norm: float
    parts: Mapping[str, float]
    num_samples: int
    requests: tuple[bool, ...]

    @property
    def finite(self) -> bool:
        """Whether the step was applied; otherwise weights, optimizer and average are untouched."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Stepper:
    """A system with its optimizer and its averaged weights.

    Args:
        system: Moved to the device; every process gets the first one's weights.
        config: Optimisation and precision.
        world: This process among all.
        layout: How they share the network; each has all of it by default.
        validates: Whether `evaluated` will be called.
    """

    def __init__(
        self, system: System, config: TrainConfig, world: World, layout: Layout | None = None, *, validates: bool = False
    ) -> None:
        self._layout = layout or Layout(world, ParallelConfig())
        self._twin = copy.deepcopy(system) if validates and world.is_main and self._layout.divides else None
        self.system, self._config, self._world = system.to(world.device), config, world
        self._layout.begin(system)
        self.dtype = choose_dtype(config.precision, world.device)
        self.optimizer = build_optimizer(system, config, world.device)
        self.ema = Ema(system, config.ema_decay) if config.ema_decay else None
        self._parameters = [p for group in system.parameter_groups() for p in group["params"]]
        self._statistics = list(running_statistics(system).values())
        self._statistics_before = [buffer.clone() for buffer in self._statistics]
        self._autocast = partial(autocast, world.device, self.dtype)
        self._strides_checked = False

    def lr(self, step: int) -> float:
        """Learning rate of a step, the first being 0."""
        return self._config.lr * lr_factor(step, self._config)

    def step(
        self, batch: Batch, step: int, requests: tuple[bool, ...] = (), between: Callable[[], None] | None = None
    ) -> StepReport:
        """Compute the gradient of a global batch and apply it where it is finite.

        Args:
            batch: This process's part.
            step: Steps done before.
            requests: What this process wants all to agree on.
            between: Called when the device has been given its work, before its result is waited for.
        """
        seed_everything(derive_seed(self._config.seed, "step", step, self._world.data_rank), self._world.device)
        seeds = sample_seeds(batch.ids, self._config.seed, "step", step).to(self._world.device)
        batch = batch.seeded(seeds)
        set_lr(self.optimizer, self.lr(step))
        _copy(self._statistics, self._statistics_before)
        self.optimizer.zero_grad(set_to_none=True)
        losses = backward(self.system, batch, step, self._config.accumulate, self._autocast)
        self._layout.synchronise(self._parameters)
        norm = self._layout.clip(self._parameters, self._config.clip_norm)
        if between is not None:
            between()
        report = self._agree(losses, norm, len(batch), requests)
        if report.finite:
            self._apply(step)
        else:  # the forward pass has already spoiled the running statistics
            _copy(self._statistics_before, self._statistics)
        return report

    @contextmanager
    def evaluated(self) -> Iterator[System | None]:
        """The whole network with its averaged weights, where there is an average, on the main process; None elsewhere.

        Its own training goes on as if nothing had happened. All processes enter this together.
        """
        if not self._layout.divides:
            with self.ema.swapped() if self.ema else nullcontext(), _in_evaluation_mode(self.system):
                yield self.system if self._world.is_main else None
            return
        parameters = self.system.state_dict(keep_vars=True)
        weights = self._layout.gathered(self.ema.state_dict(self.system) if self.ema else parameters, parameters)
        if self._twin is None:
            yield None
            return
        self._twin.load_state_dict(weights)
        yield self._twin.to(self._world.device).eval()
        self._twin.cpu()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint holds, by file stem, on the main process. All processes call this together."""
        parameters = self.system.state_dict(keep_vars=True)
        averages = optimizer_tensors(self.optimizer, self.system)
        files = {"model": parameters, "optimizer": averages}
        files |= {} if self.ema is None else {"ema": self.ema.state_dict(self.system)}
        like = parameters | {name: parameters[name.rpartition(":")[0]] for name in averages}
        return {stem: self._layout.gathered(named, like) for stem, named in files.items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Restore `tensors`.

        Raises:
            CheckpointError: When the checkpoint is of another network.
        """
        load_weights(self.system, checkpoint.tensors("model"), str(checkpoint.folder))
        state = checkpoint.tensors("optimizer")
        load_optimizer_tensors(self.optimizer, self.system, state, offload=self._layout.offloads)
        if self.ema is not None:
            averaged = checkpoint.has("ema")  # the average may have been switched on since
            self.ema.load(checkpoint.tensors("ema" if averaged else "model"), int(checkpoint.state["ema_updates"]))

    def _agree(self, losses: Losses, norm: Tensor, num_rows: int, requests: tuple[bool, ...]) -> StepReport:
        """Fetch the step's scalars in one transfer and combine them over processes."""
        scalars = [losses.total, norm, *losses.parts.values()]
        values = torch.stack([value.detach().to(losses.total.device, torch.float32).reshape(()) for value in scalars]).tolist()
        own = [values[0], *values[2:], float(num_rows), *map(float, requests)]
        loss, *rest = sum_over_ranks(own, self._world)
        size, num_parts = self._world.size, len(losses.parts)
        parts = {name: value / size for name, value in zip(losses.parts, rest, strict=False)}
        num_samples = int(rest[num_parts]) // self._world.model_size  # who shares a copy of the network has the same ones
        return StepReport(loss / size, values[1], parts, num_samples, tuple(value > 0 for value in rest[num_parts + 1 :]))

    def _apply(self, step: int) -> None:
        if not self._strides_checked:
            align_strides(self.optimizer)
            self._strides_checked = True
        if self._layout.offloads:
            step_by_parts(self.optimizer)
        else:
            self.optimizer.step()
        broadcast_tensors(self._statistics, self._world)
        self.system.after_step(step)
        if self.ema is not None:
            self.ema.update()


@contextmanager
def _in_evaluation_mode(system: nn.Module) -> Iterator[None]:
    """Each part goes back to its own mode afterwards."""
    modes = [(module, module.training) for module in system.modules()]
    system.eval()
    yield
    for module, training in modes:
        module.training = training


@torch.no_grad()
def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def load_weights(system: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load a complete set of weights strictly. Raises `CheckpointError` naming the first difference."""
    expected = system.state_dict(keep_vars=True)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: holds another network (missing {missing[:2]}, unexpected {unexpected[:2]}); use a new run folder"
        )
    for name, tensor in tensors.items():
        if tensor.shape != whole_shape(expected[name]):
            shapes = f"{tuple(tensor.shape)} there, {tuple(whole_shape(expected[name]))} here"
            raise CheckpointError(f"{where}: holds another network ('{name}' is {shapes}); use a new run folder")
    system.load_state_dict({name: own(tensor, expected[name]) for name, tensor in tensors.items()})


def compile_parts(system: nn.Module, *, by_block: bool = False) -> None:
    """Compile in place the outermost parts with a forward of their own: encoders and projections.

    Not the system itself: its batch carries ids, which would make every step a new graph.

    Args:
        system: In place.
        by_block: Compile each block by itself instead.

    Raises:
        ConfigError: There are no blocks.
    """
    if not by_block:
        for _, part in outermost_parts(system):
            part.compile()
        return
    found = list(blocks(system))
    if not found:
        raise ConfigError("train.compile: this system has no blocks that could be compiled one by one; set it to false")
    import torch._dynamo  # slow

    torch._dynamo.config.recompile_limit = BLOCK_VERSIONS
    for block in found:
        block.forward = torch.compile(block.forward)
