"""Pickles that run code when they are read, wherever one might stand: nothing reads them."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_training import ToyClip, ToyStream, make, newest, toy_config

import mm
from mm.data.check import check
from mm.data.sources import open_source
from mm.data.stream import read_stream
from mm.errors import UserError
from mm.published.convert import import_file
from mm.training import checkpoint
from mm.training.loop import train
from mm.types import Sample


class Canary:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that must never be; it is shown that the pickle would make it."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path))).close()  # noqa: S301 - the attack itself
    path.unlink()
    return path


def run_toy(run: Path, steps: int) -> None:
    train(make(ToyClip), ToyStream(), toy_config(steps=steps), run, progress=False)


def vouch(folder: Path, path: Path) -> None:
    """Make the manifest say that a file is as it should be."""
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = {"bytes": path.stat().st_size, "sha256": checkpoint._sha256(path)}
    manifest["files"][path.relative_to(folder).as_posix()] = entry
    (folder / "manifest.json").write_text(json.dumps(manifest))


FILES = ["model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json"]


@pytest.mark.fault(14)
@pytest.mark.parametrize("name", FILES)
def test_in_place_of_a_file_of_a_checkpoint(tmp_path: Path, canary: Path, name: str) -> None:
    """Even with a manifest that vouches for it."""
    run_toy(tmp_path / "run", 2)
    folder = newest(tmp_path / "run")
    path = folder / name
    path.write_bytes(pickle.dumps(Canary(canary)))
    if name != "manifest.json":
        vouch(folder, path)
    with pytest.raises(UserError):
        run_toy(tmp_path / "run", 4)
    assert not canary.exists()


SIDECARS = [".metadata", "rng_state_0.pth", "random_states_0.pkl", "scheduler.bin", "training_state.pt", "__0_0.distcp"]


@pytest.mark.fault(14)
def test_beside_the_files_of_a_checkpoint(tmp_path: Path, canary: Path) -> None:
    """Under the names by which others keep random states, schedulers and the list of shards."""
    run_toy(tmp_path / "run", 2)
    folder = newest(tmp_path / "run")
    for name in SIDECARS:
        (folder / name).write_bytes(pickle.dumps(Canary(canary)))
        vouch(folder, folder / name)
        (tmp_path / "run" / "checkpoints" / name).write_bytes(pickle.dumps(Canary(canary)))
    run_toy(tmp_path / "run", 4)
    assert newest(tmp_path / "run").name == "step-00000004"
    assert not canary.exists()


@pytest.mark.fault(14)
@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.safetensors", "weights.ckpt"])
def test_as_weights_of_others(tmp_path: Path, canary: Path, name: str, trusted: bool) -> None:
    """Not even where the user trusts the file: plain tensors are all that is read of it."""
    path = tmp_path / name
    torch.save({"state_dict": {"w": torch.zeros(1)}, "more": Canary(canary)}, path)
    with pytest.raises(UserError):
        import_file(path, architecture=None, trusted=trusted)
    with pytest.raises(UserError):
        mm.load(str(path))
    assert not canary.exists()


@pytest.mark.fault(14)
def test_in_a_shard(tmp_path: Path, canary: Path) -> None:
    """Under the extensions that webdataset unpickles, and as an array of objects; read by position and as a stream."""
    evil = pickle.dumps(Canary(canary))
    array = io.BytesIO()
    np.save(array, np.array([Canary(canary)], dtype=object), allow_pickle=True)
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    members = [("a.png", picture.getvalue()), ("a.txt", b"a caption"), ("a.npy", array.getvalue()), ("a.npz", array.getvalue())]
    members += [(f"a.{extension}", evil) for extension in ("pyd", "pkl", "pickle", "pth", "pt", "ten", "index")]
    members += [("b.json", evil), ("c.cls", evil), ("d.pyd", evil)]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "0.tar"))
    assert source.read(0).texts == ("a caption",)
    check(source)
    samples = [sample for sample in read_stream(str(tmp_path / "0.tar")) if isinstance(sample, Sample)]
    assert [sample.id for sample in samples] == ["a"]
    assert not canary.exists()
