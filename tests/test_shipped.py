"""The shipped weights still do what their card says."""

import json

import pytest

import mm
from mm.hub import ASSETS

MEASURED = {"embeds": ("zero-shot", "emoji:validation", {"baseline": "none"}, "top1", 0.01)}
MEASURED["tokenizes"] = ("reconstruction", "emoji:validation/core", {}, "psnr", 0.05)
FEW = {"limit": 24, "best_of": 4}
"""Prompts and candidates, fewer than the card's, so that a painter's figure is only roughly the same."""
MEASURED["paints"] = ("generation", "emoji:validation/core/seen", FEW, "clip_rank5", 0.3)


@pytest.mark.parametrize("name", mm.shipped())
def test_validation_figures_are_those_of_the_card(name: str) -> None:
    card = json.loads((ASSETS / "models" / name / "card.json").read_text())
    model = mm.load(name, device="cpu")
    [capability] = model.capabilities & MEASURED.keys()
    task, data, options, figure, tolerance = MEASURED[capability]
    measured = mm.evaluate(task, model, data, **options)
    assert measured.metrics[figure].value == pytest.approx(card["validation"][figure]["value"], abs=tolerance)


def test_shipped_weights_stay_within_their_budget() -> None:
    sizes = {name: (ASSETS / "models" / name / "model.safetensors").stat().st_size for name in mm.shipped()}
    assert max(sizes.values()) <= 16_000_000
    assert sum(sizes.values()) <= 64_000_000
