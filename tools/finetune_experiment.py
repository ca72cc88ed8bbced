"""Fine-tune a model on 300 pictures of an artist that it never saw: what it learns of that artist, what it forgets of another.

    python tools/finetune_experiment.py BASE [--seeds 0 1 2] [--out runs/finetune] [--json FILE]

BASE is a model of the emoji's train artists without openmoji. Each seed draws its own 300 pairs of openmoji, trains on them
with configs/finetune.yaml (as it is, with all weights, or with low-rank corrections) and averages the result with BASE. How
much of the tuned weights the average takes is chosen once for each method, by cross-validation among the first seed's 300
pairs; the rest of the artist and the other artist (fxemoji) are only measured.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import mm
from mm.data.sources import Subset, open_source
from mm.data.write import pack
from mm.hub import Model
from mm.run.adaptation import ALPHAS, best_alpha, interpolate, sweep
from mm.run.config import CONFIGS
from mm.run.evaluation import evaluate_zero_shot
from mm.seeding import generator
from mm.types import Source

ARTIST, OTHER = "emoji:train/core/openmoji", "emoji:validation/core"
PAIRS, FOLDS = 300, 3
METHODS = {"all weights": ("system.lock=[]",), "text locked": (), "lora": ("tune={rank: 8}", "train.lr=0.0005")}
"""Overrides of configs/finetune.yaml."""


def split(source: Source, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pairs to learn from, in random order, and of the rest."""
    order = generator(seed, "finetune").permutation(len(source)).tolist()
    return order[:PAIRS], sorted(order[PAIRS:])


def tune(base: str, source: Source, rows: Sequence[int], overrides: Sequence[str], seed: int, folder: Path) -> Model:
    """Fine-tune ``base`` on some samples of a source, through the same files and commands as a user's own pictures."""
    pairs = folder.with_name(f"{folder.name}-pairs")
    if not pairs.is_dir():
        pack(Subset(source, rows), pairs)
    fixed = (f"init_from={base}", f"data.train={pairs}", f"train.seed={seed}", "train.tensorboard=false", "train.log_ids=false")
    mm.train(CONFIGS / "finetune.yaml", [*fixed, *overrides], out=folder, progress=False)
    return mm.load(folder, device="cpu", precision="fp32")


def top1(model: Model, source: Source) -> float:
    """Share of pictures told rightly among all core names."""
    return evaluate_zero_shot(model, source, baseline="none", cache=False).metrics["top1"].value


def choose(base: Model, source: Source, seed: int, method: str, out: Path, console: Console) -> float:
    """Share of the tuned weights by cross-validation among the pairs: each fold is told by a model tuned on the others."""
    rows, _ = split(source, seed)
    rates = dict.fromkeys(ALPHAS, 0.0)
    for fold in range(FOLDS):
        others = [row for place, row in enumerate(rows) if place % FOLDS != fold]
        tuned = tune(base.name, source, others, METHODS[method], seed, out / f"{method}-fold-{fold}".replace(" ", "-"))
        for alpha, result in sweep(base, tuned, Subset(source, rows[fold::FOLDS])).items():
            rates[alpha] += result.metrics["top1"].value / FOLDS
    chosen = best_alpha(rates)
    shown = ", ".join(f"{alpha:g}: {100 * rate:.1f}" for alpha, rate in rates.items())
    console.print(f"{method}, top-1 of held pairs by alpha: {shown}; alpha {chosen:g}")
    return chosen


def measure(base: Model, source: Source, other: Source, seed: int, out: Path, alphas: dict[str, float]) -> list[dict[str, Any]]:
    """Figures of one seed: the base model, then each method with all of the tuned weights and with the chosen share."""
    rows, rest = split(source, seed)
    unseen = Subset(source, rest, name=f"{source.name}, the rest")
    found = [{"seed": seed, "method": "base", "artist": top1(base, unseen), "other": top1(base, other)}]
    for method, overrides in METHODS.items():
        tuned = tune(base.name, source, rows, overrides, seed, out / f"{method.replace(' ', '-')}-{seed}")
        for alpha in (1.0, alphas[method]):
            model = interpolate(base, tuned, alpha)
            name = method if alpha == 1 else f"{method}, alpha {alpha:g}"
            found.append({"seed": seed, "method": name, "artist": top1(model, unseen), "other": top1(model, other)})
    return found


def table(figures: list[dict[str, Any]]) -> Table:
    """Mean over seeds, change from the base model's mean, and every seed's figure, in percent."""
    result = Table("model", "rest of openmoji", "change", "by seed", "fxemoji", "change", "by seed")
    base = {part: statistics.mean(f[part] for f in figures if f["method"] == "base") for part in ("artist", "other")}
    for method in dict.fromkeys(figure["method"] for figure in figures):
        cells = [method]
        for part in ("artist", "other"):
            values = [figure[part] for figure in figures if figure["method"] == method]
            mean = statistics.mean(values)
            cells += [f"{100 * mean:.1f}", f"{100 * (mean - base[part]):+.1f}", ", ".join(f"{100 * v:.1f}" for v in values)]
        result.add_row(*cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="run or model folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    base = mm.load(arguments.base, device="cpu", precision="fp32")
    size = base.processor.image_spec.size
    source, other = open_source(ARTIST, image_size=size), open_source(OTHER, image_size=size)
    alphas = {method: choose(base, source, arguments.seeds[0], method, arguments.out, console) for method in METHODS}
    figures: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        figures += measure(base, source, other, seed, arguments.out, alphas)
        console.print(f"seed {seed} of {arguments.seeds} is measured")
    console.print(table(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps({"alphas": alphas, "figures": figures}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
