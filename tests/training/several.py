"""Functions run on several processes that join one gloo group."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def join(rank: int, size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)


def run_together(target: Callable[..., None], folder: Path, *args: Any, size: int = 2) -> None:
    """Run a function on several processes, with its rank, their number, and a folder that they share."""
    folder.mkdir(exist_ok=True)
    spawn(target, (size, folder, *args), nprocs=size)
    (folder / "store").unlink(missing_ok=True)
