"""A training step without its numbers: the code that trains, on weights that have shapes and no data (`FakeTensorMode`).

Only the weights, and the floats that are computed from them, are without data. Batches, masks and random draws are real, so
whatever the code decides by them (which tokens are masked, which texts are short) is decided as in training. What it decides by
the network's own output gets some value that is possible: every condition holds, indices go round.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from mm.placement import blocks
from mm.ranks import Peers
from mm.training.config import ParallelConfig, TrainConfig
from mm.training.devices import autocast
from mm.training.ema import Ema
from mm.training.gradcache import GeneratorState
from mm.training.gradients import backward
from mm.training.layout import Divide, Layout
from mm.training.meter import Cost, Meter, tensors_in
from mm.training.optim import build_optimizer
from mm.training.parallel import World
from mm.types import Batch, System

CPU = torch.device("cpu")
Recompute = Literal["none", "selective", "full"]

_aten = torch.ops.aten
_INDEXING = (
    _aten.index,
    _aten.index_put,
    _aten.index_put_,
    _aten._index_put_impl_,
    _aten._unsafe_index,
    _aten._unsafe_index_put,
)

CUDA_SINGLE = frozenset(
    """cosine_similarity cross_entropy cumsum exp group_norm kl_div layer_norm log log_softmax mse_loss nll_loss norm normalize
    pow prod rms_norm rsqrt smooth_l1_loss softmax softplus sum""".split()  # noqa: SIM905 - as a list it fills a screen
)
"""Functions that autocast computes in fp32 on CUDA and, most of them, in bf16 on the CPU."""


class Simulation(Meter):
    """A `Meter` for tensors without data. Integers and conditions that follow from such get values: every condition holds, and
    indices go round."""

    def call(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        packet = func._overloadpacket
        if packet in _INDEXING:
            args = (args[0], _numbered(args[1]), *args[2:])
        elif packet is _aten.bincount:
            args = _counted(*args)
        elif packet is _aten._ctc_loss:
            return _ctc(*args[:4])
        elif packet is _aten._local_scalar_dense and isinstance(args[0], FakeTensor):
            return 1.0
        result = super().call(func, args, kwargs)
        if all(tensor.is_floating_point() for tensor in tensors_in(result)):
            return result
        largest = min((size for tensor in tensors_in(args) for size in tensor.shape), default=1)
        return tree_map(partial(_decided, largest=max(largest, 1)), result)


class CudaAutocast(TorchFunctionMode):
    """Lets autocast on the CPU choose precisions as it does on CUDA."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in CUDA_SINGLE and torch.is_autocast_enabled("cpu"):
            args, options = tuple(map(_single, args)), {name: _single(value) for name, value in options.items()}
        return func(*args, **options)


def _as_on_cuda(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What is computed again in a backward pass is outside of all function modes."""
    with CudaAutocast():
        return forward(*args, **kwargs)


def without_data(system: System) -> System:
    """A copy whose floating-point weights have no data; shared ones stay shared, and integers are real."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    replaced: dict[int, Any] = {}
    for tensor in (*system.parameters(), *system.buffers()):
        if tensor.is_floating_point() and id(tensor) not in replaced:
            fake = mode.from_tensor(tensor.detach())
            isparameter = isinstance(tensor, nn.Parameter)
            replaced[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad) if isparameter else fake
    return copy.deepcopy(system, replaced)


@dataclass(frozen=True)
class Simulated:
    """A step of one process that holds the whole network.

    Args:
        cost: Its operations, and its memory over time.
        samples: Of its batch.
        weights: Bytes of parameters and buffers.
        averages: Bytes of averaged weights.
        gradients: Bytes of all gradients.
        optimizer: Bytes of the optimizer's state.
    """

    cost: Cost
    samples: int
    weights: int
    averages: int
    gradients: int
    optimizer: int

    @property
    def peak(self) -> float:
        """Most bytes of tensors at any moment."""
        return self.weights + self.averages + self.optimizer + self.cost.peak()


def simulate(
    system: System,
    batch: Batch,
    config: TrainConfig,
    dtype: torch.dtype,
    *,
    like_cuda: bool = False,
    recompute: Recompute = "none",
    divide: Divide | None = None,
    remembers: bool = False,
) -> Simulated:
    """Let a copy of ``system`` train on ``batch``, with the optimizer's state in place, as in any step but the first.

    Args:
        system: Not changed.
        batch: What one process computes in a step.
        config: Optimizer, accumulation, averages.
        dtype: Of the computations; weights are in fp32.
        like_cuda: Let autocast choose precisions as on CUDA.
        recompute: What of the blocks the backward pass computes again, see `mm.training.config.ParallelConfig`.
        divide: Changes networks so; needed for recomputation, see `mm.training.layout.Layout`.
        remembers: The system keeps what it made of each picture; it has seen this batch before.
    """
    network = without_data(system)
    network.train()
    if recompute != "none":
        for block in blocks(network) if like_cuda else ():
            block.forward = partial(_as_on_cuda, block.forward)
        assert divide is not None
        divide(network, stages=Peers(), slices=Peers(), recompute=recompute)
    optimizer, layout = build_optimizer(network, config, CPU), Layout(World(0, 1, CPU), ParallelConfig())
    averages = Ema(network, config.ema_decay) if config.ema_decay else None
    own = [*network.parameters(), *network.buffers()]
    generators = GeneratorState(CPU)
    with CudaAutocast() if like_cuda else nullcontext():
        if remembers:
            with Simulation(), torch.no_grad(), autocast(CPU, dtype):
                network(batch, 0)
        states = _states(optimizer)
        averaged = [] if averages is None else list(averages.state_dict(network).values())
        with Simulation(network, (*states, *averaged)) as meter:
            backward(network, batch, 0, config.accumulate, partial(autocast, CPU, dtype))
            meter.begin_update()
            layout.clip([p for group in optimizer.param_groups for p in group["params"]], config.clip_norm)
            optimizer.step()
            if averages is not None:
                averages.update()
    generators.restore()
    return Simulated(
        cost=meter.cost,
        samples=len(batch),
        weights=storage_bytes(own),
        averages=storage_bytes([*own, *averaged]) - storage_bytes(own),
        gradients=storage_bytes(parameter.grad for parameter in network.parameters() if parameter.grad is not None),
        optimizer=storage_bytes(states),
    )


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The optimizer's state, made by a step that changes nothing but that: of gradients without data."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors; what several share is counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _counted(ids: Tensor, weights: Tensor | None = None, fewest: int = 0) -> tuple[Tensor, Tensor | None, int]:
    """Arguments of ``bincount`` with ids that stand in the place of any others below the number of counts that is asked for."""
    return (ids % fewest if fewest else ids), weights, fewest


def _ctc(log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any) -> tuple[Tensor, Tensor]:
    """What torch's CTC loss gives: its value of each sample ``(B,)``, and ``(B, T, 2 S + 1)`` for the backward pass."""
    num_steps, size, _ = log_probs.shape
    return log_probs.new_empty(size), log_probs.new_empty(size, num_steps, 2 * int(max(target_lengths)) + 1)


def _numbered(indices: Any) -> list[Tensor | None]:
    """Positions in the place of masks: how many values are true decides about shapes."""
    numbered: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            numbered += index.nonzero(as_tuple=True)
        else:
            numbered.append(index)
    return numbered


def _decided(value: Any, largest: int) -> Any:
    """A real tensor in the place of one without data that is not of floats."""
    if not isinstance(value, FakeTensor) or value.is_floating_point():
        return value
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool)
    return torch.arange(value.numel()).remainder(largest).reshape(value.shape).to(value.dtype)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
