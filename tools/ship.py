"""Turn finished runs of one configuration, a seed each, into a shipped model with its system card.

The run with the best validation top-1 ships. The test artist is read here, once, by the commands that the card quotes.

    python tools/ship.py emoji-clip runs/queue-0 runs/queue-1 --first-stages runs/clip-0 runs/clip-1
"""

import argparse
import json
import platform
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import mm
from mm.evaluation.charts import read_metrics
from mm.evaluation.metrics import Result
from mm.hub import ASSETS, Model
from mm.run.evaluation import evaluate_retrieval, evaluate_zero_shot

SUMMARY = "CLIP that knows emoji-like pictures by name, in English and nine other languages"
LIMITS = """- It knows drawings of the kind of emoji, cut to their content on a plain background, not photographs.
- 1,287 concepts were seen in training. Names of other concepts are understood only as far as their words occurred in seen
  names (`top1_compositional`); concepts whose words are new (`top1_novel`) are mostly missed.
- Other languages were a tenth of the captions: words of seen names are understood, how well was not measured.
- Text of more than 24 tokens is cut."""
LICENCES = """The weights learned from art under Apache-2.0 (Noto), CC-BY-4.0 (Twemoji), MIT (Fluent Emoji, flat) and
CC-BY-SA-4.0 (OpenMoji), and from names under Unicode-3.0 (CLDR); credits in ATTRIBUTION.md. The weights are given under
CC-BY-SA-4.0, the strictest of these."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["emoji-clip"], help="the model whose summary, limits and licences are written above")
    parser.add_argument("runs", nargs="+", type=Path, help="finished second stages, by seed")
    parser.add_argument("--first-stages", nargs="+", type=Path, required=True, help="the runs that they start from")
    arguments = parser.parse_args()
    models = [replace(mm.load(run, precision="fp32"), name=arguments.name) for run in arguments.runs]
    validation = [evaluate_zero_shot(model, "emoji:validation", baseline="none") for model in models]
    chosen = max(range(len(models)), key=lambda seed: validation[seed].metrics["top1"].value)
    baselines = [None if seed == chosen else "none" for seed in range(len(models))]
    zero_shot = [evaluate_zero_shot(m, "emoji:test", baseline=b) for m, b in zip(models, baselines, strict=True)]
    retrieval = [evaluate_retrieval(model, "emoji:test/core") for model in models]
    card = {
        "summary": SUMMARY,
        "command": f"mm train configs/clip.yaml train.seed={chosen} && mm train configs/clip_queue.yaml train.seed={chosen}",
        "data": "emoji:train/core: artists noto, twemoji, fluent-flat, openmoji; seen concepts only",
        "data_fingerprint": _state(arguments.runs[chosen])["stream"]["fingerprint"],
        "training_seconds": round(sum(_seconds(run) for run in (arguments.first_stages[chosen], arguments.runs[chosen]))),
        "hardware": f"{platform.processor() or platform.machine()}, CPU only",
        "versions": {"mm": mm.__version__, "torch": torch.__version__},
        "validation": validation[chosen].to_json()["metrics"],
        "test": (zero_shot[chosen] | retrieval[chosen]).to_json()["metrics"],
        "seeds": _seeds({"validation": validation, "test": zero_shot, "retrieval": retrieval}),
        "licence": "CC-BY-SA-4.0",
    }
    folder = ASSETS / "models" / arguments.name
    shutil.rmtree(folder, ignore_errors=True)
    mm.save(models[chosen], folder, dtype=torch.bfloat16, card=card)
    shipped = mm.load(arguments.name, precision="fp32")
    card["test_as_shipped"] = evaluate_zero_shot(shipped, "emoji:test", baseline="none").to_json()["metrics"]["top1"]
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    page = _page(arguments.name, card, shipped, validation[chosen], zero_shot[chosen], retrieval[chosen])
    Path(f"docs/cards/{arguments.name}.md").write_text(page, encoding="utf-8")
    print(page)


def _state(run: Path) -> dict[str, Any]:
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return json.loads((checkpoint / "state.json").read_text())


def _seconds(run: Path) -> float:
    return max(row.get("seconds", 0.0) for row in read_metrics(run / "metrics.jsonl"))


def _seeds(measured: dict[str, list[Result]]) -> dict[str, dict[str, Any]]:
    """Every seed's headline figures, and their medians."""
    names = {"validation": ["top1"], "test": ["top1", "top5"], "retrieval": ["image_to_text_r1", "text_to_image_r1"]}
    table: dict[str, dict[str, Any]] = {}
    for part, results in measured.items():
        for name in names[part]:
            values = [result.metrics[name].value for result in results]
            table[f"{part}_{name}"] = {"values": values, "median": statistics.median(values)}
    return table


def _table(measured: Result) -> str:
    """Figures with their intervals as a Markdown table, the protocol beneath."""
    rows = [f"| `{name}` | {' | '.join(interval.show())} |" for name, interval in measured.metrics.items()]
    return "\n".join(["| figure | value | 95 % interval |", "|---|---|---|", *rows, "", measured.stamp()])


def _page(name: str, card: dict[str, Any], model: Model, validation: Result, zero_shot: Result, retrieval: Result) -> str:
    seeds = "\n".join(
        f"| `{figure}` | {', '.join(f'{100 * v:.1f}' for v in entry['values'])} | {100 * entry['median']:.1f} |"
        for figure, entry in card["seeds"].items()
    )
    return f"""# {name}

{card["summary"]}. {model.parameters()["total"]:,} parameters, {model.processor.image_spec.size} px, bf16 weights.

- Trained by `{card["command"]}` on {card["data"]}
  (fingerprint `{card["data_fingerprint"][:16]}`), {card["training_seconds"] / 60:.0f} minutes, {card["hardware"]},
  torch {card["versions"]["torch"]}.
- Configurations: `configs/clip.yaml`, then `configs/clip_queue.yaml`; chosen on the validation artist fxemoji. Shipped: the
  seed with the best validation top-1.

## Seeds, %

| figure | by seed | median |
|---|---|---|
{seeds}

## Test artist emojione, read once for each seed

`mm eval zero-shot {name} --data emoji:test`

{_table(zero_shot)}

`mm eval retrieval {name} --data emoji:test/core`

{_table(retrieval)}

Rounding to bf16 for shipping gives top-1 {100 * card["test_as_shipped"]["value"]:.1f} %.

## Validation artist fxemoji

`mm eval zero-shot {name} --data emoji:validation`

{_table(validation)}

## Limits

{LIMITS}

## Licences

{LICENCES}
"""


if __name__ == "__main__":
    main()
