"""Image-text retrieval both ways on pairs: a folder with name.jpg and name.txt, a CSV with files and captions, tar shards.

Prints R@1, R@5 and R@10 with their intervals, and draws the queries that went best and worst with what was found for them.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import mm

AT_ONCE = 256
"""Queries compared at a time."""

FOUND = 5
"""Items shown of those that were found."""

SIDE, CELL = 64, 96
"""Pixels of pictures as they are drawn, and on the sheets."""


@dataclass(frozen=True)
class Answers:
    """Of Q queries: wrong items before the first right one ``(Q,)``, its lead over the best wrong one, what was found first."""

    rank: Tensor
    lead: Tensor
    found: Tensor

    def extremes(self, count: int) -> tuple[list[int], list[int]]:
        """The best and the worst queries."""
        order = sorted(range(len(self.rank)), key=lambda row: (int(self.rank[row]), -float(self.lead[row])))
        return order[:count], order[: -count - 1 : -1]


def answer(queries: Tensor, items: Tensor, query_owner: Tensor, item_owner: Tensor) -> Answers:
    """Compare unit vectors; an item is right for a query where both belong to the same picture."""
    rank, lead, found = [], [], []
    for part, owner in zip(queries.split(AT_ONCE), query_owner.split(AT_ONCE), strict=True):
        scores, right = part @ items.T, owner[:, None] == item_owner
        best = scores.masked_fill(~right, -2).amax(1)
        wrong = scores.masked_fill(right, -2)
        rank.append((wrong >= best[:, None]).sum(1))
        lead.append(best - wrong.amax(1))
        found.append(scores.topk(min(FOUND, len(items))).indices)
    return Answers(torch.cat(rank), torch.cat(lead), torch.cat(found))


def texts_sheet(rows: list[int], answers: Answers, pairs, picture: Callable[[int], Tensor], title: str) -> Image.Image:
    """A line for each text: its own picture and that one's place, then the pictures that were found, ticked where right."""
    cells, captions, marks = [], [], []
    for row in rows:
        own, found = int(pairs.image_of[row]), answers.found[row].tolist()
        cells += [picture(own), *map(picture, found)]
        captions += [f"{int(answers.rank[row]) + 1}. {pairs.captions[row]}", *([""] * len(found))]
        marks += [None, *(place == own for place in found)]
    return mm.contact_sheet(cells, captions, columns=len(cells) // len(rows), cell=CELL, right=marks, title=title)


def pictures_sheet(rows: list[int], answers: Answers, pairs, picture: Callable[[int], Tensor], title: str) -> Image.Image:
    """Pictures with the text found first for each; where it is wrong, a text of its own beneath."""
    captions, marks = [], []
    for row in rows:
        first, own = int(answers.found[row, 0]), int((pairs.image_of == row).nonzero()[0])
        marks.append(int(pairs.image_of[first]) == row)
        captions.append(pairs.captions[first] + ("" if marks[-1] else f"\nnot: {pairs.captions[own]}"))
    return mm.contact_sheet([picture(row) for row in rows], captions, cell=CELL, right=marks, title=title)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "data", nargs="?", default="emoji:test/core", help="pairs: a folder, photos.csv, 'shards/{000..010}.tar'"
    )
    parser.add_argument("--model", default="emoji-clip", help="any MODEL of mm that embeds, such as ViT-B-32/openai")
    parser.add_argument("--image-field", metavar="COLUMN", help="column with the picture files")
    parser.add_argument("--text-field", metavar="COLUMN", help="column or field with the captions")
    parser.add_argument("--queries", type=int, default=6, help="best and worst queries that are shown, of each kind")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/retrieval"), help="folder for the sheets")
    args = parser.parse_args()
    if args.queries < 1:
        raise mm.UserError(f"--queries {args.queries}: give 1 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    encoded, fields = [], {"image_field": args.image_field, "text_field": args.text_field}
    model = mm.load(args.model)
    result = mm.evaluate("retrieval", model, args.data, on_encoded=encoded.append, **fields)
    for name, figure in result.metrics.items():
        print(f"{name:28}{figure.show()[0]:>8}  ({figure.show()[1]})")
    (pairs,) = encoded
    source = mm.open_source(args.data, image_size=SIDE, **fields)
    place = {source.key(index): index for index in range(len(source))}

    def picture(row: int) -> Tensor:
        return model.processor.view(source.read(place[pairs.ids[row]]).media["image"], SIDE)

    owners = torch.arange(len(pairs.images))
    of_texts = answer(pairs.texts, pairs.images, pairs.image_of, owners)
    of_pictures = answer(pairs.images, pairs.texts, owners, pairs.image_of)
    for kind, answers, draw in (("texts", of_texts, texts_sheet), ("pictures", of_pictures, pictures_sheet)):
        for which, rows in zip(("best", "worst"), answers.extremes(args.queries), strict=True):
            file = args.out / f"{which}-{kind}.png"
            draw(rows, answers, pairs, picture, f"{kind} as queries, {which} {len(rows)} of {len(answers.rank)}").save(file)
            print(file)


if __name__ == "__main__":
    try:
        main()
    except (mm.UserError, OSError) as error:
        sys.exit(f"error: {error}")
