"""The loader: same batches whoever loads them, exact resume, exact counts, clear refusals."""

import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter

import pytest
import torch

from mm.data.accounting import Accounting, merge_states
from mm.data.loader import Loader
from mm.errors import BadSample, UserError
from mm.seeding import generator
from mm.types import Batch, Sample


class Numbers:
    """A source of numbered samples, some of which cannot be read."""

    name = "numbers"

    def __init__(self, size, bad=(), fingerprint="numbers", shares=None):
        self.size, self.bad, self.fingerprint, self.shares = size, frozenset(bad), fingerprint, shares

    def __len__(self):
        return self.size

    def key(self, index):
        return str(index)

    def fields(self, index):
        return {"concept": index % 13}

    def read(self, index):
        if index in self.bad:
            raise BadSample("odd" if index % 2 else "even", f"number {index}")
        return Sample(str(index), {}, (f"text {index}",), self.fields(index))


def prepare(sample, visit):
    return sample.id, sample.fields, int(generator(7, visit, sample.id, "pixels").integers(1 << 30))


def collate(items, epoch):
    image = torch.tensor([[[[noise % 256]]] for _, _, noise in items], dtype=torch.uint8).expand(-1, 3, 2, 2)
    groups = torch.tensor([noise for _, _, noise in items])
    return Batch(tuple(id for id, _, _ in items), image=image, groups=groups, fields=tuple(fields for _, fields, _ in items))


def loader(source=None, **options):
    return Loader(Numbers(103) if source is None else source, prepare, collate, **{"batch_size": 8, "seed": 1, **options})


def content(batches):
    return [(batch.ids, batch.groups.tolist()) for batch in batches]


def take(stream, count):
    return content(itertools.islice(stream, count))


POLICIES = [
    {},
    {"policy": "distinct", "field": "concept"},
    {"policy": "several", "field": "concept", "tail": "short"},
    {"shuffle": False, "tail": "short"},
]


