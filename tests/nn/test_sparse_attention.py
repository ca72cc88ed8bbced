"""Sparse attention: the patterns of their paper, skipped pairs or masked ones alike, decoding like the whole pass."""

import pytest
import torch

from mm.config import ConfigError, validate
from mm.encoders.audio import LogMelEncoderConfig, build_log_mel_encoder
from mm.generators.language_model import LanguageModelConfig, build_language_model
from mm.nn.attention import MultiHeadAttention
from mm.nn.masks import Fixed, Heads, Mask, Pattern, Raster, SparseAttentionConfig, Strided, attention_mask
from mm.types import AudioBatch

LENGTH, STRIDE, SUMMARY = 23, 5, 2
HEADS: tuple[Heads, ...] = ("near", "far", "both")


def strided(heads: Heads, i: int, j: int) -> bool:
    near, far = j >= i - STRIDE, (i - j) % STRIDE == 0
    return {"near": near, "far": far, "both": near or far}[heads]


def fixed(heads: Heads, i: int, j: int) -> bool:
    near, far = j // STRIDE == i // STRIDE, j % STRIDE in range(STRIDE - SUMMARY, STRIDE) or i == j
    return {"near": near, "far": far, "both": near or far}[heads]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", [Strided, Fixed])
def test_patterns_are_those_of_the_paper(kind: type, heads: Heads) -> None:
    pattern = Strided(STRIDE, heads) if kind is Strided else Fixed(STRIDE, SUMMARY, heads)
    allowed = attention_mask(LENGTH, causal=True, pattern=pattern).tensor(LENGTH, LENGTH, torch.device("cpu"))
    assert allowed is not None
    seen = strided if kind is Strided else fixed
    expected = [[j <= i and seen(heads, i, j) for j in range(LENGTH)] for i in range(LENGTH)]
    assert allowed[0, 0].tolist() == expected
    assert attention_mask(3, LENGTH, causal=True, pattern=pattern).allowed[0, 0].tolist() == expected[-3:]  # pyright: ignore


PATTERNS: dict[str, Pattern] = {
    "strided near": Strided(32, "near"),
    "strided far": Strided(32, "far"),
    "fixed": Fixed(32, 4),
    "fixed near": Fixed(24, 4, "near"),
    "fixed far": Fixed(32, 4, "far"),
    "row": Raster("row", 16, 16),
    "column": Raster("column", 16, 16),
    "convolutional": Raster("convolutional", 16, 16, 5),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", list(PATTERNS))
def test_skipping_is_masking(name: str, padded: bool, causal: bool) -> None:
    """Values and gradients in fp64, with fewer heads of keys than of queries."""
    length, pattern = 16 + 16 * 16, PATTERNS[name]
    if isinstance(pattern, Raster) and not causal:
        pytest.skip("raster patterns are causal")
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4, num_kv_heads=2).double()
    x = torch.randn(2, length, 16, dtype=torch.float64, requires_grad=True)
    keys = torch.arange(length) < torch.tensor([[length], [length - 70]]) if padded else None
    mask = attention_mask(length, causal=causal, keys=keys, pattern=pattern)
    assert mask.groups is not None
    work = sum(q * k for q, k in zip(mask.groups.num_queries, mask.groups.num_keys, strict=True))
    assert work < 0.6 * length**2
    results = []
    for given in (mask, Mask(mask.allowed, mask.empty)):
        result = attention(x, mask=given)[0]
        loss = (result * torch.linspace(-1, 1, result.numel(), dtype=torch.float64).view_as(result)).sum()
        results.append([result, *torch.autograd.grad(loss, [x, *attention.parameters()])])
    for skipped, masked in zip(*results, strict=True):
        torch.testing.assert_close(skipped, masked, rtol=1e-9, atol=1e-11)


def test_groups_are_made_once_and_may_be_learned_through() -> None:
    with torch.inference_mode():
        first = attention_mask(256, causal=True, pattern=PATTERNS["fixed"])
    second = attention_mask(256, causal=True, pattern=PATTERNS["fixed"])
    assert first.groups is second.groups
    attention = MultiHeadAttention(16, 2)
    attention(torch.randn(1, 256, 16), mask=second)[0].sum().backward()
    assert attention.query.weight.grad is not None


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("heads", ["alternate", "both"])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_decoding_from_caches_agrees_with_the_whole_pass(pattern: str, heads: str, positions: str) -> None:
    """Prompts of unequal lengths, which end in the same column of the caches; attention is really sparse."""
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 4, "heads": 2, "context_length": 24, "vocab_size": 50, "positions": positions}
    sparse = {"pattern": pattern, "stride": 4, "summary": 1, "heads": heads}
    model, dense = (
        build_language_model(validate(LanguageModelConfig, sizes | options, "test")).eval()
        for options in ({"sparse_attention": sparse}, {})
    )
    dense.load_state_dict(model.state_dict())
    ids, lengths = torch.randint(0, 50, (3, 20)), torch.tensor([7, 4, 9])
    with torch.no_grad():
        whole = model.logits(model(model.embed(ids)))
        assert (whole - dense.logits(dense(dense.embed(ids)))).abs().max() > 1e-3
        for given in (lengths, torch.full((3,), 9)):
            logits, state = model.prefill(model.embed(ids[:, :9]), given, 9)
            for index in range(9):
                expected = torch.stack([whole[row, int(given[row]) - 1 + index] for row in range(3)])
                torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
                following = torch.stack([ids[row, int(given[row]) + index] for row in range(3)])
                if index < 8:
                    logits = model.step(following, torch.tensor([index]) if index % 2 else index, state)


def test_recordings_may_be_attended_to_sparsely_and_alone() -> None:
    """In both directions; a recording's vector does not depend on the padding."""
    torch.manual_seed(0)
    sizes = {"width": 16, "layers": 2, "heads": 2, "mels": 16}
    config = validate(LogMelEncoderConfig, {**sizes, "sparse_attention": {"pattern": "strided", "stride": 8}}, "test")
    encoder = build_log_mel_encoder(config).eval()
    waves = torch.randn(2, 16_000)
    waves[1, 9_000:] = 0
    with torch.no_grad():
        together = encoder(AudioBatch(waves, torch.tensor([16_000, 9_000]))).pooled
        alone = encoder(AudioBatch(waves[1:, :9_000], torch.tensor([9_000]))).pooled
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-5)


def test_impossible_patterns_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than a stretch"):
        validate(SparseAttentionConfig, {"pattern": "fixed", "stride": 4, "summary": 5}, "test")
