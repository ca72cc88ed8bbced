"""The order of an epoch: a pure function, complete, and true to its sampling policy."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from mm.data.order import epoch_order, rank_slice
from mm.errors import UserError

GOLDEN_PLAIN = [0, 4, 3, 1, 6, 7, 2, 5]
GOLDEN_DISTINCT = [3, 4, 6, 0, 7, 2, 5, 1]
FIXED = {"seed": 3, "epoch": 2, "fingerprint": "abc"}


def batches(order):
    return [order.indices[order.slots(number)] for number in range(len(order))]


def test_plain_visits_every_sample_once():
    order = epoch_order(103, 10, **FIXED, tail="short")
    assert sorted(order.indices) == list(range(103))
    assert [len(batch) for batch in batches(order)] == [10] * 10 + [3]
    assert order.tail == 0
    dropped = epoch_order(103, 10, **FIXED)
    assert len(dropped) == 10
    assert dropped.tail == 3
    assert np.array_equal(dropped.indices, order.indices[:100])


def test_same_arguments_same_order_and_each_argument_matters():
    order = epoch_order(50, 5, **FIXED)
    assert order.digest == epoch_order(50, 5, **FIXED).digest
    for change in ({"seed": 4}, {"epoch": 3}, {"fingerprint": "abd"}):
        assert order.digest != epoch_order(50, 5, **{**FIXED, **change}).digest
    assert not np.array_equal(order.indices, np.arange(50))


def test_the_order_is_the_same_as_when_this_test_was_written():
    assert epoch_order(8, 4, seed=0, epoch=0, fingerprint="golden").indices.tolist() == GOLDEN_PLAIN
    codes = np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert epoch_order(8, 4, seed=0, epoch=0, fingerprint="golden", codes=codes).indices.tolist() == GOLDEN_DISTINCT


def test_without_shuffling_the_source_order_is_kept():
    order = epoch_order(7, 3, **FIXED, shuffle=False, tail="short")
    assert order.indices.tolist() == list(range(7))
    assert order.offsets.tolist() == [0, 3, 6, 7]


counts_and_batch = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 8), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(counts_and_batch, st.integers(0, 5), st.sampled_from(["drop", "short"]))
def test_no_batch_holds_more_of_a_value_than_asked_for(case, seed, tail):
    counts, values_per_batch, per_value = case
    codes = np.repeat(np.arange(len(counts)), counts)
    codes = np.random.default_rng(seed).permutation(codes)
    batch_size = values_per_batch * per_value
    order = epoch_order(
        len(codes), batch_size, seed=seed, epoch=1, fingerprint="f", codes=codes, per_value=per_value, tail=tail
    )
    for batch in batches(order):
        assert set(np.unique(codes[batch], return_counts=True)[1].tolist()) == {per_value}
    if tail == "drop":
        assert all(len(batch) == batch_size for batch in batches(order))
    else:
        assert order.tail == 0
    first_visits = order.indices[order.visits == 0]
    assert len(first_visits) == len(set(first_visits.tolist())) == len(codes) - order.tail
    if per_value == 1:
        assert (order.visits == 0).all()


def test_distinct_reaches_the_largest_possible_number_of_batches():
    codes = np.repeat(np.arange(6), [10, 10, 1, 1, 1, 1])
    order = epoch_order(len(codes), 3, **FIXED, codes=codes)
    assert len(order) == 4  # of every three samples, one must be of the four rare values
    assert epoch_order(40, 4, **FIXED, codes=np.arange(40) % 4).tail == 0


def test_which_values_meet_changes_from_batch_to_batch():
    """Dealing must not keep the same companions together: of 40 values with 10 samples, two meet in 2.4 batches on average."""
    codes = np.arange(400) % 40
    together = np.zeros((40, 40))
    for batch in batches(epoch_order(400, 10, **FIXED, codes=codes)):
        together[np.ix_(codes[batch], codes[batch])] += 1
    assert together[~np.eye(40, dtype=bool)].max() <= 8


def test_several_completes_rare_values_with_repeats():
    codes = np.array([0] * 5 + [1] * 1 + [2] * 2)
    order = epoch_order(8, 2, **FIXED, codes=codes, per_value=2, tail="short")
    assert sorted(order.indices[order.visits == 0]) == list(range(8))
    assert (order.visits > 0).sum() == 2  # one for value 0, one for value 1


def test_mixture_takes_its_shares_and_walks_through_each_source():
    shares = [(100, 1.0), (20, 3.0)]
    seen = []
    for epoch in range(4):
        order = epoch_order(120, 12, seed=0, epoch=epoch, fingerprint="f", shares=shares)
        large = order.indices[order.indices < 100]
        assert len(large) == 30
        assert order.tail == 120 - len(set(order.indices.tolist()))
        seen += large.tolist()
    assert len(set(seen)) == 100  # 4 epochs of 30 see all 100 once before any comes again
    small = order.indices[order.indices >= 100]
    assert set(np.bincount(small)[100:].tolist()) <= {4, 5}
    assert order.visits.max() == np.bincount(order.indices).max() - 1


def test_mixture_and_distinct_values_together():
    codes = np.arange(60) % 10
    order = epoch_order(60, 5, **FIXED, shares=[(40, 1.0), (20, 1.0)], codes=codes)
    assert all(len(set(codes[batch].tolist())) == 5 for batch in batches(order))


def test_mixture_part_that_would_never_be_seen_is_refused():
    with pytest.raises(UserError, match="mixture part 2"):
        epoch_order(20, 5, **FIXED, shares=[(10, 1.0), (10, 1e-6)])


def test_batch_size_must_fit_several():
    with pytest.raises(UserError, match="multiple of the 2"):
        epoch_order(20, 5, **FIXED, codes=np.arange(20) % 4, per_value=2)


@given(st.integers(0, 40), st.integers(1, 9))
def test_rank_slices_join_to_the_whole_batch(length, world_size):
    parts = [list(range(length))[rank_slice(length, rank, world_size)] for rank in range(world_size)]
    assert [slot for part in parts for slot in part] == list(range(length))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
