"""A Hugging Face datasets folder (``save_to_disk``, or parquet files) as a source."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm.data.files import read_file
from mm.data.table import Columns, find_columns
from mm.errors import BadSample, DataError, UserError
from mm.types import Sample

_SPLIT = re.compile(r"^(?P<split>.+?)(-\d+-of-\d+.*)?\.parquet$")


class HuggingFaceSource:
    """Rows of a Hugging Face dataset, a `mm.types.Source`.

    Ids are row numbers. A column of pictures or recordings holds encoded bytes or paths and is never decoded by `datasets`;
    columns are found as in a table, pictures and recordings first by their feature type. Class labels become their names, in
    their own column and as ``cls``.

    Args:
        path: A folder written by ``save_to_disk``, or a parquet file, a glob, or a folder of parquet files of one split.
        image_field, text_field, label_field, audio_field: Columns to use, where their names are not the usual ones.
        name: What messages call it; default: the path.

    Raises:
        UserError: The `datasets` library is missing, several splits are there, or a column is not.
        DataError: The folder is no such dataset.
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
        rows, kinds = _open(Path(path))
        if len(rows) == 0:
            raise UserError(f"{path}: no rows in it")
        pictures, sounds, labels = (
            [column for column, kind in kinds.items() if kind == wanted] for wanted in ("Image", "Audio", "ClassLabel")
        )
        self.columns = find_columns(
            _probe(rows, kinds),
            self.name,
            image_field=image_field or (pictures[0] if pictures else None),
            text_field=text_field,
            label_field=label_field or (labels[0] if labels else None),
            audio_field=audio_field or (sounds[0] if sounds else None),
        )
        self._media = {
            modality: column
            for modality, column in (("image", self.columns.image), ("audio", self.columns.audio))
            if column is not None
        }
        self._rows = rows.select_columns(list(self._media.values()))
        self._others = rows.remove_columns(list({*pictures, *sounds, *self._media.values()}))
        self._folder = Path(path).absolute() if Path(path).is_dir() else Path(path).absolute().parent
        self.fingerprint = _fingerprint(rows, self._others)
        self.revision = f"{self.fingerprint} {rows._fingerprint}"

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        return f"{index:08d}"

    def fields(self, index: int) -> Mapping[str, Any]:
        row = self._others[index]
        names = {column: feature for column, feature in self._others.features.items() if type(feature).__name__ == "ClassLabel"}
        for column, feature in names.items():
            known = row[column] is not None and row[column] >= 0  # -1 stands for "no label"
            row[column] = feature.int2str(row[column]) if known else None
        fields = {column: value for column, value in row.items() if value is not None}
        if self.columns.label in fields:
            fields["cls"] = fields[self.columns.label]
        return fields

    def read(self, index: int) -> Sample:
        """The sample with its bytes. Raises `BadSample` with cause ``missing file``, ``too many bytes`` or ``unreadable``."""
        fields = self.fields(index)
        row = self._rows[index]
        cells = {modality: row[column] for modality, column in self._media.items() if row[column] is not None}
        if not cells:
            raise BadSample("missing file", f"{self.name}: row {index}")
        media = {modality: _bytes(cell, self._folder, f"{self.name}: row {index}") for modality, cell in cells.items()}
        return Sample(self.key(index), media, _texts(fields, self.columns), fields)


def _open(path: Path) -> tuple[Any, dict[str, str]]:
    """The dataset, its pictures and recordings left encoded, and the feature type of each column."""
    try:
        import datasets
    except ImportError:
        raise UserError(f'{path}: reading Hugging Face datasets needs: pip install "mm-suite[hub]"') from None
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        rows = _load(datasets, path)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path}: cannot be opened as a Hugging Face dataset: {str(error).splitlines()[0]}") from None
    finally:
        if bars:
            datasets.enable_progress_bars()
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    for column, kind in kinds.items():
        if kind in ("Image", "Audio"):
            rows = rows.cast_column(column, type(rows.features[column])(decode=False))
    return rows, kinds


def _load(datasets: Any, path: Path) -> Any:
    if path.is_dir() and not parquet_files(path):
        loaded = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if len(loaded) > 1:
            raise UserError(f"{path}: holds the splits {', '.join(loaded)}; choose one, such as {path / next(iter(loaded))}")
        return next(iter(loaded.values()))
    files = parquet_files(path)
    splits = sorted({found["split"] for file in files if (found := _SPLIT.match(file.name))})
    numbered = all(re.search(r"-\d+-of-\d+", file.name) for file in files)
    if len(splits) > 1 and (numbered or set(splits) <= {"train", "validation", "test"}):
        raise UserError(
            f"{path}: holds the splits {', '.join(splits)}; choose one, such as '{files[0].parent / splits[0]}*.parquet'"
        )
    return datasets.Dataset.from_parquet([str(file) for file in files])


def parquet_files(path: Path) -> list[Path]:
    """Parquet files that a path means: itself, a glob, a folder's own files or those in its ``data`` sub-folder."""
    if path.is_dir():
        return sorted(path.glob("*.parquet")) or sorted((path / "data").glob("*.parquet"))
    return [path] if path.is_file() else sorted(path.parent.glob(path.name))


def _probe(rows: Any, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """The first rows, with pictures and recordings left out, to find columns by."""
    light = [column for column, kind in kinds.items() if kind not in ("Image", "Audio")]
    first: Sequence[Mapping[str, Any]] = [rows.select_columns(light)[i] for i in range(min(len(rows), 5))] if light else [{}]
    return [{column: row.get(column) for column in kinds} for row in first]


def _bytes(cell: Any, folder: Path, where: str) -> bytes:
    if isinstance(cell, Mapping):
        if cell.get("bytes"):
            return cell["bytes"]
        cell = cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, str) and cell:
        return read_file(folder / cell)
    raise BadSample("missing file", where)


def _texts(fields: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    column = columns.text or columns.label
    cell = fields.get(column) if column is not None else None
    cells = cell if isinstance(cell, list) else [cell]
    return tuple(text.strip() for text in cells if isinstance(text, str) and text.strip())


def _fingerprint(rows: Any, others: Any) -> str:
    """Digest of the number of rows, the columns, and the content of 64 rows spread over it: reading all takes too long."""
    digest = hashlib.sha256(f"huggingface {len(rows)} {sorted(rows.column_names)}".encode())
    for index in sorted({round(i * (len(rows) - 1) / 63) for i in range(64)}):
        if others.column_names:
            digest.update(repr(sorted(others[index].items())).encode())
    return digest.hexdigest()
