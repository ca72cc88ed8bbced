"""Parallel decoding: equal to the published loop written out, counts, kept tokens, guidance, seeds."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mm.errors import UserError
from mm.generators.masked import Predict, generate, hidden_counts
from mm.types import Sampling

N, V = 12, 7
MASK = V
HIDDEN = torch.full((3, N), MASK)
SEEDS = [5, 6, 7]
PLAIN = Sampling(guidance=1.0, steps=5)


def predictor(seed: int = 0) -> Predict:
    """Logits of each token that depend on its place and on all ids of the row, as a bidirectional network's do."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(N * (V + 1), N * V, generator=random) * 0.7

    def predict(ids: Tensor) -> Tensor:
        one_hot = torch.nn.functional.one_hot(ids, V + 1).float().flatten(1)
        return torch.stack([row @ weight for row in one_hot]).unflatten(1, (N, V))  # row by row: equal bits in any batch

    return predict


def conditioned(predict_with: Predict, predict_without: Predict, batch: int) -> Predict:
    """The rows of a guided batch, in order; a batch without guidance is all conditional."""

    def predict(ids: Tensor) -> Tensor:
        assert len(ids) in {batch, 2 * batch}
        return torch.cat([predict_with(ids[:batch]), predict_without(ids[batch:])]) if len(ids) > batch else predict_with(ids)

    return predict


def gumbel(shape: tuple[int, ...], noise: torch.Generator) -> np.ndarray:
    return -np.log(-np.log(torch.rand(shape, generator=noise).numpy()))


def published_loop(predict: Predict, known: list[int], seed: int, steps: int, choice_temperature: float) -> list[list[int]]:
    """MaskGIT's loop for one picture, as its paper and code state it; the ids after each step."""
    noise = torch.Generator().manual_seed(seed)
    ids, number, history = list(known), known.count(MASK), []
    for t in range(1, steps + 1):
        logits = predict(torch.tensor([ids]))[0].double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        token_noise = gumbel((N, V), noise)
        choice_noise = gumbel((N,), noise)
        r, confidence, drawn = t / steps, [], list(ids)
        for i in range(N):
            if ids[i] == MASK:
                drawn[i] = int(np.argmax(logits[i] + token_noise[i]))
                confidence.append(log_p[i, drawn[i]] + choice_temperature * (1 - r) * choice_noise[i])
            else:
                confidence.append(math.inf)
        if t == steps:
            ids = drawn
        else:
            length = max(1, min(ids.count(MASK) - 1, math.floor(number * math.cos(math.pi * r / 2))))
            cut = sorted(confidence)[length]
            ids = [MASK if confidence[i] < cut else drawn[i] for i in range(N)]
        history.append(ids)
    return history


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 20])
@pytest.mark.parametrize("choice_temperature", [0.0, 4.5])
def test_ids_are_those_of_the_published_loop(steps: int, choice_temperature: float) -> None:
    known = HIDDEN.clone()
    known[1, 3:6] = torch.tensor([0, 4, 2])
    known[2, ::2] = 1
    seen: list[Tensor] = []
    made = generate(
        predictor(),
        known,
        SEEDS,
        Sampling(guidance=1.0, steps=steps),
        mask_id=MASK,
        choice_temperature=choice_temperature,
        on_tokens=lambda ids, hidden, _: seen.append(ids.masked_fill(hidden, MASK)),
    )
    for row, seed in enumerate(SEEDS):
        expected = published_loop(predictor(), known[row].tolist(), seed, steps, choice_temperature)
        assert [ids[row].tolist() for ids in seen] == expected
        assert made[row].tolist() == expected[-1]


@pytest.mark.parametrize(
    ("number", "steps", "counts"),
    [
        (64, 8, [62, 59, 53, 45, 35, 24, 12, 0]),
        (5, 3, [4, 2, 0]),
        (5, 8, [4, 3, 2, 1, 1, 1, 1, 0]),  # the cosine alone would be 4, 4, 4, 3, 2, 1, 0: each step decides at least one
        (2, 2, [1, 0]),
        (1, 3, [1, 1, 0]),
        (0, 3, [0, 0, 0]),
        (9, 1, [0]),
    ],
)
def test_counts_follow_the_cosine_within_their_bounds(number: int, steps: int, counts: list[int]) -> None:
    assert hidden_counts(number, steps) == counts


def test_each_picture_has_its_own_number_of_hidden_tokens() -> None:
    known = HIDDEN.clone()
    known[0] = 3  # complete already
    known[1, 1:] = 2
    known[2, :4] = 1
    seen: list[list[int]] = []
    made = generate(
        predictor(), known, SEEDS, PLAIN, mask_id=MASK, on_tokens=lambda _, hidden, __: seen.append(hidden.sum(1).tolist())
    )
    assert [list(counts) for counts in zip(*seen, strict=True)] == [hidden_counts(n, 5) for n in (0, 1, N - 4)]
    assert made[known != MASK].equal(known[known != MASK]), "what is known stays"
    assert made.max() < V
    assert made[0].tolist() == [3] * N


