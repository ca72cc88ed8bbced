"""A prefix has no place in a sequence: with rotary positions, too, prompts of unequal lengths are read together as alone."""

import pytest
import torch

from mm.generators.language_model import LanguageModelConfig, build_language_model
from mm.nn.prefixes import PrefixConfig, add_prefixes


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_padding_changes_nothing_beside_a_prefix(positions: str) -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=30, context_length=20, width=32, layers=2, heads=4, positions=positions)
    model = build_language_model(config).eval()
    add_prefixes(model, PrefixConfig(length=3))
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            torch.nn.init.normal_(parameter)
    ids, lengths = torch.randint(30, (2, 10)), torch.tensor([10, 4])
    with torch.no_grad():
        together, _ = model.prefill(model.embed(ids), lengths, 2)
        alone, _ = model.prefill(model.embed(ids[1:, :4]), lengths[1:], 2)
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-4)
