"""First and last layers of a network, which optimizers for the matrices between them leave alone."""

from typing import TypeVar

from torch import nn

L = TypeVar("L", bound=nn.Linear | nn.Conv2d)


def end(layer: L) -> L:
    """Mark a layer that takes in raw data or gives out the network's result."""
    layer.weight.end = True  # pyright: ignore[reportAttributeAccessIssue]
    return layer
