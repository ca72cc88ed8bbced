"""Which samples show the same thing, where that must hold beyond one batch and one process."""

import torch
from jaxtyping import Int
from torch import Tensor

from mm.seeding import derive_seed
from mm.types import Batch


def lasting_groups(batch: Batch, device: torch.device) -> Int[Tensor, " b"]:
    """The batch's groups or, where it has none, numbers that last: each sample shows its own thing."""
    if batch.groups is not None:
        return batch.groups
    return torch.tensor([derive_seed(name) for name in batch.ids], device=device)
