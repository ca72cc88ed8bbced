"""What a step costs each process in the ways that processes can share it: memory and time, from a step of one that has it all.

| Layout   | Weights, averages, optimizer, gradients         | Activations | Sent |
|----------|-------------------------------------------------|-------------|------|
| ddp      | all                                             | of its samples | gradients |
| fsdp     | a share; whole: one block and the next one, and what is in no block | of its samples | weights twice, gradients |
| hsdp     | as fsdp, within each of the replicas            | of its samples | the same, and shares of gradients |
| tensor   | of attention and feed-forward a share           | of these a share | what they give, each way |
| pipeline | of blocks a share                               | of its blocks: of all microbatches, in 1f1b of one; and what is outside | little |

Of ddp and fsdp the activations are those of the simulated step; those of tensor and pipeline are scaled from it. How much of
them blocks keep follows from a step that computes them again.

The time is the sum over kernels of what binds each: arithmetic, memory or its launch (the roofline,
https://doi.org/10.1145/1498765.1498785).
"""  # noqa: E501 - a table

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from mm.placement import blocks
from mm.training.hardware import Device
from mm.training.meter import SPLIT_PARTS, Cost, Phase
from mm.training.offload import PART_BYTES
from mm.training.simulate import Simulated, storage_bytes

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
        recompute: Whether the backward pass recomputes the blocks.
    """

    data: Data = "ddp"
    replicas: int = 1
    tensor: int = 1
    pipeline: int = 1
    microbatches: int = 1
    schedule: Literal["gpipe", "1f1b"] = "gpipe"
    recompute: Literal["none", "full"] = "none"

    @property
    def model_size(self) -> int:
        """Processes that share the work on one sample."""
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        """What the field calls it."""
        return self._axis + (" ckpt" if self.recompute == "full" else "")

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
        num_stacks: Lists of them.
        num_parts: Attention and feed-forward layers.
        blocks: Bytes of all of them.
        largest: Bytes of the largest one.
        split: Bytes of the attention and feed-forward layers.
        heads: Largest number that divides the heads of all attention layers; 0 without any.
    """

    num_blocks: int
    num_stacks: int
    num_parts: int
    blocks: int
    largest: int
    split: int
    heads: int


