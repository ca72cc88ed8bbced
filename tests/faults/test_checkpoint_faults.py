"""Damaged, torn and impossible checkpoints: the newest complete one is used, nothing is lost, nothing is executed."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_training import ToyClip, ToyStream, assert_same_run, lines, make, newest, toy_config

from mm.errors import CheckpointError, UserError
from mm.training import checkpoint
from mm.training.checkpoint import SaveError, find_checkpoint, latest_checkpoint, open_checkpoint, save_checkpoint
from mm.training.lock import run_lock
from mm.training.loop import train
from mm.training.tracking import Event

TENSORS = {"model": {"w": torch.arange(6.0).reshape(2, 3)}}


def save(folder: Path, step: int, **options: object) -> Path:
    return save_checkpoint(folder, step, TENSORS, {"step": step}, **options)  # pyright: ignore[reportArgumentType]


def run_toy(run: Path, on_event: Callable[[Event], None] | None = None, **changes: object) -> None:
    train(make(ToyClip), ToyStream(), toy_config(**changes), run, on_event=on_event, progress=False)


@pytest.fixture
def two_checkpoints(tmp_path: Path) -> Path:
    save(tmp_path, 1)
    save(tmp_path, 2)
    return tmp_path


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped bit in weights": lambda folder: flip_byte(folder / "model.safetensors"),
    "flipped bit in state": lambda folder: flip_byte(folder / "state.json"),
    "truncated weights": lambda folder: os.truncate(folder / "model.safetensors", 10),
    "missing weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "manifest of another kind": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest without files": lambda folder: (folder / "manifest.json").write_text('{"files": 3}'),
    "deeply nested manifest": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_one_before_is_used(two_checkpoints: Path, damage: str) -> None:
    DAMAGE[damage](two_checkpoints / "step-00000002")
    told: list[str] = []
    found = latest_checkpoint(two_checkpoints, told.append)
    assert found is not None
    assert found.folder.name == "step-00000001"
    assert torch.equal(found.tensors("model")["w"], TENSORS["model"]["w"])
    assert len(told) == 1
    assert "step-00000002" in told[0]


@pytest.mark.fault(12)
def test_only_damaged_ones_are_an_error_not_a_fresh_start(two_checkpoints: Path) -> None:
    for step in (1, 2):
        flip_byte(two_checkpoints / f"step-0000000{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is complete"):
        latest_checkpoint(two_checkpoints, lambda message: None)
    assert latest_checkpoint(two_checkpoints.parent / "nowhere") is None


def test_manifest_cannot_reach_outside(two_checkpoints: Path) -> None:
    path = two_checkpoints / "step-00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../step-00000001/state.json"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    found = latest_checkpoint(two_checkpoints, lambda message: None)
    assert found is not None
    assert found.state["step"] == 1


def test_pointer_is_advice_only(two_checkpoints: Path) -> None:
    (two_checkpoints / "latest").write_text("step-00000007\n")
    told: list[str] = []
    found = latest_checkpoint(two_checkpoints, told.append)
    assert found is not None
    assert found.state["step"] == 2
    assert "step-00000007" in told[0]
    (two_checkpoints / "latest").unlink()
    assert find_checkpoint(two_checkpoints) == two_checkpoints / "step-00000002"


@pytest.mark.fault(12)
def test_resuming_after_damage_ends_in_the_same_bits(tmp_path: Path) -> None:
    run_toy(tmp_path / "whole")
    run_toy(tmp_path / "damaged", steps=20, checkpoint_every_steps=5, keep_last=3)
    flip_byte(newest(tmp_path / "damaged") / "optimizer.safetensors")
    events: list[Event] = []
    run_toy(tmp_path / "damaged", events.append)
    assert [event.step for event in events if event.kind == "resume"] == [15]
    assert any("damaged" in event.message for event in events if event.kind == "warning")
    assert_same_run(tmp_path / "whole", tmp_path / "damaged")


@contextmanager
def no_space() -> Iterator[None]:
    """Every write of a file beyond 1,000 bytes fails in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault(7)
