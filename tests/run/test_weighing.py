"""Texts weighed against a picture: each way of joining the two, beside the way that its own task takes."""

import math

import pytest
import torch
import torch.nn.functional as F

import mm
from mm.data.emoji import draw_concepts
from mm.errors import UserError
from mm.hub import Model
from mm.run.weighing import strategy
from mm.systems.dalle import Dalle

TEXTS = ("hot dog", "pear", "red heart")


@pytest.fixture(scope="module")
def picture() -> bytes:
    return draw_concepts("emojione", ["1f32d"], 64)["1f32d"]


def test_vectors_weigh_as_in_classification(picture: bytes) -> None:
    model = mm.load("emoji-clip")
    found = mm.weigh(model, picture, TEXTS)
    assert (found.strategy, found.measure) == ("dual tower", "cosine")
    labels = mm.classify(model, [picture], TEXTS, templates=["{}"])[0]
    expected = dict(zip(labels.labels, labels.probabilities, strict=True))
    assert {fit.text: fit.probability for fit in found.fits} == pytest.approx(expected, abs=1e-5)
    cosines = (model.embed_images([picture]) @ model.embed_texts(TEXTS).T)[0].tolist()
    assert [fit.score for fit in found.fits] == pytest.approx(cosines)
    assert [fit.text for fit in found.fits] == list(TEXTS)


def test_pairs_weigh_as_in_grounding(picture: bytes) -> None:
    model = mm.load("emoji-albef")
    found = mm.weigh(model, picture, TEXTS)
    assert (found.strategy, found.measure) == ("cross-attention", "match")
    assert [fit.score for fit in found.fits] == pytest.approx([model.ground(picture, text).match for text in TEXTS], abs=1e-5)
    odds = [fit.score / (1 - fit.score) for fit in found.fits]
    assert [fit.probability for fit in found.fits] == pytest.approx([one / sum(odds) for one in odds], rel=1e-3)


def test_a_sequence_weighs_by_what_training_minimises(picture: bytes) -> None:
    model = mm.load("emoji-dalle")
    found = mm.weigh(model, picture, TEXTS)
    assert (found.strategy, found.measure) == ("single tower", "log-likelihood")
    for fit in found.fits:
        assert fit.score == pytest.approx(_token_by_token(model, picture, fit.text), abs=1e-4)
    weights = [math.exp(fit.score) for fit in found.fits]
    assert [fit.probability for fit in found.fits] == pytest.approx([one / sum(weights) for one in weights], rel=1e-4)


@torch.no_grad()
def _token_by_token(model: Model, picture: bytes, text: str) -> float:
    """The mean log-likelihood of the picture's tokens, each by a step of the decoder with its cache."""
    system = model.system
    assert isinstance(system, Dalle)
    ids = system.tokenizer.encode(model.processor.image(picture)[None])
    logits, caches = system.prefill(system.prompt(model.processor.text([text])), ids[:, :0], system.num_image)
    total = 0.0
    for place in range(system.num_image):
        total += float(F.log_softmax(logits.float(), -1)[0, ids[0, place]])
        if place + 1 < system.num_image:
            logits = system.step(ids[:, place], place, caches)
    return total / system.num_image


def test_strategies_follow_from_capabilities() -> None:
    both = {"image", "text"}
    assert strategy({"embeds"}, both) == "dual tower"
    assert strategy({"embeds"}, {"image"}) is None
    assert strategy({"matches"}, set()) == "single tower"
    assert strategy({"matches", "embeds", "grounds"}, both) == "cross-attention"
    assert strategy({"captions"}, set()) is None


def test_what_cannot_be_weighed_is_told(picture: bytes) -> None:
    with pytest.raises(UserError, match="does not weigh"):
        mm.weigh("emoji-captioner", picture, TEXTS)
    with pytest.raises(UserError, match="at least one"):
        mm.weigh("emoji-clip", picture, [])
