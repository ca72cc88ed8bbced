"""Search: exact, and of equal pictures the first by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mm


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    other = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    same = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    other.save(tmp_path / "0.png")
    for name in "dcba":
        same.save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_of_equal_pictures_the_first_name_wins(folder: Path, k: int) -> None:
    found = mm.search("emoji-clip", folder, image=folder / "d.png", k=k, device="cpu")
    assert [hit.path.name for hit in found.hits] == ["a.png", "b.png", "c.png", "d.png", "0.png"][:k]


def test_a_cache_that_cannot_be_written_costs_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MM_CACHE", "/proc/nowhere")
    assert mm.search("emoji-clip", folder, text="pizza", k=2, device="cpu").searched == 5
