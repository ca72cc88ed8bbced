"""Who holds what of a network: the same training whether each process has all of it, a share of each layer, or some layers.

| Axis     | What differs among its processes | Who brings the gradients together |
|----------|----------------------------------|-----------------------------------|
| data     | samples; with fsdp, shares of each parameter | `average_gradients`; with fsdp FSDP2, which also gathers parameters |
| pipeline | layers                           | nobody: a layer is of one stage. What all stages compute alike is averaged |
| tensor   | heads and hidden features        | nobody: each has its own. What all compute alike is averaged |

Neighbouring ranks share a copy of the network, tensor parallel ones above all, since they talk most. Averaging what is computed
alike changes nothing but the last bits, by which copies would drift apart where a device does not add in the same order twice.

FSDP2: https://arxiv.org/abs/2411.00284. Hybrid sharding: https://arxiv.org/abs/2304.11277. Networks are cut in tensor and
pipeline parallel by `mm.nn.parallel`, which knows their layers.
"""  # noqa: E501 - a table

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from mm.placement import blocks, is_sharded, local, whole
from mm.ranks import Peers, set_data_peers, single
from mm.training.config import ParallelConfig
from mm.training.parallel import World, average_gradients, broadcast_module, gather_json
from mm.types import CachesGradients, Follows, Losses, System

AXES = ("replicas", "shards", "stages", "slices")

Divide = Callable[..., None]
"""Cuts a network, see `mm.nn.parallel.divide`."""


