"""Zero-shot classification of a folder with a sub-folder for each class (ImageFolder), without any training.

Prints top-1 and top-5 with their intervals and a table of the classes, and draws which classes are taken for which.
Any labelled source of `mm` will do; the embedded emoji are classified among 1,451 names and counted by their groups.
With --labels the pictures need no classes: the likeliest label of each is printed.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from rich.text import Text

import mm

CELL, MARGIN = 44, 170
"""Pixels of a field of the confusion picture, and of the room for names."""

LARGEST = 24
"""Classes of the confusion picture: those with most mistakes."""


def tables(seen: list, by: str | None) -> tuple[dict[str, Counter], Counter]:
    """Pictures, first and among the first five rightly named, by class; and how often one class is taken for another."""
    kind = {one.right: str(one.fields[by]) if by else one.right for one in seen}
    counts, taken = defaultdict(Counter), Counter()
    for one in seen:
        row = kind[one.right]
        counts[row].update(pictures=1, top1=one.ranked[0] == one.right, top5=one.right in one.ranked)
        taken[row, kind.get(one.ranked[0], "other")] += 1
    return counts, taken


def confusion(names: list[str], taken: Counter) -> Image.Image:
    """A picture with a row for each class and a column for what it was taken for, in percent of the row."""
    side = MARGIN + CELL * len(names)
    sheet, font = Image.new("RGB", (side, side), "white"), ImageFont.load_default(13)
    draw = ImageDraw.Draw(sheet)
    for row, right in enumerate(names):
        label = Image.new("RGB", (MARGIN, CELL), "white")
        ImageDraw.Draw(label).text((MARGIN - 8, CELL // 2), right[:24], fill="black", font=font, anchor="rm")
        sheet.paste(label, (0, MARGIN + row * CELL))
        sheet.paste(label.rotate(-90, expand=True), (MARGIN + row * CELL, 0))
        total = sum(count for (truth, _), count in taken.items() if truth == right)
        for column, guess in enumerate(names):
            share = taken[right, guess] / total
            x, y = MARGIN + column * CELL, MARGIN + row * CELL
            strong = (22, 128, 61) if row == column else (194, 65, 12)
            fill = tuple(round(255 - (255 - part) * share**0.5) for part in strong)
            draw.rectangle((x, y, x + CELL - 2, y + CELL - 2), fill=fill)
            if share:
                ink = "white" if share > 0.3 else "black"
                draw.text((x + CELL // 2 - 1, y + CELL // 2), f"{share:.0%}", fill=ink, font=font, anchor="mm")
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="emoji:test/core", help="a folder with a sub-folder for each class")
    parser.add_argument("--model", default="emoji-clip", help="any MODEL of mm, such as ViT-B-32/openai")
    parser.add_argument("--labels", metavar="A,B,...", help="classify the pictures of any folder among these")
    parser.add_argument("--template", action="append", help="prompt with {} for the name; repeat for an ensemble")
    parser.add_argument("--by", help="field to count by instead of the class; for emoji: group")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/confusion.png"), help="the confusion picture, .png")
    args = parser.parse_args()
    by = args.by or ("group" if args.data.startswith("emoji:") else None)
    if args.labels:
        labels = [label.strip() for label in args.labels.split(",")]
        for one in mm.classify(args.model, [args.data], labels, templates=args.template):
            print(f"{one.probabilities[0]:6.1%}  {one.labels[0]:20}  {one.image}")
        return
    if args.out.suffix.lower() != ".png":
        raise mm.UserError(f"--out {args.out}: give a name that ends in .png")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    seen = []
    result = mm.evaluate(
        "zero-shot", args.model, args.data, templates=args.template, baseline="none", on_classified=seen.extend
    )
    if by and any(by not in one.fields for one in seen):
        raise mm.UserError(f"--by {by}: no such field; there are {', '.join(seen[0].fields)}")
    counts, taken = tables(seen, by)
    for name in ("top1", "top5", "mean_per_class"):
        if name in result.metrics:
            print(f"{name:16}{result.metrics[name].show()[0]:>8}  ({result.metrics[name].show()[1]})")
    table = Table("pictures", "top1", "top5", "class", "most often taken for")
    for name, count in sorted(counts.items(), key=lambda item: -item[1]["top1"] / item[1]["pictures"]):
        wrong = Counter({guess: n for (right, guess), n in taken.items() if right == name and guess != name})
        others = ", ".join(f"{guess} {n / count['pictures']:.0%}" for guess, n in wrong.most_common(2))
        shares = [f"{count[key] / count['pictures']:.0%}" for key in ("top1", "top5")]
        table.add_row(str(count["pictures"]), *shares, Text(name), Text(others))
    Console(width=100).print(table)
    hard = sorted(counts, key=lambda name: taken[name, name] - counts[name]["pictures"])[:LARGEST]
    confusion(sorted(hard), taken).save(args.out)
    print(f"{args.out}: rows are what is right, columns what it was taken for")


if __name__ == "__main__":
    try:
        main()
    except (mm.UserError, OSError) as error:
        sys.exit(f"error: {error}")
