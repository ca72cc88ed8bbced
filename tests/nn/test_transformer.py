"""The one transformer: equal to torch's own layers, cached decoding equal to the full pass, all parameters reached."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import LearnedPositions, Rotary, TokenEmbedding
from mm.nn.initialise import initialise
from mm.nn.masks import attention_mask
from mm.nn.transformer import Block, FeedForward, GatedFeedForward, Residual, Transformer

WIDTH, HEADS, LENGTH = 16, 4, 7
norm = functools.partial(nn.LayerNorm, WIDTH)


def clip_like(**options: bool) -> Transformer:
    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS), feed_forward=FeedForward(WIDTH, 32, nn.GELU()), norm=norm, dropout=0.0
        )

    return _drawn(Transformer(make_block, 3, final_norm=norm(), **options))


def llama_like() -> Transformer:
    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS, num_kv_heads=2, bias=False),
            feed_forward=GatedFeedForward(WIDTH, 32),
            norm=functools.partial(nn.RMSNorm, WIDTH, eps=1e-6),
        )

    return _drawn(Transformer(make_block, 3, final_norm=nn.RMSNorm(WIDTH, eps=1e-6), rotary=Rotary(WIDTH // HEADS)))


def albef_like() -> Transformer:
    def make_block(layer: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS),
            feed_forward=FeedForward(WIDTH, 32, nn.GELU()),
            norm=norm,
            norm_place="post",
            cross_attention=MultiHeadAttention(WIDTH, HEADS, context_width=12) if layer >= 1 else None,
        )

    return _drawn(Transformer(make_block, 3))


def _drawn(transformer: Transformer) -> Transformer:
    torch.manual_seed(0)
    initialise(transformer)
    return transformer


KINDS = {"clip": clip_like, "llama": llama_like, "albef": albef_like}


def sequence(batch_size: int = 2, length: int = LENGTH, width: int = WIDTH) -> Tensor:
    return torch.randn(batch_size, length, width, generator=torch.Generator().manual_seed(1))


def objective(x: Tensor) -> Tensor:
    """Depends on every component; a plain sum or a sum of squares is constant behind a norm."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[1] * LENGTH, [3, 1, 2, 1], [LENGTH]])
def test_cached_decoding_equals_the_full_pass(kind: str, steps: list[int]) -> None:
    transformer, x, context = KINDS[kind]().eval(), sequence(), sequence(length=5, width=12)
    full = transformer(x, context, mask=attention_mask(LENGTH, causal=True))
    caches, parts, done = transformer.caches(2, capacity=LENGTH + 2), [], 0
    for step in steps:
        mask = attention_mask(step, done + step, causal=True)
        parts.append(transformer(x[:, done : done + step], context, mask=mask, caches=caches))
        done += step
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-6, rtol=1e-5)


def test_cached_decoding_behind_a_padded_prompt_equals_the_full_pass() -> None:
    transformer, x, prompt = llama_like().eval(), sequence(), 4
    keys = torch.ones(2, LENGTH, dtype=torch.bool)
    keys[1, :2] = False  # padded on the left, as prompts of different lengths are
    full = transformer(x, mask=attention_mask(LENGTH, causal=True, keys=keys))
    caches = transformer.caches(2, LENGTH)
    parts = [transformer(x[:, :prompt], mask=attention_mask(prompt, causal=True, keys=keys[:, :prompt]), caches=caches)]
    for end in range(prompt + 1, LENGTH + 1):
        mask = attention_mask(1, end, causal=True, keys=keys[:, :end])
        parts.append(transformer(x[:, end - 1 : end], mask=mask, caches=caches))
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    transformer = KINDS[kind]().train()
    objective(transformer(sequence(), sequence(length=5, width=12))).backward()
    assert [name for name, p in transformer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6] == []


