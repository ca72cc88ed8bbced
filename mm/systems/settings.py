"""What every system's configuration answers, so that a run can be assembled without knowing the system."""

from typing import Self

from mm.config import StrictConfig


class SystemSettings(StrictConfig):
    """Base of all systems' configurations."""

    @property
    def picture_side(self) -> int:
        """Side in pixels of the square pictures that the system takes."""
        raise NotImplementedError

    @property
    def text_limits(self) -> tuple[int, int] | None:
        """Largest vocabulary and longest text in tokens; None for systems without text."""
        raise NotImplementedError

    def with_vocabulary(self, size: int) -> Self:
        """The configuration for a vocabulary of ``size``."""
        raise NotImplementedError

    def parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is part of the network. Its weights are ``FIELD.*`` in the network's state."""
        return {}

    def training_parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is needed for training only; none of its weights are in the network's state."""
        return {}
