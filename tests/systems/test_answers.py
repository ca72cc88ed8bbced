"""Answering: the head is its definition, learns a batch by heart, ranks what it is asked to, and blind means blind."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mm.config import validate
from mm.errors import ConfigError, UserError
from mm.losses.answers import answer_loss, answer_targets
from mm.systems.vilt import Vilt, ViltConfig, build
from mm.types import Answers, Batch, Candidates, TextBatch, capabilities

ANSWERS = ("yes", "no", "dog", "cat", "2")
SMALL: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "vocab_size": 40,
    "context_length": 8,
    "width": 32,
    "layers": 2,
    "heads": 2,
}
ALONE = {"masked_weight": 0, "matching_weight": 0, "alignment_weight": 0, "answer_weight": 1.0, "answers": ANSWERS}


def small(**options: object) -> Vilt:
    torch.manual_seed(0)
    return build(validate(ViltConfig, SMALL | ALONE | options, "test"))


def batch(size: int = 6) -> Batch:
    """Questions of which two are the same about different pictures: only the picture tells the answer."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(size, 3, 4, 4, generator=generator)
    ids = torch.randint(3, 40, (size, 8), generator=generator)
    ids[1::2] = ids[::2]
    return Batch(
        ids=tuple(map(str, range(size))),
        image=(F.interpolate(coarse, 16) * 255).to(torch.uint8),
        text=TextBatch(ids, torch.tensor([8, 8, 6, 6, 4, 4])[:size]),
        answers=({"yes": 1.0}, {"no": 1.0}, {"dog": 0.6, "cat": 0.3}, {"cat": 1.0}, {"2": 1.0, "unknown": 1.0}, {"dog": 1.0})[
            :size
        ],
    )


def inputs(data: Batch) -> tuple[Tensor, TextBatch]:
    assert data.image is not None
    assert data.text is not None
    return data.image, data.text


