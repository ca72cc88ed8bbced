"""Sets stored as arrays: CIFAR, MNIST, STL-10, SVHN, PCam, FER2013, in torchvision's layouts and the binary ones of CIFAR."""

import gzip
import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm.data.benchmarks.layout import Benchmark, Copy, class_folders
from mm.data.benchmarks.lists import read_mat, whole_numbers
from mm.data.benchmarks.names import vocabulary
from mm.data.benchmarks.plain_pickle import MAX_BYTES, read_plain_pickle
from mm.data.benchmarks.source import BenchmarkSource, Files, Pixels
from mm.data.files import read_file
from mm.errors import BadSample, DataError, UserError

FER_SIDE = 48
FER_EMOTIONS = dict(enumerate((0, 1, 2, 3, 5, 6, 4)))
"""Class of each number in the table, which counts angry, disgust, fear, happy, sad, surprise, neutral."""


def _read(copy: Copy, path: Path) -> bytes:
    try:
        return read_file(path)
    except BadSample as error:
        raise copy.error(f"{path} cannot be read: {error.cause}") from None


def _records(copy: Copy, path: Path, size: int) -> np.ndarray:
    """A file of records of ``size`` bytes, ``(records, size)``."""
    data = _read(copy, path)
    if len(data) == 0 or len(data) % size:
        raise copy.error(f"{path} has {len(data)} bytes, which is no whole number of records of {size}")
    return np.frombuffer(data, np.uint8).reshape(-1, size)


