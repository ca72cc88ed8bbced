"""Opening a source by what the user wrote: embedded emoji, a folder, a table, tar shards or a Hugging Face folder."""

import contextlib
import glob
import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm.data.benchmarks import is_benchmark, open_benchmark
from mm.data.captions import look_up
from mm.data.config import DataConfig
from mm.data.emoji import open_emoji
from mm.data.features import common_attributes
from mm.data.fields import nearest
from mm.data.folder import FolderSource
from mm.data.huggingface import HuggingFaceSource, parquet_files
from mm.data.questions import open_emoji_questions
from mm.data.remote import is_remote
from mm.data.shards import ShardSource
from mm.data.speech import open_speech
from mm.data.stream import HeadSource
from mm.data.table import TABLE_SUFFIXES, TableSource
from mm.errors import BadSample, UserError
from mm.seeding import derive_seed
from mm.types import Sample, Source

Progress = Callable[[int, int | None], None]

PROBED_SAMPLES = 50

EMBEDDED: Mapping[str, Callable[[str, int, Any], Source]] = {
    "emoji": open_emoji,
    "emoji-vqa": open_emoji_questions,
    "emoji-speech": open_speech,
}
"""Openers of the data that come with the package, by what a source begins with."""

EXPECTED = (
    "a source is emoji:train (or :validation, :test), emoji-vqa:train, emoji-speech:train, a folder of pictures or recordings, "
    "a CSV, TSV or JSONL table, tar shards such as 'shards/{000..010}.tar' or 's3://bucket/{000..010}.tar', a Hugging Face "
    "datasets folder, or an evaluation "
    "set such as imagenet:FOLDER"
)


def open_source(
    spec: str,
    *,
    text_field: str | None = None,
    label_field: str | None = None,
    image_field: str | None = None,
    audio_field: str | None = None,
    image_size: int = 64,
    progress: Progress | None = None,
) -> Source:
    """Open whatever ``spec`` names; what it is, is found out by looking at it.

    Args:
        spec: ``emoji:...``, ``emoji-vqa:...`` for questions about them, ``emoji-speech:...`` for their spoken names; a folder
            of pictures or recordings (sub-folders are classes, ``name.txt`` beside a file its captions, files that differ in
            their endings alone one sample); a CSV, TSV or JSONL table, or a folder with one table and its files; tar shards
            (folder, glob, brace range), here or in object storage; a folder written by `datasets` or parquet files.
        text_field: Column or dotted field that holds the caption, where it is not found by its usual names.
        label_field: The same for the class, which is then found under ``cls``.
        image_field, audio_field: The same for the picture and the recording; for tables and Hugging Face folders only.
        image_size: Side in pixels at which emoji are drawn.
        progress: Called with (done, in all) while emoji are drawn or spoken, or shards indexed.

    Raises:
        UserError: Nothing usable there; the message says what was found and what to do.
    """
    columns = {
        "text_field": text_field,
        "label_field": label_field,
        "image_field": image_field,
        "audio_field": audio_field,
    }
    scheme, colon, _ = spec.partition(":")
    if scheme in EMBEDDED:
        if not colon:
            raise UserError(f"{scheme}: choose {scheme}:train, {scheme}:validation, {scheme}:test or {scheme}:all")
        return _with_fields(EMBEDDED[scheme](spec, image_size, progress), **columns)
    if is_benchmark(spec):
        return _with_fields(open_benchmark(spec), **columns)
    if spec.startswith("pipe:"):
        raise UserError(f"{spec}: the output of a command is not read by position; data.stream reads it in its own order")
    path = Path(os.path.expanduser(spec))
    if path.is_dir():
        return _open_folder(path, spec, columns, progress)
    suffix = path.suffix.lower()
    if suffix in TABLE_SUFFIXES and path.is_file():
        return TableSource(path, name=spec, **columns)
    if suffix == ".parquet" and parquet_files(path):
        return HuggingFaceSource(path, name=spec, **columns)
    if is_remote(spec) or (suffix == ".tar" and (path.is_file() or glob.has_magic(spec) or "{" in spec)):
        shards = spec if is_remote(spec) else str(path)
        return _with_fields(ShardSource(shards, name=spec, progress=progress), **columns)
    if path.is_file():
        raise UserError(f"{spec}: cannot read a '{suffix or path.name}' file as a source; {EXPECTED}")
    beside = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
    hint = nearest(path.name, beside) if beside else "its folder does not exist"
    raise UserError(f"{spec}: not found; {hint if hint.startswith(('did', 'its')) else EXPECTED}")


