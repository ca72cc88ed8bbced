"""Less padding on CPUs, where it costs as much as text: rows of like length are computed together."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.types import Encoded

MIN_ROWS = 32
BUCKETS = 4
"""Larger batches are computed in so many groups of like length."""


def pays(rows: int, device: torch.device) -> bool:
    """Whether groups are worth it; a compiled or exported graph must depend neither on the lengths nor on the number of rows,
    which ``len`` would make a constant."""
    return not torch.compiler.is_compiling() and device.type == "cpu" and rows >= MIN_ROWS


def by_length(length: int, lengths: Tensor, inputs: Sequence[Tensor], compute: Callable[..., Encoded]) -> Encoded:
    """The same as ``compute`` gives for all rows at once, as long as no row depends on another or on its padding.

    Args:
        length: Positions of the padded result.
        lengths: Positions that each row needs, ``(B,)``.
        inputs: What is computed with, a row for each of the lengths.
        compute: Takes the length to which the rows may be cut, then some rows of each of the inputs.
    """
    order = lengths.argsort(stable=True)
    groups = zip(*(one[order].chunk(BUCKETS) for one in (lengths, *inputs)), strict=True)
    parts = []
    for needed, *rows in groups:
        longest = int(needed[-1])
        part = compute(longest, *rows)
        behind = length - longest
        parts.append(replace(part, tokens=F.pad(part.tokens, (0, 0, 0, behind)), mask=F.pad(part.mask, (0, behind))))
    back = order.argsort()
    tokens, mask, pooled = (torch.cat([getattr(part, name) for part in parts])[back] for name in ("tokens", "mask", "pooled"))
    return Encoded(tokens, mask, pooled)
