"""Choose where and in which precision to compute."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from mm.errors import UserError


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; auto prefers CUDA, then MPS, then CPU.

    Raises:
        UserError: No such kind of device, or this machine has none.
    """
    have = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind, count in have.items() if count)
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in have:
        raise UserError(f"device '{name}': there are auto, cpu, cuda and mps")
    if (device.index or 0) >= have[device.type]:
        raise UserError(f"device '{name}': no {name} device on this machine; use auto or cpu")
    if name != "cuda":
        return device
    if local_rank >= have["cuda"]:
        raise UserError(f"{local_rank + 1} processes on a machine with {have['cuda']} GPUs; start one process a GPU")
    return torch.device("cuda", local_rank)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Computing type of ``auto``, ``fp32`` or ``bf16``: auto is bf16 where the hardware multiplies it natively."""
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def inference_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Type of the weights of a loaded model: ``auto`` is bf16 only where matrix units make it several times faster.

    Args:
        precision: ``auto``, ``fp32`` or ``bf16``; the environment variable ``MM_PRECISION`` stands in for ``auto``.
        device: Where the model will compute.

    Raises:
        UserError: Another precision.
    """
    if precision == "auto":
        precision = os.environ.get("MM_PRECISION", "auto")
    if precision not in ("auto", "fp32", "bf16"):
        raise UserError(f"precision '{precision}': there are auto, fp32 and bf16")
    if precision == "auto":
        units = torch.cpu._is_amx_tile_supported() if device.type == "cpu" else device.type == "cuda" and _has_bf16(device)
        precision = "bf16" if units else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A fresh autocast context, none for fp32. Weights cast under ``no_grad`` must not outlive a pass, so never share it."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seed the generators that layers draw from, on the CPU and on ``device``; cheap enough to do at every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
