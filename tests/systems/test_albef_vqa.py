"""ALBEF answers: likelihoods by brute force, ranking in two stages, what it begins as, every head learns a batch by heart."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.losses.answers import answer_shares, class_loss
from mm.run.training import _adopt
from mm.systems import albef, albef_vqa, vilt
from mm.systems.albef import AlbefConfig
from mm.systems.albef_vqa import AlbefVqa, AlbefVqaConfig, build
from mm.systems.vilt import ViltConfig
from mm.types import Batch, Candidates, Decoding, Encoded, Losses, System, TextBatch, capabilities

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8}
VIT = VIT | {"options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
RESNET = {"backbone": "resnet18", "image_size": 64, "options": {"channels": [8, 8, 8, 8]}, "pool": "pyramid"}
SIZES = {"vocab_size": 40, "context_length": 8, "width": 32, "heads": 2, "text_layers": 1, "fusion_layers": 2, "embed_dim": 8}
SMALL: dict[str, Any] = {"image": VIT, **SIZES}
OPTIONS: dict[str, dict[str, Any]] = {
    "decoder": {},
    "norms before": {"norm_place": "pre", "dropout": 0.1},
    "feature map": {"image": RESNET | {"tokens": "pyramid"}, "feature_map": True, "norm_place": "pre", "text_pooling": "mean"},
    "list": {"head": "list"},
    "classes": {"head": "classes"},
    "blind": {"blind": True},
}
START, END = 1, 2
WORDS = {"yes": [10], "no": [11], "dog": [12], "dog house": [12, 13, 14], "two": [15, 11]}
ANSWERS = tuple(WORDS)


def tokens(rows: Sequence[Sequence[int]], pad: int = 0) -> TextBatch:
    whole = [[START, *row, END] for row in rows]
    longest = max(map(len, whole))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in whole])
    return TextBatch(ids, torch.tensor([len(row) for row in whole]))


def small(**options: Any) -> AlbefVqa:
    torch.manual_seed(0)
    config = validate(AlbefVqaConfig, SMALL | {"answers": ANSWERS} | options, "test")
    return build(config, {"answer_text": tokens(list(WORDS.values()))})


def livelier(model: AlbefVqa) -> AlbefVqa:
    """With weights that a decoder's fresh ones are too small to be told from."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def batch(size: int = 6, side: int = 16) -> Batch:
    """Questions of which two are the same about different pictures: only the picture tells the answer."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    ids = torch.randint(16, 40, (size, 8), generator=generator)
    ids[1::2] = ids[::2]
    right = (
        {"yes": 1.0},
        {"no": 1.0},
        {"dog": 0.9, "dog house": 0.3},
        {"two": 1.0},
        {"dog house": 1.0, "cow": 1.0},
        {"no": 0.6},
    )
    return Batch(
        ids=tuple(map(str, range(size))),
        image=(F.interpolate(coarse, side) * 255).to(torch.uint8),
        text=TextBatch(ids, torch.tensor([8, 8, 6, 6, 4, 4])[:size]),
        answers=right[:size],
    )


def inputs(data: Batch) -> tuple[Tensor, TextBatch]:
    assert data.image is not None
    assert data.text is not None
    return data.image, data.text


@torch.no_grad()
def following(model: AlbefVqa, fused: Encoded, row: int, ids: Sequence[int]) -> Tensor:
    """Log-probabilities of the token behind the first ones of an answer, from these alone."""
    words = model.network.towers.encoders["text"].get_submodule("embedding")(torch.tensor([[START, *ids]]))
    assert model.decoder is not None
    before = Encoded(words, torch.ones(1, len(ids) + 1, dtype=torch.bool), words[:, 0])
    return model.network.words(model.decoder(before, fused[row : row + 1], causal=True).tokens[0, -1]).log_softmax(-1)


def prefix(model: AlbefVqa, fused: Encoded, row: int, ids: Sequence[int]) -> float:
    """The log-likelihood of beginning with these tokens, one after the other."""
    return sum(float(following(model, fused, row, ids[:place])[token]) for place, token in enumerate(ids))


def written(model: AlbefVqa, fused: Encoded, row: int, ids: Sequence[int]) -> float:
    """The log-likelihood of an answer, its end included."""
    return prefix(model, fused, row, [*ids, END])


@pytest.mark.parametrize("norm_place", ["post", "pre"])
def test_likelihoods_count_every_token_once(norm_place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = livelier(small(norm_place=norm_place))
    fused = model.read(*inputs(batch()))
    expected = torch.tensor([[written(model, fused, row, ids) for ids in WORDS.values()] for row in range(6)])
    assert expected.std(0).min() > 1e-3, "the pictures and questions make a difference"
    for rows, pad in itertools.product((2048, 7, 1), (0, 33)):
        monkeypatch.setattr(albef_vqa, "ROWS_AT_ONCE", rows)
        found = model.log_likelihoods(fused, tokens(list(WORDS.values()), pad), 5)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_likelihoods_of_all_that_can_be_written_add_up_to_one() -> None:
    model = livelier(small(vocab_size=4, answers=("a", "b"), context_length=8))
    model.answer_ids.clamp_(max=3)
    image, question = inputs(batch())
    fused = model.read(image, TextBatch(question.ids % 4, question.lengths))
    said = [list(ids) for length in range(3) for ids in itertools.product((0, 1, 3), repeat=length)]
    ended = model.log_likelihoods(fused, tokens(said), len(said)).exp().sum(1)
    longer = [list(ids) for ids in itertools.product((0, 1, 3), repeat=3)]
    going_on = torch.tensor(
        [sum(float(torch.tensor(prefix(model, fused, row, ids)).exp()) for ids in longer) for row in range(6)]
    )
    torch.testing.assert_close(ended + going_on, torch.ones(6), atol=1e-4, rtol=0)


def test_a_long_list_is_ranked_in_two_stages() -> None:
    model = livelier(small())
    fused = model.read(*inputs(batch()))
    rows = [[first, *rest] for first in range(10, 30) for rest in ([], [31], [32, 33])]
    answers = tokens(rows)
    whole = model.log_likelihoods(fused, answers, 1000)
    assert torch.equal(model.log_likelihoods(fused, answers, len(rows)), whole)
    first = torch.tensor([[prefix(model, fused, row, [token]) for token in range(10, 30)] for row in range(6)])
    for shortlist in (1, 4, 30):
        found = model.log_likelihoods(fused, answers, shortlist)
        assert (found.isfinite().sum(1) == shortlist).all()
        for row in range(6):
            likeliest = first[row].repeat_interleave(3).sort(descending=True, stable=True).indices[:shortlist]
            assert set(found[row].isfinite().nonzero()[:, 0].tolist()) == set(likeliest.tolist())
        kept = found.isfinite()
        torch.testing.assert_close(found[kept], whole[kept], atol=1e-4, rtol=1e-4)


def test_answers_are_the_likeliest_of_the_list_or_of_the_candidates() -> None:
    model = livelier(small(shortlist=2))
    image, question = inputs(batch())
    fused = model.read(image, question)
    whole = model.log_likelihoods(fused, tokens(list(WORDS.values())), 5)
    for row, found in enumerate(model.answer(image, question, k=5)):
        order = whole[row].argsort(descending=True).tolist()
        assert found.answers == tuple(ANSWERS[place] for place in order)
        assert found.scores == pytest.approx(whole[row].exp()[order].tolist(), rel=1e-3)
    for row, found in enumerate(model.answer(image, question, k=1)):
        two = model.log_likelihoods(fused, tokens(list(WORDS.values())), 2)[row]
        assert found.answers == (ANSWERS[int(two.argmax())],)
    other = Candidates(("a b", "c"), tokens([[20, 21], [22]]))
    for row, found in enumerate(model.answer(image, question, other, k=9)):
        likely = {"a b": written(model, fused, row, [20, 21]), "c": written(model, fused, row, [22])}
        assert found.answers == tuple(sorted(likely, key=lambda answer: -likely[answer]))


def test_the_order_outlasts_likelihoods_too_small_to_be_told_apart() -> None:
    model = livelier(small())
    with torch.no_grad():
        model.network.word_bias[:] = -500.0
        model.network.word_bias[0] = 0.0
    image, question = inputs(batch())
    whole = model.log_likelihoods(model.read(image, question), tokens(list(WORDS.values())), 5)
    found = model.answer(image, question, k=5)
    assert all(set(one.scores) == {0.0} for one in found)
    assert [one.answers[0] for one in found] == [ANSWERS[place] for place in whole.argmax(1)]


@pytest.mark.parametrize("norm_place", ["post", "pre"])
def test_what_is_written_is_the_likeliest_token_each_time_and_as_likely_as_when_it_is_ranked(norm_place: str) -> None:
    model = livelier(small(norm_place=norm_place))
    with torch.no_grad():
        model.network.word_bias[END] += 2.0
    image, question = inputs(batch())
    fused = model.read(image, question)
    found = model.write_answer(image, question, Decoding(max_tokens=5, end=END), range(6))
    assert {one.finished for one in found} == {True, False}
    for row, one in enumerate(found):
        said = [*one.ids, END] if one.finished else list(one.ids)
        likeliest = [int(following(model, fused, row, said[:place]).argmax()) for place in range(len(said))]
        assert said == likeliest
        assert one.log_likelihood == pytest.approx(prefix(model, fused, row, said), abs=1e-4)
        if one.finished:
            ranked = model.log_likelihoods(fused, tokens([one.ids]), 1).detach()
            assert one.log_likelihood == pytest.approx(float(ranked[row, 0]), abs=1e-4)


def test_beams_find_the_likeliest_of_all_that_can_be_written() -> None:
    model = livelier(small(vocab_size=4, answers=("a", "b")))
    model.answer_ids.clamp_(max=3)
    image, question = inputs(batch())
    question = TextBatch(question.ids % 4, question.lengths)
    fused = model.read(image, question)
    ended = [ids for length in range(3) for ids in itertools.product((0, 1, 3), repeat=length)]
    ranked = model.log_likelihoods(fused, tokens(ended), len(ended)).detach()
    found = model.write_answer(image, question, Decoding(max_tokens=3, beams=60, length_penalty=0.0, end=END), range(6))
    for row, best in enumerate(found):
        every = {one.ids: one.log_likelihood for one in (best, *best.others) if one.finished and len(one.ids) < 3}
        assert every == {ids: pytest.approx(float(ranked[row, place]), abs=1e-4) for place, ids in enumerate(ended)}
        assert best.log_likelihood == max(one.log_likelihood for one in (best, *best.others))


def test_a_network_in_another_floating_type_writes() -> None:
    model = livelier(small())
    model.cast_(torch.bfloat16)
    image, question = inputs(batch())
    fused = model.read(image, question)
    for row, one in enumerate(model.write_answer(image, question, Decoding(max_tokens=4, beams=3, end=END), range(6))):
        said = [*one.ids, END] if one.finished else list(one.ids)
        assert one.log_likelihood == pytest.approx(prefix(model, fused, row, said), abs=0.2)


def test_answers_do_not_depend_on_the_batch() -> None:
    model, freely = livelier(small()), Decoding(max_tokens=5, beams=2, end=END)
    image, text = inputs(batch())
    together, written_together = model.answer(image, text, k=5), model.write_answer(image, text, freely, range(6))
    for row, length in enumerate(text.lengths.tolist()):
        alone = TextBatch(text.ids[row : row + 1, :length], text.lengths[row : row + 1])
        found = model.answer(image[row : row + 1], alone, k=5)[0]
        assert found.answers == together[row].answers
        assert found.scores == pytest.approx(together[row].scores, rel=1e-3)
        one, among = model.write_answer(image[row : row + 1], alone, freely, [row])[0], written_together[row]
        assert one.ids == among.ids
        assert one.log_likelihood == pytest.approx(among.log_likelihood, abs=1e-4)


def test_the_loss_is_its_definition() -> None:
    model, data = livelier(small()), batch()
    fused = model.read(*inputs(data))
    losses = model(data, 0)
    likely = lambda row, answer: written(model, fused, row, WORDS[answer])  # noqa: E731
    terms = [likely(0, "yes"), likely(1, "no"), 0.75 * likely(2, "dog") + 0.25 * likely(2, "dog house")]
    terms += [likely(3, "two"), likely(4, "dog house"), likely(5, "no")]
    assert losses.total.item() == pytest.approx(-sum(terms) / 6, rel=1e-4)
    assert 0 <= float(losses.parts["token_accuracy"]) <= 1
    nothing = model(replace(data, answers=({"cow": 1.0}, {}) * 3), 0)
    assert nothing.total.item() == 0
    nothing.total.backward()


def test_shares_and_the_loss_of_classes_are_their_definitions() -> None:
    targets = torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    assert torch.allclose(answer_shares(targets), torch.tensor([[0.75, 0.25, 0], [0, 0, 1], [0, 0, 0]]))
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(1).log()
    torch.testing.assert_close(class_loss(logits, targets), -(0.75 * p[0, 0] + 0.25 * p[0, 1] + p[1, 2]) / 3)


@pytest.mark.parametrize("head", ["list", "classes"])
def test_classifiers_read_the_first_fused_token(head: str) -> None:
    model, data = livelier(small(head=head)), batch()
    image, question = inputs(data)
    logits = model.answer_list.layers(model.read(image, question).tokens[:, 0])
    scores = logits.softmax(1) if head == "classes" else logits.sigmoid()
    for row, found in enumerate(model.answer(image, question, k=5)):
        order = logits[row].argsort(descending=True)
        assert found.answers == tuple(ANSWERS[place] for place in order)
        assert found.scores == pytest.approx(scores[row][order].tolist(), abs=1e-5)
    two = Candidates(("no", "dog"), tokens([[11], [12]]))
    among = logits[:, [1, 2]].softmax(1) if head == "classes" else logits[:, [1, 2]].sigmoid()
    found = model.answer(image, question, two, k=2)
    assert [max(one.scores) for one in found] == pytest.approx(among.amax(1).tolist(), abs=1e-5)
    with pytest.raises(UserError, match="'horse' is none of the 5 answers"):
        model.answer(image, question, replace(two, words=("no", "horse")))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_trainable_parameter_learns(name: str) -> None:
    model = small(**OPTIONS[name]).train()
    data = batch(side=model.config.picture_side)
    optimizer = torch.optim.SGD(model.parameter_groups(), lr=0.1)
    waiting = {n for n, p in model.named_parameters() if p.requires_grad}
    for step in range(4):  # residual branches of the backbone may start at zero and pass gradients on from the second step
        optimizer.zero_grad()
        model(data, step).total.backward()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert waiting == set()
    fixed = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad and "trunk" not in n}
    assert fixed == {"towers"} | ({"masked_head", "word_bias"} if model.decoder is None else set())


def fit(model: AlbefVqa, data: Batch, steps: int = 150) -> float:
    optimizer, losses = torch.optim.Adam(model.train().parameter_groups(), lr=2e-3), Losses(torch.zeros(()))
    for step in range(steps):
        optimizer.zero_grad()
        losses = model(data, step)
        losses.total.backward()
        optimizer.step()
    model.eval()
    return losses.total.item()


@pytest.mark.parametrize("head", ["decoder", "list", "classes"])
def test_a_batch_is_learned_by_heart(head: str) -> None:
    model, data = small(head=head), batch()
    fit(model, data)
    found = model.answer(*inputs(data), k=2)
    assert [best.answers[0] for best in found] == ["yes", "no", "dog", "two", "dog house", "no"]
    assert found[0].scores[0] > 0.8
    assert found[2].answers[1] == "dog house"
    if head == "decoder":
        fewer = AlbefVqaConfig.model_validate(SMALL | {"answers": ("red", "blue")})
        other = build(fewer, {"answer_text": tokens([[20], [21, 22]])}).eval()
        _adopt(other, model, "start", fewer.fresh_parts)
        for one in (model, other):  # whatever list it has
            freely = one.write_answer(*inputs(data), Decoding(end=END), range(6))
            assert [list(it.ids) for it in freely] == [WORDS[best.answers[0]] for best in found]
            assert all(it.finished for it in freely)


def test_the_blind_twin_learns_no_more_than_the_questions_say() -> None:
    data = batch()
    image, text = inputs(data)
    model = small(blind=True)
    assert fit(model, data) > 0.6, "each pair of equal questions has two answers: half of them are a bit each"
    assert model.answer(image, text, k=5) == model.answer(image.flip(0), text, k=5)
    torch.testing.assert_close(model.read(image, text).tokens, model.read(image.float() / 255, text).tokens)
    seeing = livelier(small())
    assert seeing.answer(image, text, k=5) != seeing.answer(image.flip(0), text, k=5)


TASKS = {"queue_size": 8, "distillation_ramp_steps": 2}


@pytest.mark.parametrize("name", ["decoder", "feature map", "list"])
def test_it_begins_with_an_albef_and_the_decoder_with_its_fusion(name: str) -> None:
    model, options = small(**OPTIONS[name]), OPTIONS[name]
    torch.manual_seed(5)
    start = albef.build(validate(AlbefConfig, SMALL | TASKS | {k: v for k, v in options.items() if k != "head"}, "test"))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    _adopt(model, start, "start", model.config.fresh_parts)
    after = model.state_dict()
    for key, tensor in start.network.state_dict().items():
        assert torch.equal(after[f"network.{key}"], tensor), key
    fusion = start.network.fusion.state_dict()
    if model.decoder is not None:
        narrow = {key for key, tensor in model.decoder.state_dict().items() if tensor.shape != fusion[key].shape}
        assert all("cross_attention.key_value.weight" in key for key in narrow)
        assert bool(narrow) == (not model.config.feature_map), "pictures of 16 and words of 32"
        assert all(torch.equal(t, fusion[key]) for key, t in model.decoder.state_dict().items() if key not in narrow)
        assert torch.equal(after["answer_ids"], before["answer_ids"])
    assert model.state_dict().keys() == before.keys()


def test_what_it_cannot_begin_with_is_told() -> None:
    model = small()
    unlike = ({"width": 64}, {"fusion_layers": 3}, {"fusion_layers": 1}, {"feature_map": True})
    starts: list[System] = [albef.build(validate(AlbefConfig, SMALL | TASKS | options, "test")) for options in unlike]
    starts.append(vilt.build(ViltConfig(image_size=16, patch_size=8, vocab_size=40, width=32, layers=1)))
    for start in starts:
        with pytest.raises(ConfigError, match="another network"):
            _adopt(model, start, "start", model.config.fresh_parts)


def test_a_run_goes_on_with_the_list_it_has_or_with_a_fresh_one() -> None:
    first, same = livelier(small()), small()
    _adopt(same, first, "first")
    assert all(torch.equal(tensor, first.state_dict()[key]) for key, tensor in same.state_dict().items())
    fewer = AlbefVqaConfig.model_validate(SMALL | {"answers": ("red", "blue")})
    other = build(fewer, {"answer_text": tokens([[20], [21, 22]])})
    _adopt(other, first, "first", fewer.fresh_parts)
    assert other.answer_ids[:, 1].tolist() == [20, 21]
    assert other.decoder is not None
    assert torch.equal(other.network.word_bias, first.network.word_bias)


def test_capabilities_and_the_list() -> None:
    assert capabilities(small()) == {"answers", "answers_freely"}
    assert capabilities(small(head="list")) == capabilities(small(head="classes")) == {"answers"}
    config = validate(AlbefVqaConfig, SMALL | {"num_answers": 100}, "test")
    assert (config.answer_limit, config.known_answers, config.learns_answers) == (100, (), True)
    filled = config.with_answers(ANSWERS)
    assert (filled.answer_limit, filled.num_answers, filled.known_answers) == (0, 5, ANSWERS)
    assert validate(AlbefVqaConfig, filled.model_dump(mode="json"), "test") == filled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answers": ()}, "nothing to answer with; set num_answers above 0"),
        ({"num_answers": 7}, "num_answers 7 is not the number of answers, 5"),
        ({"answers": ("yes", "yes")}, "answers must differ"),
        ({"heads": 3}, "must be a multiple of heads 3"),
        ({"shortlist": 0}, "shortlist"),
        ({"head": "writer"}, "head"),
        ({"queue_size": 7}, "queue_size"),
        ({"feature_map": True, "image": VIT | {"patch_dropout": 0.5}}, "needs every patch"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(AlbefVqaConfig, SMALL | {"answers": ANSWERS} | options, "test.yaml")


def test_a_long_context_costs_nothing_where_answers_are_short() -> None:
    """As of a published checkpoint, whose network has positions for 512 tokens."""
    long = livelier(small(context_length=64))
    embedded = []
    embedding = long.network.towers.encoders["text"].get_submodule("embedding")
    embedding.register_forward_hook(lambda _module, given, _made: embedded.append(given[0].shape[1]))
    long.answer(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), tokens([[5, 6], [7]]), k=2)
    assert max(embedded) <= max(len(row) for row in WORDS.values()) + 2
