"""Attention: two ways of computing it agree, grouped queries are shared keys, and nothing to see is zero, never NaN."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn import attention as attentions
from mm.nn.attention import MultiHeadAttention, _attend_once, attend_by_products
from mm.nn.embeddings import Rotary
from mm.nn.masks import EVERYTHING, Mask, attention_mask

WIDTH, HEADS, LENGTH = 16, 4, 6


def attention(**options: object) -> MultiHeadAttention:
    torch.manual_seed(0)
    return MultiHeadAttention(WIDTH, HEADS, **options).eval()  # pyright: ignore[reportArgumentType]


def sequence(length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(length))


PADDED = torch.tensor([[True] * 4 + [False] * 2, [False] * 6])
MASKS = {
    "everything": EVERYTHING,
    "causal": attention_mask(LENGTH, causal=True),
    "prefix": attention_mask(LENGTH, causal=True, prefix=3),
    "padded": attention_mask(LENGTH, keys=PADDED),
    "causal and padded": attention_mask(LENGTH, causal=True, keys=PADDED),
    "blocks": attention_mask(LENGTH, blocks=torch.tensor([[True, False], [False, False]])),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("rotary", [False, True])
def test_weights_path_equals_fused_path(name: str, num_kv_heads: int, rotary: bool) -> None:
    module, x, mask = attention(num_kv_heads=num_kv_heads), sequence().requires_grad_(), MASKS[name]
    rotation = Rotary(WIDTH // HEADS)(LENGTH) if rotary else None
    fused, none = module(x, mask=mask, rotation=rotation)
    explicit, weights = module(x, mask=mask, rotation=rotation, need_weights=True)
    assert none is None
    torch.testing.assert_close(explicit, fused, atol=1e-6, rtol=1e-5)
    sums = weights.sum(-1)
    empty = torch.zeros(1, dtype=torch.bool) if mask.empty is None else mask.empty[..., 0]
    torch.testing.assert_close(sums, (~empty).float().expand_as(sums))
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (fused, explicit)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients(need_weights: bool, dtype: torch.dtype) -> None:
    module, x = attention(bias=False).to(dtype), sequence().to(dtype).requires_grad_()
    out, _ = module(x, mask=attention_mask(LENGTH, keys=PADDED), need_weights=need_weights)
    out.float().square().sum().backward()
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    assert out[0].abs().sum() > 0
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert torch.equal(x.grad[1], torch.zeros_like(x.grad[1]))


def test_equals_torch_multihead_attention() -> None:
    ours, x, context = attention(context_width=24), sequence(), sequence(9, 24)
    reference = nn.MultiheadAttention(WIDTH, HEADS, kdim=24, vdim=24, batch_first=True).eval()
    key, value = ours.key_value.weight.chunk(2)
    with torch.no_grad():
        for parameter, tensor in zip(
            (reference.q_proj_weight, reference.k_proj_weight, reference.v_proj_weight),
            (ours.query.weight, key, value),
            strict=True,
        ):
            parameter.copy_(tensor)  # pyright: ignore[reportOptionalMemberAccess]
        reference.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
        reference.out_proj.load_state_dict(ours.output.state_dict())
    keys = torch.arange(9) < torch.tensor([[9], [5]])
    expected, weights = reference(x, context, context, key_padding_mask=~keys, average_attn_weights=False)
    out, ours_weights = ours(x, context, mask=attention_mask(LENGTH, 9, keys=keys), need_weights=True)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours_weights, weights, atol=1e-6, rtol=1e-5)


def test_grouped_queries_are_heads_that_share_keys_and_values() -> None:
    grouped, full, x = attention(num_kv_heads=2), attention(), sequence()
    full.load_state_dict(
        {name: tensor for name, tensor in grouped.state_dict().items() if "key_value" not in name}, strict=False
    )
    with torch.no_grad():
        for name in ("weight", "bias"):
            shared = getattr(grouped.key_value, name).view(2, 2, WIDTH // HEADS, -1)
            getattr(full.key_value, name).copy_(shared.repeat_interleave(2, 1).reshape(getattr(full.key_value, name).shape))
    torch.testing.assert_close(grouped(x)[0], full(x)[0], atol=1e-6, rtol=1e-5)


def test_attention_weights_carry_gradients() -> None:
    out, weights = attention()(sequence(), need_weights=True)
    (gradient,) = torch.autograd.grad(out.square().sum(), weights)
    assert gradient.abs().sum() > 0


def test_dropout_acts_in_training_only() -> None:
    module, x = attention(dropout=0.5), sequence()
    assert torch.equal(module(x)[0], module(x)[0])
    module.train()
    assert not torch.equal(module(x)[0], module(x)[0])


def test_a_full_cache_refuses_more() -> None:
    module = attention()
    cache = module.cache(2, 7)
    module(sequence(), cache=cache)
    with pytest.raises(AssertionError, match="holds 7 positions, 12"):
        module(sequence(), cache=cache)


def test_mask_flag_and_mask_tensor_agree() -> None:
    tensor = Mask(allowed=Mask(causal=True).tensor(LENGTH, LENGTH, torch.device("cpu")))
    module, x = attention(), sequence()
    torch.testing.assert_close(module(x, mask=Mask(causal=True))[0], module(x, mask=tensor)[0], atol=1e-6, rtol=1e-5)


def test_bf16_training_on_a_cpu_gives_the_gradients_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways through the fused kernel: its own bf16, and the fp32 detour of CPUs without matrix units."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(16, 4, num_kv_heads=2)
    x = torch.randn(3, 7, 16)
    causal = attention_mask(7, causal=True)

    def gradient(autocast: bool) -> torch.Tensor:
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result, _ = attention(x, mask=causal)
        assert result.dtype == (torch.bfloat16 if autocast else torch.float32)
        result.float().square().sum().backward()
        assert attention.query.weight.grad is not None
        return attention.query.weight.grad.clone()

    exact = gradient(autocast=False)
    for units in (False, True):
        monkeypatch.setattr("mm.nn.attention.MATRIX_UNITS", units)
        torch.testing.assert_close(gradient(autocast=True), exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_a_single_query_with_large_logits_stays_finite_in_fp16() -> None:
    """The unscaled product of these would not fit the type."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, rows, 64) * scale for rows, scale in ((1, 60), (30, 60), (30, 1)))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert (query @ key.transpose(-1, -2)).abs().max() > torch.finfo(torch.float16).max
    found = _attend_once(query.half(), key.half(), value.half(), None)
    assert found.isfinite().all()
    torch.testing.assert_close(found.float(), exact, rtol=0, atol=0.01)


@pytest.mark.parametrize(("queries", "keys"), [(256, 256), (768, 700), (16, 16)])
@torch.no_grad()
def test_attention_by_products_is_the_fused_kernel(queries: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads in one piece, one after the other, and too few scores; within the rounding of bf16."""
    monkeypatch.setattr(attentions, "MATRIX_UNITS", False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 32, generator=generator) for length in (queries, keys, keys))
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(attend_by_products(query, key, value), expected), "fp32 is left to the fused kernel"
    found = attend_by_products(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.cosine_similarity(found.float().flatten(), expected.flatten(), dim=0) > 0.9995
    assert found.shape == expected.shape
