"""Sets with a folder a class: EuroSAT, Caltech-101, Country211, Rendered SST2, GTSRB, SUN397, in torchvision's layouts."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from mm.data.benchmarks.layout import Benchmark, Copy, class_folders
from mm.data.benchmarks.names import vocabulary
from mm.data.benchmarks.source import BenchmarkSource, Files, from_ppm

PPM = frozenset({".ppm"})


def _open_class_folders(copy: Copy, *places: str) -> BenchmarkSource:
    """One folder a class in the first of the places that exists."""
    words = vocabulary(copy.name)
    assert words.folders is not None, "the data file of the set names its folders"
    root = copy.find(*places)
    paths, labels = class_folders(copy, root, {folder: label for label, folder in enumerate(words.folders)})
    return BenchmarkSource(copy, Files(root, paths), vocabulary=words, labels=labels)


def _open_eurosat(copy: Copy) -> BenchmarkSource:
    return _open_class_folders(copy, "eurosat/2750", "EuroSAT_RGB", "2750")


def _open_caltech(copy: Copy) -> BenchmarkSource:
    """All pictures, the background class included, as CLIP_benchmark has it: the set has no published split."""
    return _open_class_folders(copy, "caltech101/101_ObjectCategories", "101_ObjectCategories")


def _open_country(copy: Copy) -> BenchmarkSource:
    return _open_class_folders(copy, f"country211/{copy.split}", copy.split)


def _open_rendered(copy: Copy) -> BenchmarkSource:
    folder = "valid" if copy.split == "val" else copy.split
    return _open_class_folders(copy, f"rendered-sst2/{folder}", folder)


def _open_gtsrb(copy: Copy) -> BenchmarkSource:
    words = vocabulary("gtsrb")
    if copy.split == "train":
        root = copy.find("gtsrb/GTSRB/Training", "GTSRB/Training")
        index = {f"{label:05d}": label for label in range(len(words.classes))}
        paths, labels = class_folders(copy, root, index, PPM)
    else:
        root = copy.find("gtsrb/GTSRB/Final_Test/Images", "GTSRB/Final_Test/Images")
        table = copy.find("gtsrb/GT-final_test.csv", "GT-final_test.csv")
        rows = copy.rows(table, "Filename", "ClassId", delimiter=";")
        try:
            paths, labels = [row["Filename"] for row in rows], [int(row["ClassId"]) for row in rows]
        except ValueError as error:
            raise copy.error(f"{table} has a class that is no number: {error}") from None
    return BenchmarkSource(copy, Files(root, paths, decode=from_ppm), vocabulary=words, labels=labels)


def _open_sun(copy: Copy) -> BenchmarkSource:
    """All 108,754 pictures, as CLIP_benchmark has it: torchvision's copy has no split."""
    root = copy.find("SUN397", ".")
    table = root / "ClassName.txt"
    if not table.is_file():
        raise copy.error(f"no ClassName.txt in {root}")
    folders = [line.removeprefix("/") for line in copy.lines(table)]
    index = {folder: label for label, folder in enumerate(folders)}
    paths = sorted(path.relative_to(root).as_posix() for path in root.rglob("sun_*.jpg"))
    for path in paths:
        if str(PurePosixPath(path).parent) not in index:
            raise copy.error(f"{root / path} is in no class of {table}")
    names = [folder[2:].replace("_", " ").replace("/", " ") for folder in folders]
    labels = [index[str(PurePosixPath(path).parent)] for path in paths]
    return BenchmarkSource(copy, Files(root, paths), vocabulary=vocabulary("sun397", names), labels=labels)


SETS: Mapping[str, Benchmark] = {
    "eurosat": Benchmark(_open_eurosat, "eurosat/2750/AnnualCrop/*.jpg, one folder a class", ("all",)),
    "caltech101": Benchmark(_open_caltech, "caltech101/101_ObjectCategories/accordion/*.jpg, one folder a class", ("all",)),
    "country211": Benchmark(_open_country, "country211/test/AD/*.jpg, one folder a country", ("test", "valid", "train")),
    "rendered-sst2": Benchmark(
        _open_rendered, "rendered-sst2/test/negative/*.png and positive/*.png", ("test", "val", "train")
    ),
    "gtsrb": Benchmark(_open_gtsrb, "gtsrb/GTSRB/Final_Test/Images/*.ppm and gtsrb/GT-final_test.csv", ("test", "train")),
    "sun397": Benchmark(_open_sun, "SUN397/ClassName.txt and SUN397/a/abbey/sun_*.jpg", ("all",)),
}
