"""The system card of a run, made of what its newest checkpoint recorded: ``card.json`` and ``card.md`` in the run folder."""

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from mm.config import read_json, read_yaml
from mm.hub import CARD_FILE, CONFIG_FILE, MAX_STATE_BYTES
from mm.training.checkpoint import STATE_FILE

CARD_PAGE = "card.md"
KEPT = ("step", "parameters", "metrics", "seconds", "efficiency", "versions", "world_size")


def write_card(run: Path, checkpoint: Path) -> dict[str, Any]:
    """Write the card of a run and return what it says.

    Args:
        run: The run folder.
        checkpoint: Its newest checkpoint.
    """
    state, config = read_json(checkpoint / STATE_FILE, MAX_STATE_BYTES), read_yaml(checkpoint / CONFIG_FILE)
    stream = state["stream"]
    card = {
        "system": config["system"]["name"],
        "data": config["data"],
        "data_fingerprint": stream.get("fingerprint"),
        "exact": not stream.get("inexact", False),
        "samples": {"this_epoch": stream.get("accounting"), "earlier_epochs": stream.get("finished")},
        **{key: state[key] for key in KEPT if key in state},
        "train": state["train"],
    }
    (run / CARD_FILE).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (run / CARD_PAGE).write_text(_page(run.name, card), encoding="utf-8")
    return card


def _page(name: str, card: Mapping[str, Any]) -> str:
    data, versions, parameters = card["data"], card["versions"], card["parameters"]
    trained_on = data.get("train") or ", ".join(part["source"] for part in data.get("mixture", ()))
    rows = "\n".join(f"| {what} | {value} |" for what, value in efficiency_rows(card["efficiency"]))
    figures = "\n".join(f"| `{figure}` | {value:.4g} |" for figure, value in card["metrics"].items())
    measured = f"\n## Validation\n\n`{data.get('validation')}`\n\n| figure | value |\n|---|---|\n{figures}\n" if figures else ""
    return f"""# {name}

System `{card["system"]}`, {parameters["total"]:,} parameters, {parameters["trained"]:,} of them trained.

- Data: `{trained_on}`, {_known(card)}
- {card["step"]:,} of {card["train"]["steps"]:,} steps of {card["train"]["batch_size"]} samples, seed {card["train"]["seed"]},
  {timedelta(seconds=round(card["seconds"]))} in all
- mm {versions["mm"]}, torch {versions["torch"]}, Python {versions["python"]}

## Training

| | |
|---|---|
{rows}
{measured}"""


def _known(card: Mapping[str, Any]) -> str:
    """What identifies the data, and how many of them could be used."""
    epochs = [counts for counts in card["samples"].values() if counts]
    delivered, skipped = (sum(counts[name] for counts in epochs) for name in ("delivered", "skipped"))
    told = f"fingerprint `{str(card['data_fingerprint'])[:16]}`" if card["exact"] else "read as a stream: not exact"
    return f"{told}; {delivered:,} samples learned from, {skipped:,} that could not be used"


def efficiency_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What `mm.training.efficiency.Efficiency.summary` found, for people; unknown figures are left out."""
    yield "device", f"{found['processes']} x {found['device']}, {found['precision']}"
    yield "throughput", f"{found['samples_per_second']:,.1f} samples/s, waiting for data included"
    if found["flops_per_sample"] is not None:
        yield "FLOPs of a sample", f"{found['flops_per_sample']:.3g}, forward and backward"
    if found["mfu"] is not None:
        yield "MFU", f"{found['mfu']:.1%}"
    yield "peak memory", f"{found['peak_memory'] / 1e9:.2f} GB"
    if found["energy_kwh"] is not None:
        yield "energy", f"{found['energy_kwh']:.3g} kWh ({found['energy_method']})"
        yield "CO2", f"{found['co2_kg']:.3g} kg (estimated)"
