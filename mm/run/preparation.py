"""Samples to batches: where a data source meets a model's processor. Picklable, so that loader workers can do the work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.data.augment import AugmentConfig, augment, may_flip, mirrored
from mm.data.augment_audio import AudioAugmentConfig, augment_audio
from mm.data.captions import Captioner, look_up
from mm.data.features import Encoding, TextFeatures, read_features
from mm.data.questions import question_of
from mm.errors import BadSample
from mm.evaluation.vqa import accepted
from mm.media.audio import decode_audio, fit_audio
from mm.media.image import decode_image, fit_image
from mm.processor import Processor, padded
from mm.seeding import derive_seed, generator
from mm.types import AudioBatch, Batch, Encoded, Sample

RGBA_CHANNELS = 4


@dataclass(frozen=True)
class Item:
    """One prepared sample: captions, the group of its positives, the seed of its changes.

    ``image`` is pixels uint8 ``(3 or 4, S, S)``, None for models without pictures. ``answers`` are the right answers to its
    question and how right they are, where they are learned. ``latents`` ``(V, C, h, w)`` stand for the picture and its mirror
    image, ``features`` for the caption, where these were computed before. ``audio`` is a wave ``(T,)``, None for models without
    sound.
    """

    id: str
    image: Tensor | None
    texts: tuple[str, ...]
    fields: Mapping[str, Any]
    group: int = 0
    augment_seed: int = 0
    flippable: bool = True
    answers: Mapping[str, float] = field(default_factory=dict)
    latents: Tensor | None = None
    features: TextFeatures | None = None
    audio: Tensor | None = None


@dataclass(frozen=True)
class TrainPreparation:
    """Random captions and augmented pictures. Everything random is a function of (seed, visit, sample id, purpose).

    Args:
        processor: The model's preparation.
        captioner: Draws a caption from weighted templates.
        augment: Picture augmentation.
        positives: What makes two samples positives of each other: ``text``, ``none`` or the name of a field.
        seed: Seed of the run.
        answers: Whether samples are questions whose answers are learned; captions are then of the question.
        words: Whether captions come with the words that their tokens make.
        encoding: How samples were encoded, where they hold latents instead of pictures.
        augment_audio: Augmentation of recordings.
        sees: Whether samples must have pictures, where the model takes them.
    """

    processor: Processor
    captioner: Captioner
    augment: AugmentConfig
    positives: str
    seed: int
    answers: bool = False
    words: bool = False
    encoding: Encoding | None = None
    augment_audio: AudioAugmentConfig = field(default_factory=AudioAugmentConfig)
    sees: bool = True

    def __call__(self, sample: Sample, visit: int) -> Item:
        caption = ""
        if self.processor.has_text:
            caption = self.captioner(sample, generator(self.seed, visit, sample.id, "caption"))
        known = None if self.encoding is None else read_features(sample, self.encoding)
        return Item(
            id=sample.id,
            image=_pixels(sample, self.processor, keep_alpha=True) if known is None and self.sees else None,
            texts=(caption,),
            fields=sample.fields,
            group=_group(sample, caption, self.positives) if self.processor.has_text else 0,
            augment_seed=derive_seed(self.seed, visit, sample.id, "augment"),
            flippable=may_flip(sample, self.augment),
            answers=accepted(question_of(sample.fields, sample.id).answers) if self.answers else {},
            latents=None if known is None else known.latents,
            features=known.texts[sample.texts.index(caption)] if known is not None and known.texts else None,
            audio=self._recording(sample, visit) if self.processor.has_audio else None,
        )

    def collate(self, items: Sequence[Item], epoch: int) -> Batch:
        """Change all pictures of the batch at once; what becomes of each depends on its own seed alone."""
        seen = self.processor.has_image and self.encoding is None and self.sees
        read = self.processor.has_text and (self.encoding is None or self.encoding.text is None)
        return Batch(
            ids=tuple(item.id for item in items),
            image=self._augmented(items, epoch) if seen else None,
            text=self.processor.text([item.texts[0] for item in items], words=self.words) if read else None,
            groups=torch.tensor([item.group for item in items], dtype=torch.int64) if self.processor.has_text else None,
            answers=tuple(item.answers for item in items) if self.answers else (),
            latents=None if self.encoding is None else self._latents(items),
            features=_padded([item.features for item in items if item.features is not None]),
            audio=_heard(items) if self.processor.has_audio else None,
        )

    def _recording(self, sample: Sample, visit: int) -> Tensor:
        """A part of the recording, drawn and changed at random."""
        spec, seed = self.processor.audio_spec, derive_seed(self.seed, visit, sample.id, "audio")
        begin = float(generator(self.seed, visit, sample.id, "begin").random())
        wave = recording(sample, self.processor, begin=begin)
        return fit_audio(augment_audio(wave, seed, self.augment_audio, spec.rate), spec)

    def _latents(self, items: Sequence[Item]) -> Tensor:
        """Of the mirror images where `augment` would mirror the picture."""
        flips = mirrored([item.augment_seed for item in items], self.augment, [item.flippable for item in items])
        pairs = zip((item.latents for item in items if item.latents is not None), flips.int().tolist(), strict=True)
        return torch.stack([latents[flip] for latents, flip in pairs])

    def _augmented(self, items: Sequence[Item], epoch: int) -> Tensor:
        return augment(
            [item.image for item in items if item.image is not None],
            [item.augment_seed for item in items],
            self.augment.at(epoch),
            self.processor.image_spec.size,
            background=self.processor.image_spec.background,
            flippable=[item.flippable for item in items],
        )


@dataclass(frozen=True)
class EvalPreparation:
    """The processor's own preparation and all captions: the same sample always gives the same tensors.

    Args:
        processor: The model's preparation.
        media: What samples must have, of what the model takes: ``image``, ``audio``, or both.
    """

    processor: Processor
    media: tuple[str, ...] = ("image", "audio")

    def __call__(self, sample: Sample, visit: int) -> Item:
        texts = tuple(text for text in sample.texts if text.strip())
        return Item(
            id=sample.id,
            image=_pixels(sample, self.processor, keep_alpha=False) if self._sees else None,
            texts=texts,
            fields=sample.fields,
            audio=fit_audio(recording(sample, self.processor), self.processor.audio_spec) if self._hears else None,
        )

    @property
    def _sees(self) -> bool:
        return "image" in self.media and self.processor.has_image

    @property
    def _hears(self) -> bool:
        return "audio" in self.media and self.processor.has_audio

    def collate(self, items: Sequence[Item], epoch: int) -> Batch:
        return Batch(
            ids=tuple(item.id for item in items),
            image=torch.stack([item.image for item in items if item.image is not None]) if self._sees else None,
            fields=tuple(item.fields for item in items),
            captions=tuple(item.texts for item in items),
            audio=_heard(items) if self._hears else None,
        )


@dataclass(frozen=True)
class QuestionPreparation:
    """As another preparation, but a sample that asks no question or has no answer is bad."""

    base: EvalPreparation

    def __call__(self, sample: Sample, visit: int) -> Item:
        question_of(sample.fields, sample.id)
        return self.base(sample, visit)


def _padded(captions: Sequence[TextFeatures]) -> Encoded | None:
    """Features of captions as a batch; None where there are none."""
    if not captions:
        return None
    lengths = torch.tensor([len(caption.words) for caption in captions])
    words = pad_sequence([caption.words for caption in captions], batch_first=True)
    known = torch.arange(words.shape[1]) < lengths[:, None]
    return Encoded(words, known, torch.stack([caption.vector for caption in captions]))


def _pixels(sample: Sample, processor: Processor, *, keep_alpha: bool) -> Tensor | None:
    return picture(sample, processor, keep_alpha=keep_alpha) if processor.has_image else None


def picture(sample: Sample, processor: Processor, *, keep_alpha: bool) -> Tensor:
    """The picture of a sample, uint8 ``(3 or 4, S, S)``. Raises `BadSample` where there is none that can be decoded.

    Args:
        sample: Holds its bytes.
        processor: Says how large.
        keep_alpha: Keep transparency, for what is changed at random; else the background shows through.
    """
    data = sample.media.get("image")
    if data is None:
        raise BadSample("no picture", sample.id)
    image = decode_image(data, where=sample.id)
    return fit_image(image, processor.image_spec, keep_alpha=keep_alpha and image.shape[0] == RGBA_CHANNELS)


def recording(sample: Sample, processor: Processor, *, begin: float = 0.0) -> Tensor:
    """As much of the recording of a sample as the model takes, ``(T,)``. Raises `BadSample` where there is none.

    Args:
        sample: Holds its bytes.
        processor: Says how long and at which rate.
        begin: See `mm.media.audio.decode_audio`.
    """
    data = sample.media.get("audio")
    if data is None:
        raise BadSample("no recording", sample.id)
    spec = processor.audio_spec
    return decode_audio(data, spec.rate, max_seconds=spec.max_seconds, begin=begin, where=sample.id)


def _heard(items: Sequence[Item]) -> AudioBatch:
    return padded([item.audio for item in items if item.audio is not None])


def _group(sample: Sample, text: str, positives: str) -> int:
    """Number of the group of positives. Samples of equal captions or equal fields share one."""
    if positives == "none":
        return derive_seed(sample.id)
    if positives == "text":
        return derive_seed(text)
    value = look_up(sample.fields, positives)
    if value is None:
        raise BadSample(f"missing field '{positives}'", sample.id)
    return derive_seed(str(value))
