"""A CSV, TSV or JSONL table of pictures or recordings and captions as a source; columns are found by their usual names."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm.data.fields import nearest
from mm.data.files import is_picture, is_recording, read_file, revision_of
from mm.errors import BadSample, DataError, UserError
from mm.types import Sample

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson"})
IMAGE_COLUMNS = (
    "image",
    "img",
    "picture",
    "photo",
    "image_path",
    "img_path",
)
AUDIO_COLUMNS = (
    "audio",
    "wav",
    "sound",
    "recording",
    "audio_path",
    "wav_path",
    "sound_path",
    "recording_path",
    "audio_file",
    "audio_filepath",
    "audio_filename",
)
FILE_COLUMNS = ("path", "filepath", "file_path", "filename", "file_name", "file")
"""These hold recordings where the first cells end like recordings, else pictures."""
TEXT_COLUMNS = (
    "text",
    "texts",
    "caption",
    "captions",
    "title",
    "description",
    "prompt",
    "sentence",
    "alt",
    "transcript",
    "transcription",
    "question",
)
QUESTION_COLUMN = "question"
LABEL_COLUMNS = ("label", "class", "cls", "category", "class_name")
ADDRESS_COLUMNS = ("url", "image_url", "uri", "link")
MAX_CELL_BYTES = 1 << 20
PROBED_ROWS = 50

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Columns:
    """Names of the columns that mean something; None where a table has none. There is a picture or a recording, or both."""

    image: str | None
    audio: str | None
    text: str | None
    label: str | None


@dataclass(frozen=True)
class _Entry:
    """One picture or recording or both, or one question: id, paths as written, captions, the other columns of its first row."""

    key: str
    paths: Mapping[str, str]
    texts: tuple[str, ...]
    fields: Mapping[str, Any]


class TableSource:
    """Rows of a table as samples, a `mm.types.Source`.

    Rows with the same files are one sample with several captions, unless they ask a question each (a column ``question``):
    then each is a sample of its own, with the path as field ``picture``. Ids are the paths as written, with the number of the
    row where rows ask, and with a ``+`` between where a row has a picture and a recording; a cell may be empty. Paths are
    relative to the table's folder (or, where none of the first is found there, to the one folder beside it that has them).
    Fields are all columns of the first row, and the class as ``cls``. A missing file is noticed when it is read.

    Args:
        path: The table, UTF-8 (a byte-order mark is fine), its first line or its keys naming the columns.
        image_field, text_field, label_field, audio_field: Columns to use, where their names are not the usual ones.
        name: What messages call it; default: the path.

    Raises:
        UserError: A column that was asked for, or any column of pictures or recordings, is not there.
        DataError: The file is no such table; the message names the line.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_field: str | None = None,
        text_field: str | None = None,
        label_field: str | None = None,
        audio_field: str | None = None,
        name: str | None = None,
    ) -> None:
        self.name = name if name is not None else str(path)
        rows = list(read_rows(Path(path)))
        if not rows:
            raise UserError(f"{path}: no rows in it")
        self.columns = find_columns(
            rows,
            self.name,
            image_field=image_field,
            text_field=text_field,
            label_field=label_field,
            audio_field=audio_field,
        )
        self._entries = _entries(rows, self.columns)
        folder, first = Path(path).absolute().parent, self._entries[:PROBED_ROWS]
        self._roots = {
            modality: _root(folder, [entry.paths[modality] for entry in first if modality in entry.paths])
            for modality in ("image", "audio")
        }
        digest = hashlib.sha256(b"table")
        for entry in self._entries:
            files = "+".join(entry.paths.values())
            digest.update(json.dumps([files, entry.texts, entry.fields], sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def revision(self) -> str:
        """Hex digest that changes with the table or any file that it names; looks at every file."""
        files = (self._roots[modality] / path for entry in self._entries for modality, path in entry.paths.items())
        return hashlib.sha256(f"{self.fingerprint} {revision_of(files)}".encode()).hexdigest()

    def key(self, index: int) -> str:
        return self._entries[index].key

    def fields(self, index: int) -> Mapping[str, Any]:
        return self._entries[index].fields

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `BadSample` with cause ``missing file``, ``too many bytes`` or ``unreadable``."""
        entry = self._entries[index]
        if not entry.paths:
            raise BadSample("missing file", f"{self.name}: a row without a file")
        media = {modality: read_file(self._roots[modality] / path) for modality, path in entry.paths.items()}
        return Sample(entry.key, media, entry.texts, entry.fields)


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table in order; empty ones are left out. Raises `DataError` naming the line that cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _json_rows(file, path) if path.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(file, path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8; save the table as UTF-8 (in Excel: 'CSV UTF-8') and try again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def find_columns(
    rows: Sequence[Row],
    name: str,
    *,
    image_field: str | None = None,
    text_field: str | None = None,
    label_field: str | None = None,
    audio_field: str | None = None,
) -> Columns:
    """Choose the columns of a table: the ones asked for, else those with usual names, else those whose cells look like files.

    Raises:
        UserError: A column asked for does not exist, or no column holds pictures or recordings.
    """
    known = list(dict.fromkeys(column for row in rows[:PROBED_ROWS] for column in row))
    for asked in (image_field, text_field, label_field, audio_field):
        if asked is not None and asked not in known:
            raise UserError(f"{name}: no column '{asked}'; {nearest(asked, known)}")
    by_lower = {column.lower(): column for column in reversed(known)}

    def usual(names: Sequence[str]) -> str | None:
        return next((by_lower[candidate] for candidate in names if candidate in by_lower), None)

    image, audio = _file_columns(rows[:PROBED_ROWS], known, usual, image_field, audio_field)
    for column in (image, audio) if image or audio else (usual(ADDRESS_COLUMNS),):
        if column is not None and any(_is_address(row.get(column)) for row in rows[:PROBED_ROWS]):
            raise UserError(f"{name}: column '{column}' holds web addresses; download them first (img2dataset does)")
    if image is None and audio is None:
        raise UserError(
            f"{name}: no column of picture files or recordings among {', '.join(known)}; "
            "name it with data.image_field or data.audio_field (--image-field, --audio-field)"
        )
    return Columns(image, audio, text_field or usual(TEXT_COLUMNS), label_field or usual(LABEL_COLUMNS))


def _file_columns(
    rows: Sequence[Row],
    known: Sequence[str],
    usual: Callable[[Sequence[str]], str | None],
    image: str | None,
    audio: str | None,
) -> tuple[str | None, str | None]:
    """Columns of pictures and of recordings.

    Usual names count, but what is called like recordings holds some where the table has pictures, too; then cells count.
    """

    def ends(column: str | None, is_file: Callable[[str], bool]) -> list[bool]:
        cells = [row[column] for row in rows if row.get(column)] if column is not None else []
        return [isinstance(cell, str) and is_file(cell) for cell in cells]

    def first(columns: Sequence[str | None], is_file: Callable[[str], bool], taken: str | None) -> str | None:
        return next((c for c in columns if c != taken and (fit := ends(c, is_file)) and all(fit)), None)

    files, named = usual(FILE_COLUMNS), usual(AUDIO_COLUMNS)
    pictured = image or usual(IMAGE_COLUMNS)
    if (pictured or files) and not any(ends(named, is_recording)):
        named = None
    audio = audio or named or first([files, *known], is_recording, image)
    if pictured is None and audio is None:
        pictured = files
    return pictured or first([files, *known], is_picture, audio), audio


def _is_address(cell: Any) -> bool:
    return isinstance(cell, str) and cell.startswith(("http://", "https://", "s3://", "gs://"))


def _csv_rows(file: Iterator[str], path: Path) -> Iterator[Row]:
    first = next(file, "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    csv.field_size_limit(MAX_CELL_BYTES)
    reader = csv.reader(_chain(first, file), delimiter=delimiter, strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
        _check_header(header, path)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {len(cells)} values for {len(header)} columns; "
                    f"write texts that contain '{delimiter}' in double quotes"
                )
            yield {column: cell.strip() for column, cell in zip(header, cells, strict=False)}
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _check_header(header: Sequence[str], path: Path) -> None:
    if any(is_picture(cell) or is_recording(cell) for cell in header):
        raise DataError(f"{path}: the first line must name the columns, for example 'image,text'; it looks like a row")
    repeated = [column for column in header if header.count(column) > 1]
    if repeated:
        raise DataError(f"{path}: two columns are called '{repeated[0]}'; rename one")


def _json_rows(file: Iterator[str], path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f'{path}:{number}: each line must be an object such as {{"image": "a.jpg", "text": "a cat"}}')
        yield row


def _entries(rows: Sequence[Row], columns: Columns) -> list[_Entry]:
    """One entry a picture or recording or both, or a question, in the order of their first rows."""
    texts: dict[str, list[str]] = {}
    fields: dict[str, dict[str, Any]] = {}
    paths: dict[str, dict[str, str]] = {}
    for number, row in enumerate(rows):
        files = {
            modality: os.path.normpath(str(row[column])).replace("\\", "/")
            for modality, column in (("image", columns.image), ("audio", columns.audio))
            if column is not None and row.get(column)
        }
        joined = "+".join(files.values())
        asks = joined and row.get(QUESTION_COLUMN)
        key = f"{joined}?{number}" if asks else joined or f"row {number}"
        if key not in texts:
            texts[key], paths[key] = [], files
            fields[key] = _fields(row, columns) | ({"picture": joined} if asks else {})
        texts[key] += [text for text in _texts(row, columns) if text not in texts[key]]
    return [_Entry(key, files, tuple(texts[key]), fields[key]) for key, files in paths.items()]


def _fields(row: Row, columns: Columns) -> dict[str, Any]:
    fields = {column: cell for column, cell in row.items() if cell is not None and cell != ""}
    if columns.label is not None and columns.label in fields:
        fields["cls"] = fields[columns.label]
    return fields


def _texts(row: Row, columns: Columns) -> list[str]:
    """Captions of a row: its text column, or its class where the table has no text column."""
    column = columns.text or columns.label
    cell = row.get(column) if column is not None else None
    cells = cell if isinstance(cell, list) else [cell]
    return [text.strip() for text in cells if isinstance(text, str) and text.strip()]


def _root(folder: Path, paths: Sequence[str]) -> Path:
    """The folder that relative paths start from."""
    relative = [path for path in paths if path and not os.path.isabs(path)]
    if not relative or any((folder / path).exists() for path in relative):
        return folder
    beside = [child for child in sorted(folder.iterdir()) if child.is_dir() and (child / relative[0]).is_file()]
    return beside[0] if len(beside) == 1 else folder
