"""A language model decodes step by step what it computes at once, texts of unequal lengths together as alone."""

import pytest
import torch

from mm.errors import UserError
from mm.generators.language_model import LanguageModelConfig, build_language_model

VOCABULARY = 50


def model(**changes):
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, "context_length": 24, "width": 32, "layers": 2, "heads": 4} | changes
    built = build_language_model(LanguageModelConfig(**options)).eval()
    for parameter in built.parameters():  # an untrained head is nearly flat
        torch.nn.init.normal_(parameter, std=0.3)
    return built


STYLES = [
    {},
    {"positions": "rotary", "norm": "rms", "activation": "swiglu", "bias": False, "kv_heads": 2, "tied": False},
    {"activation": "relu"},
]


@pytest.mark.parametrize("style", STYLES)
def test_steps_give_what_one_pass_gives(style):
    lm = model(**style)
    ids = torch.randint(VOCABULARY, (3, 11))
    lengths = torch.tensor([2, 5, 4])
    whole = [lm.logits(lm(lm.embed(row[None, : length + 6])))[0] for row, length in zip(ids, lengths, strict=True)]
    prompt = ids[:, :5]
    with torch.no_grad():
        logits, state = lm.prefill(lm.embed(prompt), lengths, 7)
        for index in range(6):
            expected = torch.stack([full[length - 1 + index] for full, length in zip(whole, lengths, strict=True)])
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
            logits = lm.step(ids[torch.arange(3), lengths + index], index, state)


def test_selected_rows_go_on_as_the_rows_they_were():
    lm = model()
    ids, lengths = torch.randint(VOCABULARY, (3, 5)), torch.tensor([2, 5, 4])
    rows, words = torch.tensor([2, 0, 2]), torch.tensor([7, 8, 9])
    with torch.no_grad():
        _, state = lm.prefill(lm.embed(ids), lengths, 3)
        found = lm.step(words, 0, state[rows])
        _, again = lm.prefill(lm.embed(ids[rows]), lengths[rows], 3)
        torch.testing.assert_close(found, lm.step(words, 0, again), atol=1e-6, rtol=1e-5)


def test_what_stands_behind_a_text_changes_nothing():
    lm = model()
    ids = torch.randint(VOCABULARY, (2, 9))
    other = ids.clone()
    other[:, 5:] = 1
    torch.testing.assert_close(lm(lm.embed(ids))[:, :5], lm(lm.embed(other))[:, :5])


def test_too_long_is_refused():
    lm = model()
    with pytest.raises(UserError, match="25 positions do not fit its context of 24"):
        lm(torch.zeros(1, 25, 32))
    with pytest.raises(UserError, match="do not fit"):
        lm.prefill(torch.zeros(1, 20, 32), torch.tensor([20]), 6)


def test_gradients_reach_every_parameter():
    for style in STYLES:
        lm = model(**style)
        ids = torch.randint(VOCABULARY, (2, 24))
        lm.logits(lm(lm.embed(ids))).square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in lm.parameters())