def test_a_full_disk_leaves_what_was_there(two_checkpoints: Path) -> None:
    big = {"model": {"w": torch.zeros(10_000)}}
    with no_space(), pytest.raises(OSError, match="File too large"):
        save_checkpoint(two_checkpoints, 3, big, {})
    assert sorted(path.name for path in two_checkpoints.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    assert (two_checkpoints / "latest").read_text() == "step-00000002\n"
    assert latest_checkpoint(two_checkpoints, pytest.fail) is not None


def failing_sync(monkeypatch: pytest.MonkeyPatch, should_fail: Callable[[Path], bool]) -> None:
    original = checkpoint._sync

    def sync(path: Path) -> None:
        if should_fail(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path)

    monkeypatch.setattr(checkpoint, "_sync", sync)


@pytest.mark.fault(7)
def test_training_continues_after_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_toy(tmp_path / "whole")
    failing_sync(monkeypatch, lambda path: ".tmp-step-00000010" in str(path))
    events: list[Event] = []
    run_toy(tmp_path / "full", events.append)
    assert [event.step for event in events if event.kind == "checkpoint"] == [5, 15, 20]
    warning = next(event for event in events if event.kind == "warning")
    assert "No space left on device" in warning.message
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.fault(7)
def test_a_failed_last_save_has_its_own_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_sync(monkeypatch, lambda path: ".tmp-step-00000020" in str(path))
    with pytest.raises(SaveError, match="No space left on device") as caught:
        run_toy(tmp_path / "full")
    assert caught.value.exit_code not in (0, 1, 2)
    monkeypatch.undo()
    run_toy(tmp_path / "whole")
    run_toy(tmp_path / "full")
    assert_same_run(tmp_path / "whole", tmp_path / "full")


@pytest.mark.fault(7)
def test_logs_that_cannot_be_written_lose_nothing(tmp_path: Path) -> None:
    """The ids of steps during which the disk was full are written once there is room again."""
    run_toy(tmp_path / "whole", checkpoint_every_steps=0)
    room: list[object] = []

    def on_event(event: Event) -> None:
        if event.kind == "log" and event.step in (4, 16):
            context = no_space() if event.step == 4 else room.pop()
            (context.__enter__ if event.step == 4 else lambda: context.__exit__(None, None, None))()  # pyright: ignore
            room.append(context)

    run_toy(tmp_path / "full", on_event, checkpoint_every_steps=0)
    assert_same_run(tmp_path / "whole", tmp_path / "full")
    assert [record["step"] for record in lines(tmp_path / "full" / "ids.jsonl")] == list(range(1, 21))


@pytest.mark.fault(2)
def test_saving_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 1)
    newer = {"model": {"w": torch.zeros(2)}}
    save_checkpoint(tmp_path, 1, newer, {"step": 1})
    found = latest_checkpoint(tmp_path, pytest.fail)
    assert found is not None
    assert torch.equal(found.tensors("model")["w"], torch.zeros(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000001"]


@pytest.mark.fault(2)
def test_old_ones_go_only_when_the_new_one_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=2)
    failing_sync(monkeypatch, lambda path: path == tmp_path)  # the very last sync before the pointer
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 4, keep_last=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"step-00000002", "step-00000003"} <= names
    monkeypatch.undo()
    save(tmp_path, 5, keep_last=2)
    assert {path.name for path in tmp_path.iterdir()} == {"latest", "step-00000004", "step-00000005"}


@pytest.mark.fault(2)
def test_leftovers_are_swept_and_never_loaded(two_checkpoints: Path) -> None:
    shutil.copytree(two_checkpoints / "step-00000002", two_checkpoints / ".tmp-step-00000009")
    shutil.copytree(two_checkpoints / "step-00000002", two_checkpoints / ".old-step-00000001")
    found = latest_checkpoint(two_checkpoints, pytest.fail)
    assert found is not None
    assert found.folder.name == "step-00000002"
    save(two_checkpoints, 3)
    assert {path.name for path in two_checkpoints.iterdir()} == {"latest", "step-00000002", "step-00000003"}


def test_another_network_is_refused_by_name(tmp_path: Path) -> None:
    run_toy(tmp_path, steps=2)

    class Wider(ToyClip):
        def __init__(self) -> None:
            super().__init__()
            self.left[0] = torch.nn.Linear(12, 17)

    with pytest.raises(CheckpointError, match=r"left\.0\.bias.*\(16,\) there, \(17,\) here"):
        train(Wider(), ToyStream(), toy_config(steps=4), tmp_path, progress=False)


@pytest.mark.fault(15)
def test_second_trainer_is_refused(tmp_path: Path) -> None:
    """In this process, and in another one."""
    with run_lock(tmp_path):
        with pytest.raises(UserError, match="this process already trains"):
            run_toy(tmp_path)
        attempt = "import sys, pathlib, mm.training.lock as lock\nwith lock.run_lock(pathlib.Path(sys.argv[1])): pass"
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", attempt, str(tmp_path)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode != 0
        assert f"another trainer is at work here (process {os.getpid()} on " in done.stderr
    run_toy(tmp_path, steps=2)


def test_a_newer_damaged_checkpoint_does_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    save(tmp_path, 200)
    flip_byte(save(tmp_path, 300) / "model.safetensors")
    written = save(tmp_path, 250, keep_last=1)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.folder == written


@pytest.mark.fault(12)
def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """Anywhere in any file: the checkpoint is refused, or it was the step in the manifest, which nothing reads."""
    run_toy(tmp_path, steps=2)
    folder, chance, refused = newest(tmp_path), random.Random(0), 0
    whole = checkpoint_tensors(folder)
    for _ in range(200):
        path = chance.choice(sorted(folder.iterdir()))
        clean = path.read_bytes()
        place = chance.randrange(len(clean))
        path.write_bytes(clean[:place] + bytes([clean[place] ^ 1 << chance.randrange(8)]) + clean[place + 1 :])
        try:
            open_checkpoint(folder)
        except CheckpointError:
            refused += 1
        else:
            found = checkpoint_tensors(folder)
            assert all(torch.equal(found[stem][name], tensor) for stem in whole for name, tensor in whole[stem].items())
        path.write_bytes(clean)
    assert refused >= 195


def checkpoint_tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.stem: load_file(path) for path in folder.glob("*.safetensors")}