def test_gradient_checkpointing_changes_nothing() -> None:
    results = []
    for checkpointing in (False, True):
        transformer = clip_like(gradient_checkpointing=checkpointing).train()
        objective(transformer(sequence(), mask=attention_mask(LENGTH, causal=True))).backward()
        results.append([p.grad for p in transformer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_attention_maps_of_every_layer_are_part_of_the_graph() -> None:
    transformer, maps = albef_like().eval(), []
    x, context = sequence(), sequence(length=5, width=12)
    out = transformer(x, context, maps=maps)
    torch.testing.assert_close(out, transformer(x, context), atol=1e-6, rtol=1e-5)
    assert [sorted(layer) for layer in maps] == [["attention"]] + [["attention", "cross_attention"]] * 2
    assert maps[2]["cross_attention"].shape == (2, HEADS, LENGTH, 5)
    (gradient,) = torch.autograd.grad(objective(out), maps[1]["cross_attention"])
    assert gradient.abs().max() > 1e-6


def _copy_attention(ours: MultiHeadAttention, reference: nn.MultiheadAttention) -> None:
    weights, biases = torch.cat([ours.query.weight, ours.key_value.weight]), torch.cat([ours.query.bias, ours.key_value.bias])
    reference.load_state_dict(
        {
            "in_proj_weight": weights,
            "in_proj_bias": biases,
            "out_proj.weight": ours.output.weight,
            "out_proj.bias": ours.output.bias,
        }
    )


@pytest.mark.parametrize("place", ["pre", "post"])
def test_a_block_equals_torch_decoder_layer(place: str) -> None:
    torch.manual_seed(0)
    block = Block(
        attention=MultiHeadAttention(WIDTH, HEADS),
        cross_attention=MultiHeadAttention(WIDTH, HEADS),
        feed_forward=FeedForward(WIDTH, 32, nn.GELU()),
        norm=norm,
        norm_place=place,  # pyright: ignore[reportArgumentType]
    ).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 32, activation="gelu", batch_first=True, norm_first=place == "pre").eval()
    with torch.no_grad():
        _copy_attention(block.attention, layer.self_attn)
        assert block.cross_attention is not None
        _copy_attention(block.cross_attention, layer.multihead_attn)
    feed_forward = block.feed_forward
    assert isinstance(feed_forward, FeedForward)
    layer.linear1.load_state_dict(feed_forward.input.state_dict())
    layer.linear2.load_state_dict(feed_forward.output.state_dict())
    residuals = (block.attention_residual, block.cross_attention_residual, block.feed_forward_residual)
    for residual, theirs in zip(residuals, (layer.norm1, layer.norm2, layer.norm3), strict=True):
        assert isinstance(residual, Residual)
        theirs.load_state_dict(residual.norm.state_dict())
    x, context = sequence(), sequence(length=5)
    causal = nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = layer(x, context, tgt_mask=causal, tgt_is_causal=True)
    torch.testing.assert_close(block(x, context, mask=attention_mask(LENGTH, causal=True)), expected, atol=1e-5, rtol=1e-5)


def test_initial_weights_follow_the_table() -> None:
    width, layers = 256, 5

    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(width, 4, context_width=None),
            feed_forward=GatedFeedForward(width, 2 * width),
            norm=functools.partial(nn.LayerNorm, width),
        )

    torch.manual_seed(0)
    model = nn.ModuleList(
        [TokenEmbedding(1000, width, positions=LearnedPositions(300, width)), Transformer(make_block, layers)]
    )
    initialise(model)
    expected = {
        "0.tokens.weight": 0.02,
        "0.positions.weight": 0.01,
        "1.blocks.2.attention.query.weight": width**-0.5,
        "1.blocks.2.attention.key_value.weight": width**-0.5,
        "1.blocks.2.attention.output.weight": (2 * layers * width) ** -0.5,
        "1.blocks.2.feed_forward.gate.weight": (2 * width) ** -0.5,
        "1.blocks.2.feed_forward.input.weight": (2 * width) ** -0.5,
        "1.blocks.2.feed_forward.output.weight": (2 * layers * width) ** -0.5,
    }
    parameters = dict(model.named_parameters())
    for name, std in expected.items():
        assert math.isclose(parameters[name].std().item(), std, rel_tol=0.02), name
    assert all(not p.any() for name, p in parameters.items() if name.endswith("bias"))


def test_bf16_autocast_stays_close() -> None:
    for make in (clip_like, llama_like):
        transformer, x = make().eval(), sequence()
        mask = attention_mask(LENGTH, keys=torch.arange(LENGTH) < torch.tensor([[LENGTH], [3]]))
        with torch.autocast("cpu", torch.bfloat16):
            out = transformer(x, mask=mask)
        torch.testing.assert_close(out.float(), transformer(x, mask=mask), atol=0.06, rtol=0.06)
