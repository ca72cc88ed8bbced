"""Compositional sets, in which a caption must be told from one of nearly the same words: Winoground and SugarCrepe."""

from collections.abc import Mapping
from typing import Any

from mm.data.benchmarks.layout import Benchmark, Copy
from mm.data.benchmarks.source import BenchmarkSource, Files

CATEGORIES = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
"""SugarCrepe's ways of making a caption wrong."""


def _open_winoground(copy: Copy) -> BenchmarkSource:
    """Two samples an example, one after the other, each a picture with its own caption (https://arxiv.org/abs/2204.03162).

    Fields: ``example`` (its number), ``side`` (0 or 1) and ``tag`` (what the captions differ in, where the file says so).
    """
    table = copy.find("examples.jsonl", "data/examples.jsonl")
    if not (table.parent / "images").is_dir():
        raise copy.error(f"no images in {table.parent} (unpack images.zip there)")
    rows = [_parsed(copy, line) for line in copy.lines(table)]
    sides = [(row, side) for row in rows for side in (0, 1)]
    try:
        names = [str(row[f"image_{side}"]) for row, side in sides]
        captions = [(row[f"caption_{side}"],) for row, side in sides]
        extras = [{"example": row["id"], "side": side, "tag": row.get("collapsed_tag")} for row, side in sides]
    except KeyError as error:
        raise copy.error(f"{table} has a line without {error}") from None
    files = Files(table.parent / "images", [name if name.endswith(".png") else f"{name}.png" for name in names])
    return BenchmarkSource(copy, files, captions=captions, extras=extras)


def _parsed(copy: Copy, line: str) -> dict[str, Any]:
    value = copy.parse(line, "examples.jsonl")
    if not isinstance(value, dict):
        raise copy.error("examples.jsonl has a line that is not an object")
    return value


def _open_sugarcrepe(copy: Copy) -> BenchmarkSource:
    """One sample a pair of captions, the right one as its caption (https://arxiv.org/abs/2306.14610).

    Fields: ``category`` and ``negative``, the wrong caption. The split is a category, or all of them.
    """
    categories = CATEGORIES if copy.split == "all" else (copy.split,)
    entries: list[tuple[str, str, Mapping[str, Any]]] = []
    for category in categories:
        path = copy.find(f"{category}.json", f"data/{category}.json")
        content = copy.json(path)
        if not isinstance(content, dict):
            raise copy.error(f"{path} is not the published file")
        entries += [(category, number, entry) for number, entry in content.items()]
    root = copy.find("val2017", "images/val2017")
    try:
        files = Files(root, [str(entry["filename"]) for _, _, entry in entries], [f"{c}/{n}" for c, n, _ in entries])
        captions = [(entry["caption"],) for _, _, entry in entries]
        extras = [{"category": category, "negative": entry["negative_caption"]} for category, _, entry in entries]
    except (KeyError, TypeError) as error:
        raise copy.error(f"an entry lacks {error}") from None
    if not all(isinstance(extra["negative"], str) for extra in extras):
        raise copy.error("a negative_caption is no text")
    return BenchmarkSource(copy, files, captions=captions, extras=extras)


SETS: Mapping[str, Benchmark] = {
    "winoground": Benchmark(_open_winoground, "data/examples.jsonl and data/images/*.png", evaluation="winoground"),
    "sugarcrepe": Benchmark(
        _open_sugarcrepe,
        "add_att.json, add_obj.json, ... and the pictures val2017/*.jpg of COCO",
        ("all", *CATEGORIES),
        "sugarcrepe",
    ),
}
