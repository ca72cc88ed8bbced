"""The ``data:`` section of a configuration: what to read, in which order, with which captions and augmentation."""

from typing import Literal, Self

from pydantic import Field, model_validator

from mm.config import StrictConfig
from mm.data.augment import AugmentConfig
from mm.data.augment_audio import AudioAugmentConfig
from mm.data.captions import CaptionTemplate
from mm.data.episodes import EpisodeConfig
from mm.data.stream import StreamConfig


class MixturePart(StrictConfig):
    """One source of a weighted mixture.

    Args:
        source: What to read: ``emoji:train``, a folder, a CSV, TSV or JSONL file, a shard pattern, a Hugging Face folder.
        weight: Its share of every epoch is ``weight`` divided by the sum of all weights, whatever its size.
    """

    source: str
    weight: float = Field(default=1.0, gt=0)


class SamplingConfig(StrictConfig):
    """Which samples may meet in a batch.

    Args:
        policy: ``plain`` takes any; ``distinct`` never takes two samples with the same value of ``field`` into a batch;
            ``several`` takes ``per_concept`` samples of each chosen value.
        field: Dotted name of the metadata field, for ``distinct`` and ``several``.
        per_concept: Samples of each chosen value in a batch, for ``several``.
    """

    policy: Literal["plain", "distinct", "several"] = "plain"
    field: str | None = None
    per_concept: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _field_belongs_to_policy(self) -> Self:
        if self.policy != "plain" and self.field is None:
            raise ValueError(f"sampling policy '{self.policy}' needs 'field', the metadata field whose values are kept apart")
        return self


class DataConfig(StrictConfig):
    """What a run learns from.

    Args:
        train: Training source, as in `MixturePart`. Exactly one of ``train`` and ``mixture`` is given.
        mixture: Several training sources with weights.
        keep: Share of the training samples to learn from, such as 0.1. Their ids alone decide which; a larger share holds all
            of a smaller one.
        validation: Source scored during training; none by default.
        image_field: Column or key that holds the picture; found by its usual names when absent.
        audio_field: The same for the recording.
        text_field: Column or key that holds the caption.
        label_field: Column or key that holds the class.
        captions: Templates of training captions, chosen by weight.
        augment: Random changes of training pictures.
        augment_audio: Random changes of training recordings.
        sampling: Which samples may meet in a batch.
        positives: Which samples of a batch show the same thing: those with equal captions (``text``), none, or those with equal
            values of the named field.
        episodes: Make of each sample the query of an episode with examples from the same source; for systems that read texts in
            which pictures stand.
        stream: Read the shards of ``train`` once through, in their own order, which is not exact (`mm.data.stream`): for
            ``pipe:`` commands, and for storage that is best read from beginning to end.
        workers: Processes that load data beside the training process; 0 loads in it. Batches do not depend on it.
        timeout_seconds: How long a worker may take for a batch before the run stops; 0 waits for ever.
        max_bad_fraction: Share of unusable samples above which a run stops.
    """

    train: str | None = None
    mixture: tuple[MixturePart, ...] = ()
    keep: float = Field(default=1.0, gt=0, le=1)
    validation: str | None = None
    image_field: str | None = None
    audio_field: str | None = None
    text_field: str | None = None
    label_field: str | None = None
    captions: tuple[CaptionTemplate, ...] = Field(default=(CaptionTemplate(template="{text}"),), min_length=1)
    augment: AugmentConfig = AugmentConfig()
    augment_audio: AudioAugmentConfig = AudioAugmentConfig()
    sampling: SamplingConfig = SamplingConfig()
    positives: str = "text"
    episodes: EpisodeConfig | None = None
    stream: StreamConfig | None = None
    workers: int = Field(default=0, ge=0, le=256)
    timeout_seconds: float = Field(default=600.0, ge=0)
    max_bad_fraction: float = Field(default=0.2, ge=0, le=1)

    @model_validator(mode="after")
    def _one_training_source(self) -> Self:
        if (self.train is None) == (not self.mixture):
            raise ValueError("give exactly one of 'train' (a source) and 'mixture' (a list of sources with weights)")
        if self.stream is not None:
            exact = {"mixture": self.mixture, "episodes": self.episodes, "keep": self.keep < 1, "text_field": self.text_field}
            exact |= {"label_field": self.label_field, "sampling": self.sampling != SamplingConfig()}
            given = next((name for name, value in exact.items() if value), None)
            if given is not None:
                raise ValueError(f"stream reads shards in their own order, without '{given}'; leave one of the two out")
        return self
