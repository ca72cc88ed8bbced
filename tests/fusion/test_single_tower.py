"""The single tower: order, positions and types in their places; padding and caches change nothing."""

import functools

import pytest
import torch
from torch import Tensor, nn

from mm.fusion.single_tower import SingleTower
from mm.nn.attention import MultiHeadAttention
from mm.nn.embeddings import LearnedPositions
from mm.nn.initialise import initialise
from mm.nn.masks import Raster, attention_mask, dalle_layer_pattern
from mm.nn.transformer import Block, FeedForward, Transformer
from mm.types import Encoded

WIDTH, LAYERS, NUM_TEXT, ROWS, COLUMNS = 16, 4, 4, 3, 3
NUM_IMAGE = ROWS * COLUMNS


def tower(*, causal: bool = False, sparse: bool = False) -> SingleTower:
    torch.manual_seed(0)
    norm = functools.partial(nn.LayerNorm, WIDTH)

    def make_block(_: int) -> Block:
        return Block(attention=MultiHeadAttention(WIDTH, 4), feed_forward=FeedForward(WIDTH, 32, nn.GELU()), norm=norm)

    patterns = [Raster(dalle_layer_pattern(layer, LAYERS), NUM_TEXT, COLUMNS, 3) for layer in range(LAYERS)]
    made = SingleTower(
        Transformer(make_block, LAYERS, final_norm=norm()),
        {"text": LearnedPositions(NUM_TEXT, WIDTH), "image": LearnedPositions(NUM_IMAGE, WIDTH)},
        WIDTH,
        causal=causal,
        patterns=patterns if sparse else (None,),
    )
    initialise(made)
    for value in made.types.values():
        nn.init.normal_(value)
    return made.eval()


def features(length: int, seed: int, batch_size: int = 2) -> Tensor:
    return torch.randn(batch_size, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def padded(x: Tensor, lengths: list[int]) -> Encoded:
    return Encoded(x, torch.arange(x.shape[1]) < torch.tensor(lengths)[:, None], x[:, 0])


def test_join_adds_positions_and_types_and_names_the_slices() -> None:
    model, text, image = tower(), features(3, 1), features(NUM_IMAGE, 2)
    tokens, mask, slices = model.join({"image": image, "text": padded(text, [3, 2])})
    assert slices == {"text": slice(0, 3), "image": slice(3, 3 + NUM_IMAGE)}  # the tower's order, not the call's
    positions = {name: module.weight for name, module in model.positions.items()}
    torch.testing.assert_close(tokens[:, slices["text"]], text + positions["text"][:3] + model.types["text"])
    torch.testing.assert_close(tokens[:, slices["image"]], image + positions["image"] + model.types["image"])
    assert mask is not None
    assert mask.sum(1).tolist() == [3 + NUM_IMAGE, 2 + NUM_IMAGE]
    assert model.join({"text": text, "image": image})[1] is None
    tokens, _, slices = model.join({"image": image[:, 4:6]}, starts={"image": 4})
    assert slices == {"image": slice(0, 2)}
    torch.testing.assert_close(tokens, image[:, 4:6] + positions["image"][4:6] + model.types["image"])


def test_features_that_know_their_positions_get_none() -> None:
    model = SingleTower(
        Transformer(lambda _: Block(attention=MultiHeadAttention(WIDTH, 4), feed_forward=nn.Identity(), norm=nn.Identity), 1),
        {"image": None},
        WIDTH,
    )
    image = features(5, 1)
    torch.testing.assert_close(model.join({"image": image})[0], image)


def test_unknown_modalities_are_refused() -> None:
    with pytest.raises(AssertionError, match="of text, image, got audio"):
        tower().join({"audio": features(3, 1)})


def test_padding_changes_no_real_token() -> None:
    model, text, image = tower(), features(NUM_TEXT, 1), features(NUM_IMAGE, 2)
    short = model({"text": text[:, :2], "image": image})
    long = model({"text": padded(text, [2, 2]), "image": image})
    torch.testing.assert_close(long.tokens[:, long.extras["image"]], short.tokens[:, short.extras["image"]])
    torch.testing.assert_close(long.pooled, short.pooled)
    torch.testing.assert_close(long.pooled, long.tokens[:, 0])
    assert torch.equal(long.mask.sum(1), short.mask.sum(1))


def test_an_encoder_sees_everything_a_decoder_only_what_is_before() -> None:
    text, image = features(NUM_TEXT, 1), features(NUM_IMAGE, 2)
    for causal in (False, True):
        model = tower(causal=causal)
        changed = image.clone()
        changed[:, 5] += 1
        one, other = model({"text": text, "image": image}), model({"text": text, "image": changed})
        same = [torch.equal(a, b) for a, b in zip(one.tokens.unbind(1), other.tokens.unbind(1), strict=True)]
        assert same == ([True] * (NUM_TEXT + 5) + [False] * 4 if causal else [False] * (NUM_TEXT + NUM_IMAGE))


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("steps", [[1] * NUM_IMAGE, [0, 4, 5], [3, 1, 5]])
def test_cached_decoding_equals_the_full_pass(sparse: bool, steps: list[int]) -> None:
    model, text, image = tower(causal=True, sparse=sparse), features(NUM_TEXT, 1), features(NUM_IMAGE, 2)
    full = model({"text": text, "image": image})
    caches = model.transformer.caches(2, NUM_TEXT + NUM_IMAGE)
    parts = [model({"text": text, "image": image[:, : steps[0]]}, caches=caches).tokens]
    done = steps[0]
    for step in steps[1:]:
        parts.append(model({"image": image[:, done : done + step]}, starts={"image": done}, caches=caches).tokens)
        done += step
    torch.testing.assert_close(torch.cat(parts, 1), full.tokens, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(full.pooled, full.tokens[:, -1])


def test_each_layer_has_its_own_sparse_mask() -> None:
    model, text, image = tower(causal=True, sparse=True), features(NUM_TEXT, 1), features(NUM_IMAGE, 2)
    fused = model({"text": text, "image": image}).tokens
    x, _, _ = model.join({"text": text, "image": image})
    for block, raster in zip(model.transformer.blocks, model.patterns, strict=True):
        x = block(x, mask=attention_mask(x.shape[1], causal=True, pattern=raster))
    torch.testing.assert_close(fused, model.transformer.final_norm(x))
    assert not torch.allclose(fused, tower(causal=True)({"text": text, "image": image}).tokens)


def test_what_is_decoded_step_by_step_has_no_padding() -> None:
    model, caches = tower(causal=True), tower(causal=True).transformer.caches(2, 8)
    model({"text": features(2, 1)}, caches=caches)
    with pytest.raises(AssertionError, match="no padding"):
        model({"image": padded(features(2, 2), [2, 1])}, caches=caches)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_reach_every_parameter(causal: bool) -> None:
    model = tower(causal=causal, sparse=causal).train()
    fused = model({"text": padded(features(NUM_TEXT, 1), [4, 3]), "image": features(NUM_IMAGE, 2)})
    (fused.tokens * features(NUM_TEXT + NUM_IMAGE, 3)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6] == []
