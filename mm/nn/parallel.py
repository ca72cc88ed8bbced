"""Networks cut for `mm.training.layout`: by heads and features, by layers, and by what the backward pass computes again."""

from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mm.errors import ConfigError
from mm.nn.slices import slice_layers
from mm.nn.stages import Schedule, stage_layers
from mm.placement import blocks
from mm.ranks import Peers
from mm.types import Auxiliary

KEPT = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")
"""Beginnings of the names of what is dear to compute again: products and attention."""


def divide(
    network: nn.Module,
    *,
    stages: Peers,
    slices: Peers,
    microbatches: int = 1,
    schedule: Schedule = "gpipe",
    recompute: Literal["none", "selective", "full"] = "none",
) -> None:
    """Cut a network in place; it computes what it did before, together with the others.

    Args:
        network: With the same weights on all processes.
        stages: Processes among which layers are shared out.
        slices: Processes among which each layer is shared out.
        microbatches: See `mm.training.config.ParallelConfig`.
        schedule: See there.
        recompute: See there.

    Raises:
        ConfigError: This network cannot be cut like this.
    """
    if slices.size > 1:
        slice_layers(network, slices)
    if stages.size > 1:
        if any(isinstance(part, Auxiliary) for part in network.modules()):
            raise ConfigError(
                "parallel.pipeline: losses of experts do not reach the other stages; set it to 1, or experts to null"
            )
        stage_layers(network, stages, microbatches, schedule)
    if recompute != "none":
        recompute_blocks(network, selective=recompute == "selective")


def recompute_blocks(network: nn.Module, *, selective: bool) -> None:
    """Let the backward pass compute each block again (https://arxiv.org/abs/1604.06174), in place.

    Args:
        network: Its blocks are those of `mm.placement.blocks`.
        selective: Keep the results of products and attention, the dear part (https://arxiv.org/abs/2205.05198).

    Raises:
        ConfigError: It has no blocks.
    """
    found = list(blocks(network))
    if not found:
        raise ConfigError("parallel.recompute: this system has no blocks that could be computed again; set it to none")
    context = partial(create_selective_checkpoint_contexts, _policy) if selective else None
    for block in found:
        block.forward = partial(_recomputed, block.forward, {} if context is None else {"context_fn": context})


def _recomputed(forward: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **options, **kwargs)


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operator.__name__.startswith(KEPT)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
