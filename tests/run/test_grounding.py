"""Grounding from a saved model: Python, the command with its table, picture and JSON, and one-line errors."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from stub_models import TEXT, clip
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.config import validate
from mm.errors import UserError
from mm.hub import Model
from mm.media.image import ImageSpec, fit_image, open_image
from mm.processor import Processor
from mm.systems.albef import AlbefConfig, build

SIDE = 32
ALBEF = {
    "image": {"backbone": "vit_tiny_patch16_224", "image_size": SIDE, "patch_size": 8}
    | {"options": {"embed_dim": 16, "depth": 1, "num_heads": 2}},
    "vocab_size": TEXT.vocab_size,
    "context_length": 16,
    "width": 16,
    "heads": 2,
    "text_layers": 1,
    "fusion_layers": 3,
    "embed_dim": 8,
    "momentum": 0,
    "queue_size": 0,
    "distillation": 0,
}


def made(**options: object) -> Model:
    config = validate(AlbefConfig, ALBEF | options, "test")
    torch.manual_seed(0)
    system = build(config).eval()
    with torch.no_grad():
        for parameter in system.network.fusion.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    processor = Processor(image=ImageSpec(size=SIDE, fit="content"), tokenizer=TEXT, context_length=16)
    return Model(system=system, processor=processor, config=config, name="albef")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that grounds, two that do not, and a picture."""
    folder = tmp_path_factory.mktemp("grounding")
    mm.save(made(), folder / "albef")
    mm.save(made(fusion_layers=1), folder / "one-layer")
    mm.save(clip(), folder / "clip")
    picture = Image.new("RGB", (60, 40), "white")
    picture.paste((220, 30, 30), (5, 5, 25, 25))
    picture.paste((30, 60, 220), (35, 10, 50, 35))
    picture.save(folder / "squares.png")
    return folder


def test_words_get_the_mean_heat_of_their_pieces(folder: Path) -> None:
    model = mm.load(folder / "albef", device="cpu")
    text = "Red, bluish green!"
    words = TEXT.words(text, 16)
    assert [word for word, _ in words] == ["red", "bluish", "green"]
    assert len(words[1][1]) > 1
    found = model.ground(folder / "squares.png", text, layers=[0, 1])
    pixels, ids = model.processor.image(folder / "squares.png")[None], model.processor.text([text])
    with torch.no_grad():
        image, encoded = model.system.encode_image(pixels), model.system.encode_text(ids)
        match = float(model.system.match(image, encoded).sigmoid())
    pieces = model.system.ground(image, encoded, layers=[0, 1])[0]
    for (_, places), heat in zip(words, found.heat, strict=True):
        torch.testing.assert_close(heat, sum(pieces[place] for place in places) / len(places))
    assert found.words == ("red", "bluish", "green")
    assert found.match == pytest.approx(match)
    assert all(parameter.grad is None for parameter in model.system.parameters())


def test_in_bf16_the_heat_is_nearly_the_same(folder: Path) -> None:
    exact, fast = (
        mm.load(folder / "albef", device="cpu", precision=precision).ground(folder / "squares.png", "red and blue")
        for precision in ("fp32", "bf16")
    )
    assert fast.heat.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(exact.heat.flatten(1), fast.heat.flatten(1)).min() > 0.98


def test_the_view_is_what_the_model_sees_in_more_detail(folder: Path) -> None:
    """Brought to the model's side, a larger view is nearly the model's picture."""
    raw = open_image(folder / "squares.png")
    for spec in (
        ImageSpec(size=32, fit="content"),
        ImageSpec(size=32, fit="crop", resize_to=40),
        ImageSpec(size=32, fit="squash"),
    ):
        processor = Processor(image=spec)
        view = processor.view(raw, 128)
        assert view.shape == (3, 128, 128)
        small = fit_image(view, ImageSpec(size=32, fit="squash")).float()
        assert (small - processor.image(raw).float()).abs().mean() < 8


def test_the_command(folder: Path, tmp_path: Path) -> None:
    model, picture, out, sheet = (
        str(path) for path in (folder / "albef", folder / "squares.png", tmp_path / "o.json", tmp_path / "o.png")
    )
    runner = CliRunner()
    done = runner.invoke(app, ["ground", model, picture, "red and blue", "--json", out, "-o", sheet])
    assert done.exit_code == 0, done.output
    found = json.loads(Path(out).read_text())
    assert [entry["word"] for entry in found["words"]] == ["red", "and", "blue"]
    assert sum(entry["share"] for entry in found["words"]) == pytest.approx(1, abs=1e-5)
    for entry in (*found["words"], found["whole"]):
        assert (len(entry["heat"]), len(entry["heat"][0])) == (4, 4)
        assert 0 <= entry["x"] <= 1
        assert 0 <= entry["y"] <= 1
        assert 0.25 <= entry["focus"] <= 1
    means = torch.tensor([entry["heat"] for entry in found["words"]]).mean(0)
    torch.testing.assert_close(means, torch.tensor(found["whole"]["heat"]))
    assert all(word in done.output for word in ("red", "and", "blue", "whole text"))
    with Image.open(sheet) as drawn:
        assert drawn.width > 5 * 256, "picture, text and three words beside each other"

    only = ["--word", "Blue", "--layer", "0", "--layer", "1", "--json", out, "--out", str(tmp_path / "panels")]
    done = runner.invoke(app, ["ground", model, picture, "red and blue", *only])
    assert done.exit_code == 0, done.output
    again = json.loads(Path(out).read_text())
    assert [entry["word"] for entry in again["words"]] == ["blue"]
    assert again["words"][0]["heat"] != found["words"][2]["heat"], "of other layers"
    assert sorted(path.name for path in (tmp_path / "panels").iterdir()) == ["0000.png", "0001.png", "0002.png"]


def test_a_text_that_is_cut_is_told(folder: Path) -> None:
    text = "red green blue yellow black " * 4
    done = CliRunner().invoke(app, ["ground", str(folder / "albef"), str(folder / "squares.png"), text])
    assert done.exit_code == 0, done.output
    assert "too long for the model" in done.stderr


def test_bad_input_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    model, picture = str(folder / "albef"), str(folder / "squares.png")
    (tmp_path / "broken.png").write_bytes(b"broken")
    cases = [
        ([str(folder / "clip"), picture, "red"], "clip cannot tell where words are (it can: embeds); take a model whose words"),
        ([str(folder / "one-layer"), picture, "red"], "(it can: embeds, matches)"),
        ([model, str(tmp_path / "none.png"), "red"], "none.png: no such picture"),
        ([model, str(tmp_path / "broken.png"), "red"], "broken.png"),
        ([model, picture, ""], "has no word to look for"),
        ([model, picture, " ?!\n "], "has no word to look for"),
        ([model, picture, "red", "--word", "blue"], "'blue' is no word of the text; its words are red"),
        ([model, picture, "red", "--layer", "2"], "layer 2: words are grounded by layers 0 to 1"),
        ([model, picture, "red", "--out", str(tmp_path / "x.jpg")], "x.jpg: pictures are written as .png"),
        ([model, picture, "red", "--json", str(tmp_path / "no" / "x.json")], "x.json: the result cannot be written"),
    ]
    for arguments, message in cases:
        done = CliRunner().invoke(app, ["ground", *arguments, "--device", "cpu"])
        assert isinstance(done.exception, UserError), (arguments, done.exception, done.output)
        assert message in str(done.exception), done.exception
        assert "\n" not in str(done.exception)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.png"], "nothing half-written"
