"""Masking, matching and alignment against their definitions by brute force."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment, linprog
from torch import Tensor, nn

from mm.losses.alignment import transport_plan, word_patch_alignment
from mm.losses.masked import MaskedTokens, hide_words, mask_tokens, masked_cross_entropy
from mm.losses.matching import derangement, draw_negatives, half_mismatched, matching_loss, random_candidates, ranking_loss
from mm.types import TextBatch

VOCAB, MASK_ID = 50, 50


def text(rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and which of them are words: not the first, not the last two."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    maskable = torch.ones(rows, length, dtype=torch.bool)
    maskable[:, [0, -2, -1]] = False
    return ids, maskable


def test_shares_of_hidden_replaced_and_kept_tokens() -> None:
    torch.manual_seed(0)
    ids, maskable = text(2000, 43)
    before = ids.clone()
    masked = mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB)
    assert torch.equal(ids, before)
    assert torch.equal(masked.targets, ids)
    assert not (masked.chosen & ~maskable).any()
    assert torch.equal(masked.ids[~masked.chosen], ids[~masked.chosen])
    assert float(masked.chosen.sum() / maskable.sum()) == pytest.approx(0.15, abs=0.005)
    changed, original = masked.ids[masked.chosen], ids[masked.chosen]
    hidden, kept = changed == MASK_ID, changed == original
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float(kept.float().mean()) == pytest.approx(0.1 + 0.1 / VOCAB, abs=0.02)
    replacements = changed[~hidden]
    assert replacements.min() >= 0
    assert replacements.max() < VOCAB


def test_masking_follows_the_global_seed() -> None:
    ids, maskable = text(4, 12)
    torch.manual_seed(3)
    one = mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB)
    torch.manual_seed(3)
    other = mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB)
    assert torch.equal(one.ids, other.ids)
    assert not torch.equal(one.ids, mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB).ids)


def test_every_row_has_a_chosen_token_unless_it_has_no_words() -> None:
    ids, maskable = text(500, 5)
    maskable[0] = False
    chosen = mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB, rate=1e-6).chosen
    assert chosen.sum(1).tolist() == [0, *[1] * 499]
    assert 0 < int(chosen[:, 1].sum()) < 499  # not always the same one


def test_whole_words_are_chosen() -> None:
    torch.manual_seed(0)
    ids, maskable = text(2000, 13)
    words = torch.tensor([0, 1, 1, 1, 2, 3, 3, 4, 5, 6, 6, 7, 7]).expand(2000, -1)
    masked = mask_tokens(ids, maskable, mask_id=MASK_ID, vocab_size=VOCAB, words=words)
    for word in range(1, 7):
        members = masked.chosen[:, (words[0] == word) & maskable[0]]
        assert torch.equal(members.any(1), members.all(1))
    partly = (masked.ids == MASK_ID)[:, 1:4].sum(1)
    assert {1, 2, 3} <= set(partly.tolist())  # what becomes of its tokens is drawn for each


def test_words_of_texts_are_hidden_whole_at_the_rate_of_words() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([9, 6, 3, 2]).repeat(20_000)
    ids = torch.randint(3, VOCAB, (len(lengths), 9))
    words = torch.tensor([0, 0, 0, 1, 2, 2, 2, 3, 0]).expand(len(ids), -1)  # the start has the number of the first word
    text = TextBatch(ids, lengths, words)
    masked = hide_words(text, VOCAB, rate=0.3, whole=True)
    assert not masked.chosen[~text.inner()].any()
    for word, places in enumerate(([1, 2], [3], [4, 5, 6], [7])):
        members = masked.chosen[:, places]
        whole = text.inner()[:, places].all(1)
        assert torch.equal(members[whole].any(1), members[whole].all(1)), word
    four = masked.chosen[lengths == 9][:, [1, 3, 4, 7]].float()
    at_least_one = 0.7**4 / 4  # where none would be hidden, one of the four is
    assert four.mean(0).tolist() == pytest.approx([0.3 + at_least_one] * 4, abs=0.015)
    hidden = (masked.ids == MASK_ID) & masked.chosen
    assert float(hidden.sum() / masked.chosen.sum()) == pytest.approx(0.8, abs=0.02)


def test_tokens_are_hidden_one_by_one_unless_words_are_asked_for() -> None:
    text = TextBatch(torch.arange(3, 43).view(4, 10), torch.full((4,), 10), torch.zeros(4, 10, dtype=torch.int64))
    for words in (text.words, None):
        torch.manual_seed(0)
        masked = hide_words(replace(text, words=words), VOCAB, rate=0.4)
        torch.manual_seed(0)
        expected = mask_tokens(text.ids, text.inner(), mask_id=VOCAB, vocab_size=VOCAB, rate=0.4)
        assert torch.equal(masked.ids, expected.ids)
    with pytest.raises(ValueError, match="which tokens make a word"):
        hide_words(replace(text, words=None), VOCAB, whole=True)


def test_masked_cross_entropy_is_that_of_the_chosen_positions() -> None:
    torch.manual_seed(0)
    features, head = torch.randn(3, 6, 8, requires_grad=True), nn.Linear(8, VOCAB)
    ids = torch.randint(0, VOCAB, (3, 6))
    chosen = torch.rand(3, 6) < 0.4
    found = masked_cross_entropy(features, MaskedTokens(ids, ids, chosen), head)
    terms = [-head(features[b, t]).log_softmax(-1)[ids[b, t]] for b, t in chosen.nonzero().tolist()]
    torch.testing.assert_close(found, torch.stack(terms).mean())
    found.backward()
    assert features.grad is not None
    assert not features.grad[~chosen].any()
    nothing = masked_cross_entropy(features, MaskedTokens(ids, ids, torch.zeros_like(chosen)), head)
    nothing.backward()
    assert float(nothing.detach()) == 0


def test_distilled_words_have_soft_targets() -> None:
    torch.manual_seed(0)
    features, head, teacher = torch.randn(2, 5, 8), nn.Linear(8, VOCAB), torch.randn(10, VOCAB, requires_grad=True)
    ids, chosen = torch.randint(0, VOCAB, (2, 5)), torch.rand(2, 5) < 0.6
    masked, teacher = MaskedTokens(ids, ids, chosen), teacher[: int(chosen.sum())]
    found = masked_cross_entropy(features, masked, head, teacher=teacher, alpha=0.4)
    terms = []
    for (b, t), lesson in zip(chosen.nonzero().tolist(), teacher, strict=True):
        target = 0.4 * lesson.softmax(0) + 0.6 * F.one_hot(ids[b, t], VOCAB)
        terms.append(-(target * head(features[b, t]).log_softmax(0)).sum())
    torch.testing.assert_close(found, torch.stack(terms).mean())
    assert torch.autograd.grad(found, teacher, allow_unused=True) == (None,)
    plain = masked_cross_entropy(features, masked, head)
    torch.testing.assert_close(masked_cross_entropy(features, masked, head, teacher=teacher, alpha=0.0), plain)


GROUPS = [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 3], [5, 5, 5, 1, 2, 2], [7, 7, 7, 7, 1, 2], [4, 4, 4], [9], [0, 1]]


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_derangements_pair_with_other_groups_as_often_as_possible(groups: list[int]) -> None:
    torch.manual_seed(0)
    size = len(groups)
    permutations = [list(enumerate(permutation)) for permutation in itertools.permutations(range(size))]
    moved = [{(i, j) for i, j in pairs if groups[i] != groups[j]} for pairs in permutations]
    best = max(map(len, moved))
    seen = set()
    for _ in range(60):
        partner, matched = derangement(torch.tensor(groups))
        assert sorted(partner.tolist()) == list(range(size))
        assert matched.tolist() == [groups[i] == groups[j] for i, j in enumerate(partner.tolist())]
        assert int((~matched).sum()) == best
        seen |= {(i, j) for i, j in enumerate(partner.tolist()) if groups[i] != groups[j]}
    assert seen == set().union(*(pairs for pairs in moved if len(pairs) == best))


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_half_of_the_pairs_are_mismatched_where_that_is_possible(groups: list[int]) -> None:
    torch.manual_seed(0)
    size = len(groups)
    for _ in range(30):
        partner, matched = half_mismatched(torch.tensor(groups))
        for i, (j, match) in enumerate(zip(partner.tolist(), matched.tolist(), strict=True)):
            assert match == (i == j) == (groups[i] == groups[j])
        wrong = int((~matched).sum())
        assert wrong <= size // 2
        if len(set(groups)) == size:
            assert wrong == size // 2


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_hard_negatives_are_never_of_the_same_group(groups: list[int]) -> None:
    torch.manual_seed(0)
    numbers = torch.tensor(groups)
    logits = torch.randn(len(groups), len(groups)).fill_diagonal_(100)
    for _ in range(30):
        rows, valid = draw_negatives(logits, numbers)
        assert valid.tolist() == [any(other != group for other in groups) for group in groups]
        assert (numbers[rows] != numbers)[valid].all()


def test_hard_negatives_are_drawn_by_the_softmax_of_the_others() -> None:
    torch.manual_seed(0)
    groups, logits = torch.tensor([0, 0, 1, 2, 3]), torch.randn(5, 5)
    draws = torch.stack([draw_negatives(logits, groups).rows for _ in range(4000)])
    for row in range(5):
        expected = logits[row].masked_fill(groups == groups[row], -torch.inf).softmax(0)
        shares = (draws[:, row, None] == torch.arange(5)).float().mean(0)
        torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    extreme = torch.tensor([[500.0, -300.0, -900.0], [0.0, 0.0, 0.0], [-1e30, 1e30, 0.0]])  # softmaxes that underflow
    rows, valid = draw_negatives(extreme, torch.arange(3))
    assert rows[[0, 2]].tolist() == [1, 1]
    assert valid.all()


def test_matching_loss_is_the_two_way_softmax() -> None:
    logits, matched = torch.randn(6), torch.tensor([True, False, True, True, False, False])
    expected = F.cross_entropy(torch.stack([torch.zeros(6), logits], 1), matched.long())
    torch.testing.assert_close(matching_loss(logits, matched), expected)


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_candidates_are_the_row_itself_and_different_others(groups: list[int]) -> None:
    torch.manual_seed(0)
    rows, valid = random_candidates(torch.tensor(groups), 3)
    assert rows.shape == (len(groups), min(4, len(groups)))
    assert rows[:, 0].tolist() == list(range(len(groups)))
    for i, (own_rows, own_valid) in enumerate(zip(rows.tolist(), valid.tolist(), strict=True)):
        others = [j for j, ok in zip(own_rows[1:], own_valid[1:], strict=True) if ok]
        assert all(groups[j] != groups[i] for j in others)
        assert len(set(others)) == len(others) == min(3, sum(group != groups[i] for group in groups))


def test_ranking_loss_ignores_what_is_no_negative() -> None:
    logits = torch.randn(2, 4, requires_grad=True)
    loss = ranking_loss(logits, torch.tensor([[True, True, False, True], [True, False, False, False]]))
    torch.testing.assert_close(loss, -logits[0, [0, 1, 3]].log_softmax(0)[0] / 2)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def exact(cost: np.ndarray) -> float:
    """The least cost of moving equal masses, as a linear programme."""
    rows, columns = cost.shape
    sums = np.concatenate([np.kron(np.eye(rows), np.ones(columns)), np.kron(np.ones(rows), np.eye(columns))])
    masses = np.concatenate([np.full(rows, 1 / rows), np.full(columns, 1 / columns)])
    return linprog(cost.ravel(), A_eq=sums, b_eq=masses).fun


@pytest.mark.parametrize(("num_words", "num_patches"), [(1, 5), (3, 7), (6, 4), (5, 5)])
def test_the_plan_tends_to_optimal_transport(num_words: int, num_patches: int) -> None:
    cost = torch.rand(1, num_words, num_patches, generator=torch.Generator().manual_seed(num_words)).double() * 2
    masks = torch.ones(1, num_words, dtype=torch.bool), torch.ones(1, num_patches, dtype=torch.bool)
    costs = []
    for iterations in (5, 50, 2000):
        plan = transport_plan(cost, *masks, iterations=iterations)
        torch.testing.assert_close(plan.sum(1), torch.full((1, num_patches), 1 / num_patches).double())
        costs.append(float((plan * cost).sum()))
    torch.testing.assert_close(plan.sum(2), torch.full((1, num_words), 1 / num_words).double(), atol=1e-3, rtol=0)
    best = exact(cost[0].numpy())
    assert costs[2] == pytest.approx(best, abs=1e-3)
    assert costs[1] == pytest.approx(best, abs=0.05)


def test_the_plan_of_as_many_words_as_patches_is_the_best_assignment() -> None:
    cost = torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(4)) * 2
    ones = torch.ones(1, 6, dtype=torch.bool)
    plan = transport_plan(cost, ones, ones, iterations=3000)[0]
    _, columns = linear_sum_assignment(cost[0].numpy())
    assert plan.argmax(1).tolist() == columns.tolist()
    torch.testing.assert_close(plan.amax(1), torch.full((6,), 1 / 6), atol=1e-3, rtol=0)


def test_alignment_is_the_same_whatever_the_padding() -> None:
    torch.manual_seed(0)
    words, patches = torch.randn(3, 6, 8, requires_grad=True), torch.randn(3, 9, 8)
    lengths = torch.tensor([6, 2, 0])
    word_mask, patch_mask = torch.arange(6) < lengths[:, None], torch.ones(3, 9, dtype=torch.bool)
    patch_mask[1, 4:] = False
    found = word_patch_alignment(words, patches, word_mask, patch_mask)
    whole = word_patch_alignment(words[:1], patches[:1], word_mask[:1], patch_mask[:1])
    cut = word_patch_alignment(words[1:2, :2], patches[1:2, :4], word_mask[1:2, :2], patch_mask[1:2, :4])
    torch.testing.assert_close(found, torch.cat([whole, cut, torch.zeros(1)]))
    found.sum().backward()
    assert words.grad is not None
    assert words.grad.isfinite().all()
    assert not words.grad[~word_mask].any()
    assert words.grad[word_mask].any(1).all()


def test_alignment_of_equal_features_is_free_and_of_opposite_ones_dearest() -> None:
    words = torch.eye(4)[None]
    mask = torch.ones(1, 4, dtype=torch.bool)
    aligned = word_patch_alignment(words, words.flip(1), mask, mask, iterations=500)
    assert float(aligned) == pytest.approx(0, abs=1e-3)
    ones = torch.ones(1, 4, 8)
    assert float(word_patch_alignment(ones, -ones, mask, mask)) == pytest.approx(2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(word_patch_alignment(words, words.flip(1), mask, mask, iterations=500), aligned)
