"""The report page: well-formed, self-contained, escaped; charts whose marks stand where the numbers say."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.errors import UserError
from mm.evaluation.charts import MAX_POINTS, Bar, bar_chart, curve_chart, read_metrics
from mm.evaluation.metrics import Interval, Result
from mm.evaluation.report import (
    Charts,
    Gallery,
    Section,
    Shot,
    Table,
    Text,
    Tile,
    Tiles,
    Wide,
    result_table,
    write_report,
)

EVIL = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "img", "br", "link"}


class Balanced(HTMLParser):
    """Fails where a tag is closed that was not open; remembers tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parse(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser


def every_block(text: str) -> list[Section]:
    picture = np.full((20, 30, 3), 128, np.uint8)
    chart = bar_chart([Bar(text, 0.4, 0.3, 0.5)], title=text, caption=text)
    curve = curve_chart({text: [(0, 1.0), (1, 0.5)]}, title=text, x_label=text)
    result = Result({text: Interval(0.5, 0.4, 0.6)}, {text: text})
    blocks = [
        Text(text),
        Text(text, code=True),
        Table((text, text), [(text, "1")], note=text),
        result_table(result),
        Tiles([Tile(text, text, text)]),
        Charts([chart, curve]),
        Gallery([Shot(picture, text, [text], right=mark) for mark in (True, False, None)], note=text),
        Wide(picture, text),
    ]
    return [Section(text, blocks)]


def test_page_is_well_formed_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.html", EVIL, every_block(EVIL), lead=EVIL, foot=EVIL)
    seen = parse(tmp_path / "new" / "report.html").seen
    assert "script" not in {tag for tag, _ in seen}
    sources = [attributes["src"] or "" for _, attributes in seen if "src" in attributes]
    assert len(sources) == 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [
        attributes for _, attributes in seen if "href" in attributes or any(name.startswith("on") for name in attributes)
    ]


@settings(max_examples=25, deadline=None)
@given(text=st.text(min_size=1, max_size=30))
def test_any_text_keeps_the_page_well_formed(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, "title", every_block(text.encode("utf-8", "replace").decode("utf-8")))
    parse(path)


def test_pictures_are_those_given_but_no_larger_than_the_page_needs(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    huge = Image.new("RGB", (5000, 100))
    write_report(tmp_path / "r.html", "t", [Section("s", [Gallery([Shot(noise)]), Wide(huge)])])
    data = re.findall(r"base64,([^\"]+)", (tmp_path / "r.html").read_text())
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in data]
    assert (np.asarray(images[0]) == noise).all()
    assert images[1].size == (2000, 40)


def test_number_columns_are_set_right(tmp_path: Path) -> None:
    write_report(
        tmp_path / "r.html", "t", [Section("s", [Table(("name", "value"), [("a", "1.5"), ("2b", "−3 %"), ("c", "–")])])]
    )
    cells = [attributes.get("class") for tag, attributes in parse(tmp_path / "r.html").seen if tag == "td"]
    assert cells == [None, "number"] * 3


def test_unwritable_report_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(tmp_path / "file" / "report.html", "t", [])


def elements(svg: str, kind: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(svg)  # noqa: S314 - our own markup
    return [element.attrib for element in root.iter() if kind in element.attrib.get("class", "").split()]


def test_bars_are_as_long_as_their_values() -> None:
    bars = elements(bar_chart([Bar("a", 0.5, 0.4, 0.6), Bar("b", 0.25, strong=False)], title="t").svg, "bar")
    assert float(bars[0]["width"]) == pytest.approx(2 * float(bars[1]["width"]), rel=0.01)
    assert bars[1]["class"] == "bar weak"
    track = float(elements(bar_chart([Bar("a", 1.0)], title="t").svg, "track")[0]["width"])
    assert float(elements(bar_chart([Bar("a", 1.0)], title="t").svg, "bar")[0]["width"]) == pytest.approx(track)


def test_curves_fall_where_the_loss_falls_and_stay_inside() -> None:
    svg = curve_chart({"loss": [(step, 5.0 - 0.001 * step) for step in range(3000)], "other": [(0, 2.0)]}, title="t").svg
    numbers = re.findall(r"[\d.]+", elements(svg, "line")[0]["d"])
    xs, ys = np.array(numbers[::2], float), np.array(numbers[1::2], float)
    assert len(xs) <= MAX_POINTS
    assert (np.diff(xs) > 0).all()
    assert (np.diff(ys) >= 0).all(), "downwards is larger y in SVG"
    height = float(ElementTree.fromstring(svg).attrib["viewBox"].split()[3])  # noqa: S314 - our own markup
    assert 0 <= ys.min() < ys.max() <= height


@pytest.mark.parametrize(
    "points", [[], [(0, float("nan"))], [(3, 1.0)], [(0, 2.0), (1, 2.0)], [(0, 1e-9), (1, 1e9)], [(0, -1.0), (9, 0.0)]]
)
def test_odd_series_still_draw(points: list[tuple[float, float]]) -> None:
    svg = curve_chart({"loss": points}, title="t").svg
    assert "nan" not in svg
    assert "inf" not in svg
    ElementTree.fromstring(svg)  # noqa: S314 - our own markup


def test_metrics_log_is_read_up_to_where_a_kill_cut_it(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5, "r1": 0.1}, {"step": 3, "loss": None}, {"step": 2, "loss": 2.4}]
    log.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 4, "lo')
    assert read_metrics(log) == rows
    assert read_metrics(tmp_path / "missing.jsonl") == []