@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_a_predictor_that_knows_the_answer_recovers_it(steps: int) -> None:
    answer = torch.randint(V, (3, N), generator=torch.Generator().manual_seed(1))
    sure = torch.nn.functional.one_hot(answer, V) * 50.0
    assert generate(lambda _: sure, HIDDEN, SEEDS, Sampling(guidance=1.0, steps=steps), mask_id=MASK).equal(answer)


def test_a_picture_depends_on_its_seed_alone() -> None:
    whole = generate(predictor(), HIDDEN, SEEDS, PLAIN, mask_id=MASK)
    for row, seed in enumerate(SEEDS):
        assert generate(predictor(), HIDDEN[:1], [seed], PLAIN, mask_id=MASK).equal(whole[row : row + 1])
    assert generate(predictor(), HIDDEN, SEEDS[::-1], PLAIN, mask_id=MASK).equal(whole.flip(0))
    assert len(whole.unique(dim=0)) == 3, "other seeds, other pictures"


def test_guidance_mixes_the_logits_of_every_step() -> None:
    with_text, without = predictor(0), predictor(1)

    def mixed(ids: Tensor) -> Tensor:
        return without(ids) + 3.0 * (with_text(ids) - without(ids))

    guided = generate(conditioned(with_text, without, 3), HIDDEN, SEEDS, Sampling(guidance=3.0, steps=5), mask_id=MASK)
    assert guided.equal(generate(mixed, HIDDEN, SEEDS, PLAIN, mask_id=MASK))
    assert not guided.equal(generate(with_text, HIDDEN, SEEDS, PLAIN, mask_id=MASK))


@pytest.mark.parametrize(
    ("interval", "ramp", "scales"),
    [
        ((0.0, 1.0), False, [3, 3, 3, 3, 3]),
        ((0.25, 0.5), False, [1, 3, 3, 1, 1]),
        ((0.0, 1.0), True, [1, 1.5, 2, 2.5, 3]),
        ((0.5, 1.0), True, [1, 1, 2, 2.5, 3]),
    ],
)
def test_scale_of_each_step_and_no_second_half_without_guidance(
    interval: tuple[float, float], ramp: bool, scales: list[float]
) -> None:
    rows: list[int] = []
    steps = iter(scales)
    with_text, without = predictor(0), predictor(1)

    def counted(ids: Tensor) -> Tensor:
        rows.append(len(ids))
        return conditioned(with_text, without, 3)(ids)

    def mixed(ids: Tensor) -> Tensor:
        return without(ids) + next(steps) * (with_text(ids) - without(ids))

    sampling = Sampling(guidance=3.0, guidance_interval=interval, guidance_ramp=ramp, steps=5)
    made = generate(counted, HIDDEN, SEEDS, sampling, mask_id=MASK)
    assert rows == [3 if scale == 1 else 6 for scale in scales]
    assert made.equal(generate(mixed, HIDDEN, SEEDS, PLAIN, mask_id=MASK))


def test_temperature_top_k_and_top_p_reach_the_draw() -> None:
    logits = torch.randn(3, N, V, generator=torch.Generator().manual_seed(0))
    greedy = generate(lambda _: logits, HIDDEN, SEEDS, Sampling(guidance=1.0, temperature=0.0), mask_id=MASK)
    assert greedy.equal(logits.argmax(-1))
    few = generate(lambda _: logits, HIDDEN, SEEDS, Sampling(guidance=1.0, top_k=2), mask_id=MASK)
    assert (few[..., None] == logits.topk(2).indices).any(-1).all()
    assert not few.equal(greedy)
    assert generate(lambda _: logits, HIDDEN, SEEDS, Sampling(guidance=1.0, top_p=1e-6), mask_id=MASK).equal(greedy)


def test_nothing_that_is_handed_in_or_out_is_shared() -> None:
    known, predict = HIDDEN.clone(), predictor()
    expected = generate(predict, known, SEEDS, PLAIN, mask_id=MASK)
    assert known.equal(HIDDEN)

    def careless(ids: Tensor) -> Tensor:
        logits = predict(ids)
        ids.zero_()
        return logits

    def careless_receiver(ids: Tensor, hidden: Tensor, progress: float) -> None:
        ids.zero_()
        hidden.zero_()
        progressed.append(progress)

    progressed: list[float] = []
    made = generate(careless, known, SEEDS, PLAIN, mask_id=MASK, on_tokens=careless_receiver)
    assert made.equal(expected)
    assert known.equal(HIDDEN)
    assert progressed == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_impossible_requests_are_one_line() -> None:
    with pytest.raises(UserError, match="steps is 0; take at least 1"):
        generate(predictor(), HIDDEN, SEEDS, Sampling(steps=0), mask_id=MASK)
    with pytest.raises(UserError, match="2 seeds for 3 pictures"):
        generate(predictor(), HIDDEN, SEEDS[:2], PLAIN, mask_id=MASK)


def test_nothing_hidden_is_nothing_to_do() -> None:
    known = torch.zeros(3, N, dtype=torch.int64)
    assert generate(predictor(), known, SEEDS, Sampling(), mask_id=MASK).equal(known)
