"""Accelerators that trainings are planned for: peak rates, memory, power, and what an hour usually costs.

Rates are the makers', dense: where a data sheet gives the rate with sparsity, half of that. Matrix products of fp32 run on the
ordinary units, as torch has them by default. Products in bf16 add up in fp32, which halves the rate of consumer cards. `link`
without NVLink or Infinity Fabric is PCIe by way of the host's memory: half of its rate. Compared with:

- H100 (SXM, PCIe), H200, A100, B200, MI300X, L40S: https://github.com/pytorch/torchtitan/blob/main/torchtitan/tools/utils.py,
  which links the data sheets
- A100 and B200, memory, links and power, too: https://glennklockwood.com/garden/processors/A100, .../B200
- A10G, whose tensor units are slower than an A10's: https://www.baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-inference/
- L4 (242 TFLOP/s with sparsity): https://grokipedia.com/page/NVIDIA_L4_vs_L40S
- RTX 4090: https://waredb.com/processor/nvidia-geforce-rtx-4090
- MI300X, memory and links: https://www.emergentmind.com/topics/amd-mi300x-gpu

Prices are rough figures for an hour on demand of one device, in the middle of what smaller providers ask. Providers differ
two- to fourfold, and prices change every few months
(https://www.mercatus-ai.com/blog/cloud-gpu-pricing, https://aimultiple.com/gpu-index, May 2026): give your own.
"""

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from mm.errors import UserError

PRICES_OF = "2025 and 2026, rough: providers differ two- to fourfold"


@dataclass(frozen=True)
class Device:
    """One accelerator.

    Args:
        name: What users call it.
        matches: A regular expression of what torch calls the device after its maker, lower case and with spaces.
        bf16: Peak of dense matrix products in bf16, FLOP/s.
        fp32: The same in fp32.
        memory: Bytes.
        bandwidth: Of its memory, bytes/s.
        link: To its neighbours in one machine, bytes/s in one direction.
        watts: Power under full load.
        price: Dollars an hour; None where there is no usual one.
        form: How it is built in, or where its figures come from.
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
    form: str
    cuda: bool = True

    def peak(self, dtype: torch.dtype) -> float:
        """FLOP/s of matrix products in a type."""
        return self.fp32 if dtype == torch.float32 else self.bf16


PCIE_4, PCIE_5 = 16e9, 32e9
"""Bytes/s in one direction by way of the host."""

DEVICES = {
    device.name: device
    for device in (
        Device("b200", "b200", 2250e12, 80e12, 180e9, 8e12, 900e9, 1000, 4.50, "HGX, 8 a machine"),
        Device("h200", "h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, 700, 3.50, "SXM5, 8 a machine"),
        Device("h100", "h100 80gb hbm3", 989e12, 67e12, 80e9, 3.35e12, 450e9, 700, 2.99, "SXM5, 8 a machine"),
        Device("h100-pcie", "h100 pcie", 756e12, 51e12, 80e9, 2e12, PCIE_5, 350, 2.40, "PCIe"),
        Device("a100-80", "a100 sxm4? 80gb", 312e12, 19.5e12, 80e9, 2.04e12, 300e9, 400, 1.50, "SXM4, 8 a machine"),
        Device("a100-40", "a100 sxm4? 40gb", 312e12, 19.5e12, 40e9, 1.56e12, 300e9, 400, 1.29, "SXM4, 8 a machine"),
        Device("l40s", "l40s", 362e12, 91.6e12, 48e9, 0.864e12, PCIE_4, 350, 1.00, "PCIe"),
        Device("a10g", "a10g", 70e12, 31.5e12, 24e9, 0.6e12, PCIE_4, 300, 1.01, "AWS g5"),
        Device("l4", "l4", 121e12, 30.3e12, 24e9, 0.3e12, PCIE_4, 72, 0.70, "PCIe"),
        Device("rtx-4090", "rtx 4090", 165e12, 82.6e12, 24e9, 1.01e12, PCIE_4, 450, 0.44, "PCIe"),
        Device("mi300x", "mi300x( oam| vf)?", 1307e12, 163.4e12, 192e9, 5.3e12, 448e9, 750, 1.99, "OAM, 8 a machine"),
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
    return named(torch.cuda.get_device_name(device))


def named(name: str) -> Device | None:
    """The device that torch calls so; None for what is not in the table, slices (MIG) and laptops' variants among it."""
    told = " ".join(name.lower().replace("-", " ").split())
    return next(
        (known for known in DEVICES.values() if re.fullmatch(rf"((nvidia|geforce|amd|instinct) )*({known.matches})", told)),
        None,
    )


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
        form="measured on this machine",
        cuda=False,
    )


def _best_seconds(work: Callable[[], object], times: int = 3) -> float:
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best
