"""Fusion by cross-attention equals torch's own decoder layers, ignores padding, and shows what it attends to."""

import functools

import pytest
import torch
from torch import Tensor, nn

from mm.fusion.cross_attention import CoAttention, CrossAttention
from mm.nn.attention import MultiHeadAttention
from mm.nn.buckets import MIN_ROWS
from mm.nn.initialise import initialise
from mm.nn.transformer import Block, FeedForward, NormPlace, Transformer
from mm.types import Encoded

WIDTH, HEADS, CONTEXT = 16, 4, 16
norm = functools.partial(nn.LayerNorm, WIDTH)


def fusion(norm_place: NormPlace) -> CrossAttention:
    def make_block(_: int) -> Block:
        return Block(
            attention=MultiHeadAttention(WIDTH, HEADS),
            feed_forward=FeedForward(WIDTH, 32, nn.GELU()),
            norm=norm,
            norm_place=norm_place,
            cross_attention=MultiHeadAttention(WIDTH, HEADS, context_width=CONTEXT),
        )

    torch.manual_seed(0)
    made = CrossAttention(Transformer(make_block, 2, final_norm=norm() if norm_place == "pre" else None))
    initialise(made)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def encoded(seed: int, length: int, width: int, lengths: list[int]) -> Encoded:
    tokens = torch.randn(len(lengths), length, width, generator=torch.Generator().manual_seed(seed))
    return Encoded(tokens, torch.arange(length) < torch.tensor(lengths)[:, None], tokens[:, 0])


def torchs(block: nn.Module, *, norm_first: bool) -> nn.TransformerDecoderLayer:
    """torch's layer with the weights of a block."""
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
    ).eval()
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (layer.norm1, block.attention_residual.norm),
        (layer.norm2, block.cross_attention_residual.norm),
        (layer.norm3, block.feed_forward_residual.norm),
        (layer.linear1, block.feed_forward.input),
        (layer.linear2, block.feed_forward.output),
        (layer.self_attn.out_proj, block.attention.output),
        (layer.multihead_attn.out_proj, block.cross_attention.output),
    ]
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for theirs, ours in ((layer.self_attn, block.attention), (layer.multihead_attn, block.cross_attention)):
            theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key_value.weight]))
            theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    return layer


@pytest.mark.parametrize("norm_place", ["post", "pre"])
def test_equals_torchs_decoder_layers_without_causal_mask(norm_place: NormPlace) -> None:
    module, text, image = fusion(norm_place), encoded(1, 6, WIDTH, [6, 4, 2]), encoded(2, 5, CONTEXT, [5, 5, 3])
    expected: Tensor = text.tokens
    for block in module.transformer.blocks:
        layer = torchs(block, norm_first=norm_place == "pre")
        expected = layer(expected, image.tokens, tgt_key_padding_mask=~text.mask, memory_key_padding_mask=~image.mask)
    expected = module.transformer.final_norm(expected)
    found = module(text, image)
    torch.testing.assert_close(found.tokens[text.mask], expected[text.mask], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pooled, expected[:, 0], rtol=1e-4, atol=1e-5)


def test_attention_weights_are_given_on_request_and_differentiable() -> None:
    module, text, image = fusion("post"), encoded(1, 6, WIDTH, [6, 4]), encoded(2, 5, CONTEXT, [5, 3])
    maps: list[dict[str, Tensor]] = []
    fused = module(text, image, maps=maps)
    torch.testing.assert_close(fused.tokens, module(text, image).tokens, rtol=1e-4, atol=1e-5)
    assert [weights["cross_attention"].shape for weights in maps] == [(2, HEADS, 6, 5)] * 2
    torch.testing.assert_close(maps[0]["cross_attention"].sum(-1), torch.ones(2, HEADS, 6))
    assert not maps[1]["cross_attention"][1, :, :, 3:].any()
    gradient = torch.autograd.grad(fused.pooled.sum(), maps[0]["cross_attention"])[0]
    assert gradient.any()


def test_a_word_sees_none_after_it_where_asked() -> None:
    module, text, image = fusion("pre"), encoded(1, 6, WIDTH, [6]), encoded(2, 5, CONTEXT, [5])
    changed = text.tokens.clone()
    changed[:, 4:] *= -1
    before, after = (
        module(Encoded(tokens, text.mask, tokens[:, 0]), image, causal=True).tokens for tokens in (text.tokens, changed)
    )
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("rows", [MIN_ROWS, MIN_ROWS + 3])
@pytest.mark.parametrize("causal", [False, True])
def test_many_rows_are_the_same_as_few(rows: int, causal: bool) -> None:
    """Groups of like length change neither the fused words nor their gradients."""
    lengths = [1 + (5 * row) % 7 for row in range(rows)]
    text, image = encoded(1, 8, WIDTH, lengths), encoded(2, 5, CONTEXT, [5] * rows)
    network, gradients, results = fusion("pre"), [], []
    for parts in ([slice(0, rows)], [slice(first, first + 4) for first in range(0, rows, 4)]):
        network.zero_grad()
        found = [network(text[part], image[part], causal=causal) for part in parts]
        results.append(torch.cat([one.tokens.where(one.mask[..., None], 0) for one in found]))
        results[-1].square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    torch.testing.assert_close(results[0], results[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def two_streams() -> CoAttention:
    picture = fusion("pre").transformer
    del picture.blocks[-1]
    return CoAttention(fusion("pre").transformer, picture)


def test_each_stream_reads_the_other_as_the_layer_before_left_it() -> None:
    text, image = encoded(1, 5, WIDTH, [5, 2]), encoded(2, 4, CONTEXT, [4, 3])
    network, fused = two_streams(), []
    words, picture = network.transformer.blocks, network.picture.blocks
    for row in range(2):
        w, p = (
            text.tokens[row : row + 1, : int(text.mask[row].sum())],
            image.tokens[row : row + 1, : int(image.mask[row].sum())],
        )
        second = words[1](words[0](w, p), picture[0](p, w))
        fused.append(network.transformer.final_norm(second))
    maps: list[dict[str, Tensor]] = []
    found = network(text, image, maps=maps)
    for row in range(2):
        torch.testing.assert_close(found.tokens[row : row + 1][:, : fused[row].shape[1]], fused[row], atol=1e-5, rtol=1e-5)
    assert [weights["cross_attention"].shape for weights in maps] == [(2, HEADS, 5, 4)] * 2


def test_two_streams_have_an_order_and_sizes() -> None:
    text, image = encoded(1, 5, WIDTH, [5, 2]), encoded(2, 4, CONTEXT, [4, 3])
    with pytest.raises(ValueError, match="cannot be causal"):
        two_streams()(text, image, causal=True)
    with pytest.raises(ValueError, match="need one layer over the picture fewer"):
        CoAttention(fusion("pre").transformer, fusion("pre").transformer)
