"""From one's own pictures to a tokenizer, to a painter that stands on it, to pictures: every step through configurations."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.errors import UserError
from mm.types import Sampling

VQ: dict[str, Any] = {
    "name": "vq",
    "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16], "quantizer": {"kind": "fsq", "levels": [5, 5, 3]}},
}
SIZES = {"width": 16, "layers": 1, "heads": 2}
PAINTERS: dict[str, dict[str, Any]] = {
    "dalle": {"name": "dalle", **SIZES, "text": {"vocab_size": 262, "context_length": 8}},
    "muse": {
        "name": "muse",
        **SIZES,
        "text": {
            "width": 16,
            "layers": 1,
            "heads": 2,
            "vocab_size": 262,
            "context_length": 8,
            "causal": False,
            "pooling": "mean",
        },
    },
}
CLIP = {
    "name": "clip",
    "image": {"backbone": "resnet18", "image_size": 16, "options": {"channels": [8, 8, 8, 8]}},
    "text": {"width": 16, "layers": 1, "heads": 2, "vocab_size": 262, "context_length": 8},
    "embed_dim": 8,
}
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, and in ``vq``, ``dalle``, ``muse`` and two ``clip`` folders what was trained on them for a few steps."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("workshop")
    for number in range(12):
        colour = COLOURS[number % 4]
        (folder / "pictures" / colour).mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (16, 16), colour)
        picture.putpixel((number, 3), (0, 0, 0))
        picture.save(folder / "pictures" / colour / f"{number}.png")
        (folder / "pictures" / colour / f"{number}.txt").write_text(f"{colour} square")
    run(folder, "vq", VQ, validation=True)
    for name, system in PAINTERS.items():
        run(folder, name, system | {"tokenizer": str(folder / "vq")}, validation=True)
    run(folder, "clip-a", CLIP)
    run(folder, "clip-b", CLIP | {"embed_dim": 12}, seed=1)
    return folder


def run(folder: Path, name: str, system: dict[str, Any], *, validation: bool = False, seed: int = 0, steps: int = 3) -> Any:
    pictures = str(folder / "pictures")
    data = {"train": pictures} | ({"validation": pictures} if validation else {})
    train = {"steps": steps, "batch_size": 4, "tensorboard": False, "seed": seed, "precision": "fp32"}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"system": system, "data": data, "train": train}))
    return mm.train(file, out=folder / name, progress=False)


def test_a_tokenizer_is_validated_by_what_comes_back(workshop: Path) -> None:
    lines = [json.loads(line) for line in (workshop / "vq" / "metrics.jsonl").read_text().splitlines()]
    validation = lines[-1]["validation"]
    assert set(validation) == {"psnr", "ssim", "codebook_usage", "perplexity"}
    measured = mm.evaluate("reconstruction", str(workshop / "vq"), str(workshop / "pictures"))
    for name in validation:
        assert measured.metrics[name].value == pytest.approx(validation[name], rel=1e-4)


@pytest.mark.parametrize("name", PAINTERS)
def test_a_painter_is_whole_without_the_folder_of_its_tokenizer(workshop: Path, tmp_path: Path, name: str) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(workshop / name, moved)
    model = mm.load(moved)
    assert model.config.tokenizer == mm.load(workshop / "vq").config, (
        "a run folder is no lasting name: its configuration is stored"
    )
    known, inside = mm.load(workshop / "vq").system.state_dict(), model.system.tokenizer.state_dict()
    assert known.keys() == inside.keys()
    assert all(torch.equal(known[key], inside[key]) for key in known)


def test_weights_of_a_shipped_part_are_not_stored_again(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm.hub.ASSETS", tmp_path / "assets")
    mm.save(mm.load(workshop / "vq"), tmp_path / "assets" / "models" / "tiny-vq")
    run(tmp_path_with_pictures(workshop, tmp_path), "painter", PAINTERS["dalle"] | {"tokenizer": "tiny-vq"})
    model = mm.load(tmp_path / "painter")
    assert model.config.tokenizer == "tiny-vq"
    mm.save(model, tmp_path / "saved")
    from safetensors.torch import load_file

    assert not any(key.startswith("tokenizer.") for key in load_file(tmp_path / "saved" / "model.safetensors"))
    again = mm.load(tmp_path / "saved")
    prompts, sampling = ["red square"], Sampling(guidance=2.0)
    first, second = (mm.generate(one, prompts, sampling=sampling)[0].pixels for one in (model, again))
    assert torch.equal(first, second)
    assert model.fingerprint == again.fingerprint


def tmp_path_with_pictures(workshop: Path, tmp_path: Path) -> Path:
    shutil.copytree(workshop / "pictures", tmp_path / "pictures")
    return tmp_path


@pytest.mark.parametrize("name", PAINTERS)
def test_generation_is_reproducible_and_ranked(workshop: Path, name: str) -> None:
    painter, ranker = mm.load(workshop / name), mm.load(workshop / "clip-a")
    made = mm.generate(painter, ["red square", "blue"], count=2, seed=3, best_of=3, ranker=ranker)
    assert [one.prompt for one in made] == ["red square", "red square", "blue", "blue"]
    assert all(one.pixels.shape == (3, 16, 16) and one.pixels.dtype == torch.uint8 for one in made)
    alone = mm.generate(painter, ["blue"], count=2, seed=3, best_of=3, ranker=ranker)
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(alone, made[2:], strict=True))
    candidates = mm.generate(painter, ["blue"], count=6, seed=3, ranker=ranker)
    assert [one.score for one in alone] == [max(c.score or -2 for c in part) for part in (candidates[:3], candidates[3:])]


def test_a_run_is_measured_against_what_it_learned_from(workshop: Path) -> None:
    options = {"judge": str(workshop / "clip-b"), "ranker": str(workshop / "clip-a"), "best_of": 2, "limit": 4}
    result = mm.evaluate("generation", str(workshop / "dalle"), str(workshop / "pictures"), **options)
    assert result.metrics["nearest_train_real"].value == 0, "these real pictures are the training pictures"
    assert result.protocol["training"] == str(workshop / "pictures"), "as the run's configuration says"
    assert {"clip_rank1", "clip_rank1_real", "clip_rank1_real_tokens", "clip_rank1_retrieved"} <= set(result.metrics)
    assert result.protocol["prompts"].startswith("4 class names")


def test_a_single_tower_retrieves_by_reading_all_pairs(workshop: Path) -> None:
    from mm.data.sources import open_source

    system = {
        "name": "vilt",
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "layers": 1,
        "heads": 2,
        "vocab_size": 262,
        "context_length": 8,
    }
    run(workshop, "vilt", system, validation=True)
    model, pictures = mm.load(workshop / "vilt"), str(workshop / "pictures")
    result = mm.evaluate("retrieval", model, pictures)
    source = open_source(pictures)
    samples = [source.read(index) for index in range(len(source))]
    image = model.processor.images([sample.media["image"] for sample in samples])
    text = model.processor.text([sample.texts[0] for sample in samples])
    with torch.no_grad():
        words, pixels = model.system.encode_text(text), image[:, None].expand(-1, len(samples), -1, -1, -1)
        logits = torch.stack([model.system.match(model.system.encode_image(row), words) for row in pixels])
    right = (logits.argmax(1) == torch.arange(len(samples))).float().mean().item()
    assert result.metrics["image_to_text_r1"].value == pytest.approx(right)
    assert result.protocol["compared"] == "144 pairs, each read together"


def test_command_line(workshop: Path, tmp_path: Path) -> None:
    out, values = tmp_path / "made.png", tmp_path / "made.json"
    picture = next((workshop / "pictures").rglob("*.png"))
    command = ["generate", str(workshop / "dalle"), "red square", "-n", "2", "-o", str(out), "--json", str(values)]
    done = CliRunner().invoke(app, [*command, "--image", str(picture), "--keep", "top"], catch_exceptions=False)
    assert done.exit_code == 0
    assert out.stat().st_size > 100
    assert len(json.loads(values.read_text())["pictures"]) == 2
    folder = tmp_path / "each"
    CliRunner().invoke(app, ["generate", str(workshop / "muse"), "blue", "-n", "3", "-o", str(folder)], catch_exceptions=False)
    assert len(list(folder.glob("*.png"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [" "]}, "at least one prompt"),
        ({"best_of": 2}, "needs a ranker"),
        ({"count": 0}, "must be at least 1"),
        ({"keep": "top"}, "give the picture, too"),
        ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8), "keep": "middle"}, "none of top, bottom"),
        ({"image": torch.zeros(3, 16, 16, dtype=torch.uint8), "keep": "bottom"}, "from the top left on"),
    ],
)
def test_bad_requests(workshop: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mm.generate(str(workshop / "dalle"), options.pop("prompts", ["red"]), **options)


def test_models_are_asked_only_for_what_they_can(workshop: Path) -> None:
    vq, clip = mm.load(workshop / "vq"), mm.load(workshop / "clip-a")
    assert vq.capabilities == {"tokenizes", "compresses"}
    assert mm.load(workshop / "dalle").capabilities == {"paints", "expects"}
    with pytest.raises(UserError, match="cannot paint"):
        mm.generate(vq, ["red"])
    with pytest.raises(UserError, match="does not turn pictures into tokens"):
        mm.evaluate("reconstruction", clip, str(workshop / "pictures"))
    with pytest.raises(UserError, match="no shared embedding space"):
        mm.classify(vq, [torch.zeros(3, 16, 16, dtype=torch.uint8)], ["a", "b"])
    with pytest.raises(UserError, match="takes no text"):
        vq.processor.text(["red"])
