"""Caption sets with the splits of Karpathy and Fei-Fei (https://arxiv.org/abs/1412.2306): COCO and Flickr30k.

All captions of a picture are kept. COCO's test pictures lie among those of val2014. The annotation files of CLIP_benchmark,
which hold the same split, are read too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.data.benchmarks.layout import Benchmark, Copy
from mm.data.benchmarks.source import BenchmarkSource, Files

ANNOTATION_PLACES = ("", "annotations/", "karpathy/")
FLICKR_PLACES = ("flickr30k-images", "flickr30k_images", "images", "Images")

Captions = dict[str, tuple[str, ...]]
"""Captions by relative path, in order."""


def _annotations(copy: Copy, *names: str) -> Path:
    return copy.find(*(f"{place}{name}" for name in names for place in ANNOTATION_PLACES))


def _karpathy(copy: Copy, path: Path) -> Captions:
    """Pictures of a split, with the folder that the file names for each (COCO) or without (Flickr30k)."""
    data = copy.json(path)
    try:
        return {
            "/".join(part for part in (entry.get("filepath"), entry["filename"]) if part): tuple(
                sentence["raw"] for sentence in entry["sentences"]
            )
            for entry in data["images"]
            if entry["split"] == copy.split
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise copy.error(f"{path} is not Karpathy's file: {error!r} in an entry of 'images'") from None


def _open_coco(copy: Copy) -> BenchmarkSource:
    path = _annotations(copy, "dataset_coco.json", f"coco_{copy.split}_karpathy.json")
    captions = _karpathy(copy, path) if path.name == "dataset_coco.json" else _coco_style(copy, path)
    root = copy.folder / "images" if (copy.folder / "images").is_dir() else copy.folder
    return _captioned(copy, root, captions)


def _coco_style(copy: Copy, path: Path) -> Captions:
    """Annotations as COCO itself writes them, pictures in the order of their numbers."""
    data = copy.json(path)
    folder = "train2014" if copy.split == "train" else "val2014"
    try:
        images = sorted(data["images"], key=lambda image: image["id"])
        texts: dict[Any, list[str]] = {image["id"]: [] for image in images}
        for annotation in data["annotations"]:
            texts[annotation["image_id"]].append(annotation["caption"])
        return {f"{folder}/{image['file_name']}": tuple(texts[image["id"]]) for image in images}
    except (KeyError, TypeError) as error:
        raise copy.error(f"{path} does not hold COCO captions: {error!r}") from None


def _open_flickr(copy: Copy) -> BenchmarkSource:
    path = _annotations(copy, "dataset_flickr30k.json", f"flickr30k_{copy.split}_karpathy.txt")
    captions = _karpathy(copy, path) if path.suffix == ".json" else _flickr_table(copy, path)
    root = next((copy.folder / place for place in FLICKR_PLACES if (copy.folder / place).is_dir()), copy.folder)
    return _captioned(copy, root, captions)


def _flickr_table(copy: Copy, path: Path) -> Captions:
    """Lines ``picture.jpg,caption`` under a header; captions hold commas and are not quoted."""
    texts: dict[str, list[str]] = {}
    for line in copy.lines(path)[1:]:
        name, separator, caption = line.partition(".jpg,")
        if not separator:
            raise copy.error(f"{path} has a line without a picture: '{line[:60]}'")
        texts.setdefault(f"{name}.jpg", []).append(caption)
    return {name: tuple(captions) for name, captions in texts.items()}


def _captioned(copy: Copy, root: Path, captions: Captions) -> BenchmarkSource:
    files = Files(root, list(captions))
    if captions and not any((root / path).exists() for path in captions):
        raise copy.error(f"none of its pictures is there, such as {root / next(iter(captions))}")
    return BenchmarkSource(copy, files, captions=list(captions.values()))


SETS: Mapping[str, Benchmark] = {
    "coco": Benchmark(
        _open_coco, "dataset_coco.json and val2014/COCO_val2014_*.jpg", ("test", "val", "train", "restval"), "retrieval"
    ),
    "flickr30k": Benchmark(
        _open_flickr, "dataset_flickr30k.json and flickr30k-images/*.jpg", ("test", "val", "train"), "retrieval"
    ),
}
