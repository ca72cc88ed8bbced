"""torch.export: each tower as a .pt2 file that torch runs without this package."""

import warnings
from pathlib import Path
from typing import Any

import torch

from mm.export.tokenizer import write_preparation
from mm.export.towers import Towers, describe, lengths_to_try, require_equal, trace, write_manifest


def write(towers: Towers, folder: Path) -> None:
    """Write image.pt2 and text.pt2, load them again and compare. Raises `UserError` if they differ."""
    loaded: dict[str, Any] = {}
    for name, program in trace(towers).items():
        path = folder / f"{name}.pt2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of its own deprecated calls
            torch.export.save(program, path)
            loaded[name] = torch.export.load(path).module()
    agreement = compare(towers, loaded["image"], loaded["text"])
    write_preparation(towers, folder)
    files = {name: {"file": f"{name}.pt2", **values} for name, values in describe(towers).items()}
    write_manifest(towers, folder, "torch", {**files, "agreement": agreement})


@torch.no_grad()
def compare(towers: Towers, image: Any, text: Any) -> dict[str, dict[str, float]]:
    """Agreement of two callables with the towers, at other sizes than they were traced at, the smallest over all of them.

    Args:
        towers: The reference.
        image: pixels to unit vectors, all tensors.
        text: ids and lengths to unit vectors.
    """
    found = {
        "image": [require_equal(towers.embed("image", x), image(x), "image tower") for x in map(towers.pixels, (1, 3))],
        "text": [
            require_equal(towers.embed("text", x), text(x.ids, x.lengths), f"text tower, {length} tokens")
            for length in lengths_to_try(towers)
            for x in (towers.text(rows, length) for rows in (1, 3))
        ],
    }
    return {
        name: {
            "cosine": min(each["cosine"] for each in results),
            "largest_difference": max(each["largest_difference"] for each in results),
        }
        for name, results in found.items()
    }