def _open_cifar(copy: Copy) -> BenchmarkSource:
    """The binary version where it is there, else the Python version, read without executing it."""
    ten = copy.name == "cifar10"
    binary, pickled = ("cifar-10-batches-bin", "cifar-10-batches-py") if ten else ("cifar-100-binary", "cifar-100-python")
    names = [f"data_batch_{number}" for number in range(1, 6)] if copy.split == "train" else ["test_batch"]
    if not ten:
        names = [copy.split]
    base = copy.find(binary, pickled)
    if base.name == binary:
        files = [base / f"{name}.bin" for name in names]
        labels_first = 1 if ten else 2
        rows = np.concatenate([_records(copy, file, labels_first + 3 * 32 * 32) for file in files])
        pixels, labels = rows[:, labels_first:], rows[:, labels_first - 1]
    else:
        files = [base / name for name in names]
        batches = [_batch(copy, file, "labels" if ten else "fine_labels") for file in files]
        pixels = np.concatenate([pixels for pixels, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
    pictures = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return BenchmarkSource(copy, Pixels(pictures, files), vocabulary=vocabulary(copy.name), labels=labels)


def _batch(copy: Copy, path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels ``(N, 3072)`` and labels of a batch of the Python version."""
    try:
        batch = read_plain_pickle(read_file(path, MAX_BYTES))
        pixels, labels = batch["data"], np.array(batch[key])
    except BadSample as error:
        raise copy.error(f"{path} cannot be read: {error.cause}") from None
    except (ValueError, KeyError) as error:
        raise DataError(f"{path}: not a CIFAR batch ({error}); download it again, or take the binary version") from None
    rows = isinstance(pixels, np.ndarray) and pixels.shape[1:] == (3 * 32 * 32,)
    if not rows or labels.ndim != 1 or labels.dtype.kind != "i":
        raise DataError(f"{path}: not a CIFAR batch (no rows of 3072 bytes with whole numbers as labels); download it again")
    return pixels, labels


def _open_mnist(copy: Copy) -> BenchmarkSource:
    prefix = "t10k" if copy.split == "test" else "train"
    files = [
        copy.find(*(f"{place}{prefix}-{kind}-ubyte{end}" for place in ("MNIST/raw/", "raw/", "") for end in ("", ".gz")))
        for kind in ("images-idx3", "labels-idx1")
    ]
    pictures, labels = (_idx(copy, file, dimensions) for file, dimensions in zip(files, (3, 1), strict=True))
    if pictures.shape[1:] != (28, 28):
        raise copy.error(f"{files[0]} has pictures of {pictures.shape[2]} x {pictures.shape[1]} pixels, not 28 x 28")
    return BenchmarkSource(copy, Pixels(pictures, files), vocabulary=vocabulary("mnist"), labels=labels)


def _idx(copy: Copy, path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes in the IDX format of http://yann.lecun.com/exdb/mnist/, also compressed."""
    data = _read(copy, path)
    if path.suffix == ".gz":
        try:
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise copy.error(f"{path} cannot be unpacked: {error}") from None
    start = 4 * (dimensions + 1)
    shape = tuple(np.frombuffer(data[4:start], ">u4").tolist())
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(shape) != dimensions or len(data) - start != int(np.prod(shape)):
        raise copy.error(f"{path} is no array of {dimensions} dimensions in the IDX format")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _open_stl(copy: Copy) -> BenchmarkSource:
    base = copy.find("stl10_binary", ".")
    files = [base / f"{copy.split}_X.bin", base / f"{copy.split}_y.bin"]
    rows, labels = _records(copy, files[0], 3 * 96 * 96), _records(copy, files[1], 1)[:, 0]
    pictures = rows.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1)  # stored by columns
    return BenchmarkSource(copy, Pixels(pictures, files), vocabulary=vocabulary("stl10"), labels=labels.astype(int) - 1)


def _open_svhn(copy: Copy) -> BenchmarkSource:
    path = copy.find(f"{copy.split}_32x32.mat", f"svhn/{copy.split}_32x32.mat")
    arrays = read_mat(copy, path)
    pictures = np.asarray(arrays.get("X"))
    if pictures.shape[:3] != (32, 32, 3) or pictures.dtype != np.uint8:
        raise copy.error(f"{path} lacks the pictures X (32, 32, 3, N)")
    labels = whole_numbers(copy, path, "y", arrays.get("y"))
    labels = np.where(labels == 10, 0, labels)  # the digit 0 is written as 10
    media = Pixels(pictures.reshape(32, 32, 3, -1).transpose(3, 0, 1, 2), [path])
    return BenchmarkSource(copy, media, vocabulary=vocabulary("svhn"), labels=labels)


class _H5Pictures:
    """Pictures of an HDF5 file, read one by one: the test pictures of PCam are 0.9 GB."""

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int, /) -> np.ndarray:
        with _h5(self.path) as file:
            return file["x"][index]


def _h5(path: Path) -> Any:
    import h5py  # pyright: ignore[reportMissingImports] - not a requirement, this set alone takes it

    return h5py.File(path, "r")


def _open_pcam(copy: Copy) -> BenchmarkSource:
    split = "valid" if copy.split == "val" else copy.split
    names = [f"camelyonpatch_level_2_split_{split}_{kind}.h5" for kind in "xy"]
    files = [copy.find(f"pcam/{name}", name) for name in names]
    try:
        with _h5(files[1]) as file:
            labels = np.asarray(file["y"]).reshape(-1)
        with _h5(files[0]) as file:
            length, *shape = file["x"].shape
    except ImportError:
        raise UserError(f"{copy.spec}: reading {names[0]} takes h5py; pip install h5py") from None
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise copy.error(f"{files[0].parent} holds files that cannot be read: {error}") from None
    if shape != [96, 96, 3]:
        raise copy.error(f"{files[0]} holds no pictures of 96 x 96 pixels")
    media = Pixels(_H5Pictures(files[0], length), files)
    return BenchmarkSource(copy, media, vocabulary=vocabulary("pcam"), labels=labels)


def _open_fer(copy: Copy) -> BenchmarkSource:
    """Folders of pictures, or the table of pixels of the competition; both test splits have 7,178 faces."""
    words = vocabulary("fer2013")
    tables = [copy.folder / place / name for place in ("fer2013", ".") for name in ("fer2013.csv", "icml_face_data.csv")]
    table = next((table for table in tables if table.is_file()), None)
    if table is None:
        assert words.folders is not None, "the data file of the set names its folders"
        root = copy.find(copy.split, f"fer2013/{copy.split}")
        paths, labels = class_folders(copy, root, {folder: label for label, folder in enumerate(words.folders)})
        return BenchmarkSource(copy, Files(root, paths), vocabulary=words, labels=labels)
    usages = ("Training",) if copy.split == "train" else ("PublicTest", "PrivateTest")
    rows = [row for row in copy.rows(table, "emotion", "pixels", "Usage") if row["Usage"] in usages]
    try:
        pictures = np.array([np.array(row["pixels"].split(), np.uint8).reshape(FER_SIDE, FER_SIDE) for row in rows])
        labels = [FER_EMOTIONS[int(row["emotion"])] for row in rows]
    except (ValueError, KeyError, OverflowError) as error:
        raise copy.error(f"{table} is not the published table: {error!r}") from None
    return BenchmarkSource(copy, Pixels(pictures, [table]), vocabulary=words, labels=labels)


SETS: Mapping[str, Benchmark] = {
    "cifar10": Benchmark(
        _open_cifar, "cifar-10-batches-bin/test_batch.bin or cifar-10-batches-py/test_batch", ("test", "train")
    ),
    "cifar100": Benchmark(_open_cifar, "cifar-100-binary/test.bin or cifar-100-python/test", ("test", "train")),
    "mnist": Benchmark(_open_mnist, "MNIST/raw/t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte", ("test", "train")),
    "stl10": Benchmark(_open_stl, "stl10_binary/test_X.bin and test_y.bin", ("test", "train")),
    "svhn": Benchmark(_open_svhn, "test_32x32.mat", ("test", "train", "extra")),
    "pcam": Benchmark(
        _open_pcam, "pcam/camelyonpatch_level_2_split_test_x.h5 and ..._y.h5, unpacked", ("test", "val", "train")
    ),
    "fer2013": Benchmark(_open_fer, "test/angry/*.jpg, one folder a class; or fer2013/fer2013.csv", ("test", "train")),
}
