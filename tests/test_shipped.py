"""The shipped weights still do what their card says."""

import json

import pytest

import mm
from mm.hub import ASSETS


@pytest.mark.parametrize("name", mm.shipped())
def test_validation_figures_are_those_of_the_card(name: str) -> None:
    card = json.loads((ASSETS / "models" / name / "card.json").read_text())
    measured = mm.evaluate("zero-shot", name, "emoji:validation", baseline="none", device="cpu")
    assert measured.metrics["top1"].value == pytest.approx(card["validation"]["top1"]["value"], abs=0.01)
