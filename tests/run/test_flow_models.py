"""A flow on one's own pictures and models: saved, moved, loaded; pictures made, changed, varied, judged."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.errors import CheckpointError, UserError
from mm.types import Sampling

VQ = {
    "name": "vq",
    "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16], "quantizer": {"kind": "fsq", "levels": [5, 5, 3]}},
}
CLIP = {
    "name": "clip",
    "image": {"backbone": "resnet18", "image_size": 16, "options": {"channels": [8, 8, 8, 8]}},
    "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": 262, "context_length": 8},
    "embed_dim": 8,
}
FLOW = {"name": "flow", "denoiser": {"width": 16, "layers": 2, "heads": 2}}
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and in ``vq``, ``clip``, ``judge`` and ``flow`` what was trained on them for a few steps."""
    folder = tmp_path_factory.mktemp("workshop")
    for number in range(12):
        colour = COLOURS[number % 4]
        (folder / "pictures" / colour).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (16, 16), colour)
        picture.putpixel((number, 3), (0, 0, 0))
        picture.save(folder / "pictures" / colour / f"{number}.png")
        (folder / "pictures" / colour / f"{number}.txt").write_text(f"{colour} square")
    run(folder, "vq", VQ)
    run(folder, "clip", CLIP)
    run(folder, "judge", CLIP | {"embed_dim": 12}, seed=1)
    run(folder, "flow", FLOW | {"latents": str(folder / "vq"), "text": str(folder / "clip")}, steps=30)
    return folder


def run(folder: Path, name: str, system: dict[str, Any], *, seed: int = 0, steps: int = 3) -> Any:
    pictures = str(folder / "pictures")
    train = {"steps": steps, "batch_size": 4, "tensorboard": False, "seed": seed, "precision": "fp32", "lr": 0.01}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"system": system, "data": {"train": pictures, "validation": pictures}, "train": train}))
    return mm.train(file, out=folder / name, progress=False)


def test_a_run_is_a_model_wherever_it_is_moved(workshop: Path, tmp_path: Path) -> None:
    model = mm.load(workshop / "flow")
    assert model.capabilities == {"paints", "varies"}
    moved = tmp_path / "moved"
    mm.save(model, moved)
    made = [mm.generate(one, ["red square"], count=2) for one in (model, mm.load(moved))]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(*made, strict=True))
    lines = [json.loads(line) for line in (workshop / "flow" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["validation"]["denoising"] > 0


def test_words_and_vectors_are_the_text_models_own(workshop: Path) -> None:
    flow, clip = mm.load(workshop / "flow"), mm.load(workshop / "clip")
    assert flow.processor.tokenizer.vocab_size == clip.processor.tokenizer.vocab_size
    text = flow.processor.text(["a red square", "blue"])
    condition = flow.system.condition(text)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    torch.testing.assert_close(condition.vector, clip.embed_texts(["a red square", "blue"]))


def test_pictures_are_changed_finished_and_varied(workshop: Path) -> None:
    model, picture = mm.load(workshop / "flow"), torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    plain, steered = (mm.generate(model, ["red"], negative=negative)[0].pixels for negative in (None, "white square"))
    assert not torch.equal(plain, steered)
    changed = mm.generate(model, ["red"], image=picture, sampling=Sampling(strength=0.2, steps=10))[0]
    finished = mm.generate(model, ["red"], image=picture, keep="left")[0]
    assert torch.equal(finished.pixels[:, :, :8], picture[:, :, :8])
    assert not torch.equal(changed.pixels, finished.pixels)
    varied = mm.vary(model, [picture, picture], count=2)
    assert [one.prompt for one in varied] == ["picture 1"] * 2 + ["picture 2"] * 2
    assert len({one.pixels.numpy().tobytes() for one in varied}) == 4, "seeds differ"
    again = mm.vary(model, [picture], count=2)
    assert torch.equal(again[1].pixels, varied[1].pixels)


def test_it_is_judged_like_any_painter(workshop: Path) -> None:
    measured = mm.evaluate(
        "generation", str(workshop / "flow"), str(workshop / "pictures"), judge=str(workshop / "judge"), limit=12
    )
    assert {"clip_rank1", "clip_rank1_real_tokens"} & measured.metrics.keys()
    with pytest.raises(UserError, match="is a part of"):
        mm.evaluate("generation", str(workshop / "flow"), str(workshop / "pictures"), judge=str(workshop / "clip"), limit=4)


def test_command_line(workshop: Path, tmp_path: Path) -> None:
    picture, flow = str(next((workshop / "pictures").rglob("*.png"))), str(workshop / "flow")
    for command in (
        ["generate", flow, "red", "-n", "2", "--negative", "blue", "--solver", "euler", "--steps", "3"],
        ["generate", flow, "red", "-n", "2", "--image", picture, "--strength", "0.5"],
        ["generate", flow, "red", "-n", "2", "--image", picture, "--keep", "border", "--partial", str(tmp_path / "making")],
        ["vary", flow, picture, "-n", "2"],
    ):
        out = tmp_path / "made.png"
        done = CliRunner().invoke(app, [*command, "-o", str(out)], catch_exceptions=False)
        assert done.exit_code == 0, command
        assert out.stat().st_size > 100
        out.unlink()
    assert len(list((tmp_path / "making").glob("*.png"))) == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(solver="nothing")}, "solver 'nothing': there is none"),
        ({"sampling": Sampling(threshold=0.9)}, "threshold: is for pixels"),
        ({"sampling": Sampling(steps=0)}, "steps is 0"),
        ({"sampling": Sampling(strength=2.0)}, "strength is 2.0"),
        ({"negative": "blue", "sampling": Sampling(guidance=1.0)}, "what guidance leads away from"),
    ],
)
def test_bad_requests(workshop: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mm.generate(str(workshop / "flow"), ["red"], **options)


def test_bad_models_are_told(workshop: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot vary pictures"):
        mm.vary(str(workshop / "vq"), [torch.zeros(3, 16, 16, dtype=torch.uint8)])
    with pytest.raises(UserError, match="1 pictures, 0 of each"):
        mm.vary(str(workshop / "flow"), [torch.zeros(3, 16, 16, dtype=torch.uint8)], count=0)
    broken = tmp_path / "broken"
    shutil.copytree(workshop / "flow", broken)
    weights = next(broken.rglob("model.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises((CheckpointError, UserError)):
        mm.load(broken)
