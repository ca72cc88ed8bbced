"""A language model as a system of its own, and as the part of others."""

import pytest
import torch
from torch import Tensor, nn

from mm.errors import ConfigError
from mm.nn.transformer import Block
from mm.systems import build, clip
from mm.systems.clip import ClipConfig
from mm.systems.language_model import Language, LanguageConfig, build_language_part

NETWORK = {"vocab_size": 50, "context_length": 16, "width": 32, "layers": 2, "heads": 4}


def language(**changes: object) -> Language:
    torch.manual_seed(0)
    config = LanguageConfig.model_validate({"network": NETWORK | changes, "end_id": 2})
    system = build(config)
    assert isinstance(system, Language)
    return system.eval()


class Gated(nn.Module):
    """Adds something to a block, which does nothing at first."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block, self.attention = block, block.attention
        self.gate = nn.Parameter(torch.zeros(1))
        self.added = nn.Linear(32, 32)

    def forward(self, x: Tensor, context: Tensor | None = None, **options: object) -> Tensor:
        return self.block(x + self.gate * self.added(x), context, **options)


@pytest.mark.parametrize("changes", [{}, {"tied": False, "positions": "rotary", "norm": "rms", "activation": "swiglu"}])
def test_a_wrapped_part_computes_what_the_part_does_until_what_was_added_acts(changes: dict[str, object]) -> None:
    trained = language(**changes)
    for parameter in trained.parameters():
        nn.init.normal_(parameter, std=0.3)
    network = build_language_part(trained.config, {"language": trained}, lambda _, block: Gated(block)).eval()
    vectors = trained.network.embed(torch.randint(50, (2, 9)))
    expected = trained.network.logits(trained.network(vectors))
    torch.testing.assert_close(network.logits(network(vectors)), expected)
    nn.init.ones_(network.transformer.blocks[1].gate)  # pyright: ignore[reportArgumentType]
    assert not torch.allclose(network.logits(network(vectors)), expected)


def test_a_part_is_used_as_it_is() -> None:
    trained = language()
    assert build_language_part("gpt2", {"language": trained}) is trained.network
    assert build_language_part(trained.config).width == 32
    with pytest.raises(ConfigError, match="'gpt2' names a model"):
        build_language_part("gpt2")
    with pytest.raises(ConfigError, match="does not predict words"):
        build_language_part("emoji-clip", {"language": clip.build(ClipConfig())})
