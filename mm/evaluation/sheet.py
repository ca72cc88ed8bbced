"""Contact sheets: pictures in a grid with captions beneath, drawn with Pillow alone."""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mm.errors import UserError

Picture = Image.Image | np.ndarray | Tensor

PAPER, INK, QUIET = (255, 255, 255), (28, 30, 38), (108, 114, 128)
RIGHT, WRONG, FRAME = (22, 128, 61), (194, 65, 12), (226, 229, 235)
CAPTION_LINES = 2
WIDE_FONTS = ("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc", "arial.ttf")
"""Fonts with many scripts that systems often have, for captions that Pillow's own font cannot draw."""


def to_pillow(picture: Picture) -> Image.Image:
    """RGB with transparency laid on white, from Pillow, an array ``(H, W, 3|4)`` or a tensor ``(3|4, H, W)``, both uint8."""
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4):
            raise UserError(f"a picture for a sheet is uint8 (height, width, 3 or 4), not {picture.dtype} {picture.shape}")
        picture = Image.fromarray(np.ascontiguousarray(picture))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, (*PAPER, 255)), rgba)
    return picture.convert("RGB")


def contact_sheet(
    pictures: Sequence[Picture],
    captions: Sequence[str] = (),
    *,
    columns: int = 6,
    cell: int = 128,
    right: Sequence[bool | None] = (),
    title: str = "",
) -> Image.Image:
    """Draw pictures in rows with numbers and captions.

    Args:
        pictures: Anything `to_pillow` takes; each is fitted into its cell whole, small ones enlarged without smoothing.
        captions: One text a picture, or none at all; at most two lines are drawn, a longer text ends in an ellipsis.
        columns: Pictures in a row.
        cell: Side of a picture in pixels.
        right: Whether each was answered rightly: a green frame and a tick, an orange frame and a cross, or None for neither.
        title: Line above the sheet.

    Raises:
        UserError: no picture, or captions or marks of another number.
    """
    for name, given in (("captions", captions), ("marks", right)):
        if given and len(given) != len(pictures):
            raise UserError(f"contact sheet: {len(pictures)} pictures but {len(given)} {name}")
    if not pictures:
        raise UserError("contact sheet: there is no picture to draw")
    columns = max(1, min(columns, len(pictures)))
    size = max(11, cell // 10)
    gap, line = max(8, cell // 10), round(size * 1.3)
    head = line * 2 + gap if title else gap
    row = cell + gap + (line * CAPTION_LINES + gap // 2 if captions else 0)
    width, height = gap + columns * (cell + gap), head + -(-len(pictures) // columns) * row
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        _write(draw, (gap, gap), title, round(size * 1.3), INK, width - 2 * gap)
    for index, picture in enumerate(pictures):
        x, y = gap + index % columns * (cell + gap), head + index // columns * row
        mark = right[index] if right else None
        _place(sheet, to_pillow(picture), x, y, cell)
        frame = FRAME if mark is None else RIGHT if mark else WRONG
        draw.rectangle((x - 1, y - 1, x + cell, y + cell), outline=frame, width=1 if mark is None else max(2, cell // 48))
        if mark is not None:
            _mark(draw, x + cell, y, size, mark)
        if captions:
            ink = QUIET if mark is None else frame
            for number, text in enumerate(wrap(captions[index], size, cell)):
                _write(draw, (x, y + cell + gap // 3 + number * line), text, size, INK if number == 0 else ink, cell)
    return sheet


def _place(sheet: Image.Image, picture: Image.Image, x: int, y: int, cell: int) -> None:
    scale = cell / max(picture.size)
    fitted = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    smooth = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    sheet.paste(picture.resize(fitted, smooth), (x + (cell - fitted[0]) // 2, y + (cell - fitted[1]) // 2))


def _mark(draw: ImageDraw.ImageDraw, right_edge: int, top: int, size: int, good: bool) -> None:
    """A tick or a cross in a disc at the upper right corner, so that colour is not the only sign."""
    r = round(size * 0.75)
    x, y = right_edge - r, top + r
    draw.ellipse((x - r, y - r, x + r, y + r), fill=RIGHT if good else WRONG, outline=PAPER, width=2)
    arm, pen = r * 0.45, max(2, size // 6)
    if good:
        draw.line(
            [(x - arm, y), (x - arm * 0.2, y + arm * 0.8), (x + arm, y - arm * 0.8)], fill=PAPER, width=pen, joint="curve"
        )
    else:
        draw.line([(x - arm, y - arm), (x + arm, y + arm)], fill=PAPER, width=pen)
        draw.line([(x - arm, y + arm), (x + arm, y - arm)], fill=PAPER, width=pen)


def wrap(text: str, size: int, width: int, lines: int = CAPTION_LINES) -> list[str]:
    """Break a text, at spaces where it can, into at most ``lines`` lines of ``width`` pixels; line breaks in it are kept."""
    broken: list[str] = []
    for paragraph in text.split("\n"):
        rest = " ".join(paragraph.split())
        while rest:
            cut = _fitting(rest, size, width)
            if cut < len(rest) and " " in rest[:cut].strip():
                cut = rest.rindex(" ", 0, cut)
            broken.append(rest[:cut].strip())
            rest = rest[cut:].strip()
    if len(broken) > lines:
        last = broken[lines - 1]
        while last and _font(last + "…", size)[0].getlength(last + "…") > width:
            last = last[:-1]
        broken = [*broken[: lines - 1], last.rstrip() + "…"]
    return broken


def _fitting(text: str, size: int, width: int) -> int:
    """How many leading characters fit (at least one); a following space belongs to them."""
    font, drawable = _font(text, size)
    if font.getlength(drawable) <= width:
        return len(text)
    count = 1
    while count < len(text) and font.getlength(_font(text[: count + 1], size)[1]) <= width:
        count += 1
    return count + (text[count : count + 1] == " ")


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, size: int, ink: tuple[int, int, int], width: int) -> None:
    lines = wrap(text, size, width, lines=1)
    if lines:
        font, drawable = _font(lines[0], size)
        draw.text(at, drawable, font=font, fill=ink)


def _font(text: str, size: int) -> tuple[ImageFont.ImageFont | ImageFont.FreeTypeFont, str]:
    """The font that can draw most of the text, Pillow's own before the system's, and the text with the rest replaced."""
    present = [name for name in ("", *WIDE_FONTS) if _load(name, size) is not None]
    name = min(present, key=lambda name: sum(not _has(name, size, character) for character in text))
    font = _load(name, size)
    assert font is not None, "Pillow always has its own font"
    return font, "".join(_replacement(name, size, character) for character in text)


@lru_cache(maxsize=64)
def _load(name: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont | None:
    if not name:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(name: str, size: int, character: str) -> bool:
    """Whether a font has a glyph: one without draws the same box as a code point that is no character."""
    font = _load(name, size)
    if font is None or character.isspace():
        return character.isspace()
    if isinstance(
        font, ImageFont.FreeTypeFont
    ):  # character by character: shaping would put a dotted circle beneath a lone mark
        font = font.font_variant(layout_engine=ImageFont.Layout.BASIC)
    try:
        return _ink(font, character) != _ink(font, "\uffff")
    except UnicodeEncodeError:
        return False


def _ink(font: ImageFont.ImageFont | ImageFont.FreeTypeFont, character: str) -> bytes:
    cell = Image.new("L", (64, 64))
    ImageDraw.Draw(cell).text((8, 8), character, font=font, fill=255)
    return cell.crop(cell.getbbox()).tobytes()


def _replacement(name: str, size: int, character: str) -> str:
    """The character, else its letter without marks, else its name where it is a symbol, else a middle dot."""
    if _has(name, size, character):
        return character
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    if plain and all(_has(name, size, c) for c in plain):
        return plain
    category = unicodedata.category(character)
    if category.startswith("S"):
        return f"[{unicodedata.name(character, 'symbol').lower()}]"
    return "" if category.startswith(("M", "C")) else "·"
