"""Damaged pictures, broken sources and dying workers: exact counts, or a clear end; never a hang."""

import collections
import gc
import io
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from mm.data.loader import Loader
from mm.data.sources import open_source
from mm.errors import BadSample, DataError, UserError
from mm.media.image import decode_image
from mm.types import Batch, Sample


def picture(seed):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "unknown format": lambda data: b"<html><body>404 Not Found</body></html>",
    "empty": lambda data: b"",
}


@pytest.fixture
def damaged(tmp_path):
    """300 pictures with a table; 5 % are damaged, five in each of three ways, and two more are missing."""
    lines = ["image,text"]
    for i in range(300):
        data = picture(i)
        if i % 20 == 7:
            data = list(DAMAGE.values())[i // 20 % 3](data)
        (tmp_path / f"{i}.jpg").write_bytes(data)
        lines.append(f"{i}.jpg,picture number {i}")
    (tmp_path / "table.csv").write_text("\n".join([*lines, "gone1.jpg,a", "gone2.jpg,b"]))
    return tmp_path / "table.csv"


EXPECTED_CAUSES = {"truncated": 5, "unknown format": 5, "empty": 5, "missing file": 2}


def prepare(sample, visit):
    decode_image(sample.media["image"], where=sample.id)
    return sample.id


def collate(items, epoch):
    return Batch(tuple(items), image=torch.zeros(len(items), 3, 1, 1, dtype=torch.uint8))


@pytest.mark.fault(5)
@pytest.mark.parametrize("workers", [0, 2])
def test_five_percent_damaged_pictures(damaged, workers):
    stream = Loader(open_source(str(damaged)), prepare, collate, batch_size=32, seed=0, workers=workers, tail="short")
    batches = list(stream.one_epoch())
    counts = stream.accounting
    assert counts.causes == EXPECTED_CAUSES
    assert (counts.delivered, counts.skipped, counts.tail, counts.indexed) == (285, 17, 0, 302)
    assert counts.balanced
    assert counts.substituted == 17
    assert [len(batch) for batch in batches] == [32] * 9 + [14]


@pytest.mark.fault(5)
def test_ranks_together_count_each_damaged_picture_once(damaged):
    causes, delivered = {}, 0
    for rank in range(3):
        stream = Loader(
            open_source(str(damaged)), prepare, collate, batch_size=32, seed=0, rank=rank, world_size=3, tail="short"
        )
        for _ in stream.one_epoch():
            pass
        delivered += stream.accounting.delivered
        for cause, count in stream.accounting.causes.items():
            causes[cause] = causes.get(cause, 0) + count
    assert causes == EXPECTED_CAUSES
    assert delivered == 285


@pytest.mark.fault(5)
def test_too_many_damaged_pictures_end_the_run(damaged):
    stream = Loader(open_source(str(damaged)), prepare, collate, batch_size=32, seed=0, max_bad_fraction=0.03)
    with pytest.raises(DataError, match="too many samples cannot be used") as error:
        for _ in stream:
            pass
    assert "mm data check" in str(error.value)
    assert "missing file 2" in str(error.value) or "truncated" in str(error.value)


class Broken:
    """A source whose samples are all bad, or that fails as a whole."""

    name, fingerprint = "broken", "broken"

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 50

    def key(self, index):
        return str(index)

    def fields(self, index):
        return {}

    def read(self, index):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_usable_at_all(workers):
    stream = Loader(Broken(BadSample("truncated", "x")), prepare, collate, batch_size=4, seed=0, workers=workers)
    with pytest.raises(DataError, match="broken: no usable sample found after"):
        next(iter(stream))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_user_error_comes_through_a_worker_as_it_is(workers):
    stream = Loader(
        Broken(UserError("shard 3 is damaged at byte 512")), prepare, collate, batch_size=4, seed=0, workers=workers
    )
    with pytest.raises(UserError, match=r"^shard 3 is damaged at byte 512$"):
        next(iter(stream))


class Endless:
    """A source that can be told to stop answering."""

    name, fingerprint = "endless", "endless"

    def __init__(self, hang=False):
        self.hang = hang

    def __len__(self):
        return 64

    def key(self, index):
        return str(index)

    def fields(self, index):
        return {}

    def read(self, index):
        if self.hang:
            time.sleep(60)
        return Sample(str(index), {}, (str(os.getpid()),))


def prepare_pid(sample, visit):
    return sample.texts[0]


@pytest.fixture
def no_collection():
    """An error that a signal raises while the garbage collector calls back would be swallowed by it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.fault(10)
@pytest.mark.parametrize("moment", ["while waiting", "while training"])
def test_a_killed_worker_is_an_error_not_a_hang(moment, no_collection):
    stream = Loader(Endless(), prepare_pid, collate, batch_size=4, seed=0, workers=2)
    batches = iter(stream)
    worker = int(next(batches).ids[0])
    started = time.monotonic()

    def kill_and_go_on():
        os.kill(worker, signal.SIGKILL)
        while moment == "while training" and time.monotonic() < started + 30:
            time.sleep(0.01)
        collections.deque(batches, maxlen=0)

    with pytest.raises(DataError, match=r"a data worker died .*data\.workers"):
        kill_and_go_on()
    assert time.monotonic() - started < 20


@pytest.mark.fault(10)
@pytest.mark.parametrize("way", ["it reads for ever", "it is stopped"])
def test_a_worker_that_hangs_is_an_error(way, no_collection):
    """Also one that stopped between saying that a batch is there and handing it over; none is left behind."""
    before = {child.pid for child in multiprocessing.active_children()}
    hang = way == "it reads for ever"
    stream = Loader(Endless(hang), prepare_pid, collate, batch_size=4, seed=0, workers=1, timeout_seconds=1)
    batches = iter(stream)
    if not hang:
        os.kill(int(next(batches).ids[0]), signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DataError, match="no data worker answered in time"):
        collections.deque(batches, maxlen=0)
    assert time.monotonic() - started < 10
    assert {child.pid for child in multiprocessing.active_children()} <= before
