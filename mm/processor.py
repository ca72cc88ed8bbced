"""Raw input to tensors: the preparation that belongs to a model and is saved with its weights."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mm.config import StrictConfig, read_json, validate
from mm.errors import CheckpointError, UserError
from mm.media.audio import AudioSpec, fit_audio, open_audio
from mm.media.image import ImageSpec, fit_image, open_image
from mm.tokenizers.text import TextTokenizer
from mm.types import AudioBatch, TextBatch

PROCESSOR_FILE = "processor.json"
TOKENIZER_FILE = "tokenizer.json"


class ProcessorConfig(StrictConfig):
    """How raw pictures and texts become tensors; picture size and context length follow from the system.

    Args:
        fit: ``crop`` scales the shorter side and cuts the centre, ``squash`` scales both sides, ``content`` cuts to what
            differs from the background and pads to a square.
        margin: Space left around the content by ``content``, as a share of its longer side.
        interpolation: Antialiased resampling filter.
        background: RGB colour under transparent pixels, and of the padding.
        tokenizer: ``bpe`` is trained on the captions of the training data, ``characters`` has those of these captions, for
            recognition of speech, ``clip`` is the vocabulary of OpenAI's CLIP.
        templates: Prompts that surround a class name, ``{}`` being the name.
        audio: How recordings become waves, for systems that take them.
    """

    fit: Literal["crop", "squash", "content"] = "crop"
    margin: float = 0.04
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)
    tokenizer: Literal["bpe", "characters", "clip"] = "bpe"
    templates: tuple[str, ...] = ("{}",)
    audio: AudioSpec = AudioSpec()

    def image_spec(self, size: int) -> ImageSpec:
        """The picture preparation for one side length in pixels."""
        return ImageSpec(
            size=size, fit=self.fit, margin=self.margin, interpolation=self.interpolation, background=self.background
        )


class SavedProcessor(StrictConfig):
    """The content of ``processor.json``."""

    image: ImageSpec | None = None
    audio: AudioSpec | None = None
    context_length: int
    templates: tuple[str, ...]


class Processor:
    """Prepares raw pictures and texts for one model.

    Args:
        image: Geometry of the pictures; None for models without pictures.
        tokenizer: Text to ids; None for models without text.
        context_length: Longest text in tokens, start and end included; 0 for models without text.
        templates: Prompts for class names.
        audio: What waves are made of recordings; None for models without sound.
    """

    def __init__(
        self,
        *,
        image: ImageSpec | None = None,
        tokenizer: TextTokenizer | None = None,
        context_length: int = 0,
        templates: Sequence[str] = ("{}",),
        audio: AudioSpec | None = None,
    ) -> None:
        self._image_spec = image
        self._audio_spec = audio
        self._tokenizer = tokenizer
        self.context_length = context_length
        self.templates = tuple(templates)

    @property
    def has_image(self) -> bool:
        """Whether the model takes pictures."""
        return self._image_spec is not None

    @property
    def image_spec(self) -> ImageSpec:
        """Geometry of the pictures. Raises `UserError` for models without pictures."""
        if self._image_spec is None:
            raise UserError("this model takes no pictures; choose another model")
        return self._image_spec

    @property
    def has_audio(self) -> bool:
        """Whether the model takes recordings."""
        return self._audio_spec is not None

    @property
    def audio_spec(self) -> AudioSpec:
        """What waves the model takes. Raises `UserError` for models without sound."""
        if self._audio_spec is None:
            raise UserError("this model takes no recordings; choose one that hears, such as emoji-audio")
        return self._audio_spec

    @property
    def has_text(self) -> bool:
        """Whether the model takes texts."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> TextTokenizer:
        """Text to ids. Raises `UserError` for models without text."""
        if self._tokenizer is None:
            raise UserError("this model takes no text; choose another model")
        return self._tokenizer

    def image(self, raw: Any) -> Tensor:
        """One picture (path, bytes, PIL image, ``(H, W, C)`` array or ``(C, H, W)`` uint8 tensor) to uint8 ``(3, S, S)``."""
        return fit_image(open_image(raw), self.image_spec)

    def view(self, raw: Any, side: int) -> Tensor:
        """What the model sees of a picture in another resolution, for people: uint8 ``(3, side, side)``."""
        spec = self.image_spec
        resize_to = None if spec.resize_to is None else round(side * spec.resize_to / spec.size)
        return fit_image(open_image(raw), spec.model_copy(update={"size": side, "resize_to": resize_to}))

    def images(self, raws: Sequence[Any]) -> Tensor:
        """Several pictures to uint8 ``(B, 3, S, S)``."""
        return torch.stack([self.image(raw) for raw in raws])

    def audio(self, raw: Any, *, whole: bool = False) -> Tensor:
        """One recording (path, bytes of a file, or an array at the model's rate) to a wave ``(T,)``, fp32, always the same.

        Args:
            raw: The recording.
            whole: Take all of it in place of the beginning; one beyond the limit of half an hour is refused.
        """
        spec = self.audio_spec
        return fit_audio(open_audio(raw, spec.rate, max_seconds=None if whole else spec.max_seconds), spec, whole=whole)

    def audios(self, raws: Sequence[Any]) -> AudioBatch:
        """Several recordings, filled up with zeros behind their ends."""
        return padded([self.audio(raw) for raw in raws])

    def text(self, texts: Sequence[str], *, words: bool = False) -> TextBatch:
        """Texts to ids, trimmed to the longest of them, and on demand which of these make a word."""
        return self.tokenizer(texts, self.context_length, words=words)

    def without_start(self) -> "Processor":
        """The same, but nothing is put before a text."""
        return Processor(
            image=self._image_spec,
            tokenizer=self.tokenizer.without_start(),
            context_length=self.context_length,
            templates=self.templates,
            audio=self._audio_spec,
        )

    def with_image(self, image: ImageSpec) -> "Processor":
        """The same, but it prepares pictures like this."""
        return Processor(
            image=image,
            tokenizer=self._tokenizer,
            context_length=self.context_length,
            templates=self.templates,
            audio=self._audio_spec,
        )

    def beginnings(self, texts: Sequence[str]) -> TextBatch:
        """Texts that are to be continued: as `text`, but without the end. Raises `UserError` where a text leaves no room."""
        batch = self.text(texts)
        if int(batch.lengths.max()) >= self.context_length:
            raise UserError(f"a beginning of {self.context_length} tokens or more leaves no room to write; shorten it")
        shorter = 0 if self.tokenizer.end is None else 1
        return TextBatch(batch.ids[:, : batch.ids.shape[1] - shorter], batch.lengths - shorter)

    def stamp(self) -> dict[str, Any]:
        """What an evaluation's protocol stamp says of the preparation."""
        facts: dict[str, Any] = {}
        if self.has_image:
            spec = self.image_spec
            facts["resize"] = f"{spec.fit} to {spec.size} px, {spec.interpolation}, antialiased"
        if self.has_audio:
            facts["sound"] = f"{self.audio_spec.rate} Hz, mono, the first {self.audio_spec.max_seconds:g} s"
        return facts

    def to_dict(self) -> dict[str, Any]:
        """Everything but the vocabulary, JSON ready: the content of ``processor.json``."""
        saved = SavedProcessor(
            image=self._image_spec, audio=self._audio_spec, context_length=self.context_length, templates=self.templates
        )
        absent = {name for name, there in (("image", self.has_image), ("audio", self.has_audio)) if not there}
        return saved.model_dump(mode="json", exclude=absent)

    def save(self, folder: Path) -> None:
        """Write ``processor.json`` and ``tokenizer.json`` into an existing folder."""
        (folder / PROCESSOR_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        if self.has_text:
            self.tokenizer.save(folder / TOKENIZER_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Processor":
        """Read what `save` wrote. Raises `CheckpointError` when it is not there."""
        path = folder / PROCESSOR_FILE
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {PROCESSOR_FILE}; a model folder holds one, write it with mm.save or mm train")
        saved = validate(SavedProcessor, read_json(path), str(path))
        return cls(
            image=saved.image,
            tokenizer=TextTokenizer.load(folder / TOKENIZER_FILE) if saved.context_length else None,
            context_length=saved.context_length,
            templates=saved.templates,
            audio=saved.audio,
        )


def padded(waves: Sequence[Tensor]) -> AudioBatch:
    """Waves ``(T,)`` of any lengths, with zeros behind their ends."""
    return AudioBatch(pad_sequence(list(waves), batch_first=True), torch.tensor([len(wave) for wave in waves]))
