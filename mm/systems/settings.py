"""What every system's configuration answers, so that a run can be assembled without knowing the system."""

from typing import Self

from pydantic import Field, model_validator

from mm.config import StrictConfig


class SystemSettings(StrictConfig):
    """Base of all systems' configurations."""

    @property
    def picture_side(self) -> int | None:
        """Side in pixels of the square pictures that the system takes; None for systems without pictures."""
        raise NotImplementedError

    @property
    def text_limits(self) -> tuple[int, int] | None:
        """Largest vocabulary and longest text in tokens; None for systems without text."""
        raise NotImplementedError

    @property
    def hears(self) -> bool:
        """Whether the system takes recordings."""
        return False

    @property
    def audio_rate(self) -> int | None:
        """Samples a second of the recordings that its parts are made for; None where any will do."""
        return None

    @property
    def learns_pictures(self) -> bool:
        """Whether training needs pictures, where the system takes them at all."""
        return True

    @property
    def begins_texts(self) -> bool:
        """Whether texts have the tokenizer's start before them; pictures may stand in its place."""
        return True

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
    def learns_whole_words(self) -> bool:
        """Whether training needs to know which tokens make a word, `mm.types.TextBatch.words`."""
        return False

    @property
    def fresh_parts(self) -> tuple[str, ...]:
        """Fields of the network that may be in one network only when it takes over the weights of another; they start fresh."""
        return ()

    def check_start(self, start: "SystemSettings | None") -> None:
        """Raises `ConfigError` for a training that cannot begin like this: with weights of a network of another kind, which fit
        by shape but would compute something else, or, where ``start`` is None, with none where some are needed."""

    def for_inference(self) -> Self:
        """The configuration of the network without what training alone needs, `mm.types.System.only_for_training`."""
        return self

    def parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is part of the network. Its weights are ``FIELD.*`` in the network's state."""
        return {}

    @property
    def readers(self) -> frozenset[str]:
        """Parts that painting asks for nothing but texts: they may be built without a picture tower then."""
        return frozenset()

    def training_parts(self) -> dict[str, str]:
        """Fields that name another MODEL which is needed for training only; none of its weights are in the network's state."""
        return {}

    @property
    def encodable(self) -> frozenset[str]:
        """Parts whose work `mm data encode` can do before training, as it stays the same: ``latents``, ``text``."""
        return frozenset()


class AnswerSettings(SystemSettings):
    """Of systems that may know answers.

    Args:
        num_answers: Length of the list of answers, which holds the most frequent ones of the training questions.
        answers: The list itself, which a run fills in; give it to choose one's own.
        blind: See grey instead of every picture: what a model learns from the questions alone.
    """

    num_answers: int = Field(default=0, ge=0)
    answers: tuple[str, ...] = ()
    blind: bool = False

    @property
    def answer_limit(self) -> int:
        return 0 if self.answers else self.num_answers

    @property
    def known_answers(self) -> tuple[str, ...]:
        return self.answers

    def with_answers(self, answers: tuple[str, ...]) -> Self:
        return self.model_copy(update={"answers": answers, "num_answers": len(answers)})

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.answers and self.num_answers not in (0, len(self.answers)):
            raise ValueError(f"num_answers {self.num_answers} is not the number of answers, {len(self.answers)}; leave it out")
        if len(set(self.answers)) < len(self.answers):
            raise ValueError("answers must differ from each other")
        return self
