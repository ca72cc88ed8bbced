"""The configuration of a run: which system, prepared how, learning from what, for how long."""

from pathlib import Path
from typing import Self

from pydantic import model_validator

from mm.config import StrictConfig
from mm.data.config import DataConfig
from mm.nn.tuning import Tune
from mm.processor import ProcessorConfig
from mm.systems import NamedSystem
from mm.training.config import ParallelConfig, TrainConfig

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"
"""Inside an installed package, beside the package in a checkout."""


class RunConfig(StrictConfig):
    """Everything that decides what a run computes.

    Args:
        system: The network and its objective; ``system.name`` picks which.
        processor: Preparation of raw pictures and texts.
        data: Sources, captions, augmentation, order.
        train: Optimisation, precision, checkpoints.
        parallel: How the processes that torchrun starts share the network.
        init_from: A MODEL whose weights and preparation the run starts from; its network must be the one configured. Without a
            ``system`` section the network is the model's own.
        tune: What is trained: all (full), or something small that is added to frozen weights (`mm.nn.tuning`): lora, adapter,
            prefix, prompt. The name of a method, or a section with its ``method`` (lora where none is said) and options.
    """

    system: NamedSystem
    data: DataConfig
    processor: ProcessorConfig = ProcessorConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    init_from: str | None = None
    tune: Tune | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.system.name in ("clip", "clap", "albef") and self.train.batch_size < 2:
            raise ValueError("train.batch_size must be at least 2: a contrastive loss compares samples of a batch")
        given, wanted = self.processor.audio.rate, self.system.audio_rate
        if wanted not in (None, given):
            raise ValueError(f"processor.audio.rate {given} and system.audio.rate {wanted} must be equal: bands follow from it")
        return self
