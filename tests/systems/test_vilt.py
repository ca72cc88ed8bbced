"""ViLT: every task is its definition, pairs do not depend on their batch, and it learns to match."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.losses.alignment import word_patch_alignment
from mm.losses.masked import mask_tokens
from mm.losses.matching import half_mismatched, random_candidates
from mm.systems.vilt import Vilt, ViltConfig, build
from mm.types import Batch, TextBatch

SMALL = {
    "image_size": 16,
    "patch_size": 8,
    "vocab_size": 40,
    "context_length": 8,
    "width": 32,
    "layers": 2,
    "heads": 2,
}
RETRIEVAL = {"masked_weight": 0, "matching_weight": 0, "alignment_weight": 0, "retrieval_negatives": 3}
OPTIONS: dict[str, dict[str, object]] = {
    "linear": {},
    "stem": {"stem": [8, 16]},
    "retrieval": RETRIEVAL,
    "all": {"retrieval_negatives": 2, "dropout": 0.1},
    "no alignment": {"alignment_weight": 0},
}


def small(**options: object) -> Vilt:
    torch.manual_seed(0)
    return build(validate(ViltConfig, SMALL | options, "test"))


def batch(size: int = 6, groups: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    return Batch(
        ids=tuple(map(str, range(size))),
        image=(F.interpolate(coarse, 16) * 255).to(torch.uint8),
        text=TextBatch(torch.randint(3, 40, (size, 8), generator=generator), torch.tensor([8, 5, 6, 3, 7, 4])[:size]),
        groups=groups,
    )


def inputs(data: Batch) -> tuple[Tensor, TextBatch]:
    assert data.image is not None
    assert data.text is not None
    return data.image, data.text


@pytest.mark.parametrize("name", OPTIONS)
def test_every_trainable_parameter_learns(name: str) -> None:
    model = small(**OPTIONS[name]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):  # residual branches of the stem start at zero and pass gradients on from the second step
        optimizer.zero_grad()
        losses = model(batch(groups=torch.tensor([0, 0, 1, 2, 3, 4])), step)
        losses.total.backward()
        optimizer.step()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert not any(part.requires_grad for part in losses.parts.values())
    fixed = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == ({"masked_head", "word_bias"} if name == "retrieval" else set())


@pytest.mark.parametrize("name", ["linear", "stem", "retrieval"])
def test_learns_which_text_belongs_to_a_picture(name: str) -> None:
    model, data = small(**OPTIONS[name]).train(), batch(4)
    image, text = inputs(data)
    optimizer = torch.optim.Adam(model.parameter_groups(), lr=1e-3)
    for step in range(80):
        optimizer.zero_grad()
        model(data, step).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    logits = all_pairs(model.eval(), image, text)
    assert logits.argmax(0).tolist() == logits.argmax(1).tolist() == [0, 1, 2, 3]
    if name != "retrieval":
        assert torch.equal(logits > 0, torch.eye(4, dtype=torch.bool))


@torch.no_grad()
def all_pairs(model: Vilt, image: Tensor, text: TextBatch) -> Tensor:
    """Logits of all pictures (rows) with all texts, no picture being encoded twice."""
    encoded, size = model.encode_image(image), len(text)
    words = model.encode_text(text)
    return torch.stack([model.match(encoded[torch.full((size,), row)], words) for row in range(len(image))])


@pytest.mark.parametrize("name", ["linear", "stem"])
def test_pairs_depend_neither_on_their_batch_nor_on_padding(name: str) -> None:
    model = small(**OPTIONS[name]).eval()
    image, text = inputs(batch())
    together = all_pairs(model, image, text)
    with torch.no_grad():
        for i in range(len(image)):
            for j, length in enumerate(text.lengths.tolist()):
                words = model.encode_text(TextBatch(text.ids[j : j + 1, :length], text.lengths[j : j + 1]))
                alone = model.match(model.encode_image(image[i : i + 1]), words)
                torch.testing.assert_close(alone[0], together[i, j], atol=1e-5, rtol=1e-4)
    assert together.std(0).min() > 1e-4
    assert together.std(1).min() > 1e-4


def test_matching_is_a_pass_over_words_and_patches_in_one_sequence() -> None:
    model = small().eval()
    image, text = inputs(batch(2))
    config, tower = model.config, model.tower
    for i, length in enumerate(text.lengths.tolist()):
        pixels = (image[i].float() / 255 - 0.5) / 0.5
        patches = F.conv2d(pixels[None], *model.patches.projection.parameters(), stride=config.patch_size).flatten(2).mT
        words = model.words.tokens(text.ids[i : i + 1, :length])
        positions = {name: module.weight for name, module in tower.positions.items()}
        x = torch.cat([words + positions["text"][:length], patches + positions["image"]], 1)
        first = tower.transformer(x)[:, 0]
        expected = model.matching_head(torch.tanh(model.pooler[0](first)))[0, 0]
        found = model.match(model.encode_image(image), model.encode_text(text))[i]
        torch.testing.assert_close(found, expected)


def test_the_losses_are_their_definitions() -> None:
    model = small(retrieval_negatives=2).eval()
    groups = torch.tensor([0, 0, 1, 2, 3, 4])
    data = batch(groups=groups)
    image, text = inputs(data)
    torch.manual_seed(7)
    losses = model(data, 0)
    torch.manual_seed(7)
    encoded = model.encode_image(image)

    inner = torch.zeros(6, 8, dtype=torch.bool)
    for row, length in zip(inner, text.lengths.tolist(), strict=True):
        row[1 : length - 1] = True
    masked = mask_tokens(text.ids, inner, mask_id=40, vocab_size=40)
    fused = model.fuse(encoded, model.encode_text(TextBatch(masked.ids, text.lengths)))
    logits = model.masked_head(fused.tokens[:, :8]) @ model.words.tokens.weight[:40].T + model.word_bias
    terms = [-logits[b, t].log_softmax(0)[text.ids[b, t]] for b, t in masked.chosen.nonzero().tolist()]
    torch.testing.assert_close(losses.parts["masked"], torch.stack(terms).mean().detach())

    rows, matched = half_mismatched(groups)
    given = model.encode_text(text[rows])
    fused = model.fuse(encoded, given)
    terms = [F.logsigmoid(x if m else -x) for x, m in zip(model.match(encoded, given), matched, strict=True)]
    torch.testing.assert_close(losses.parts["matching"], -torch.stack(terms).mean().detach())
    cost = word_patch_alignment(fused.tokens[:, :8], fused.tokens[:, 8:], inner[rows], encoded.mask)
    torch.testing.assert_close(losses.parts["alignment"], (cost * (2 * matched.float() - 1)).mean().detach())

    candidates, valid = random_candidates(groups, 2)
    logits = all_pairs(model, image, text).gather(1, candidates)
    terms = [row[ok].log_softmax(0)[0] for row, ok in zip(logits, valid, strict=True)]
    torch.testing.assert_close(losses.parts["retrieval"], -torch.stack(terms).mean())

    parts = losses.parts
    total = parts["masked"] + parts["matching"] + 0.1 * parts["alignment"] + parts["retrieval"]
    torch.testing.assert_close(losses.total.detach(), total)


def test_words_are_predicted_from_the_picture() -> None:
    torch.manual_seed(0)
    model, data = small(matching_weight=1e-6, alignment_weight=0, mask_rate=0.9).train(), batch(4)
    optimizer = torch.optim.Adam(model.parameter_groups(), lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        losses = model(data, step)
        losses.total.backward()
        optimizer.step()
    assert float(losses.parts["masked"]) < 0.7  # of 3.7 by guessing
    model.eval()
    others = model.loss(replace(data, image=inputs(data)[0].flip(0)), 0).parts["masked"]
    assert float(others) > 2


@pytest.mark.parametrize("groups", [[3], [3, 3, 3]])
def test_batches_without_negatives_have_finite_losses(groups: list[int]) -> None:
    model = small(retrieval_negatives=2).train()
    losses = model(batch(len(groups), torch.tensor(groups)), 0)
    losses.total.backward()
    assert losses.total.isfinite()
    assert float(losses.parts["retrieval"]) == pytest.approx(0, abs=1e-6)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_texts_without_words_have_finite_losses() -> None:
    model, data = small().train(), batch(3)
    assert data.text is not None
    losses = model(replace(data, text=TextBatch(data.text.ids[:, :2], torch.tensor([2, 2, 2]))), 0)
    losses.total.backward()
    assert losses.total.isfinite()
    assert float(losses.parts["masked"]) == float(losses.parts["alignment"]) == 0


def test_fine_tuning_takes_the_weights_of_training() -> None:
    trained, tuned = small(), small(**RETRIEVAL)
    tuned.load_state_dict(trained.state_dict())
    image, text = inputs(batch(2))
    found, expected = (model.match(model.encode_image(image), model.encode_text(text)) for model in (tuned, trained))
    torch.testing.assert_close(found, expected)


def test_half_precision_stays_close() -> None:
    model = small(mean=[0.48, 0.46, 0.41]).eval()
    image, text = inputs(batch())
    with torch.no_grad():
        expected = model.match(model.encode_image(image), model.encode_text(text))
        model.cast_(torch.bfloat16)
        found = model.match(model.encode_image(image), model.encode_text(text))
    assert model.patches.mean.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0.03)


def test_pictures_of_another_size_and_long_texts_are_refused() -> None:
    model = small()
    image, text = inputs(batch(2))
    with pytest.raises(UserError, match=r"\(3, 8, 8\) where \(3, 16, 16\) is expected"):
        model.encode_image(image[:, :, :8, :8])
    with pytest.raises(UserError, match="9 tokens where the model takes 8"):
        model.encode_text(TextBatch(F.pad(text.ids, (0, 1)), text.lengths))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "must be a multiple of heads 3"),
        ({"patch_size": 5}, "multiple of patch_size 5"),
        ({"stem": [8, 8, 8, 8, 8]}, "cannot be halved between the 5 stages"),
        ({"std": [0.5, 0, 0.5]}, "std must be above 0"),
        ({"matching_weight": 0}, "nothing would learn to match or to answer"),
        ({"matching_weight": 0, "retrieval_negatives": 1}, "alignment_weight is of the pairs of matching"),
        ({"patchsize": 4}, "did you mean 'patch_size'"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ViltConfig, SMALL | options, "test.yaml")


def test_a_run_can_ask_the_configuration() -> None:
    config = validate(ViltConfig, SMALL, "test")
    assert (config.picture_side, config.text_limits) == (16, (40, 8))
    assert build(config.with_vocabulary(25)).words.tokens.num_embeddings == 26


def test_whole_words_are_hidden_where_that_is_asked_for() -> None:
    """All tokens of the only word are hidden, so the loss is that of every token between start and end."""
    model, data = small(masked_weight=1.0, whole_words=True).train(), batch()
    _, text = inputs(data)
    words = replace(text, words=torch.zeros_like(text.ids))
    seen = []
    masks = model.masked_head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    losses = model(replace(data, text=words), 0)
    masks.remove()
    losses.total.backward()
    assert seen[0] == int(text.inner().sum())
    assert validate(type(model.config), SMALL | {"whole_words": True}, "test").learns_whole_words
    assert not validate(type(model.config), SMALL | {"whole_words": True, "masked_weight": 0}, "test").learns_whole_words
    with pytest.raises(ValueError, match="which tokens make a word"):
        model(data, 0)