def _open_folder(path: Path, spec: str, columns: Mapping[str, str | None], progress: Progress | None) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file() or parquet_files(path):
        return HuggingFaceSource(path, name=spec, **columns)
    if next(path.glob("*.tar"), None) is not None:
        return _with_fields(ShardSource(path, name=spec, progress=progress), **columns)
    tables = sorted(file for file in path.iterdir() if file.suffix.lower() in TABLE_SUFFIXES and not file.name.startswith("."))
    if len(tables) > 1:
        names = ", ".join(table.name for table in tables)
        raise UserError(f"{spec}: holds several tables ({names}); choose one, such as {path / tables[0].name}")
    if tables:
        try:
            return TableSource(tables[0], name=spec, **columns)
        except UserError as error:
            raise type(error)(f"{error}; or take {tables[0].name} out of the folder to read its other files alone") from None
    return _with_fields(FolderSource(path, name=spec), **columns)


def open_training_source(config: DataConfig, *, image_size: int = 64, progress: Progress | None = None) -> Source:
    """The source of ``data.train``, or the weighted mixture of ``data.mixture``; of a stream its first samples.

    Raises `UserError` as `open_source`.
    """

    def open_one(spec: str) -> Source:
        source = open_source(
            spec,
            text_field=config.text_field,
            label_field=config.label_field,
            image_field=config.image_field,
            audio_field=config.audio_field,
            image_size=image_size,
            progress=progress,
        )
        return source if config.keep == 1 else kept_share(source, config.keep)

    if config.train is not None and config.stream is not None:
        return HeadSource(config.train, config.stream)
    if config.train is not None:
        return open_one(config.train)
    return Concat([open_one(part.source) for part in config.mixture], weights=[part.weight for part in config.mixture])


def revision(source: Source) -> str:
    """Hex digest of the content of a source, for caches of what was computed from it.

    Stricter than the fingerprint, which only stands for which samples there are: editing or copying a file changes it.
    """
    return getattr(source, "revision", source.fingerprint)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Subset:
    """Some samples of a source, a `mm.types.Source`.

    Args:
        source: Where they are.
        keep: Their indices, or a predicate on the fields of a sample.
        name: What messages call it; default: the name of the source.
    """

    def __init__(
        self, source: Source, keep: Sequence[int] | Callable[[Mapping[str, Any]], bool], *, name: str | None = None
    ) -> None:
        self.source = source
        self.name = name if name is not None else source.name
        self.indices = [i for i in range(len(source)) if keep(source.fields(i))] if callable(keep) else [int(i) for i in keep]
        self.fingerprint = _digest("subset", source.fingerprint, ",".join(map(str, self.indices)))

    @property
    def task(self) -> Any:
        """The classification task of the source, if it brings one."""
        return getattr(self.source, "task", None)

    @property
    def templates(self) -> tuple[str, ...]:
        """The source's published prompts, if it brings any."""
        return getattr(self.source, "templates", ())

    @property
    def evaluation(self) -> str | None:
        """What figures of the source are published for, if it is a published set."""
        return getattr(self.source, "evaluation", None)

    @property
    def attributes(self) -> Mapping[str, str]:
        """As the source's."""
        return getattr(self.source, "attributes", {})

    @property
    def revision(self) -> str:
        """As the source's."""
        return _digest("subset", revision(self.source), self.fingerprint)

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, index: int) -> str:
        return self.source.key(self.indices[index])

    def fields(self, index: int) -> Mapping[str, Any]:
        return self.source.fields(self.indices[index])

    def read(self, index: int) -> Sample:
        return self.source.read(self.indices[index])


def kept_share(source: Source, share: float) -> Subset:
    """About that share of a source, chosen by ids: a larger share holds all of a smaller one. Raises `UserError` for none."""
    indices = [index for index in range(len(source)) if derive_seed("keep", source.key(index)) < share * 2**63]
    if not indices:
        raise UserError(f"{source.name}: data.keep {share} leaves none of its {len(source)} samples; keep more")
    return Subset(source, indices)


