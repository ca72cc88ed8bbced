"""ImageNet (https://arxiv.org/abs/1409.0575) and the sets that share its classes: V2, A, R, Sketch, ObjectNet.

A label is the WordNet id of its class, since some of ImageNet's published names are equal. A and R have 200 of the classes, and
their candidates are these alone.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mm.data.benchmarks.layout import Benchmark, Copy, class_folders, files_below
from mm.data.benchmarks.names import Vocabulary, published
from mm.data.benchmarks.source import BenchmarkSource, Files

SOLUTION = "LOC_val_solution.csv"
"""Kaggle's labels of the validation pictures: ``ImageId,PredictionString``, the latter beginning with the WordNet id."""

_WNID = re.compile(r"n\d{8}")


def imagenet_vocabulary(wnids: Sequence[str] | None = None) -> Vocabulary:
    """OpenAI's 1000 class names and 80 templates, or those of some classes only."""
    data = published("imagenet")
    names: dict[str, str] = dict(zip(data["wnids"], data["classes"], strict=True))
    chosen = tuple(wnids or data["wnids"])
    return Vocabulary(tuple(names[wnid] for wnid in chosen), tuple(data["templates"]), values=chosen)


def _index(vocabulary: Vocabulary) -> Mapping[str, int]:
    return vocabulary.task().index()


def _has_class_folders(folder: Path) -> bool:
    return folder.is_dir() and any(_WNID.fullmatch(entry.name) and entry.is_dir() for entry in folder.iterdir())


def _open_imagenet(copy: Copy) -> BenchmarkSource:
    vocabulary = imagenet_vocabulary()
    places = [copy.folder / copy.split, copy.folder / "ILSVRC/Data/CLS-LOC" / copy.split, copy.folder]
    root = next((place for place in places if _has_class_folders(place)), None)
    if root is not None:
        paths, labels = class_folders(copy, root, _index(vocabulary))
    elif copy.split == "val" and (copy.folder / SOLUTION).is_file():
        root = copy.find("ILSVRC/Data/CLS-LOC/val", "val")
        paths, labels = _by_solution(copy, root, _index(vocabulary))
    else:
        raise copy.error(f"no class folders (n01440764, ...) in {places[0]}")
    return BenchmarkSource(copy, Files(root, paths), vocabulary=vocabulary, labels=labels)


def _by_solution(copy: Copy, root: Path, index: Mapping[str, int]) -> tuple[list[str], list[int]]:
    """Pictures of a flat folder, labelled by Kaggle's table."""
    path = copy.folder / SOLUTION
    rows = copy.rows(path, "ImageId", "PredictionString")
    wnids = {row["ImageId"]: row["PredictionString"].split(" ", 1)[0] for row in rows}
    paths = files_below(root)
    for name in paths:
        if wnids.get(Path(name).stem) not in index:
            raise copy.error(f"{path} has no class for {name}")
    return paths, [index[wnids[Path(name).stem]] for name in paths]


def _open_subset(copy: Copy) -> BenchmarkSource:
    """A folder of WordNet ids: Sketch with all classes, A and R with the 200 that they have."""
    vocabulary = imagenet_vocabulary(None if copy.name == "imagenet-sketch" else published(copy.name)["wnids"])
    places = [copy.folder, copy.folder / copy.name, copy.folder / "sketch"]
    root = next((place for place in places if _has_class_folders(place)), None)
    if root is None:
        raise copy.error(f"no class folders (n01443537, ...) in {copy.folder}")
    paths, labels = class_folders(copy, root, _index(vocabulary))
    return BenchmarkSource(copy, Files(root, paths), vocabulary=vocabulary, labels=labels)


def _open_v2(copy: Copy) -> BenchmarkSource:
    vocabulary = imagenet_vocabulary()
    root = copy.find("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency", ".")
    paths, labels = class_folders(copy, root, {str(label): label for label in range(len(vocabulary.classes))})
    return BenchmarkSource(copy, Files(root, paths), vocabulary=vocabulary, labels=labels)


def _open_objectnet(copy: Copy) -> BenchmarkSource:
    """The 113 classes shared with ImageNet under ObjectNet's own names, pictures as they are, as CLIP_benchmark has it."""
    base = copy.folder / "objectnet-1.0" if (copy.folder / "objectnet-1.0").is_dir() else copy.folder
    mappings = next(
        (place for place in (base / "mappings", copy.folder) if (place / "folder_to_objectnet_label.json").is_file()), None
    )
    if mappings is None or not (base / "images").is_dir():
        raise copy.error(f"no mappings/folder_to_objectnet_label.json and images in {base}")
    names = copy.json(mappings / "folder_to_objectnet_label.json")
    shared = copy.json(mappings / "objectnet_to_imagenet_1k.json")
    if not isinstance(names, dict) or not isinstance(shared, dict) or not all(isinstance(n, str) for n in names.values()):
        raise copy.error(f"the files in {mappings} are not the published ones")
    kept = sorted(folder for folder, name in names.items() if name in shared)
    templates = tuple(published("imagenet")["templates"])
    vocabulary = Vocabulary(tuple(names[folder].lower() for folder in kept), templates, values=tuple(kept))
    # the other 200 classes are left out, so every folder has a number and those without a class fall away
    paths, labels = class_folders(copy, base / "images", {**dict.fromkeys(names, -1), **_index(vocabulary)})
    chosen = [(path, label) for path, label in zip(paths, labels, strict=True) if label >= 0]
    files = Files(base / "images", [path for path, _ in chosen])
    return BenchmarkSource(copy, files, vocabulary=vocabulary, labels=[label for _, label in chosen])


SETS: Mapping[str, Benchmark] = {
    "imagenet": Benchmark(
        _open_imagenet, f"val/n01440764/*.JPEG, one folder a class; or val/*.JPEG and {SOLUTION}", ("val", "train")
    ),
    "imagenet-v2": Benchmark(_open_v2, "imagenetv2-matched-frequency-format-val/0/*.jpeg to .../999/*.jpeg"),
    "imagenet-a": Benchmark(_open_subset, "imagenet-a/n01498041/*.jpg, one folder for each of the 200 classes"),
    "imagenet-r": Benchmark(_open_subset, "imagenet-r/n01443537/*.jpg, one folder for each of the 200 classes"),
    "imagenet-sketch": Benchmark(_open_subset, "sketch/n01440764/*.JPEG, one folder a class"),
    "objectnet": Benchmark(_open_objectnet, "objectnet-1.0/images/<class>/*.png and objectnet-1.0/mappings/*.json"),
}
