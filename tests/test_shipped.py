"""The shipped weights still do what their card says."""

import json
import shutil

import pytest

import mm
from mm.hub import ASSETS

FEW = {"limit": 24, "best_of": 4}
"""Prompts and candidates, fewer than the card's, so that a painter's figure is only roughly the same."""

CHOSEN = {"best_of": 8, "ranker": "emoji-clip", "neighbour": "none", "judge": "none"}

MEASURED = {
    "hears": (
        "retrieval",
        "emoji-speech:validation/core",
        {"between": ("audio", "image")},
        "audio_to_image_r1",
        "audio_to_image_r1",
        0.015,
    ),
    "matches": ("retrieval", "emoji:validation/core", {}, "image_to_text_r1", "image_to_text_r1", 0.01),
    "embeds": ("zero-shot", "emoji:validation", {"baseline": "none"}, "top1", "top1", 0.01),
    "tokenizes": ("reconstruction", "emoji:validation/core", {}, "psnr", "psnr", 0.05),
    "paints": ("generation", "emoji:validation/core/seen", FEW, "clip_rank5", "clip_rank5", 0.3),
    "captions": ("captioning", "emoji:validation/core", CHOSEN, "exact", "exact", 0.01),
    "answers": ("vqa", "emoji-vqa:validation/compositional", {}, "accuracy", "accuracy_compositional", 0.01),
}
"""By the first capability that a model has: what is measured, which figure of it, and which of the card's it should be."""


@pytest.mark.parametrize("name", mm.shipped())
def test_validation_figures_are_those_of_the_card(name: str) -> None:
    card = json.loads((ASSETS / "models" / name / "card.json").read_text())
    model = mm.load(name, device="cpu")
    if "hears" in model.capabilities and shutil.which("espeak-ng") is None:
        pytest.skip("needs espeak-ng, which speaks the names")
    task, data, options, figure, of_card, tolerance = next(MEASURED[one] for one in MEASURED if one in model.capabilities)
    measured = mm.evaluate(task, model, data, **options)
    assert measured.metrics[figure].value == pytest.approx(card["validation"][of_card]["value"], abs=tolerance)


def test_shipped_weights_stay_within_their_budget() -> None:
    sizes = {name: (ASSETS / "models" / name / "model.safetensors").stat().st_size for name in mm.shipped()}
    assert max(sizes.values()) <= 16_000_000
    assert sum(sizes.values()) <= 64_000_000