def structure(network: nn.Module) -> Structure:
    """Look at a network."""
    sizes = [storage_bytes(block.parameters()) for block in blocks(network)]
    parts = [part for name, part in network.named_modules() if name.rpartition(".")[2] in SPLIT_PARTS]
    heads = [number for part in parts if isinstance(number := getattr(part, "num_heads", None), int)]
    split = storage_bytes(parameter for part in parts for parameter in part.parameters())
    return Structure(
        num_blocks=len(sizes),
        num_stacks=sum(name.endswith("blocks") for name, _ in network.named_modules()),
        num_parts=len(parts),
        blocks=sum(sizes),
        largest=max(sizes, default=0),
        split=split,
        heads=math.gcd(*heads),
    )


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
    """

    sharing: Sharing
    memory: Memory
    fits: bool
    seconds: float
    samples_per_second: float
    mfu: float


@dataclass(frozen=True)
class Setting:
    """What all layouts of a plan have in common.

    Args:
        plain: A step on the samples that a process has under data parallelism.
        recomputed: The same with the blocks recomputed.
        structure: Of the network.
        device: Where.
        processes: How many.
        batch_size: Samples of a step, over all processes.
        dtype: Of the computations.
        mfu: Share of the peak that is reached; None to estimate it kernel by kernel.
        offload: Whether the optimizer's state waits on the CPU.
    """

    plain: Simulated
    recomputed: Simulated
    structure: Structure
    device: Device
    processes: int
    batch_size: int
    dtype: torch.dtype
    mfu: float | None = None
    offload: bool = False


def sharings(processes: int, batch_size: int, structure: Structure) -> list[Sharing]:
    """Layouts that so many processes, such a batch and such a network allow, the simplest first."""
    found = [Sharing()]
    if processes > 1:
        found.append(Sharing(data="fsdp"))
        replicas = processes // MACHINE_SIZE if processes > MACHINE_SIZE else 2
        if processes >= 4 and processes % replicas == 0:
            found.append(Sharing(data="fsdp", replicas=replicas))
        shared = max((n for n in range(2, MACHINE_SIZE + 1) if not (processes % n or structure.heads % n)), default=1)
        if shared > 1 and structure.heads:
            found.append(Sharing(tensor=shared))
        stages = max((n for n in range(2, MACHINE_SIZE + 1) if processes % n == 0 and n <= structure.num_blocks), default=1)
        samples = batch_size * stages // processes
        parts = max((n for n in range(1, 4 * stages + 1) if samples % n == 0), default=1)
        if stages > 1 and parts >= stages:
            found += [Sharing(pipeline=stages, microbatches=parts, schedule=schedule) for schedule in ("gpipe", "1f1b")]
    found += [replace(sharing, recompute="full") for sharing in found if sharing.schedule == "gpipe"]
    return found


def estimate(sharing: Sharing, setting: Setting) -> Estimate:
    """Memory and time of a layout."""
    memory, seconds = _memory(sharing, setting), _seconds(sharing, setting)
    device = setting.device
    usable = USABLE_MEMORY * device.memory - (RESERVED_BYTES if device.cuda else 0)
    speed = setting.batch_size / seconds
    useful = setting.plain.cost.flops("forward", "backward") / setting.plain.samples
    reached = speed * useful / (setting.processes * device.peak(setting.dtype))
    return Estimate(sharing, memory, memory.total <= usable, seconds, speed, reached)


def recommended(estimates: list[Estimate]) -> Estimate | None:
    """The fastest layout that fits; of nearly equal ones the simplest."""
    fitting = [one for one in estimates if one.fits]
    best = max((one.samples_per_second for one in fitting), default=0.0)
    return next((one for one in fitting if one.samples_per_second >= 0.98 * best), None)


def _simulated(sharing: Sharing, setting: Setting) -> Simulated:
    return setting.recomputed if sharing.recompute == "full" else setting.plain


def _memory(sharing: Sharing, setting: Setting) -> Memory:
    step, parts = _simulated(sharing, setting), setting.structure
    total = max(step.weights, 1)
    share, gathered, of_blocks = 1.0, 0.0, parts.blocks / total
    if sharing.data == "fsdp" and setting.processes > sharing.replicas:
        share = sharing.replicas / setting.processes
        gathered = step.weights - parts.blocks + 2 * parts.largest
    elif sharing.tensor > 1:
        share = 1 - parts.split / total * (1 - 1 / sharing.tensor)
    elif sharing.pipeline > 1:
        share = 1 - of_blocks * (1 - 1 / sharing.pipeline)
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

    def peak(step: Simulated) -> float:
        return step.cost.peak("forward", "backward", gradients=share, activations=samples, split=samples / sharing.tensor)

    if sharing.pipeline == 1:
        return peak(_simulated(sharing, setting))
    parts, again = setting.structure, peak(setting.recomputed)
    count, stacks = max(1, parts.num_blocks), parts.num_stacks
    block = max(0.0, peak(setting.plain) - again) / max(1, count - 1)  # computing again holds one after the other
    arrived = samples * setting.plain.cost.exchanged / max(1, parts.num_parts)  # at a block, as large as what a part hands on
    graphs = 1 / sharing.microbatches if sharing.schedule == "1f1b" else 1.0
    inputs = count * graphs / sharing.pipeline + (stacks if sharing.schedule == "1f1b" else 0) + 1  # and a stack's result
    kept = 1 / sharing.microbatches if sharing.recompute == "full" else count * graphs / sharing.pipeline
    return again + block * (kept - 1) + arrived * (min(inputs, count) - count)


def _seconds(sharing: Sharing, setting: Setting) -> float:
    """Of a step: computing, what is sent and not hidden behind it, and where a pipeline waits."""
    step, device, processes = _simulated(sharing, setting), setting.device, setting.processes
    link = device.link if processes <= MACHINE_SIZE else min(device.link, NETWORK)
    copies = processes // sharing.model_size
    shards = processes // sharing.replicas if sharing.data == "fsdp" else 1
    sent = 0.0
    if sharing.data == "fsdp":
        sent += 3 * _around(shards) * step.weights
    if copies > shards:
        sent += 2 * _around(copies // shards) * step.gradients / shards / sharing.model_size
    backward = _time(step.cost, setting, sharing, "backward")
    update = _time(step.cost, setting, sharing, "update", 1 / shards / sharing.model_size)
    forward = _time(step.cost, setting, sharing, "forward")
    seconds = forward + max(backward, sent / link) + update
    if sharing.tensor > 1:
        exchanged = 2 * step.cost.exchanged * sharing.model_size
        seconds += 2 * _around(sharing.tensor) * exchanged / device.link
    if sharing.pipeline > 1:
        seconds *= (sharing.microbatches + sharing.pipeline - 1) / sharing.microbatches
        if sharing.schedule == "1f1b":
            seconds += forward * (sharing.microbatches - 1) / sharing.microbatches
    if setting.offload and device.cuda:
        seconds += 2 * step.optimizer / shards / sharing.model_size / HOST
    return seconds


def _around(processes: int) -> float:
    """Share of the data that each sends when a ring of processes brings it together or shares it out."""
    return (processes - 1) / processes


def _time(cost: Cost, setting: Setting, sharing: Sharing, phase: Phase, share: float | None = None) -> float:
    """Of the kernels of a phase on this process's part of the work: ``share``, or what the layout leaves of it."""
    device, seconds = setting.device, 0.0
    peaks = {low: device.peak(torch.bfloat16 if low else torch.float32) for low in (True, False)}
    for operation in cost.operations:
        if operation.phase != phase:
            continue
        work = sharing.tensor / (sharing.tensor if operation.split else 1) if share is None else share
        if setting.mfu is not None and phase != "update":
            seconds += work * operation.flops / (device.peak(setting.dtype) * setting.mfu)
            continue
        arithmetic = operation.flops / (peaks[operation.low_precision] * REACHED_ARITHMETIC)
        moved = operation.num_bytes / (device.bandwidth * REACHED_BANDWIDTH)
        seconds += max(work * arithmetic, work * moved, LAUNCH_SECONDS)
    return seconds
