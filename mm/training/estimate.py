"""What a step costs each process in the ways that processes can share it: memory and time, from a step of one that has it all.

| Layout   | Weights, averages, optimizer, gradients         | Activations | Sent |
|----------|-------------------------------------------------|-------------|------|
| ddp      | all                                             | of its samples | gradients |
| fsdp     | a share; whole: one block and the next one, and what is in no block | of its samples | weights twice, gradients |
| hsdp     | as fsdp, within each of the replicas            | of its samples | the same, and shares of gradients |
| tensor   | of attention and feed-forward a share           | of these a share | what they give, each way |
| pipeline | of blocks a share                               | of its blocks: of all microbatches, in 1f1b of one; and what is outside | little |

Of ddp and fsdp the activations are those of the simulated step; those of tensor and pipeline are scaled from it. How much of
them blocks keep follows from a step that computes them again. Shares of weights are those of a network that is cut as a training
would cut it, and what a training refuses is not among the layouts.

The time is the sum over kernels of what binds each: arithmetic, memory or its launch (the roofline,
https://doi.org/10.1145/1498765.1498785).
"""  # noqa: E501 - a table

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mm.errors import ConfigError
from mm.placement import blocks
from mm.ranks import Peers
from mm.training.hardware import Device
from mm.training.layout import Divide
from mm.training.meter import PASSES, SPLIT_PARTS, Cost, Phase
from mm.training.offload import PART_BYTES
from mm.training.simulate import Recompute, Simulated, storage_bytes, without_data
from mm.types import System

REACHED_ARITHMETIC, REACHED_BANDWIDTH = 0.7, 0.8
"""Of the peaks, by kernels that one of them binds."""

LAUNCH_SECONDS = 5e-6
"""Between the beginnings of two kernels without compilation."""

USABLE_MEMORY, RESERVED_BYTES = 0.92, 1 << 30
"""Share of an accelerator's memory that fragments leave, and what its context and libraries take."""

MACHINE_SIZE = 8
"""Accelerators that a fast link joins; beyond, the network."""

NETWORK = 50e9
"""Between machines, bytes/s an accelerator in one direction: 400 Gbit/s."""

HOST = 12e9
"""Between an accelerator and the CPU's memory, bytes/s in one direction: a rough share of PCIe's, as pages are not locked."""

Data = Literal["ddp", "fsdp"]
Bound = Literal["arithmetic", "memory", "launches", "sending", "waiting"]
"""What takes the time: products, memory traffic, launches of kernels, what is sent and not hidden, stages that wait."""


@dataclass(frozen=True)
class Sharing:
    """How processes share a training; the names are those of a ``parallel:`` section.

    Args:
        data: Whether each process holds all weights, or FSDP2 shares them out.
        replicas: Groups of processes that each share out one copy (HSDP).
        tensor: Processes that compute each layer together.
        pipeline: Processes that each have some of the blocks.
        microbatches: Parts of a batch that follow each other through the pipeline.
        schedule: Whether its stages keep the activations of all of them, or of one at a time, computing them again.
        recompute: What of the blocks the backward pass computes again.
    """

    data: Data = "ddp"
    replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    microbatches: int = 1
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    recompute: Recompute = "none"

    @property
    def model_size(self) -> int:
        """Processes that share the work on one sample."""
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        """What the field calls it."""
        return self._axis + {"none": "", "selective": " sel.", "full": " full"}[self.recompute]

    @property
    def _axis(self) -> str:
        if self.tensor > 1:
            return f"tensor {self.tensor}"
        if self.pipeline > 1:
            return f"pipeline {self.pipeline}" + (" 1f1b" if self.schedule == "1f1b" else "")
        if self.data == "fsdp":
            return "fsdp" if self.replicas == 1 else f"hsdp {self.replicas}"
        return self.data

    def settings(self) -> dict[str, Any]:
        """What differs from the defaults: the ``parallel:`` section."""
        return {key: value for key, value in vars(self).items() if value != getattr(Sharing, key)}


