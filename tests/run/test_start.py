"""A command is ready soon: libraries, towers and first weights that it does not need are left alone; all else is the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mm
from mm.errors import CheckpointError
from mm.hub import load, load_painter, shipped
from mm.nn.initialise import Unfilled
from mm.run.generation import generate
from mm.systems import build
from mm.types import Sampling

HEAVY = ("timm", "torchvision", "torch._dynamo", "sympy", "diffusers", "transformers", "open_clip", "faiss", "tensorboard")
"""Each takes from a tenth of a second to seconds to import."""

PAINT = """
import sys
from mm.cli import app
try:
    app(["generate", sys.argv[1], "a green heart", "-n", "1", "--steps", "2", "--out", sys.argv[2]])
finally:
    print(sorted(set(sys.argv[3:]) & sys.modules.keys()))
"""


@pytest.mark.parametrize("model", ["emoji-flow", "emoji-dalle", "emoji-muse"])
def test_painting_needs_no_heavy_library(model: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PAINT, model, str(tmp_path / "heart.png"), *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "heart.png").is_file()


def test_a_painter_paints_what_the_whole_model_does() -> None:
    whole, painter = (read("emoji-flow", device="cpu", precision="fp32") for read in (load, load_painter))
    given, sampling = {"negative": "red", "seed": 3}, Sampling(steps=2)
    first, second = (generate(model, ["a green heart"], sampling=sampling, **given)[0].pixels for model in (whole, painter))  # pyright: ignore[reportArgumentType]
    assert torch.equal(first, second)
    assert whole.capabilities - painter.capabilities == {"varies"}
    assert "image" not in painter.system.get_submodule("text.towers.encoders")._modules


def test_a_tower_that_is_left_out_is_still_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model says by a digest which weights its part had, those of the picture tower included."""

    def changed(path: Path, read: Any = mm.hub._read_weights) -> dict[str, torch.Tensor]:
        state = read(path)
        name = "towers.encoders.image.trunk.conv1.0.weight"
        return state | ({name: state[name] + 1} if name in state else {})

    state = mm.hub._read_weights(mm.hub.ASSETS / "models" / "emoji-clip" / mm.hub.WEIGHTS_FILE)
    assert "towers.encoders.image.trunk.conv1.0.weight" in state
    monkeypatch.setattr("mm.hub._read_weights", changed)
    with pytest.raises(CheckpointError, match="its text 'emoji-clip' has other weights"):
        load_painter("emoji-flow", device="cpu")


@pytest.mark.parametrize("name", shipped())
def test_what_is_loaded_is_all_that_a_network_holds(name: str) -> None:
    """A network that was built with its first weights drawn, and given the same state, is the same in every tensor."""
    model = load(name, device="cpu", precision="fp32")
    parts = {part: loaded.system for part, loaded in mm.hub.load_parts(model.config.parts()).items()}
    usual = build(model.config.for_inference(), parts)
    usual.load_state_dict(model.system.state_dict())
    for tensors in ("named_parameters", "named_buffers"):
        first, second = (dict(getattr(system, tensors)()) for system in (model.system, usual))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
        assert all(tensor.isfinite().all() for tensor in first.values())


def test_no_weight_is_drawn() -> None:
    before = torch.get_rng_state()
    with Unfilled():
        layers = nn.Linear(4, 4), nn.Conv2d(3, 4, 3), nn.Embedding(5, 4)
        nn.init.trunc_normal_(layers[0].weight)
        norm = nn.LayerNorm(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert layers[0].weight.shape == (4, 4)
    assert torch.equal(norm.weight, torch.ones(4))
    assert not torch.equal(nn.init.normal_(torch.zeros(9)), torch.zeros(9))
