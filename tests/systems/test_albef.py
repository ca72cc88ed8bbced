"""ALBEF: every task is its definition, momentum and queues resume exactly, the ablations are configuration alone."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import validate
from mm.errors import ConfigError
from mm.evaluation.reranking import BothWays, candidates
from mm.losses.contrastive import info_nce
from mm.losses.distillation import Views, distilled_contrastive
from mm.losses.masked import mask_tokens
from mm.losses.matching import draw_negatives
from mm.run.reranking import _encoded, pair_scores
from mm.systems.albef import Albef, AlbefConfig, build
from mm.types import Batch, TextBatch, capabilities

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8}
VIT = VIT | {"options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
RESNET = {"backbone": "resnet18", "image_size": 64, "options": {"channels": [8, 8, 8, 8]}, "pool": "pyramid"}
SIZES = {"vocab_size": 40, "context_length": 8, "width": 16, "heads": 2, "text_layers": 1, "fusion_layers": 1, "embed_dim": 8}
SMALL = {"image": VIT, **SIZES, "queue_size": 8, "distillation_ramp_steps": 2}
ALONE = {"momentum": 0, "queue_size": 0, "distillation": 0}
OPTIONS: dict[str, dict[str, object]] = {
    "whole": {},
    "feature map": {"image": RESNET, "feature_map": True, "norm_place": "pre", "text_pooling": "mean", "dropout": 0.1},
    "cells": {"image": RESNET | {"tokens": "pyramid"}, "feature_map": True, "norm_place": "pre"},
    "two streams": {"two_streams": True},
    "two streams of cells": {
        "image": RESNET,
        "feature_map": True,
        "norm_place": "pre",
        "two_streams": True,
        "fusion_layers": 3,
    },
    "no distillation": {"distillation": 0},
    "even negatives": {"hard_negatives": False},
    "no hidden words": {"masked_weight": 0},
    "contrastive": {"masked_weight": 0, "matching_weight": 0},
    "no momentum": ALONE,
}
GROUPS = torch.tensor([0, 0, 1, 2, 3, 4])


def small(**options: object) -> Albef:
    torch.manual_seed(0)
    return build(validate(AlbefConfig, SMALL | options, "test"))


def batch(size: int = 6, groups: Tensor | None = None, seed: int = 1, side: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    return Batch(
        ids=tuple(f"{seed}/{i}" for i in range(size)),
        image=(F.interpolate(coarse, side) * 255).to(torch.uint8),
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
    data = batch(groups=GROUPS, side=model.config.picture_side)
    optimizer = torch.optim.SGD(model.parameter_groups(), lr=0.1)
    waiting = {n for n, p in model.named_parameters() if p.requires_grad}
    for step in range(4):  # residual branches of the backbone may start at zero and pass gradients on from the second step
        optimizer.zero_grad()
        losses = model(data, step)
        losses.total.backward()
        waiting -= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        optimizer.step()
        model.after_step(step)
    assert waiting == set()
    assert not any(part.requires_grad for part in losses.parts.values())
    fixed = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad and "trunk" not in n}
    assert fixed - {"network", "matching_head"} == ({"momentum"} if model.config.momentum else set())


def test_learns_which_text_belongs_to_a_picture() -> None:
    model, data = small(distillation=0.1).train(), batch(4)
    optimizer = torch.optim.Adam(model.parameter_groups(), lr=3e-3)
    for step in range(120):
        optimizer.zero_grad()
        losses = model(data, step)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        model.after_step(step)
    image, text = inputs(data)
    model.eval()
    with torch.no_grad():
        both = model.scores(model.embed_image(image), model.embed_text(text)), all_pairs(model, image, text)
    for logits in both:
        assert logits.argmax(0).tolist() == logits.argmax(1).tolist() == [0, 1, 2, 3]
    assert float(losses.parts["masked"]) < 2.5  # of 3.7 by guessing


@torch.no_grad()
def all_pairs(model: Albef, image: Tensor, text: TextBatch) -> Tensor:
    pictures, words = model.encode_image(image), model.encode_text(text)
    return torch.stack([model.match(pictures[torch.full((len(text),), row)], words) for row in range(len(image))])


def test_the_losses_are_their_definitions() -> None:
    model = small().train()
    model(batch(groups=GROUPS + 3, seed=5), 0).total.backward()
    model.after_step(0)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.eval()
    data = batch(groups=GROUPS)
    image, text = inputs(data)
    torch.manual_seed(7)
    losses = model(data, 1)  # half of the ramp: alpha is 0.2
    torch.manual_seed(7)
    assert model.momentum is not None
    average = model.momentum.average
    pictures, words = model.encode_image(image), model.encode_text(text)
    taught = average.encode_image(image), average.encode_text(text)
    scale = model.network.towers.scale()
    contrastive = distilled_contrastive(
        Views(pictures.pooled, words.pooled),
        Views(taught[0].pooled, taught[1].pooled),
        scale,
        GROUPS,
        alpha=0.2,
        queued=(model._queues["image"].content(), model._queues["text"].content()),
    )
    torch.testing.assert_close(losses.parts["contrastive"], contrastive.detach())

    similarities = model.scores(pictures.pooled, words.pooled).detach()
    texts, images = draw_negatives(similarities, GROUPS).rows, draw_negatives(similarities.T, GROUPS).rows
    logits = all_pairs(model, image, text)
    own = torch.arange(6)
    terms = [F.softplus(-logits[own, own]), F.softplus(logits[own, texts]), F.softplus(logits[images, own])]
    torch.testing.assert_close(losses.parts["matching"], torch.cat(terms).mean())

    masked = mask_tokens(text.ids, text.inner(), mask_id=40, vocab_size=40)
    changed = TextBatch(masked.ids, text.lengths)
    said = model.network.words(model.fuse(pictures, model.encode_text(changed)).tokens[masked.chosen])
    lesson = average.words(average.fusion(average.encode_text(changed), taught[0]).tokens[masked.chosen]).softmax(1)
    target = 0.8 * F.one_hot(masked.targets[masked.chosen], 40) + 0.2 * lesson
    torch.testing.assert_close(losses.parts["masked"], -(target * said.log_softmax(1)).sum(1).mean().detach())
    total = losses.parts["contrastive"] + losses.parts["matching"] + losses.parts["masked"]
    torch.testing.assert_close(losses.total.detach(), total)


def test_at_first_momentum_without_distillation_is_plain_info_nce() -> None:
    tasks = {"matching_weight": 0, "masked_weight": 0}
    data = batch(groups=GROUPS)
    plain, moving = small(**ALONE, **tasks), small(distillation=0, **tasks)
    moving.network.load_state_dict(plain.network.state_dict())  # as init_from does, after the copy was made
    image, text = inputs(data)
    expected = info_nce(plain.embed_image(image), plain.embed_text(text), plain.network.towers.scale(), groups=GROUPS)
    for model in (plain, moving):
        torch.testing.assert_close(model(data, 0).total, expected)


def test_momentum_and_queues_resume_exactly() -> None:
    model, copy = small().train(), small().train()
    for step in range(2):
        model(batch(seed=step), step)
        model.after_step(step)
    copy.load_state_dict(model.state_dict())
    for one in (model, copy):
        torch.manual_seed(3)
        losses = one(batch(seed=9), 2)
        losses.total.backward()
        with torch.no_grad():
            one.matching_head.weight.add_(float(losses.total))
        one.after_step(2)
    for mine, theirs in zip(model.state_dict().values(), copy.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_that_is_not_applied_leaves_no_trace() -> None:
    model = small().train()
    model(batch(), 0)
    assert len(model._queues["image"]) == 0
    model(batch(seed=2), 1)
    model.after_step(1)
    assert sorted(model._queues["text"].ids[:6].tolist()) == sorted(
        model._queues["image"].ids[:6].tolist()
    )  # of the second batch alone
    assert len(model._queues["image"]) == 6


def test_what_training_alone_needs_is_named() -> None:
    model = small()
    needed = {n for n in model.state_dict() if not n.startswith(model.only_for_training)}
    assert needed == set(small(**ALONE).state_dict())


@pytest.mark.parametrize("groups", [[3], [3, 3, 3]])
def test_batches_without_negatives_have_finite_losses(groups: list[int]) -> None:
    model = small().train()
    losses = model(batch(len(groups), torch.tensor(groups)), 0)
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_texts_without_words_have_finite_losses() -> None:
    model, data = small().train(), batch(3)
    _, text = inputs(data)
    losses = model(replace(data, text=TextBatch(text.ids[:, :2], torch.tensor([2, 2, 2]))), 5)
    losses.total.backward()
    assert losses.total.isfinite()
    assert float(losses.parts["masked"]) == 0


def test_the_temperature_stays_in_its_range() -> None:
    model = small()
    for wanted, found in ((20.0, 1000.0), (-20.0, 2.0)):
        with torch.no_grad():
            model.network.towers.logit_scale.fill_(wanted)
        model.after_step(0)
        assert model.network.towers.scale().item() == pytest.approx(found)


def test_candidate_pairs_have_the_scores_of_all_pairs_in_any_chunks() -> None:
    model = small().eval()
    image, text = inputs(batch())
    logits = all_pairs(model, image, text)
    vectors = model.embed_image(image).detach(), model.embed_text(text).detach()
    found = candidates(*vectors, 3)
    expected = BothWays(logits.gather(1, found.texts), logits.T.gather(1, found.images))
    options = {"device": torch.device("cpu")}
    for size, pairs in ((6, 100), (2, 4), (1, 1)):
        scores = pair_scores(model, image.split(size), text, found, pairs_at_once=pairs, **options)
        for mine, right in zip(scores, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    for budget in (1, 2 * 5 * 16 * 4, 1 << 20):  # of one picture, of two, of all
        scores = pair_scores(model, image.split(1), text, found, token_bytes=budget, **options)
        for mine, right in zip(scores, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    halves = [pair_scores(model, [image[:2]], text, found, **options)]
    halves.append(pair_scores(model, image[2:].split(3), text, found, first_row=2, **options))
    for one, other, right in zip(*halves, expected, strict=True):
        torch.testing.assert_close(one + other, right, rtol=1e-4, atol=1e-5)
    sums = logits + model.scores(*vectors).detach()
    for pairs in (100, 4):
        both = pair_scores(model, image.split(4), text, found, vectors=vectors, pairs_at_once=pairs, **options)
        torch.testing.assert_close(both.images, sums.T.gather(1, found.images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.texts, sums.gather(1, found.texts), rtol=1e-4, atol=1e-5)


def test_pictures_are_held_within_their_budget() -> None:
    model = small().eval()
    image, _ = inputs(batch())
    size = model.encode_image(image[:1]).tokens.nbytes
    for budget, sizes in ((0, [1] * 6), (size, [1] * 6), (3 * size - 1, [2] * 3), (4 * size, [4, 2]), (1 << 30, [6])):
        groups = list(_encoded(model, image.split(1), torch.device("cpu"), budget))
        assert [len(group.tokens) for group in groups] == sizes
        assert max(group.tokens.nbytes for group in groups) <= max(budget, size)
        joined = torch.cat([group.tokens for group in groups])
        torch.testing.assert_close(joined, model.encode_image(image).tokens, rtol=1e-4, atol=1e-5)


def test_a_network_that_was_not_trained_to_match_cannot() -> None:
    assert capabilities(small(fusion_layers=2)) == {"embeds", "matches", "grounds"}
    assert capabilities(small()) == {"embeds", "matches"}, "after its only layer the first word alone is looked at"
    assert capabilities(small(matching_weight=0, fusion_layers=2)) == {"embeds"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "must be a multiple of heads 3"),
        ({"momentum": 0}, "queue_size is of momentum features"),
        ({"momentum": 0, "queue_size": 0}, "distillation is of momentum features"),
        ({"contrastive_weight": 0}, "contrastive_weight"),
        ({"feature_map": True, "image": VIT | {"patch_dropout": 0.5}}, "needs every patch"),
        ({"image": VIT | {"tokens": "pyramid"}}, "cells of pool: pyramid"),
        ({"hard_negative": True}, "did you mean 'hard_negatives'"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(AlbefConfig, SMALL | options, "test.yaml")


def test_two_streams_need_heads_that_divide_the_picture_tokens() -> None:
    odd = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 8}
    odd |= {"options": {"embed_dim": 15, "depth": 1, "num_heads": 3}}
    with pytest.raises(ConfigError, match="width 15 must be a multiple of 2 heads"):
        small(image=odd, two_streams=True)


def test_whole_words_are_hidden_where_that_is_asked_for() -> None:
    """All tokens of the only word are hidden, so the loss is that of every token between start and end."""
    model, data = small(masked_weight=1.0, whole_words=True).train(), batch()
    _, text = inputs(data)
    words = replace(text, words=torch.zeros_like(text.ids))
    seen = []
    masks = model.network.masked_head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    losses = model(replace(data, text=words), 0)
    masks.remove()
    losses.total.backward()
    assert seen[0] == int(text.inner().sum())
    assert validate(type(model.config), SMALL | {"whole_words": True}, "test").learns_whole_words
    assert not validate(type(model.config), SMALL | {"whole_words": True, "masked_weight": 0}, "test").learns_whole_words
    with pytest.raises(ValueError, match="which tokens make a word"):
        model(data, 0)