@dataclass(frozen=True)
class Structure:
    """How the weights of a network lie.

    Args:
        num_blocks: Repeated parts.
        blocks: Bytes of all of them.
        largest: Bytes of the largest one.
        num_stacks: Lists of them.
        num_parts: Attention and feed-forward layers.
        tensor: Largest number of processes that can compute its layers together; 1 where none can.
        tensor_share: Of the weights, on each of them.
        pipeline: Largest number of stages that its layers can be cut into; 1 where none can.
        pipeline_share: Of the weights, on the stage that has most of them.
    """

    num_blocks: int
    blocks: int
    largest: int
    num_stacks: int = 0
    num_parts: int = 0
    tensor: int = 1
    tensor_share: float = 1.0
    pipeline: int = 1
    pipeline_share: float = 1.0


def structure(system: System, processes: int, divide: Divide) -> Structure:
    """Look at a network, and try how so many processes could cut it by ``divide``, see `mm.training.layout.Layout`."""
    sizes = [storage_bytes(block.parameters()) for block in blocks(system)]
    counts = [n for n in range(min(MACHINE_SIZE, processes), 1, -1) if processes % n == 0]
    tensor = next(((n, share) for n in counts if (share := _cut_share(system, divide, slices=n)) < 1), (1, 1.0))
    pipeline = next(((n, share) for n in counts if (share := _cut_share(system, divide, stages=n)) < 1), (1, 1.0))
    names = [name for name, _ in system.named_modules()]
    return Structure(
        num_blocks=len(sizes),
        blocks=sum(sizes),
        largest=max(sizes, default=0),
        num_stacks=sum(name.endswith("blocks") for name in names),
        num_parts=sum(name.rpartition(".")[2] in SPLIT_PARTS for name in names),
        tensor=tensor[0],
        tensor_share=tensor[1],
        pipeline=pipeline[0],
        pipeline_share=pipeline[1],
    )


