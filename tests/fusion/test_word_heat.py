"""Grounding: heat is its definition, head by head and by finite differences; it finds what a network learned to look for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm.config import validate
from mm.errors import UserError
from mm.fusion.grounding import centre, focus, ground_words, word_heat
from mm.nn import attention
from mm.systems.albef import Albef, AlbefConfig, build
from mm.types import Batch, Encoded, TextBatch

HEADS, LAYERS = 2, 3
VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8}
VIT = VIT | {"options": {"embed_dim": 32, "depth": 1, "num_heads": 2}}
RESNET = {"backbone": "resnet18", "image_size": 64, "options": {"channels": [8, 8, 8, 8]}, "pool": "pyramid"}
ALONE = {"momentum": 0, "queue_size": 0, "distillation": 0}
SIZES = {"vocab_size": 40, "context_length": 8, "width": 32, "heads": HEADS, "text_layers": 1, "embed_dim": 16}
SMALL = {**SIZES, **ALONE, "image": VIT, "fusion_layers": LAYERS}
OPTIONS: dict[str, dict[str, object]] = {
    "patches behind a class token": {},
    "feature map": {"image": RESNET | {"pool": None}, "feature_map": True, "norm_place": "pre"},
    "pyramid": {"image": RESNET | {"tokens": "pyramid"}, "feature_map": True, "norm_place": "pre", "dropout": 0.1},
    "four heads": {"heads": 4},
}
GRIDS = {"patches behind a class token": (4, 4), "feature map": (2, 2), "pyramid": (6, 6), "four heads": (4, 4)}
LENGTHS = [8, 5, 3]


def small(**options: object) -> Albef:
    torch.manual_seed(0)
    model = build(validate(AlbefConfig, SMALL | options, "test")).eval()
    with torch.no_grad():
        for parameter in model.network.fusion.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def inputs(model: Albef, lengths: list[int] = LENGTHS) -> tuple[Encoded, Encoded]:
    generator = torch.Generator().manual_seed(1)
    side = model.config.picture_side
    image = torch.randint(0, 256, (len(lengths), 3, side, side), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(TextBatch(ids, torch.tensor(lengths)))


def rows(encoded: Encoded, row: slice, length: int | None = None) -> Encoded:
    return replace(encoded[row], tokens=encoded.tokens[row, :length], mask=encoded.mask[row, :length], extras=encoded.extras)


@contextmanager
def changed_weights(change: Callable[[Tensor], Tensor], call: int) -> Iterator[None]:
    """The attention weights of one call, counted from 0, are changed before they are used."""
    original, calls = attention._attention_weights, iter(range(100))

    def weights(*arguments: object) -> Tensor:
        found = original(*arguments)  # pyright: ignore[reportArgumentType]
        return change(found) if next(calls) == call else found

    with patch.object(attention, "_attention_weights", weights):
        yield


@pytest.mark.parametrize("name", OPTIONS)
def test_heat_is_attention_times_how_the_logit_answers_to_it(name: str) -> None:
    """Finite differences in double precision, weight by weight: another way to the same gradient."""
    model = small(**OPTIONS[name]).double()
    image, text = inputs(model, [4])
    heads = int(model.config.heads)
    for layer in model.grounding_layers:
        maps: list[dict[str, Tensor]] = []
        with torch.no_grad():
            model.fuse(image, text, maps=maps)
        weights = maps[layer]["cross_attention"]
        expected = torch.zeros(4, weights.shape[-1], dtype=torch.float64)
        places = torch.randperm(weights[0, 0].numel(), generator=torch.Generator().manual_seed(2))[:12].tolist()
        for place in places:
            word, token = divmod(place, weights.shape[-1])
            for head in range(heads):
                step = torch.zeros_like(weights)
                step[0, head, word, token] = 1e-5
                logits = []
                for sign in (1, -1):
                    # in every layer the words attend to each other first, then to the picture
                    with torch.no_grad(), changed_weights(lambda found, s=sign * step: found + s, 2 * layer + 1):
                        fused = model.fuse(image, text, maps=[])
                        logits.append(model.matching_head(fused.pooled)[0, 0])
                slope = (logits[0] - logits[1]) / 2e-5
                expected[word, token] += weights[0, head, word, token] * slope.clamp(min=0) / heads
        assert expected.max() > 1e-4
        found = model.ground(image, text, layers=[layer])
        assert found.shape == (1, 4, *GRIDS[name])
        prefix = weights.shape[-1] - found[0, 0].numel()
        for place in places:
            word, token = divmod(place, weights.shape[-1])
            if token >= prefix:
                value = found[0, word].flatten()[token - prefix]
                assert float(value) == pytest.approx(float(expected[word, token]), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_heat_is_the_mean_over_heads_and_layers(name: str) -> None:
    model = small(**OPTIONS[name])
    image, text = inputs(model)
    maps: list[dict[str, Tensor]] = []
    logits = model.matching_head(model.fuse(image, text, maps=maps).pooled)[:, 0]
    prefix = image.extras["prefix"]
    expected = torch.zeros(len(LENGTHS), max(LENGTHS), image.tokens.shape[1] - prefix)
    for layer in (0, 1):
        weights = maps[layer]["cross_attention"]
        for row, logit in enumerate(logits):
            slope = torch.autograd.grad(logit, weights, retain_graph=True)[0][row]
            for head in range(int(model.config.heads)):
                product = weights[row, head].detach() * torch.relu(slope[head])
                expected[row] += product[:, prefix:] / int(model.config.heads) / 2
    found = model.ground(image, text, layers=[0, 1])
    torch.testing.assert_close(found.flatten(2), expected)
    assert found[0].any()
    torch.testing.assert_close(
        found, (model.ground(image, text, layers=[0]) + model.ground(image, text, layers=[1])) / 2, rtol=1e-4, atol=1e-8
    )
    assert torch.equal(model.ground(image, text), model.ground(image, text, layers=[1])), "the middle of those there are"


@pytest.mark.parametrize("name", OPTIONS)
def test_a_pair_has_the_same_heat_alone_as_in_a_padded_batch(name: str) -> None:
    model = small(**OPTIONS[name])
    image, text = inputs(model)
    together = model.ground(image, text)
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        alone = model.ground(rows(image, one), rows(text, one, length))
        torch.testing.assert_close(together[one, :length], alone, rtol=1e-4, atol=1e-7)
        assert not together[row, length:].any()


def test_weights_get_no_gradients_and_modes_stay() -> None:
    model = small(dropout=0.1)
    image, text = inputs(model)
    expected = model.ground(image, text)
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        found = model.ground(image, text)
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)
    assert not found.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not text.tokens.requires_grad
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert torch.equal(model.requires_grad_(False).ground(image, text), expected), "frozen weights change nothing"
    part = model.train().matching_head
    model.ground(image, text)
    assert part.training
    assert model.training


def test_any_grid_is_taken_as_it_is_and_the_tokens_before_it_are_left_out() -> None:
    """The heat of a logit that is linear in the attention is known."""
    weights = torch.rand(2, 5, 3, 2 + 4 * 3)
    slopes = torch.randn(2, 5, 3, 2 + 4 * 3)
    image = Encoded(
        torch.zeros(2, 14, 1), torch.ones(2, 14, dtype=torch.bool), torch.zeros(2, 1), {"prefix": 2, "grid": (4, 3)}
    )
    text = Encoded(torch.zeros(2, 3, 1), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, 1))

    def judge(_: Encoded, words: Encoded, /, *, maps: list[dict[str, Tensor]]) -> Tensor:
        attended = weights + words.tokens.sum()
        maps.append({"cross_attention": attended})
        return (attended * slopes).sum((1, 2, 3))

    found = word_heat(judge, image, text, [0])
    expected = (weights * slopes.clamp(min=0)).mean(1)[..., 2:].reshape(2, 3, 4, 3)
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="tokens in a grid"):
        word_heat(judge, replace(image, extras={"prefix": 0}), text, [0])


COLOURS = torch.tensor([[220, 30, 30], [30, 180, 60], [40, 60, 220], [240, 220, 40], [60, 200, 220], [200, 60, 220]])


def scenes(size: int, generator: torch.Generator) -> tuple[Tensor, TextBatch, Tensor, Tensor]:
    """Two coloured squares among three grey ones, named by their colours; their groups, and their places, two of 16."""
    colours = torch.rand(size, 6, generator=generator).argsort(1)[:, :2]
    places = torch.rand(size, 16, generator=generator).argsort(1)[:, :5]
    cells, row = torch.full((size, 16, 3), 255), torch.arange(size)[:, None]
    cells[row, places[:, :2]], cells[row, places[:, 2:]] = COLOURS[colours], torch.tensor([100, 100, 100])
    image = cells.to(torch.uint8).mT.reshape(size, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    ids = torch.cat([torch.full((size, 1), 1), colours + 3, torch.full((size, 1), 2)], 1)
    groups = colours.min(1).values * 6 + colours.max(1).values
    return image, TextBatch(ids, torch.full((size,), 4)), groups, places[:, :2]


@pytest.mark.slow
def test_a_network_that_learned_to_match_looks_at_what_is_named() -> None:
    """Its tokens are patches that know nothing of each other, so what a word looks for is in one place."""
    patches = VIT | {"pool": "avg", "options": {"embed_dim": 32, "depth": 0, "num_heads": 2}}
    torch.manual_seed(0)
    options = {"image": patches, "fusion_layers": 2, "masked_weight": 0, "norm_place": "pre", "vocab_size": 10}
    model = build(validate(AlbefConfig, SMALL | options, "test"))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameter_groups(), lr=2e-3)

    def share_of_the_named() -> float:
        image, text, _, places = scenes(200, torch.Generator().manual_seed(9))
        model.eval()
        heat = model.ground(model.encode_image(image), model.encode_text(text))[:, 1:3].mean(1).flatten(1)
        return float((heat.gather(1, places).sum(1) / heat.sum(1)).mean())

    before = share_of_the_named()
    model.train()
    for step in range(250):
        image, text, groups, _ = scenes(32, generator)
        optimizer.zero_grad()
        model(Batch(tuple(map(str, range(32))), image, text, groups), step).total.backward()
        optimizer.step()
        model.after_step(step)
    assert before < 0.4, "an eighth of the picture, though it stands out"
    assert share_of_the_named() > 0.5  # 0.59 to 0.8, by the order in which a machine adds up


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 1000))
def test_the_heat_of_a_word_is_the_mean_of_its_pieces(counts: list[int], seed: int) -> None:
    pieces = torch.rand(sum(counts) + 2, 3, 2, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(counts).cumsum(0).tolist()
    words = [(f"w{i}", range(1 + end - count, 1 + end)) for i, (count, end) in enumerate(zip(counts, ends, strict=True))]
    found = ground_words("text", words, pieces, 0.5)
    for (name, places), word, heat in zip(words, found.words, found.heat, strict=True):
        assert word == name
        torch.testing.assert_close(heat, sum(pieces[place] for place in places) / len(places))
    torch.testing.assert_close(found.whole, found.heat.mean(0))
    assert sum(found.shares) == pytest.approx(1, abs=1e-5)
    one = found.only(["W0"])
    assert one.words == ("w0",)
    assert torch.equal(one.heat[0], found.heat[0])
    assert torch.equal(one.whole, found.whole)
    with pytest.raises(UserError, match="'other' is no word of the text; its words are w0"):
        found.only(["w0", "other"])


def test_centre_and_focus() -> None:
    heat = torch.zeros(4, 2)
    assert centre(heat) is None
    assert focus(heat) is None
    assert ground_words("a", [("a", [0])], heat[None], 0.5).shares == (0,)
    heat[3, 0] = 2.0
    assert centre(heat) == pytest.approx((0.25, 0.875))
    assert focus(heat) == pytest.approx(1)
    for shape in ((4, 2), (7, 7), (1, 3)):
        assert centre(torch.ones(shape)) == pytest.approx((0.5, 0.5))
        assert focus(torch.ones(shape)) == pytest.approx(0.25), "also where a quarter is no whole number of places"


@pytest.mark.parametrize("layers", [[2], [0, 5], [-1]])
def test_layers_that_say_nothing_of_words_are_refused(layers: list[int]) -> None:
    model = small()
    with pytest.raises(UserError, match="layers 0 to 1 of this model"):
        model.ground(*inputs(model), layers=layers)


def test_the_attention_of_words_in_the_last_layer_changes_no_logit() -> None:
    """Why that layer is refused."""
    model = small()
    image, text = inputs(model)
    judge = lambda *pair, maps: model.matching_head(model.fuse(*pair, maps=maps).pooled)[:, 0]  # noqa: E731
    heat = word_heat(judge, image, text, [LAYERS - 1])
    assert not heat[:, 1:].any()
    assert heat[:, 0].any()
