"""The samples of an evaluation set: files or arrays with labels, captions and the set's prompts."""

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image

from mm.data.benchmarks.layout import Copy
from mm.data.benchmarks.names import Vocabulary
from mm.data.files import read_file, revision_of
from mm.errors import BadSample, DataError
from mm.media.image import DEFAULT_LIMITS
from mm.types import Sample


class Pictures(Protocol):
    """Pictures by index, uint8 ``(H, W)`` or ``(H, W, 3)``: an array, or what reads them one by one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Media(Protocol):
    """The media of a set in order."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str: ...

    def read(self, index: int) -> bytes: ...

    def revision(self) -> str: ...


@dataclass(frozen=True)
class Files:
    """A file a sample.

    Args:
        root: Where paths start.
        paths: Relative paths.
        keys: Ids; default: the paths.
        decode: Turns the bytes of a file into those of a format that mm reads, where they are not.

    Raises:
        DataError: A path leads out of the root: the lists that hold them were downloaded.
    """

    root: Path
    paths: Sequence[str]
    keys: Sequence[str] | None = None
    decode: Callable[[bytes, str], bytes] | None = None

    def __post_init__(self) -> None:
        for path in self.paths:
            if os.path.isabs(path) or (".." in path and ".." in Path(path).parts):
                raise DataError(
                    f"{self.root}: a list of the set names '{path}', which is not below it; download the list again"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def key(self, index: int) -> str:
        return (self.keys or self.paths)[index]

    def read(self, index: int) -> bytes:
        """Bytes of a file. Raises `BadSample`."""
        path = self.root / self.paths[index]
        data = read_file(path)
        return self.decode(data, str(path)) if self.decode else data

    def revision(self) -> str:
        return revision_of(self.root / path for path in self.paths)


@dataclass(frozen=True)
class Pixels:
    """Pictures in arrays.

    Args:
        pictures: The pictures in order.
        files: Where they came from.
    """

    pictures: Pictures
    files: Sequence[Path]

    def __len__(self) -> int:
        return len(self.pictures)

    def key(self, index: int) -> str:
        return f"{index:06d}"

    def read(self, index: int) -> bytes:
        """The picture as PNG, without loss."""
        return _png(Image.fromarray(np.ascontiguousarray(self.pictures[index])))

    def revision(self) -> str:
        return revision_of(self.files)


class BenchmarkSource:
    """An evaluation set, a `mm.types.Source`.

    Args:
        copy: Where it is.
        media: Its pictures or recordings.
        vocabulary: Names and prompts of its classes, where it has classes.
        labels: Index of the class of each sample.
        captions: Captions of each sample; default: the name of its class.
        extras: More fields of each sample.
        modality: What the media are, ``"image"`` or ``"audio"``.

    Attributes:
        task: The classification task, or None.
        templates: Published prompts of the set; empty where it has no classes.
        evaluation: What figures are published for.

    Raises:
        UserError: The copy holds no sample, or labels or captions that do not fit.
    """

    def __init__(
        self,
        copy: Copy,
        media: Media,
        *,
        vocabulary: Vocabulary | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        captions: Sequence[tuple[str, ...]] | None = None,
        extras: Sequence[Mapping[str, Any]] | None = None,
        modality: Literal["image", "audio"] = "image",
    ) -> None:
        if len(media) == 0:
            raise copy.error(f"no samples in {copy.folder}")
        self.name, self.evaluation = copy.spec, copy.evaluation
        self.task = vocabulary.task() if vocabulary else None
        self.templates = vocabulary.templates if vocabulary else ()
        self._copy, self._media, self._modality = copy, media, modality
        self._vocabulary, self._captions, self._extras = vocabulary, captions, extras
        self._labels = None
        if vocabulary is not None and labels is not None:
            self._labels = self._checked(np.asarray(labels), len(vocabulary.classes))
        for index, texts in enumerate(captions or ()):
            if not all(isinstance(text, str) for text in texts):
                raise copy.error(f"a caption of {media.key(index)} is no text")
        self.fingerprint = _digest(copy.name, copy.split, *(media.key(index) for index in range(len(media))))

    def _checked(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """Labels as int64, one a sample, each a class."""
        if labels.size != len(self._media):
            raise self._copy.error(f"{len(self._media)} samples and {labels.size} labels")
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise self._copy.error("labels are no list of whole numbers")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise self._copy.error(f"labels go from {labels.min()} to {labels.max()}, and there are {num_classes} classes")
        return labels.astype(np.int64)

    @property
    def revision(self) -> str:
        """Hex digest that changes with any file, label or caption; looks at every file."""
        digest = hashlib.sha256(f"{self.fingerprint} {self._media.revision()}".encode())
        for index in range(len(self)):
            digest.update(json.dumps([self._texts(index), self.fields(index)], sort_keys=True).encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._media)

    def key(self, index: int) -> str:
        return self._media.key(index)

    def fields(self, index: int) -> Mapping[str, Any]:
        own = {} if self._extras is None else self._extras[index]
        if self._vocabulary is None or self._labels is None:
            return own
        return {"cls": (self._vocabulary.values or self._vocabulary.classes)[self._labels[index]], **own}

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `BadSample` when its file has gone or cannot be used."""
        return Sample(self.key(index), {self._modality: self._media.read(index)}, self._texts(index), self.fields(index))

    def _texts(self, index: int) -> tuple[str, ...]:
        if self._captions is not None:
            return tuple(self._captions[index])
        return () if self._vocabulary is None or self._labels is None else (self._vocabulary.classes[self._labels[index]],)


def from_ppm(data: bytes, where: str) -> bytes:
    """A PPM file as PNG. Raises `BadSample`."""
    try:
        with Image.open(io.BytesIO(data), formats=["PPM"]) as picture:
            if picture.width * picture.height > DEFAULT_LIMITS.max_pixels:
                raise BadSample("too many pixels", where)
            return _png(picture.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample("undecodable", f"{where}: {error}") from None


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()
