"""Accelerators that trainings are planned for: peak rates, memory, power, and what an hour usually costs.

Rates and memory are those that the makers give: dense, without sparsity. Matrix products of fp32 run on the ordinary units, as
torch has them by default. Prices are rough figures for an hour on demand of one device at the providers named, in late 2025.
They were not read off the providers' pages, differ twofold between them and change every few months: give your own.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from mm.errors import UserError

PRICES_OF = "late 2025, rough and unchecked"


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: What users call it.
        matches: What torch's name of the device contains, lower case.
        bf16: Peak of dense matrix products in bf16, FLOP/s.
        fp32: The same in fp32.
        memory: Bytes.
        bandwidth: Of its memory, bytes/s.
        link: To its neighbours in one machine, bytes/s in one direction.
        watts: Power under full load.
        price: Dollars an hour; None where there is no usual one.
        source: Whose price that is.
        cuda: Whether autocast and memory are those of CUDA (or ROCm).
    """

    name: str
    matches: str
    bf16: float
    fp32: float
    memory: float
    bandwidth: float
    link: float
    watts: float
    price: float | None
    source: str
    cuda: bool = True

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in a type."""
        return self.fp32 if dtype == torch.float32 else self.bf16


DEVICES = {
    device.name: device
    for device in (
        Device("h100", "h100", 989e12, 67e12, 80e9, 3.35e12, 450e9, 700, 2.99, "Lambda, Nebius: SXM5, 8 a machine"),
        Device("h200", "h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 700, 3.50, "Nebius: SXM5, 8 a machine"),
        Device("a100-80", "a100", 312e12, 19.5e12, 80e9, 2.04e12, 300e9, 400, 1.79, "Lambda: SXM4, 8 a machine"),
        Device("a10g", "a10g", 70e12, 31.5e12, 24e9, 0.6e12, 16e9, 300, 1.01, "AWS g5.xlarge"),
        Device("l4", "l4", 121e12, 30.3e12, 24e9, 0.3e12, 16e9, 72, 0.71, "Google Cloud g2-standard-4"),
        Device("rtx-4090", "4090", 165.2e12, 82.6e12, 24e9, 1.01e12, 16e9, 450, 0.44, "RunPod, Vast.ai"),
        Device("mi300x", "mi300x", 1307e12, 163.4e12, 192e9, 5.3e12, 448e9, 750, 1.99, "RunPod, TensorWave: 8 a machine"),
    )
}
CPU_WATTS = 10.0
"""Of one busy core of a server, its share of memory and board included: a rough figure."""

LINK_OF_PROCESSES = 5e9
"""Between processes of one machine, bytes/s."""


def find_device(name: str) -> Device:
    """The device called ``name``; ``cpu`` is what this machine has, measured.

    Raises:
        UserError: Nobody knows it here.
    """
    if name == "cpu":
        return this_cpu()
    if name not in DEVICES:
        raise UserError(f"device '{name}': there are {', '.join(DEVICES)} and cpu")
    return DEVICES[name]


def recognise(device: torch.device) -> Device | None:
    """What is known of the device that a training runs on; None for those that are not in the table."""
    if device.type == "cpu":
        return this_cpu()
    if device.type != "cuda":
        return None
    told = torch.cuda.get_device_name(device).lower().replace("-", " ").split()
    return next((known for known in DEVICES.values() if any(known.matches == word for word in told)), None)


@cache
def this_cpu() -> Device:
    """This machine, with the threads that torch uses: peaks by short matrix products and copies, the best of a few."""
    side, cores = 768, torch.get_num_threads()
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(side, side, dtype=dtype)
        rates[dtype] = 2 * side**3 / _best_seconds(lambda a=a: a @ a)
    block = torch.ones(16 << 20, dtype=torch.float32)
    bandwidth = 2 * block.nbytes / _best_seconds(block.clone)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name="cpu",
        matches="cpu",
        bf16=rates[torch.bfloat16],
        fp32=rates[torch.float32],
        memory=memory,
        bandwidth=bandwidth,
        link=LINK_OF_PROCESSES,
        watts=CPU_WATTS * cores,
        price=None,
        source="measured on this machine",
        cuda=False,
    )


def _best_seconds(work: Callable[[], object], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
