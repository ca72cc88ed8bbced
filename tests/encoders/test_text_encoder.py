"""Text encoder: trimming is exact, no padding leaks, every parameter learns, hidden words are hidden."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from mm.encoders.text import TextEncoder, TextEncoderConfig, build_text_encoder
from mm.errors import UserError
from mm.nn.buckets import MIN_ROWS
from mm.types import System, TextBatch

IDS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 2, 0, 0, 0]])
TEXT = TextBatch(IDS, torch.tensor([5, 3, 2]))


def objective(pooled: torch.Tensor) -> torch.Tensor:
    """Depends on every component; a plain sum or a sum of squares is constant behind a norm."""
    return (pooled * torch.randn(pooled.shape, dtype=pooled.dtype, generator=torch.Generator().manual_seed(3))).sum()


def encoder(**options: object) -> TextEncoder:
    torch.manual_seed(0)
    sizes = {"width": 32, "layers": 2, "heads": 4, "vocab_size": 11, "context_length": 12}
    return build_text_encoder(TextEncoderConfig.model_validate(sizes | options)).eval()


KINDS = [
    {"causal": True, "pooling": "last"},
    {"causal": True, "pooling": "mean"},
    {"causal": False, "pooling": "first"},
    {"causal": False, "pooling": "mean"},
    {"causal": False, "pooling": "last", "activation": "quick_gelu"},
]


@pytest.mark.parametrize("options", KINDS)
def test_padding_changes_nothing(options: dict[str, object]) -> None:
    model = encoder(**options)
    whole = model(TEXT)
    other_padding = torch.where(whole.mask, TEXT.ids, 9)
    padded = model(TextBatch(torch.nn.functional.pad(other_padding, (0, 7), value=3), TEXT.lengths))
    torch.testing.assert_close(padded.pooled, whole.pooled, atol=1e-6, rtol=1e-5)
    for row, length in enumerate(TEXT.lengths.tolist()):
        alone = model(TextBatch(TEXT.ids[row : row + 1, :length], TEXT.lengths[row : row + 1]))
        torch.testing.assert_close(alone.pooled[0], whole.pooled[row], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(alone.tokens[0], whole.tokens[row, :length], atol=1e-6, rtol=1e-5)
        assert whole.mask[row].tolist() == [position < length for position in range(5)]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("num_rows", [MIN_ROWS, MIN_ROWS + 5])
def test_computing_by_length_changes_nothing(options: dict[str, object], num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (num_rows, 9), generator=generator)
    text = TextBatch(ids, torch.randint(2, 10, (num_rows,), generator=generator))
    results = []
    for encode in (TextEncoder._encode, TextEncoder.forward):
        model = encoder(**options).double().train()
        encoded = encode(model, text)
        objective(encoded.pooled).backward()
        tokens = encoded.tokens * encoded.mask[..., None]
        results.append([encoded.mask, tokens, encoded.pooled, *(p.grad for p in model.parameters())])
    for plain, bucketed in zip(*results, strict=True):
        torch.testing.assert_close(plain, bucketed, atol=1e-10, rtol=1e-9)


def test_causal_tokens_see_no_later_word_and_others_do() -> None:
    changed = TextBatch(IDS[:1].clone(), TEXT.lengths[:1])
    changed.ids[0, 3] = 9
    for causal in (True, False):
        model = encoder(causal=causal)
        before, after = model(TEXT[:1]).tokens[0], model(changed).tokens[0]
        assert torch.equal(before[:3], after[:3]) == causal
        assert not torch.allclose(before[3:], after[3:])


@pytest.mark.parametrize("options", KINDS)
def test_pooled_gradients_reach_every_parameter(options: dict[str, object]) -> None:
    model = encoder(**options, gradient_checkpointing=True, token_dropout=0.1).train()
    objective(model(TEXT).pooled).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6] == []
    assert model.width == 32


def test_token_dropout_hides_inner_words_in_training_only() -> None:
    model, other_words = encoder(token_dropout=0.99), TextBatch(torch.tensor([[1, 9, 9, 9, 2]]), TEXT.lengths[:1])
    assert not torch.allclose(model(TEXT[:1]).pooled, model(other_words).pooled)
    model.train()
    torch.manual_seed(1)
    hidden = model(TEXT[:1]).pooled
    torch.manual_seed(1)
    assert torch.equal(hidden, model(other_words).pooled)
    other_ends = TextBatch(torch.tensor([[3, 5, 6, 7, 4]]), TEXT.lengths[:1])
    torch.manual_seed(1)
    assert not torch.allclose(hidden, model(other_ends).pooled)


@pytest.mark.parametrize("options", [{}, {"attend_padding": True}])
def test_what_is_hidden_belongs_to_a_text(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its batch, be it computed in groups of like length or at once; another seed hides something else."""
    model = encoder(token_dropout=0.5, **options).train()
    count, length = 2 * MIN_ROWS, 12
    lengths = torch.arange(count) % 7 + 6
    ids = torch.arange(1, count * length + 1).view(count, length) % 8 + 3
    text = TextBatch(ids.masked_fill(torch.arange(length) >= lengths[:, None], 0), lengths, seeds=torch.arange(count))
    together = model(text).pooled
    torch.testing.assert_close(model(text[3:5]).pooled, together[3:5])
    assert not torch.allclose(model(replace(text, seeds=torch.arange(count) + count)).pooled, together)


def test_texts_beyond_the_context_are_refused() -> None:
    with pytest.raises(UserError, match="13 tokens do not fit its context of 12"):
        encoder()(TextBatch(torch.ones(1, 13, dtype=torch.int64), torch.tensor([13])))


@pytest.mark.parametrize(
    ("values", "message"), [({"heads": 3}, "multiple of heads"), ({"pooling": "first"}, "sees nothing but itself")]
)
def test_impossible_configurations_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TextEncoderConfig.model_validate(values)


def test_only_matrices_decay() -> None:
    system = System()
    system.text = encoder()
    decayed, plain = ({id(p) for p in group["params"]} for group in system.parameter_groups())
    for name, parameter in system.named_parameters():
        expected = decayed if parameter.ndim == 2 and "positions" not in name else plain
        assert id(parameter) in expected, name


def test_bf16_autocast_stays_close() -> None:
    for options in KINDS:
        model = encoder(**options)
        with torch.autocast("cpu", torch.bfloat16):
            pooled = model(TEXT).pooled
        cosine = torch.nn.functional.cosine_similarity(pooled.float(), model(TEXT).pooled)
        assert cosine.min() > 0.999


def test_compiles_as_one_graph_for_any_length() -> None:
    model = encoder()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    many = TextBatch(IDS.repeat(MIN_ROWS, 1), TEXT.lengths.repeat(MIN_ROWS))
    for text in (TEXT, TextBatch(IDS[:, :3], torch.tensor([3, 3, 2])), many):
        torch.testing.assert_close(compiled(text).pooled, model(text).pooled)
