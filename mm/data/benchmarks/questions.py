"""Question sets as they are published: VQA v2 (https://arxiv.org/abs/1612.00837), questions and annotations beside COCO."""

from collections.abc import Mapping
from typing import Any

from mm.data.benchmarks.layout import Benchmark, Copy
from mm.data.benchmarks.source import BenchmarkSource, Files

PLACES = ("", "annotations/", "questions/")


def _open_vqav2(copy: Copy) -> BenchmarkSource:
    """One sample a question, which is its text, in the order of the file.

    Fields: ``question``, ``answers`` (ten people's), ``kind`` (the answer's type: yes/no, number, other), ``question_type``
    (its first words) and ``picture``.
    """
    part = f"{copy.split}2014"
    asked = _entries(copy, f"v2_OpenEnded_mscoco_{part}_questions.json", "questions")
    answered = _entries(copy, f"v2_mscoco_{part}_annotations.json", "annotations")
    try:
        annotations = {entry["question_id"]: entry for entry in answered}
        pairs = [(entry, annotations[entry["question_id"]]) for entry in asked]
        paths = [f"{part}/COCO_{part}_{int(entry['image_id']):012d}.jpg" for entry in asked]
        extras = [_fields(entry, annotation, path) for (entry, annotation), path in zip(pairs, paths, strict=True)]
        keys = [str(entry["question_id"]) for entry in asked]
    except (KeyError, TypeError, ValueError) as error:
        raise copy.error(f"a question lacks {error!r}, or an annotation does") from None
    root = copy.folder / "images" if (copy.folder / "images").is_dir() else copy.folder
    if paths and not any((root / path).exists() for path in dict.fromkeys(paths)):
        raise copy.error(f"none of its pictures is there, such as {root / paths[0]}")
    return BenchmarkSource(copy, Files(root, paths, keys), captions=[(extra["question"],) for extra in extras], extras=extras)


def _entries(copy: Copy, name: str, key: str) -> list[Mapping[str, Any]]:
    path = copy.find(*(f"{place}{name}" for place in PLACES))
    content = copy.json(path)
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise copy.error(f"{path} lacks the list '{key}'")
    return entries


def _fields(entry: Mapping[str, Any], annotation: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {
        "question": str(entry["question"]),
        "answers": [str(given["answer"]) for given in annotation["answers"]],
        "kind": str(annotation["answer_type"]),
        "question_type": str(annotation["question_type"]),
        "picture": path,
    }


SETS: Mapping[str, Benchmark] = {
    "vqav2": Benchmark(
        _open_vqav2,
        "v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014/COCO_val2014_*.jpg",
        ("val", "train"),
        "vqa",
    )
}
