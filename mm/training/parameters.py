"""How much of a network is trained, part by part."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from mm.types import System


def outermost_parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost parts with a forward of their own, encoders and projections, by qualified name."""
    for name, child in module.named_children():
        if type(child).forward is nn.Module.forward:
            yield from outermost_parts(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def count_parameters(system: System) -> dict[str, Any]:
    """How many parameters there are and how many are trained, JSON ready; copies that training alone needs are left out.

    Returns:
        ``trained``, ``total`` and ``parts``: the same two of each of the `outermost_parts` and of each parameter outside them.
    """
    places = dict.fromkeys(name for name, _ in outermost_parts(system))
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in system.named_parameters():
        if not parameter.requires_grad and name.startswith(system.only_for_training):
            continue
        owner = next((place for place in places if name.startswith(f"{place}.")), name)
        counts = parts.setdefault(owner, {"trained": 0, "total": 0})
        counts["trained"] += parameter.numel() * parameter.requires_grad
        counts["total"] += parameter.numel()
    whole = {key: sum(counts[key] for counts in parts.values()) for key in ("trained", "total")}
    return {**whole, "parts": parts}


def parameter_lines(counts: dict[str, Any]) -> list[str]:
    """What `count_parameters` found, for people: the share that is trained and, where it is not all, that of each part."""
    lines = [f"trained: {_share(counts, ' parameters')}"]
    if counts["trained"] < counts["total"]:
        width = max(map(len, counts["parts"]))
        lines += [f"  {name:{width}}  {_share(part)}" for name, part in counts["parts"].items()]
    return lines


def _share(counts: dict[str, int], what: str = "") -> str:
    trained, total = counts["trained"], counts["total"]
    return f"{100 * trained / max(1, total):.3g} % ({trained:,} of {total:,}{what})"


def blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a network, in order: what is in a list called ``blocks``, or something that ends like this."""
    for name, part in network.named_modules():
        if isinstance(part, nn.ModuleList | nn.Sequential) and name.endswith("blocks"):
            yield from (block for block in part if next(block.parameters(), None) is not None)
