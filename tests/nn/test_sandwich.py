"""CogView's sandwich of norms, and that its other measures against overflow in half precision are torch's own."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm.nn.attention import MultiHeadAttention
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.transformer import Block, FeedForward, NormPlace, Residual, Transformer

WIDTH, HEADS = 16, 4
FP16_MAX = 65504.0
norm = functools.partial(nn.LayerNorm, WIDTH)


def drawn_norm() -> nn.Module:
    """A norm whose gain and bias tell it from others."""
    module = norm()
    nn.init.normal_(module.weight, 1.0)
    nn.init.normal_(module.bias)
    return module


def transformer(norm_place: NormPlace, num_layers: int = 4) -> Transformer:
    torch.manual_seed(0)

    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS),
            cross_attention=MultiHeadAttention(WIDTH, HEADS),
            feed_forward=FeedForward(WIDTH, 32, nn.GELU()),
            norm=norm,
            norm_place=norm_place,
        )

    made = Transformer(make_block, num_layers, final_norm=norm())
    initialise(made)
    return made


def sequence(seed: int = 1) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def test_each_place_is_its_formula() -> None:
    torch.manual_seed(0)
    x, branch = sequence(), nn.Linear(WIDTH, WIDTH)
    pre, post, sandwich = (Residual(drawn_norm, place, 0.0) for place in ("pre", "post", "sandwich"))
    torch.testing.assert_close(pre(x, branch), x + branch(pre.norm(x)))
    torch.testing.assert_close(post(x, branch), post.norm(x + branch(x)))
    torch.testing.assert_close(sandwich(x, branch), x + sandwich.branch_norm(branch(sandwich.norm(x))))
    assert not torch.equal(sandwich.norm.weight, sandwich.branch_norm.weight)


def test_a_sandwich_has_one_more_norm_a_branch_and_all_learn() -> None:
    model = transformer("sandwich").train()
    names = {name for name, _ in model.named_parameters()}
    added = names - {name for name, _ in transformer("pre").named_parameters()}
    assert len(added) == 4 * 3 * 2
    assert all("branch_norm" in name for name in added)
    (model(sequence(), sequence(2)) * sequence(3)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6] == []


def test_a_sandwich_bounds_what_a_branch_adds_however_large_it_grows() -> None:
    sizes = {}
    for place in ("pre", "sandwich"):
        model = transformer(place).eval()
        with torch.no_grad():
            for block in model.blocks:
                block.feed_forward.output.weight.mul_(1e4)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            model.final_norm = nn.Identity()
            sizes[place] = float(model(sequence(), sequence(2)).abs().max())
    assert sizes["sandwich"] < 3 * 4 * WIDTH**0.5 + 5 < sizes["pre"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masking", ["none", "flag", "tensor"])
def test_logits_beyond_the_range_of_fp16_are_no_problem_for_the_fused_softmax(dtype: torch.dtype, masking: str) -> None:
    torch.manual_seed(0)
    query = torch.full((1, 2, 6, 64), 100.0, dtype=dtype)
    key = query.clone()
    query[..., -1], key[..., -1] = 1.0, torch.arange(6.0)  # all logits lie near 78750 and differ by eighths
    value = torch.randn(1, 2, 6, 64).to(dtype)
    query.requires_grad_()
    mask = torch.ones(6, 6, dtype=torch.bool).tril() if masking == "tensor" else None
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=masking == "flag")
    logits = query.detach().double() @ key.double().mT / 8
    assert logits.min() > FP16_MAX
    if masking != "none":
        logits = logits.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -torch.inf)
    expected = logits.softmax(-1) @ value.double()
    torch.testing.assert_close(attended.double(), expected, atol=0.02, rtol=0.02)
    attended.sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()


def test_attention_stays_finite_in_fp16_with_weights_far_out() -> None:
    torch.manual_seed(0)
    attention, x = MultiHeadAttention(WIDTH, HEADS), sequence()
    initialise(nn.Sequential(attention))
    with torch.no_grad():
        attention.query.weight.mul_(300)
        attention.key_value.weight[:WIDTH].mul_(300)
    mask = attention_mask(5, causal=True)
    largest = (attention.query(x) @ attention.key_value(x)[..., :WIDTH].mT).abs().max()
    assert largest > FP16_MAX
    result, _ = attention.half()(x.half(), mask=mask)
    assert result.isfinite().all()


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_norms_need_no_smaller_input(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 64) * 15_000).clamp(-FP16_MAX, FP16_MAX).half()
    module = make(64)
    expected = module(x.float())
    plain, scaled = module.half()(x), module.half()(x / (x.abs().amax() / 8))
    assert (plain - expected).abs().max() <= (scaled - expected).abs().max()
    torch.testing.assert_close(plain.float(), expected, atol=2e-3, rtol=2e-3)