class Concat:
    """Several sources one after the other, a `mm.types.Source`. Ids get the number of their source in front.

    Args:
        sources: The parts.
        weights: Share of an epoch that each part gets, in proportion; None takes every sample once.

    Attributes:
        shares: ``(size, weight)`` of each part where weights are given, else None; the loader draws by it.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        if weights is not None and (len(weights) != len(sources) or not all(weight > 0 for weight in weights)):
            raise ValueError("one weight above zero for each source")
        for source in sources:
            if len(source) == 0:
                raise UserError(f"{source.name}: no samples in it")
        self.sources = list(sources)
        self.name = " + ".join(source.name for source in sources)
        self.attributes = common_attributes([getattr(source, "attributes", {}) for source in sources], self.name)
        sizes = [len(source) for source in sources]
        self.shares = None if weights is None else list(zip(sizes, weights, strict=True))
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self.fingerprint = hashlib.sha256(
            " ".join(["concat", *(source.fingerprint for source in sources)]).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def key(self, index: int) -> str:
        part, place = self._locate(index)
        return f"{part}/{self.sources[part].key(place)}"

    def fields(self, index: int) -> Mapping[str, Any]:
        part, place = self._locate(index)
        return self.sources[part].fields(place)

    def read(self, index: int) -> Sample:
        part, place = self._locate(index)
        sample = self.sources[part].read(place)
        return replace(sample, id=f"{part}/{sample.id}")

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        part = bisect_right(self._starts, index) - 1
        return part, index - self._starts[part]


class FieldView:
    """A source whose captions or class come from chosen fields, a `mm.types.Source`.

    Args:
        source: What to read.
        text_field: Dotted field that holds the captions; None keeps the source's.
        label_field: Dotted field that becomes ``cls``.

    Raises:
        UserError: None of the first samples has the field.
    """

    def __init__(self, source: Source, *, text_field: str | None = None, label_field: str | None = None) -> None:
        self.source = source
        self.name = source.name
        self.fingerprint = _digest("fields", source.fingerprint, repr(text_field), repr(label_field))
        self._text_field, self._label_field = text_field, label_field
        first = list(_readable_fields(source))
        for asked in (text_field, label_field):
            if asked is not None and all(look_up(fields, asked) is None for fields in first):
                known = list(dict.fromkeys(name for fields in first for name in fields))
                raise UserError(f"{self.name}: samples have no field '{asked}'; {nearest(asked, known)}")

    @property
    def task(self) -> Any:
        """The classification task of the source, if it brings one and its class is not replaced."""
        return getattr(self.source, "task", None) if self._label_field is None else None

    @property
    def templates(self) -> tuple[str, ...]:
        """The source's published prompts, if it brings any and its class is not replaced."""
        return getattr(self.source, "templates", ()) if self._label_field is None else ()

    @property
    def evaluation(self) -> str | None:
        """What figures of the source are published for, if it is a published set."""
        return getattr(self.source, "evaluation", None)

    @property
    def attributes(self) -> Mapping[str, str]:
        """As the source's."""
        return getattr(self.source, "attributes", {})

    @property
    def revision(self) -> str:
        """As the source's."""
        return _digest(revision(self.source), self.fingerprint)

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._relabelled(self.source.fields(index))

    def read(self, index: int) -> Sample:
        """As the source's. Raises `BadSample` ("missing text") where the text field is absent or empty."""
        sample = self.source.read(index)
        texts = sample.texts
        if self._text_field is not None:
            value = look_up(sample.fields, self._text_field)
            texts = tuple(str(text).strip() for text in (value if isinstance(value, (list, tuple)) else [value]) if text)
            if not texts:
                raise BadSample("missing text", sample.id)
        return replace(sample, texts=texts, fields=self._relabelled(sample.fields))

    def _relabelled(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        value = None if self._label_field is None else look_up(fields, self._label_field)
        return fields if value is None else {**fields, "cls": value}


class CaptionAsField:
    """A source whose samples have their first caption as a field, a `mm.types.Source`; reading fields reads the sample.

    Args:
        source: What to read.
        field: Name of the field.
    """

    def __init__(self, source: Source, field: str) -> None:
        self.source, self._field = source, field
        self.name = source.name
        self.fingerprint = _digest("caption as field", source.fingerprint, field)
        self.evaluation = getattr(source, "evaluation", None)

    @property
    def attributes(self) -> Mapping[str, str]:
        """As the source's."""
        return getattr(self.source, "attributes", {})

    @property
    def revision(self) -> str:
        """As the source's."""
        return _digest(revision(self.source), self.fingerprint)

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def fields(self, index: int) -> Mapping[str, Any]:
        return self.read(index).fields

    def read(self, index: int) -> Sample:
        sample = self.source.read(index)
        return replace(sample, fields={**sample.fields, self._field: sample.texts[0]}) if sample.texts else sample


def _readable_fields(source: Source) -> Iterator[Mapping[str, Any]]:
    for index in range(min(len(source), PROBED_SAMPLES)):
        with contextlib.suppress(BadSample):
            yield source.fields(index)


def _with_fields(
    source: Source, *, text_field: str | None, label_field: str | None, image_field: str | None, audio_field: str | None
) -> Source:
    for what, asked in (("image_field", image_field), ("audio_field", audio_field)):
        if asked is not None:
            raise UserError(f"{source.name}: {what} '{asked}' is for tables and Hugging Face folders only; leave it out")
    if (text_field is None and label_field is None) or len(source) == 0:
        return source
    return FieldView(source, text_field=text_field, label_field=label_field)