class Layout:
    """What a training asks of the way in which its processes share a network.

    Args:
        world: All processes.
        config: How they share it.
        divide: Cuts networks; needed for tensor and pipeline parallelism and for recomputation.

    Raises:
        ConfigError: So many processes cannot be shared out like this.
    """

    def __init__(self, world: World, config: ParallelConfig, divide: Divide | None = None) -> None:
        self._world, self._config, self._divide = world, config, divide
        data_size = config.data_size(world.size)
        self.data, self._slices, self._stages, self._shards = Peers(world.rank, world.size), Peers(), Peers(), Peers()
        self._mesh: Any = None
        ring = None if config.contrastive == "auto" else config.contrastive == "ring"
        set_data_peers(replace(self.data, ring=ring))
        if world.size == 1 or (config.model_size == 1 and config.data == "ddp"):
            return
        from torch.distributed.device_mesh import init_device_mesh

        shards = data_size // config.replicas
        mesh = init_device_mesh(
            world.device.type, (config.replicas, shards, config.pipeline, config.tensor), mesh_dim_names=AXES
        )
        samples = mesh["replicas", "shards"]._flatten("samples")
        self.data, self._stages, self._slices = (_peers(part) for part in (samples, mesh["stages"], mesh["slices"]))
        set_data_peers(replace(self.data, ring=ring))
        if config.data == "fsdp":
            self._shards = _peers(mesh["shards"])
            self._mesh = mesh["shards"] if config.replicas == 1 else mesh["replicas", "shards"]

    @property
    def divides(self) -> bool:
        """Whether a process has less than the whole network."""
        return self._world.size > 1 and (self._mesh is not None or self._config.model_size > 1)

    @property
    def offloads(self) -> bool:
        """Whether the optimizer's state waits on the CPU."""
        return self._config.offload

    def begin(self, system: System) -> None:
        """Give every process the first one's weights, then leave each with its share. Parameters may be other objects then."""
        broadcast_module(system, self._world)
        for part in system.modules():
            if isinstance(part, Follows):
                part.take_over()
        if self._divide is not None:
            options = {name: getattr(self._config, name) for name in ("microbatches", "schedule", "recompute")}
            self._divide(system, stages=self._stages, slices=self._slices, **options)
        if self._mesh is not None:
            _shard(system, self._mesh, self._world.device)

    def synchronise(self, parameters: Sequence[Tensor]) -> None:
        """Make each ``.grad`` that of the global batch."""
        average_gradients([p for p in parameters if not is_sharded(p)], self._world, self.data)
        average_gradients([p for p in parameters if not hasattr(p, "stage")], self._world, self._stages, alike=True)
        average_gradients([p for p in parameters if not hasattr(p, "sliced")], self._world, self._slices, alike=True)

    def clip(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        """Scale gradients in place to a global norm of at most ``max_norm`` (0: leave them); returns the norm before."""
        norm = self._norm(parameters)
        gradients = _gradients(parameters)
        if max_norm > 0 and gradients:
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def gathered(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors, on the CPU of the main process; others return nothing of use. All processes call this together.

        Args:
            tensors: Of one name to the pieces that are here.
            like: Of the same name to the parameter that lies likewise, where there is one.
        """
        if not self.divides:
            return dict(tensors)
        complete = {}
        for name, tensor in tensors.items():
            parameter = like.get(name, tensor)
            value = whole(tensor.to(parameter.device), parameter)
            if self._world.rank < self._config.model_size and not value.is_meta:
                complete[name] = value.cpu()
        return complete if self._stages.size == 1 else self._from_all_stages(complete, tensors, like)

    def _from_all_stages(
        self, complete: dict[str, Tensor], tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the first stage does not have, sent by the others."""
        own = {name: tensor for name, tensor in complete.items() if hasattr(like.get(name, tensor), "stage")}
        shapes = {name: (list(tensor.shape), str(tensor.dtype).removeprefix("torch.")) for name, tensor in own.items()}
        everyone = gather_json(shapes, self._world)
        for stage in range(1, self._stages.size):
            for name, (shape, dtype) in everyone[stage * self._slices.size].items():
                if self._world.rank == stage * self._slices.size:
                    dist.send(own[name].contiguous(), 0, group=self._world.control)
                elif self._world.is_main:
                    complete[name] = torch.empty(shape, dtype=getattr(torch, dtype))
                    dist.recv(complete[name], stage * self._slices.size, group=self._world.control)
        order = [*tensors, *complete]  # as in a single process, then what has no piece here
        return {name: complete[name] for name in dict.fromkeys(order) if name in complete}

    def _norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Norm of the whole gradient: squares are added over the processes that hold other parts of a parameter."""
        if all(group.size == 1 for group in (self._shards, self._stages, self._slices)):
            return _total_norm(parameters)
        kinds: dict[tuple[int, int, int], list[Tensor]] = {}
        for p in parameters:
            kind = int(is_sharded(p)), int(hasattr(p, "stage")), int(hasattr(p, "sliced"))  # booleans would be a mask
            kinds.setdefault(kind, []).append(p)
        squares = torch.zeros(2, 2, 2, device=self._world.device)
        for kind, members in kinds.items():
            squares[kind] = _total_norm(members).square()
        for axis, peers in enumerate((self._shards, self._stages, self._slices)):
            if peers.size > 1:
                divided = squares.select(axis, 1).clone()
                dist.all_reduce(divided, group=peers.group)
                squares.select(axis, 1).copy_(divided)
        return squares.sum().sqrt()


def _gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parts that lie here."""
    return [local(p.grad) for p in parameters if p.grad is not None]


def _total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Of the parts that lie here, in fp32."""
    return get_total_norm(list(map(single, _gradients(parameters))))


def _peers(mesh: Any) -> Peers:
    return Peers(mesh.get_local_rank(), mesh.size(), mesh.get_group())


def _shard(system: System, mesh: Any, device: torch.device) -> None:
    """FSDP2: each block a unit that is gathered for its passes, and all else one that stays whole from the first to the last.

    Weights are gathered as they are, in fp32 but for those that were loaded in 16 bits: autocast makes what is computed bf16.
    Gradients are added in fp32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    marks = {name: vars(parameter) for name, parameter in system.named_parameters()}
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in blocks(system):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    ignored = {p for p in system.parameters() if not p.ndim}
    fully_shard(system, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    for name, parameter in system.named_parameters():
        vars(parameter).update(marks[name])
    for part in system.modules():
        if isinstance(part, FSDPModule) and device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    if isinstance(system, CachesGradients):
        register_fsdp_forward_method(system, "represent")
    _show_losses()


@functools.cache
def _show_losses() -> None:
    """Let FSDP2 find the tensor that the backward pass starts from."""
    from torch.export import register_dataclass

    register_dataclass(Losses)
