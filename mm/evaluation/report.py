"""One self-contained HTML page from plain data: text, tables, charts and pictures, for light and dark, desk and phone.

The page holds its pictures as data, runs no script and loads nothing; all text is escaped.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from mm.errors import UserError
from mm.evaluation.charts import Chart
from mm.evaluation.metrics import Result
from mm.evaluation.sheet import Picture, to_pillow

_STYLE = Path(__file__).with_name("report.css")

MAX_SIDE = 2000
"""Pictures are shrunk to this many pixels on the longer side, so that a page stays mailable."""


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by empty lines; ``code`` is shown as typed, in a box."""

    text: str
    code: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of texts beneath a header. Columns whose cells all start like a number are set right. ``note`` stands beneath."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """A key figure: the figure, what it is, and what to compare it with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """Key figures side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


@dataclass(frozen=True)
class Shot:
    """A picture with a caption; ``right`` marks an answer as right or wrong, ``lines`` are small print beneath the caption."""

    picture: Picture
    caption: str = ""
    lines: Sequence[str] = ()
    right: bool | None = None


@dataclass(frozen=True)
class Gallery:
    """Pictures in a grid that fits the screen."""

    shots: Sequence[Shot]
    note: str = ""


@dataclass(frozen=True)
class Wide:
    """One picture as wide as the page: a contact sheet, a generated grid."""

    picture: Picture
    caption: str = ""


Block = Text | Table | Tiles | Charts | Gallery | Wide


@dataclass(frozen=True)
class Section:
    """A heading and what stands beneath it."""

    heading: str
    blocks: Sequence[Block]


def result_table(result: Result) -> Table:
    """A result's figures with their intervals, its protocol stamp beneath."""
    rows = [(name, *interval.show()) for name, interval in result.metrics.items()]
    return Table(("metric", "value", "95 % interval"), rows, note=result.stamp())


def write_report(path: Path, title: str, sections: Sequence[Section], *, lead: str = "", foot: str = "") -> None:
    """Write the page.

    Args:
        path: File to write, usually ``report.html``; its folder is made.
        title: Heading of the page.
        sections: Content in order.
        lead: One or two sentences beneath the title.
        foot: Small print at the end: versions, command, date.

    Raises:
        UserError: the file cannot be written.
    """
    body = "".join(_section(section) for section in sections)
    page = _PAGE.format(
        title=escape(title), style=_STYLE.read_text(encoding="utf-8"), lead=_paragraphs(lead), body=body, foot=_paragraphs(foot)
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page.encode("utf-8", "replace"))  # file names may hold what is no character
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written: {error.strerror}; choose another folder") from None


def _section(section: Section) -> str:
    return f"<section><h2>{escape(section.heading)}</h2>{''.join(map(_block, section.blocks))}</section>"


def _block(block: Block) -> str:
    match block:
        case Text(text, code):
            return f"<pre>{escape(text)}</pre>" if code else _paragraphs(text)
        case Table():
            return _table(block)
        case Tiles(tiles):
            return f'<div class="tiles">{"".join(map(_tile, tiles))}</div>'
        case Charts(charts):
            figures = (
                f"<figure><h3>{escape(chart.title)}</h3>{chart.svg}{_caption(chart.caption)}</figure>" for chart in charts
            )
            return f'<div class="charts">{"".join(figures)}</div>'
        case Gallery(shots, note):
            return f'<div class="gallery">{"".join(map(_shot, shots))}</div>{_note(note)}'
        case Wide(picture, caption):
            return f'<figure class="wide">{_image(picture, caption)}{_caption(caption)}</figure>'


def _table(table: Table) -> str:
    numeric = [all(_starts_like_number(row[column]) for row in table.rows) for column in range(len(table.header))]

    def line(cells: Sequence[str], tag: str) -> str:
        marks = (' class="number"' if right else "" for right in numeric)
        return (
            "<tr>" + "".join(f"<{tag}{mark}>{escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True)) + "</tr>"
        )

    rows = "".join(line(row, "td") for row in table.rows)
    grid = f"<table><thead>{line(table.header, 'th')}</thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll">{grid}</div>{_note(table.note)}'


def _starts_like_number(cell: str) -> bool:
    return cell.lstrip("+-−")[:1].isdigit() or cell in ("", "–")


def _tile(tile: Tile) -> str:
    return f'<div class="tile"><b>{escape(tile.value)}</b><span>{escape(tile.label)}</span>{_note(tile.note)}</div>'


def _shot(shot: Shot) -> str:
    kind = "" if shot.right is None else ' class="right"' if shot.right else ' class="wrong"'
    sign = "" if shot.right is None else "<i>✓</i> " if shot.right else "<i>✗</i> "
    lines = "".join(f"<small>{escape(line)}</small>" for line in shot.lines)
    words = f"<figcaption>{sign}{escape(shot.caption)}{lines}</figcaption>" if shot.caption or lines or sign else ""
    return f"<figure{kind}>{_image(shot.picture, shot.caption)}{words}</figure>"


def _image(picture: Picture, description: str) -> str:
    image = to_pillow(picture)
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    size = f'width="{image.width}" height="{image.height}"'
    return f'<img src="data:image/png;base64,{data}" {size} alt="{escape(description)}" loading="lazy">'


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{escape(' '.join(part.split()))}</p>" for part in text.split("\n\n") if part.strip())


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>' if text else ""


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{lead}</header>
<main>{body}</main>
<footer>{foot}</footer>
</body>
</html>
"""