def fit(model: Vilt, data: Batch, steps: int = 120) -> float:
    optimizer = torch.optim.Adam(model.train().parameter_groups(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        losses = model(data, step)
        losses.total.backward()
        optimizer.step()
    return float(losses.parts["answer_accuracy"])


def test_targets_and_loss_are_their_definitions() -> None:
    places = {"yes": 0, "no": 1, "dog": 2}
    targets = answer_targets([{"yes": 1.0}, {"dog": 0.3, "cat": 1.0}, {}], places)
    assert torch.equal(targets, torch.tensor([[1, 0, 0], [0, 0, 0.3], [0, 0, 0]]))
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(1).mean()
    torch.testing.assert_close(answer_loss(logits, targets).double(), by_hand, atol=1e-6, rtol=1e-6)


def test_the_loss_reads_question_and_picture_in_one_pass() -> None:
    model, data = small(answer_weight=0.5).eval(), batch()
    image, text = inputs(data)
    losses = model(data, 0)
    pooled = model.pooler(model.fuse(model.encode_image(image), model.encode_text(text)).pooled)
    head = model.answer_list.layers
    logits = head[3](F.gelu(F.layer_norm(head[0](pooled), (64,), head[1].weight, head[1].bias)))
    targets = answer_targets(data.answers, {answer: place for place, answer in enumerate(ANSWERS)})
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()
    torch.testing.assert_close(losses.parts["answer"], expected.detach())
    torch.testing.assert_close(losses.total, 0.5 * expected)
    chosen = logits.argmax(1)
    right = sum(float(targets[row, column]) for row, column in enumerate(chosen)) / 6
    assert float(losses.parts["answer_accuracy"]) == pytest.approx(right)


@pytest.mark.parametrize(
    "options",
    [{}, {"stem": [8, 16]}, {"masked_weight": 1.0, "matching_weight": 1.0, "alignment_weight": 0.1}, {"blind": True}],
    ids=["alone", "stem", "with all others", "blind"],
)
def test_every_trainable_parameter_learns(options: dict[str, object]) -> None:
    model = small(**options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(), step).total.backward()
        optimizer.step()
    assert [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []
    fixed = {n.partition(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert fixed == (set() if "matching_weight" in options else {"masked_head", "word_bias", "matching_head"})


@pytest.mark.parametrize("options", [{}, {"stem": [8, 16]}], ids=["linear", "stem"])
def test_a_batch_is_learned_by_heart(options: dict[str, object]) -> None:
    model, data = small(**options), batch()
    fit(model, data)
    image, text = inputs(data)
    found = model.eval().answer(image, text)
    assert [best.answers for best in found] == [("yes",), ("no",), ("dog",), ("cat",), ("2",), ("dog",)]
    assert found[0].scores[0] > 0.8


def test_the_blind_twin_learns_no_more_than_the_questions_say() -> None:
    data = batch()
    image, text = inputs(data)
    model = small(blind=True)
    assert fit(model, data) <= 0.7, "each pair of equal questions has two answers, and one of the six is worth 0.6"
    model.eval()
    assert model.answer(image, text, k=5) == model.answer(image.flip(0), text, k=5)
    torch.testing.assert_close(model.encode_image(image).tokens, model.encode_image(image.float() / 255).tokens)
    assert small().answer(image, text) != small().answer(image.flip(0), text, k=1)


def test_answers_do_not_depend_on_the_batch() -> None:
    model, data = small().eval(), batch()
    image, text = inputs(data)
    together = model.answer(image, text, k=5)
    for row, length in enumerate(text.lengths.tolist()):
        alone = model.answer(
            image[row : row + 1], TextBatch(text.ids[row : row + 1, :length], text.lengths[row : row + 1]), k=5
        )
        assert alone[0].answers == together[row].answers
        assert alone[0].scores == pytest.approx(together[row].scores, abs=1e-5)
    assert all(list(one.scores) == sorted(one.scores, reverse=True) for one in together)
    assert all(sorted(one.answers) == sorted(ANSWERS) for one in together)


def test_candidates_are_ranked_as_among_all() -> None:
    model = small().eval()
    image, text = inputs(batch(2))
    among = Candidates(("cat", "yes"), TextBatch(torch.zeros(2, 3, dtype=torch.int64), torch.tensor([3, 3])))
    for few, all_ in zip(model.answer(image, text, among, k=5), model.answer(image, text, k=5), strict=True):
        kept = [(a, s) for a, s in zip(all_.answers, all_.scores, strict=True) if a in among.words]
        assert list(zip(few.answers, few.scores, strict=True)) == kept
    with pytest.raises(UserError, match="'horse' is none of the 5 answers"):
        model.answer(image, text, replace(among, words=("yes", "horse")))


def test_capabilities_are_what_was_learned() -> None:
    assert capabilities(small()) == {"answers"}
    assert isinstance(small(), Answers)
    assert capabilities(small(matching_weight=1.0)) == {"answers", "matches"}
    assert capabilities(small(answer_weight=0, answers=(), matching_weight=1.0)) == {"matches"}
    assert capabilities(small(answer_weight=0, answers=(), retrieval_negatives=2)) == {"matches"}


def test_the_list_is_filled_in_by_a_run() -> None:
    config = validate(ViltConfig, SMALL | ALONE | {"answers": (), "num_answers": 100}, "test")
    assert (config.answer_limit, config.known_answers, config.learns_answers) == (100, (), True)
    filled = config.with_answers(ANSWERS)
    assert (filled.answer_limit, filled.num_answers, filled.known_answers) == (0, 5, ANSWERS)
    assert validate(ViltConfig, filled.model_dump(mode="json"), "test") == filled
    assert build(filled).known_answers == ANSWERS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer_weight": 0}, "nothing would learn to match or to answer"),
        ({"answer_weight": 0, "matching_weight": 1}, "answer_weight and num_answers .* go together"),
        ({"answers": ()}, "answer_weight and num_answers .* go together"),
        ({"num_answers": 7}, "num_answers 7 is not the number of answers, 5"),
        ({"answers": ("yes", "yes")}, "answers must differ"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ViltConfig, SMALL | ALONE | options, "test.yaml")
