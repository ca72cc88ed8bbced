"""Measure published checkpoints and hold the figures against the published ones, wherever weights and data can be had.

    python tools/published.py --data FOLDER [--only imagenet] [--write]

FOLDER holds one folder a data set, in its standard layout (imagenet, cifar100, coco, flickr30k). A row that cannot be measured
here says why and counts as neither passed nor failed. ``--write`` keeps what was measured in published.json, beside what was
measured before, and renews docs/published.md; the exit code is 1 when a measured figure is outside its tolerance.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mm
from mm.errors import UserError

ROWS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "published.md"
UNMEASURED = "not measured"


def measure(row: dict[str, Any], data: Path | None, cache: dict[tuple[str, str, str], Any]) -> tuple[float | None, str]:
    """The figure, or None and the reason why it cannot be had."""
    if data is None or not (data / row["data"]).is_dir():
        return None, f"no data: {row['data']}"
    key = (row["task"], row["model"], row["data"])
    try:
        if key not in cache:
            cache[key] = mm.evaluate(row["task"], row["model"], f"{row['data']}:{data / row['data']}")
        return cache[key].metrics[row["metric"]].value, ""
    except Exception as error:  # one row that fails must not cost the others, whatever the cause
        return None, str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def command(row: dict[str, Any]) -> str:
    return f"mm eval {row['task']} {row['model']} --data {row['data']}:DATA/{row['data']}"


def page(rows: list[dict[str, Any]], source: str) -> str:
    """The table as Markdown."""
    lines = [
        "# Published figures",
        "",
        "What the checkpoints should give, and what mm gives where both weights and data are at hand:",
        "`make published DATA=FOLDER` measures every row and renews this page. Rows that were never measured say so.",
        "",
        f"Source of the published figures: {source}.",
        "",
        "| command | figure | published | tolerance | measured |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        measured = f"{row['measured']:.4f}" if "measured" in row else UNMEASURED
        lines.append(f"| `{command(row)}` | `{row['metric']}` | {row['figure']:.4f} | {row['tolerance']} | {measured} |")
    return "\n".join(lines) + "\n"


def _json(content: dict[str, Any]) -> str:
    """A row a line."""
    rows = ",\n".join(f"    {json.dumps(row)}" for row in content["rows"])
    return f'{{\n  "source": {json.dumps(content["source"])},\n  "rows": [\n{rows}\n  ]\n}}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with one folder a data set")
    parser.add_argument("--only", help="measure only this data set")
    parser.add_argument("--write", action="store_true", help="renew docs/published.md")
    options = parser.parse_args()
    content = json.loads(ROWS.read_text(encoding="utf-8"))
    table = Table("model", "data", "figure", "published", "measured", "verdict")
    cache: dict[tuple[str, str, str], Any] = {}
    failed = 0
    for row in (row for row in content["rows"] if options.only in (None, row["data"])):
        value, reason = measure(row, options.data, cache)
        if value is not None:
            row["measured"] = value
        outside = value is not None and abs(value - row["figure"]) > row["tolerance"]
        failed += outside
        verdict = f"cannot run here: {reason}" if value is None else "outside its tolerance" if outside else "as published"
        shown = "-" if value is None else f"{value:.4f}"
        table.add_row(row["model"], row["data"], row["metric"], f"{row['figure']:.4f}", shown, verdict)
    Console().print(table)
    if options.write:
        ROWS.write_text(_json(content), encoding="utf-8")
        PAGE.write_text(page(content["rows"], content["source"]), encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
