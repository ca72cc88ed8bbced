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

    @property
    def answer_limit(self) -> int:
        """Number of answers to take from the training questions; 0 for systems that learn none or know theirs already."""
        return 0

    @property
    def known_answers(self) -> tuple[str, ...]:
        """The answers that the network knows."""
        return ()

    @property
    def learns_answers(self) -> bool:
        """Whether training needs answers beside pictures and texts."""
        return False

    def with_answers(self, answers: tuple[str, ...]) -> Self:
        """The configuration with the answers that the network will know."""
        raise NotImplementedError

    @property
    def fresh_parts(self) -> tuple[str, ...]:
        """Fields of the network that may be in one network only when it takes over the weights of another; they start fresh."""
        return ()

    def parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is part of the network. Its weights are ``FIELD.*`` in the network's state."""
        return {}

    def training_parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is needed for training only; none of its weights are in the network's state."""
        return {}