@pytest.mark.fault(4)
@pytest.mark.parametrize("options", POLICIES)
def test_batches_do_not_depend_on_the_number_of_workers(options):
    streams = [loader(Numbers(103, bad=(3, 50, 77)), workers=workers, **options) for workers in (0, 1, 2)]
    taken = [take(stream, 30) for stream in streams]
    assert taken[0] == taken[1] == taken[2]
    assert streams[0].state() == streams[1].state() == streams[2].state()


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    take(loader(workers=1), 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.fault(13)
@pytest.mark.parametrize("options", [*POLICIES, {"workers": 2}])
def test_resume_at_any_batch(options):
    source = Numbers(40, bad=(3, 4))
    whole = loader(source, **options)
    expected, states = [], [whole.state()]
    for batch in itertools.islice(whole, 14):
        expected += content([batch])
        states.append(json.loads(json.dumps(whole.state())))
    positions = range(0, 14, 4) if options.get("workers") else range(14)
    for position in positions:
        resumed = loader(source, **options)
        resumed.restore(states[position])
        assert take(resumed, 14 - position) == expected[position:]
        assert resumed.state() == states[14]


def test_a_signal_to_all_processes_of_a_job_does_not_end_the_workers():
    """Some schedulers signal every process, not only the main one, which is to save and stop in its own time."""
    expected = take(loader(), 12)
    others = {child.pid for child in multiprocessing.active_children()}
    stream = iter(loader(workers=2))
    found = [next(stream)]
    workers = [child for child in multiprocessing.active_children() if child.pid not in others]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    found += list(itertools.islice(stream, 11))
    assert content(found) == expected
    stream.close()
    assert not any(worker.is_alive() for worker in workers)


def test_a_second_iterator_continues():
    one, two = loader(), loader()
    expected = take(one, 9)
    assert take(two, 4) + take(two, 5) == expected


def test_prefetched_batches_do_not_count():
    stream = loader(workers=2)
    next(iter(stream))
    assert stream.state()["cursor"] == 1
    assert stream.accounting.delivered == 8


@pytest.mark.fault(9)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_global_batch_and_their_counts_add_up(world_size):
    source = Numbers(103, bad=(3, 4, 5, 50, 101))
    single = loader(source)
    expected = content(single.one_epoch())
    ranks = [loader(source, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [content(rank.one_epoch()) for rank in ranks]
    joined = [
        (sum((part[k][0] for part in parts), ()), [group for part in parts for group in part[k][1]])
        for k in range(len(expected))
    ]
    assert joined == expected
    merged = merge_states([rank.state() for rank in ranks])
    assert Accounting.from_dict(merged["accounting"]).balanced
    total = Accounting.from_dict(merged["accounting"])
    assert (total.delivered, total.skipped, total.tail, total.causes) == (
        single.accounting.delivered,
        single.accounting.skipped,
        single.accounting.tail,
        single.accounting.causes,
    )


@pytest.mark.fault(3)
def test_another_number_of_ranks_continues_the_same_batches_and_counts():
    source = Numbers(60, bad=(3, 4))
    single = loader(source)
    expected = take(single, 10)
    pair = [loader(source, rank=rank, world_size=2) for rank in range(2)]
    for rank in pair:
        take(rank, 4)
    state = merge_states([rank.state() for rank in pair])
    resumed = loader(source)
    resumed.restore(state)
    assert take(resumed, 6) == expected[4:]
    assert resumed.accounting == single.accounting
    again = [loader(source, rank=rank, world_size=2) for rank in range(2)]
    for rank in again:
        rank.restore(state)
        take(rank, 6)
    assert Accounting.from_dict(merge_states([rank.state() for rank in again])["finished"]) == single._finished


def test_states_of_ranks_at_different_positions_are_not_merged():
    first, second = loader(rank=0, world_size=2), loader(rank=1, world_size=2)
    take(first, 1)
    with pytest.raises(UserError, match="rank 1 is at another position"):
        merge_states([first.state(), second.state()])


@pytest.mark.parametrize("tail", ["drop", "short"])
@pytest.mark.parametrize("substitute", [True, False])
def test_accounting_of_an_epoch_is_exact(tail, substitute):
    bad = (0, 1, 2, 5, 9)
    stream = loader(Numbers(103, bad=bad), tail=tail, substitute=substitute, shuffle=False)
    batches = list(stream.one_epoch())
    counts = stream.accounting
    assert counts.balanced
    assert counts.causes == {"even": 2, "odd": 3}
    assert counts.examples == {"even": "number 0", "odd": "number 1"}
    assert counts.tail == (7 if tail == "drop" else 0)
    assert counts.substituted == (5 if substitute else 0)
    assert sum(map(len, batches)) == counts.delivered + counts.substituted
    assert not {id for batch in batches for id in batch.ids} & set(map(str, bad))


def test_counts_of_several_epochs_add_up():
    stream = loader(Numbers(40, bad=(3,)))
    take(stream, 12)
    assert stream.epoch == 2
    assert stream.total.indexed == 120
    assert stream.total.delivered == 5 * 8 * 2 + 2 * 8 - stream.total.skipped
    assert stream.total.causes == {"odd": stream.total.skipped}


def test_a_substitute_keeps_the_values_of_a_batch_apart():
    source = Numbers(130, bad=range(0, 130, 9))
    for batch in loader(source, policy="distinct", field="concept").one_epoch():
        assert len({fields["concept"] for fields in batch.fields}) == 8


def test_a_repeated_sample_is_prepared_differently():
    stream = loader(Numbers(20, shares=[(16, 1.0), (4, 4.0)]), batch_size=10)
    noise = [pair for ids, groups in content(stream.one_epoch()) for pair in zip(ids, groups, strict=True)]
    assert max(Counter(id for id, _ in noise).values()) >= 4
    assert len(set(noise)) == 20
    assert stream.accounting.repeated == 20 - stream.accounting.delivered
    assert stream.accounting.balanced


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 104}, "103 samples do not fill a batch of 104; set the batch size to 103 or less"),
        ({"policy": "distinct", "field": "concept", "batch_size": 14}, "set the batch size to 13 or less"),
        ({"policy": "distinct", "field": "concpt"}, "no field 'concpt'; did you mean 'concept'"),
        ({"policy": "several", "field": "concept", "batch_size": 9}, "multiple of the 2"),
        ({"world_size": 9}, "smaller than the number of processes"),
        ({"source": Numbers(0)}, "no samples"),
    ],
)
def test_what_cannot_work_is_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        loader(**options)


def test_a_source_smaller_than_a_batch_comes_as_a_short_one():
    stream = loader(Numbers(3), tail="short")
    assert [len(ids) for ids, _ in take(stream, 4)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "made with seed 1 and this run has 2"),
        ({"batch_size": 4}, "batch size 8 and this run has 4"),
        ({"source": Numbers(103, fingerprint="other")}, "data fingerprint numbers"),
        ({"policy": "distinct", "field": "concept"}, "another order"),
    ],
)
def test_the_state_of_another_run_is_refused(change, message):
    stream = loader()
    take(stream, 3)
    with pytest.raises(UserError, match=message):
        loader(**change).restore(stream.state())
