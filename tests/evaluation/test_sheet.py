"""Contact sheets: layout, captions that fit, glyphs that exist, marks, refusals."""

import numpy as np
import pytest
import torch
from PIL import Image

from mm.errors import UserError
from mm.evaluation import sheet as module
from mm.evaluation.sheet import RIGHT, WRONG, contact_sheet, to_pillow, wrap

BLUE = (10, 20, 200)


def plain(width: int = 32, height: int = 32) -> Image.Image:
    return Image.new("RGB", (width, height), BLUE)


def has_colour(image: Image.Image, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(image) == colour).all(-1).any())


@pytest.mark.parametrize("count", [1, 5, 6, 7, 13])
def test_every_picture_has_its_cell(count: int) -> None:
    drawn = np.asarray(contact_sheet([plain() for _ in range(count)], columns=6, cell=64))
    assert (drawn == BLUE).all(-1).sum() >= count * 62 * 62
    assert (drawn == BLUE).all(-1).sum() <= count * 64 * 64


def test_wide_and_high_pictures_keep_their_shape() -> None:
    drawn = (np.asarray(contact_sheet([plain(90, 30), plain(30, 90)], columns=2, cell=96)) == BLUE).all(-1)
    left, right = np.array_split(drawn, 2, axis=1)
    assert left.any(0).sum() > 2.5 * left.any(1).sum()
    assert right.any(1).sum() > 2.5 * right.any(0).sum()


def test_pictures_come_as_tensor_array_and_pillow_with_transparency_on_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4] = (255, 0, 0, 255)
    from_array = np.asarray(to_pillow(rgba))
    from_tensor = np.asarray(to_pillow(torch.from_numpy(rgba).permute(2, 0, 1)))
    from_pillow = np.asarray(to_pillow(Image.fromarray(rgba)))
    assert (from_array == from_tensor).all()
    assert (from_array == from_pillow).all()
    assert from_array[0, 0].tolist() == [255, 0, 0]
    assert from_array[7, 7].tolist() == [255, 255, 255]
    with pytest.raises(UserError, match="not float32"):
        to_pillow(np.zeros((8, 8, 3), np.float32))


@pytest.mark.parametrize(
    "text", ["a short one", "several words that need more than one line of a cell", "x" * 300, "Ω" * 60, ""]
)
def test_captions_fit_their_cell(text: str) -> None:
    lines = wrap(text, size=12, width=96)
    assert len(lines) <= 2
    for line in lines:
        font, drawable = module._font(line, 12)
        assert font.getlength(drawable) <= 96
    shown = "".join(lines).replace(" ", "")
    assert text.replace(" ", "") == shown or shown.endswith("…")


def test_line_breaks_of_a_caption_are_kept() -> None:
    assert wrap("true name\nanswer", 12, 200) == ["true name", "answer"]


def test_what_no_font_can_draw_is_replaced_not_boxed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDE_FONTS", ())
    font, drawable = module._font("café 笑顔 😀 ok", 12)
    assert drawable == "cafe ·· [grinning face] ok" or drawable.startswith("café")
    assert all(module._has("", 12, character) for character in drawable)
    assert font.getlength(drawable) > 0


def test_right_and_wrong_differ_in_colour_and_sign() -> None:
    good, bad, neither = (contact_sheet([plain()], ["x"], right=[mark]) for mark in (True, False, None))
    assert has_colour(good, RIGHT)
    assert not has_colour(good, WRONG)
    assert has_colour(bad, WRONG)
    assert not has_colour(neither, RIGHT)
    assert not has_colour(neither, WRONG)
    as_ink = [(np.asarray(image.convert("L")) < 140) for image in (good, bad)]
    assert (as_ink[0] != as_ink[1]).any(), "a tick and a cross, not colour alone"


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="2 pictures but 1 captions"):
        contact_sheet([plain(), plain()], ["one"])
    with pytest.raises(UserError, match="2 pictures but 3 marks"):
        contact_sheet([plain(), plain()], right=[True, False, True])
    with pytest.raises(UserError, match="no picture"):
        contact_sheet([])
