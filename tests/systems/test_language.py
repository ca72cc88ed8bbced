"""A language model as a system of its own, and as the part of others."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mm.config import validate
from mm.data.write import write_shards
from mm.errors import ConfigError
from mm.hub import load
from mm.nn.transformer import Block
from mm.run.config import RunConfig
from mm.run.training import train
from mm.systems import build, clip
from mm.systems.clip import ClipConfig
from mm.systems.language_model import Language, LanguageConfig, build_language_part
from mm.types import Batch, Decoding, Interleaved, Sample, TextBatch

NETWORK = {"vocab_size": 50, "context_length": 16, "width": 32, "layers": 2, "heads": 4}


def language(**changes: object) -> Language:
    torch.manual_seed(0)
    config = LanguageConfig.model_validate({"network": NETWORK | changes})
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


def texts(rows: slice = slice(None)) -> Batch:
    torch.manual_seed(3)
    text = TextBatch(torch.randint(3, 50, (4, 9)), torch.tensor([9, 2, 5, 1]))
    return Batch(tuple("abcd"), text=text)[rows]


@torch.no_grad()
def test_the_loss_is_the_mean_over_texts_of_the_mean_over_their_next_words() -> None:
    system, batch = language(), texts()
    assert batch.text is not None
    means, every = [], []
    for ids, length in zip(batch.text.ids, batch.text.lengths, strict=True):
        hidden = system.network(system.network.embed(ids[None, :length]))
        scores = system.network.logits(hidden)[0].log_softmax(-1)
        lost = [-float(scores[i, ids[i + 1]]) for i in range(length - 1)]
        means.append(sum(lost) / max(1, len(lost)))
        every += lost
    losses = system.loss(batch, 0)
    assert float(losses.total) == pytest.approx(sum(means) / 4, rel=1e-5)
    assert float(losses.parts["perplexity"]) == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)
    halves = [float(system.loss(texts(rows), 0).total) for rows in (slice(0, 2), slice(2, 4))]
    assert sum(halves) / 2 == pytest.approx(float(losses.total), rel=1e-5)


def test_a_run_on_captions_learns_without_pictures_and_is_loaded_again(tmp_path: Path) -> None:
    captions = [f"a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "tree", "house")]
    write_shards([Sample(str(i), {}, (caption,)) for i, caption in enumerate(captions)], tmp_path / "captions")
    config = {
        "system": {"name": "language-model", "network": NETWORK | {"vocab_size": 300, "positions": "rotary"}},
        "data": {"train": str(tmp_path / "captions"), "validation": str(tmp_path / "captions")},
        "train": {
            "steps": 60,
            "batch_size": 12,
            "lr": 0.01,
            "warmup_steps": 5,
            "ema_decay": 0.0,
            "log_every": 5,
            "device": "cpu",
        },
    }
    result = train(validate(RunConfig, config, "test"), out=tmp_path / "run", progress=False)
    assert result.metrics["perplexity"] < 3
    model = load(tmp_path / "run", device="cpu", precision="fp32")
    assert not model.processor.has_image
    assert isinstance(model.system, Language)
    start = model.processor.text(["a red"])
    prompt = Interleaved(TextBatch(start.ids, start.lengths - 1), torch.empty(0, 3, 1, 1, dtype=torch.uint8))
    (written,) = model.system.write(prompt, Decoding(max_tokens=12, end=model.processor.tokenizer.end), [0])
    assert written.finished
    assert model.processor.tokenizer.decode(written.ids) in ("cat", "dog", "tree", "house")
