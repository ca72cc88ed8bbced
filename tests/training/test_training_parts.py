"""Logs that can be cut back, devices, batches taken ahead."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_training import ToyStream, lines

from mm.errors import UserError
from mm.training.config import TrainConfig
from mm.training.devices import choose_device, choose_dtype
from mm.training.feed import Feed
from mm.training.logs import JsonLines
from mm.training.parallel import World, broadcast_tensors, gather_bytes, open_world, sum_over_ranks


@given(st.lists(st.sampled_from(["append", "flush", "sync", "mark", "cut"]), max_size=30))
def test_log_is_a_list_with_marks(tmp_path_factory: pytest.TempPathFactory, actions: list[str]) -> None:
    """Whatever the order of actions, the file holds what was appended up to the mark that it was cut to, and since."""
    log = JsonLines(tmp_path_factory.mktemp("log") / "x.jsonl")
    written: list[int] = []
    pending: list[int] = []
    mark = (0, 0)
    for number, action in enumerate(actions):
        if action == "append":
            log.append({"n": number, "text": "é\n"})
            pending.append(number)
        elif action in ("flush", "sync"):
            log.flush(sync=action == "sync")
            written, pending = written + pending, []
        elif action == "mark":
            log.flush()
            written, pending = written + pending, []
            mark = (log.size, len(written))
        else:
            log.truncate(mark[0])
            written, pending = written[: mark[1]], []
    log.flush()
    written += pending
    assert [record["n"] for record in (lines(log.path) if log.path.exists() else [])] == written
    assert log.size == (log.path.stat().st_size if log.path.exists() else 0)


def test_log_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"n":1}\n{"n":')
    log = JsonLines(path)
    log.truncate(8)
    log.append({"n": 2})
    log.flush()
    assert lines(path) == [{"n": 1}, {"n": 2}]


def test_devices() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.backends.mps.is_available():
        with pytest.raises(UserError, match="no mps device"):
            choose_device("mps")
    assert choose_dtype("fp32", torch.device("cuda")) == torch.float32
    assert choose_dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("amx", "avx", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")])
def test_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert choose_dtype("auto", torch.device("cpu")) == choose_dtype(expected, torch.device("cpu"))


class Accelerator:
    """Stands for a device that computes by itself; the toy's tensors stay where they are."""

    type = "meta"


class Unmoved(ToyStream):
    def batch(self, k: int) -> Any:
        batch = super().batch(k)
        object.__setattr__(batch, "to", lambda device: batch)
        return batch


def test_looking_ahead_does_not_move_the_position() -> None:
    stream = Unmoved()
    feed = Feed(stream, Accelerator())  # pyright: ignore[reportArgumentType]
    for k in range(3):
        assert feed.take().ids[0] == f"{k}-0"
        assert feed.state()["cursor"] == k + 1
        feed.look_ahead()
        feed.look_ahead()
        assert stream.cursor == k + 2
        assert feed.state()["cursor"] == k + 1


def test_failure_ahead_is_raised_when_it_is_due() -> None:
    class Failing(Unmoved):
        def batch(self, k: int) -> Any:
            if k == 1:
                raise RuntimeError("bad shard")
            return super().batch(k)

    feed = Feed(Failing(), Accelerator())  # pyright: ignore[reportArgumentType]
    feed.take()
    feed.look_ahead()
    with pytest.raises(RuntimeError, match="bad shard"):
        feed.take()


def test_alone_in_the_world() -> None:
    with open_world("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert gather_bytes(b"abc", world) == [b"abc"]
        assert sum_over_ranks([1.5, 2.0], world) == [1.5, 2.0]
        tensor = torch.ones(2)
        broadcast_tensors([tensor], world)
        assert torch.equal(tensor, torch.ones(2))


@pytest.mark.parametrize("values", [{"betas": (0.9, 1.0)}, {"accumulate": 9, "batch_size": 8}, {"lr": 0}, {"unknown": 1}])
def test_impossible_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TrainConfig.model_validate(values)
