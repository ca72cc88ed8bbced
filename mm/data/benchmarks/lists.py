"""Sets whose splits are lists of pictures: Food-101, Pets, Flowers, Cars, Aircraft, DTD, in torchvision's layouts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.benchmarks.layout import MAX_METADATA_BYTES, Benchmark, Copy
from mm.data.benchmarks.names import Vocabulary, vocabulary
from mm.data.benchmarks.source import BenchmarkSource, Files
from mm.data.files import read_file
from mm.errors import BadSample, DataError, UserError


def read_mat(copy: Copy, path: Path) -> Mapping[str, Any]:
    """Arrays of a MATLAB file by name, single dimensions dropped. Raises `UserError` where scipy or the file cannot be used."""
    try:
        import scipy.io
    except ImportError:
        raise UserError(f"{copy.spec}: reading {path.name} takes scipy; pip install scipy") from None
    try:
        read_file(path, MAX_METADATA_BYTES)
        return scipy.io.loadmat(str(path), squeeze_me=True)
    except BadSample as error:
        raise copy.error(f"{path} cannot be read: {error}") from None
    except (
        Exception
    ) as error:  # a reader of foreign bytes raises nearly anything; all of it means that the file is no such file
        raise DataError(f"{copy.spec}: {path} is no MATLAB file that can be read: {error}") from None


def whole_numbers(copy: Copy, path: Path, name: str, value: Any) -> np.ndarray:
    """A value of a MATLAB file as int64 ``(N,)``; MATLAB also writes whole numbers as fractions. Raises `UserError`."""
    try:
        numbers = np.atleast_1d(np.asarray(value))
    except ValueError:  # lists of different lengths
        numbers = np.empty(0, dtype=object)
    fit = numbers.ndim == 1 and numbers.dtype.kind in "iuf" and (np.abs(numbers) < 1 << 53).all()  # which NaN is not
    if not fit or (numbers != numbers.round()).any():
        raise copy.error(f"{path} lacks a list of whole numbers '{name}'")
    return numbers.astype(np.int64)


def _open_food(copy: Copy) -> BenchmarkSource:
    base = copy.find("food-101", ".")
    table = base / "meta" / f"{copy.split}.json"
    lists = copy.json(table) if table.is_file() else None
    if not isinstance(lists, dict) or not lists or not all(isinstance(paths, list) for paths in lists.values()):
        raise copy.error(f"no meta/{copy.split}.json with lists of pictures by class in {base}")
    index = {name: label for label, name in enumerate(sorted(lists))}
    pairs = [(f"{path}.jpg", index[name]) for name, paths in lists.items() for path in paths]
    words = vocabulary("food101", [name.replace("_", " ") for name in index])
    return _listed(copy, base / "images", pairs, words)


def _open_pets(copy: Copy) -> BenchmarkSource:
    base = copy.find("oxford-iiit-pet", ".")
    table = base / "annotations" / f"{copy.split}.txt"
    rows = [line.split() for line in _lines(copy, table)]
    return _listed(
        copy, base / "images", [(f"{row[0]}.jpg", _number(copy, table, row, 1) - 1) for row in rows], vocabulary("pets")
    )


def _open_flowers(copy: Copy) -> BenchmarkSource:
    base = copy.find("flowers-102", ".")
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[copy.split]
    splits, labels = read_mat(copy, base / "setid.mat"), read_mat(copy, base / "imagelabels.mat")
    numbers = whole_numbers(copy, base / "setid.mat", key, splits.get(key))
    classes = whole_numbers(copy, base / "imagelabels.mat", "labels", labels.get("labels"))
    if len(numbers) and not 1 <= numbers.min() <= numbers.max() <= len(classes):
        raise copy.error(f"{base}/setid.mat names pictures that imagelabels.mat does not have")
    pairs = [(f"image_{number:05d}.jpg", int(classes[number - 1]) - 1) for number in numbers]
    return _listed(copy, base / "jpg", pairs, vocabulary("flowers"))


def _open_cars(copy: Copy) -> BenchmarkSource:
    base = copy.find("stanford_cars", ".")
    table = base / ("cars_test_annos_withlabels.mat" if copy.split == "test" else "devkit/cars_train_annos.mat")
    classes = [str(name) for name in np.atleast_1d(read_mat(copy, base / "devkit" / "cars_meta.mat").get("class_names", []))]
    rows = np.atleast_1d(read_mat(copy, table).get("annotations", []))
    if not classes or not len(rows) or not {"fname", "class"} <= set(rows.dtype.names or ()):
        raise copy.error(f"{table} lacks file names and classes, or devkit/cars_meta.mat their names")
    labels = whole_numbers(copy, table, "class", rows["class"].tolist()) - 1
    pairs = [(str(name), int(label)) for name, label in zip(rows["fname"], labels, strict=True)]
    return _listed(copy, base / f"cars_{copy.split}", pairs, vocabulary("cars", classes))


def _open_aircraft(copy: Copy) -> BenchmarkSource:
    """The 100 variants."""
    base = copy.find("fgvc-aircraft-2013b/data", "data", ".")
    table = base / f"images_variant_{copy.split}.txt"
    classes = _lines(copy, base / "variants.txt")
    index = {name: label for label, name in enumerate(classes)}
    rows = [line.partition(" ") for line in _lines(copy, table)]
    for _, _, variant in rows:
        if variant not in index:
            raise copy.error(f"{table} names the variant '{variant}', which variants.txt does not have")
    pairs = [(f"{number}.jpg", index[variant]) for number, _, variant in rows]
    return _listed(copy, base / "images", pairs, vocabulary("aircraft", classes))


def _open_dtd(copy: Copy) -> BenchmarkSource:
    """The first of the ten published partitions."""
    base = copy.find("dtd/dtd", "dtd", ".")
    words = vocabulary("dtd")
    index = {name: label for label, name in enumerate(words.classes)}
    table = base / "labels" / f"{copy.split}1.txt"
    paths = _lines(copy, table)
    for path in paths:
        if path.split("/")[0] not in index:
            raise copy.error(f"{table} names the class '{path.split('/')[0]}', which the set does not have")
    return _listed(copy, base / "images", [(path, index[path.split("/")[0]]) for path in paths], words)


def _listed(copy: Copy, root: Path, pairs: list[tuple[str, int]], words: Vocabulary) -> BenchmarkSource:
    if not root.is_dir():
        raise copy.error(f"no folder {root}")
    files = Files(root, [path for path, _ in pairs])
    return BenchmarkSource(copy, files, vocabulary=words, labels=[label for _, label in pairs])


def _lines(copy: Copy, path: Path) -> list[str]:
    if not path.is_file():
        raise copy.error(f"no {path}")
    return copy.lines(path)


def _number(copy: Copy, table: Path, row: list[str], column: int) -> int:
    if len(row) <= column or not row[column].isdecimal():
        raise copy.error(f"{table} has a line without a class number: '{' '.join(row)}'")
    return int(row[column])


SETS: Mapping[str, Benchmark] = {
    "food101": Benchmark(_open_food, "food-101/meta/test.json and food-101/images/apple_pie/*.jpg", ("test", "train")),
    "pets": Benchmark(
        _open_pets, "oxford-iiit-pet/annotations/test.txt and oxford-iiit-pet/images/*.jpg", ("test", "trainval")
    ),
    "flowers": Benchmark(
        _open_flowers, "flowers-102/setid.mat, flowers-102/imagelabels.mat and flowers-102/jpg/*.jpg", ("test", "val", "train")
    ),
    "cars": Benchmark(
        _open_cars,
        "stanford_cars/devkit/cars_meta.mat, stanford_cars/cars_test_annos_withlabels.mat and stanford_cars/cars_test/*.jpg",
        ("test", "train"),
    ),
    "aircraft": Benchmark(
        _open_aircraft,
        "fgvc-aircraft-2013b/data with variants.txt, images_variant_test.txt and images/*.jpg",
        ("test", "val", "trainval", "train"),
    ),
    "dtd": Benchmark(_open_dtd, "dtd/dtd/labels/test1.txt and dtd/dtd/images/banded/*.jpg", ("test", "val", "train")),
}