def _cut_share(system: System, divide: Divide, *, stages: int = 1, slices: int = 1) -> float:
    """Share of the weights that the last of so many processes keeps; 1 where a training would refuse."""
    network = without_data(system)
    total = storage_bytes(network.parameters())
    try:
        divide(network, stages=Peers(stages - 1, stages), slices=Peers(slices - 1, slices))
    except ConfigError:
        return 1.0
    kept = (one for one in network.parameters() if getattr(one, "stage", stages - 1) == stages - 1)
    return storage_bytes(kept) / max(total, 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the fullest moment of a step."""

    weights: float
    averages: float
    optimizer: float
    gradients: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.averages + self.optimizer + self.gradients + self.activations


@dataclass(frozen=True)
class Estimate:
    """A layout on a device.

    Args:
        sharing: The layout.
        memory: Of each process.
        fits: Whether the device has so much.
        seconds: Of a step.
        samples_per_second: Of all processes.
        mfu: FLOPs of the network without recomputation, over what the devices could do in that time.
        shares: Of the time, by what takes it.
    """

    sharing: Sharing
    memory: Memory
    fits: bool
    seconds: float
    samples_per_second: float
    mfu: float
    shares: Mapping[Bound, float]


@dataclass(frozen=True)
class Setting:
    """What all layouts of a plan have in common.

    Args:
        steps: A step on the samples that a process has under data parallelism, for each way to recompute blocks that there is.
        structure: Of the network.
        device: Where.
        processes: How many.
        batch_size: Samples of a step, over all processes.
        dtype: Of the computations.
        mfu: Share of the peak that is reached; None to estimate it kernel by kernel.
        offload: Whether the optimizer's state waits on the CPU.
    """

    steps: Mapping[Recompute, Simulated]
    structure: Structure
    device: Device
    processes: int
    batch_size: int
    dtype: torch.dtype
    mfu: float | None = None
    offload: bool = False


def usable(device: Device) -> float:
    """Bytes of a device that a training may fill."""
    return USABLE_MEMORY * device.memory - (RESERVED_BYTES if device.cuda else 0)


def sharings(processes: int, batch_size: int, structure: Structure) -> list[Sharing]:
    """Layouts that so many processes, such a batch and such a network allow, the simplest first."""
    found = [Sharing()]
    if processes > 1:
        found.append(Sharing(data="fsdp"))
        replicas = processes // MACHINE_SIZE if processes > MACHINE_SIZE else 2
        if processes >= 4 and processes % replicas == 0:
            found.append(Sharing(data="fsdp", replicas=replicas))
        if structure.tensor > 1:
            found.append(Sharing(tensor=structure.tensor))
        stages = structure.pipeline
        samples = batch_size * stages // processes
        parts = max((n for n in range(1, 4 * stages + 1) if samples % n == 0), default=1)
        if stages > 1 and parts >= stages:
            found += [Sharing(pipeline=stages, microbatches=parts, schedule=schedule) for schedule in ("gpipe", "1f1b")]
    ways: tuple[Recompute, ...] = ("none", "selective", "full") if structure.num_blocks else ("none",)
    return [
        replace(sharing, recompute=way)
        for way in ways
        for sharing in found
        if way == "none" or sharing.schedule == "gpipe"  # 1f1b computes again already
    ]


def estimate(sharing: Sharing, setting: Setting) -> Estimate:
    """Memory and time of a layout."""
    memory, times, step = _memory(sharing, setting), _seconds(sharing, setting), setting.steps[sharing.recompute]
    seconds = sum(times.values())
    speed = setting.batch_size / seconds
    useful = step.cost.flops("forward", "backward") / step.samples
    reached = speed * useful / (setting.processes * setting.device.peak(setting.dtype))
    shares: dict[Bound, float] = {bound: value / seconds for bound, value in times.items() if value}
    return Estimate(sharing, memory, memory.total <= usable(setting.device), seconds, speed, reached, shares)


def recommended(estimates: list[Estimate]) -> Estimate | None:
    """The fastest layout that fits; of nearly equal ones the simplest."""
    fitting = [one for one in estimates if one.fits]
    best = max((one.samples_per_second for one in fitting), default=0.0)
    return next((one for one in fitting if one.samples_per_second >= 0.98 * best), None)


def reasons(estimates: list[Estimate], device: Device) -> list[str]:
    """Why `recommended` chose as it did: what is against the simpler layouts, the fastest ones first."""
    best, room = recommended(estimates), usable(device) / 1e9
    if best is None:
        least = min(estimates, key=lambda one: one.memory.total)
        return [f"the smallest, {least.sharing.name}, needs {least.memory.total / 1e9:,.1f} of {room:,.1f} GB"]
    simpler = estimates[: estimates.index(best)]
    if not simpler:
        return ["the simplest fits, and no other is more than 2 % faster"]
    return [
        f"{one.sharing.name} has {one.samples_per_second / best.samples_per_second:.2f} times its speed"
        if one.fits
        else f"{one.sharing.name} needs {one.memory.total / 1e9:,.1f} of {room:,.1f} GB"
        for one in simpler
    ]


def _memory(sharing: Sharing, setting: Setting) -> Memory:
    step, parts = setting.steps[sharing.recompute], setting.structure
    total = max(step.weights, 1)
    share, gathered = 1.0, 0.0
    if sharing.data == "fsdp" and setting.processes > sharing.replicas:
        share = sharing.replicas / setting.processes
        gathered = step.weights - parts.blocks + 2 * parts.largest
    elif sharing.tensor > 1:
        share = parts.tensor_share
    elif sharing.pipeline > 1:
        share = parts.pipeline_share
    gradients, optimizer, brought = step.gradients * share, step.optimizer * share, 0.0
    if setting.offload and setting.device.cuda:
        optimizer, brought = 0.0, optimizer * min(1.0, PART_BYTES / max(1.0, gradients))
    passed = _passing(sharing, setting, share)
    updated = step.cost.peak("update", gradients=share, activations=share, split=share) + brought
    averaging = 2 * gradients if setting.processes > 1 else 0.0  # they are sent in one piece
    peak = max(passed, updated, averaging)
    if gathered:
        peak += gathered * step.gradients / total
    return Memory(
        weights=step.weights * share + gathered,
        averages=step.averages * share,
        optimizer=optimizer,
        gradients=gradients,
        activations=peak - gradients,
    )


def _passing(sharing: Sharing, setting: Setting, share: float) -> float:
    """Most bytes of activations and gradients in forward and backward pass, ``share`` of the gradients being here."""
    samples = float(sharing.model_size)  # of those that were simulated

    def peak(recompute: Recompute) -> float:
        return setting.steps[recompute].cost.peak(*PASSES, gradients=share, activations=samples, split=samples / sharing.tensor)

    if sharing.pipeline == 1:
        return peak(sharing.recompute)
    parts, again = setting.structure, peak("full")
    count, stacks, full = max(1, parts.num_blocks), parts.num_stacks, sharing.recompute == "full"
    block = max(0.0, peak("none" if full else sharing.recompute) - again) / max(1, count - 1)  # again: one after the other
    arrived = samples * setting.steps["none"].cost.exchanged / max(1, parts.num_parts)  # at a block: what a part hands on
    graphs = 1 / sharing.microbatches if sharing.schedule == "1f1b" else 1.0
    inputs = count * graphs / sharing.pipeline + (stacks if sharing.schedule == "1f1b" else 0) + 1  # and a stack's result
    kept = 1 / sharing.microbatches if full else count * graphs / sharing.pipeline
    return again + block * (kept - 1) + arrived * (min(inputs, count) - count)


def _seconds(sharing: Sharing, setting: Setting) -> dict[Bound, float]:
    """Of a step: computing, what is sent and not hidden behind it, and where a pipeline waits."""
    step, device, processes = setting.steps[sharing.recompute], setting.device, setting.processes
    link = device.link if processes <= MACHINE_SIZE else min(device.link, NETWORK)
    copies = processes // sharing.model_size
    shards = processes // sharing.replicas if sharing.data == "fsdp" else 1
    sent = 0.0
    if sharing.data == "fsdp":
        sent += 3 * _around(shards) * step.weights
    if copies > shards:
        sent += 2 * _around(copies // shards) * step.gradients / shards / sharing.model_size
    forward, backward, update = (
        _time(step.cost, setting, sharing, "forward"),
        _time(step.cost, setting, sharing, "backward", "recompute"),
        _time(step.cost, setting, sharing, "update", share=1 / shards / sharing.model_size),
    )
    times: dict[Bound, float] = {bound: forward[bound] + backward[bound] + update[bound] for bound in forward}
    times["sending"] = max(0.0, sent / link - sum(backward.values()))
    if sharing.tensor > 1:
        exchanged = 2 * step.cost.exchanged * sharing.model_size
        times["sending"] += 2 * _around(sharing.tensor) * exchanged / device.link
    times["waiting"] = sum(times.values()) * (sharing.pipeline - 1) / sharing.microbatches
    if sharing.schedule == "1f1b":
        for bound, seconds in forward.items():
            times[bound] += seconds * (sharing.microbatches - 1) / sharing.microbatches
    if setting.offload and device.cuda:
        times["sending"] += 2 * step.optimizer / shards / sharing.model_size / HOST
    return times


def _around(processes: int) -> float:
    """Share of the data that each sends when a ring of processes brings it together or shares it out."""
    return (processes - 1) / processes


def _time(cost: Cost, setting: Setting, sharing: Sharing, *phases: Phase, share: float | None = None) -> dict[Bound, float]:
    """Of the kernels of some phases on this process's part of the work: ``share``, or what the layout leaves of it."""
    device = setting.device
    times: dict[Bound, float] = {"arithmetic": 0.0, "memory": 0.0, "launches": 0.0}
    launches = LAUNCH_SECONDS * (sharing.microbatches / sharing.pipeline if share is None else 1)
    peaks = {low: device.peak(torch.bfloat16 if low else torch.float32) for low in (True, False)}
    for operation in cost.operations:
        if operation.phase not in phases:
            continue
        work = sharing.tensor / (sharing.tensor if operation.split else 1) if share is None else share
        if setting.mfu is not None and operation.phase != "update":
            times["arithmetic"] += work * operation.flops / (device.peak(setting.dtype) * setting.mfu)
            continue
        needed: dict[Bound, float] = {
            "arithmetic": work * operation.flops / (peaks[operation.low_precision] * REACHED_ARITHMETIC),
            "memory": work * operation.num_bytes / (device.bandwidth * REACHED_BANDWIDTH),
            "launches": launches,
        }
        bound = max(needed, key=needed.__getitem__)
        times[bound] += needed[bound]
    return times
