"""From a folder of pictures with captions (name.jpg beside name.txt, or sub-folders as captions) to a small CLIP, on a laptop.

Holds some pictures back, trains on the others, measures how well those held back are found, and searches all for a text.
Without a folder it takes animals, plants and dishes, each drawn by several artists, from the embedded emoji.
"""

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import mm

CONFIG = Path(__file__).parents[1] / "configs" / "own.yaml"
EMOJI, GROUPS, SIDE = "emoji:train/core", ("animals-nature", "food-drink"), 64
FEWEST = 10
"""Different captions, without which nothing can be told from anything else."""

HELD_BACK = 1 / 7

Pair = tuple[Path, Sequence[str]]


def embedded(folder: Path) -> Path:
    """Some of the embedded emoji as ordinary files."""
    folder.mkdir(parents=True, exist_ok=True)
    source = mm.open_source(EMOJI, image_size=SIDE)
    for index in range(len(source)):
        if source.fields(index)["group"] in GROUPS:
            sample = source.read(index)
            stem = f"{sample.texts[0]}, {sample.id}".replace("/", " ")
            (folder / f"{stem}.png").write_bytes(sample.media["image"])
            (folder / f"{stem}.txt").write_text(sample.texts[0], encoding="utf-8")
    return folder


def read_pairs(folder: Path) -> list[Pair]:
    """The pictures that have captions."""
    source, pairs, left_out = mm.open_source(str(folder)), [], 0
    for index in range(len(source)):
        try:
            texts = source.read(index).texts
        except mm.BadSample:
            texts = ()
        left_out += not texts
        pairs += [((folder / source.key(index)).resolve(), texts)] if texts else []
    print(f"{len(pairs)} pictures with captions, {left_out} without")
    return pairs


def hold_back(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pictures to train on, and some with different captions to measure on."""
    different = {texts[0]: (file, texts) for file, texts in pairs}
    if len(different) < FEWEST:
        raise mm.UserError(
            f"{len(different)} different captions; give pictures with at least {FEWEST}, in .txt files beside them"
        )
    count = max(FEWEST // 2, min(round(HELD_BACK * len(pairs)), len(different)))
    held = random.Random(0).sample(list(different.values()), count)
    files = {file for file, _ in held}
    return [pair for pair in pairs if pair[0] not in files], held


def write_table(path: Path, pairs: list[Pair]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "caption"), *((file, text) for file, texts in pairs for text in texts)])
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="pictures with captions; default: some of the embedded emoji")
    parser.add_argument("--steps", type=int, default=200, help="more is better, up to a point")
    parser.add_argument("--search", metavar="TEXT", help="what to look for; default: a caption that was held back")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("runs/own"), help="new folder, or the one of a run to go on with"
    )
    args = parser.parse_args()
    if args.folder is not None and not args.folder.is_dir():
        raise mm.UserError(f"{args.folder}: no such folder; give one with pictures and captions")
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.folder or embedded(args.out / "pictures")
    training, held = hold_back(read_pairs(folder))
    tables = [write_table(args.out / f"{name}.csv", pairs) for name, pairs in (("training", training), ("held-back", held))]
    settings = [f"data.train={tables[0]}", f"train.steps={args.steps}", f"train.batch_size={min(64, len(training))}"]
    run = args.out / "run"
    outcome = mm.train(CONFIG, settings, out=run)
    if outcome.step < args.steps:
        raise mm.UserError(f"{run}: stopped at step {outcome.step}; the same command goes on")
    model = mm.load(run)
    print(f"\n{len(held)} pictures that it has not seen:")
    for name, figure in mm.evaluate("retrieval", model, tables[1]).metrics.items():
        print(f"{name:28}{figure.show()[0]:>8}  ({figure.show()[1]})")
    text = args.search or held[0][1][0]
    print(f"\n'{text}' among all pictures:")
    found = mm.search(model, folder, text=text, k=6)
    for hit in found.hits:
        print(f"{hit.score:.2f}  {hit.path.name}")


if __name__ == "__main__":
    try:
        main()
    except (mm.UserError, OSError) as error:
        sys.exit(f"error: {error}")
