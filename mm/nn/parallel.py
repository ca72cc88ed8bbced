"""Networks cut among processes."""

from typing import Any

from mm.ranks import Peers


def divide(system: Any, config: Any, stages: Peers, slices: Peers) -> None:
    """Nothing yet."""
