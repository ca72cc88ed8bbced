"""Generation around the painter: numbers and seeds, choosing in bounded memory, masks, what is checked before any painting."""

import json
from pathlib import Path
from typing import Any

import pytest
import stub_models as stubs
import torch
from PIL import Image
from typer.testing import CliRunner

import mm.run.generation
from mm.cli import app
from mm.errors import UserError
from mm.media.geometry import ImageSpec, fit_image, fit_mask
from mm.run.generation import Painting, cut_prompts, generate
from mm.types import Sampling

BLACK = torch.zeros(3, stubs.SIDE, stubs.SIDE, dtype=torch.uint8)


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> stubs.StubPainter:
    """The command line finds a stub painter under ``stub`` and a ranker under ``clip``; other names as always."""
    model, system = stubs.painter()
    known, load = {"stub": model, "clip": stubs.clip(), "painter": model}, mm.run.evaluation.load
    for way in ("load", "load_painter"):
        monkeypatch.setattr(f"mm.run.evaluation.{way}", lambda name, **options: known.get(str(name)) or load(name, **options))
    return system


def test_seed_and_number_make_a_picture_again_and_a_prompt_given_twice_goes_on() -> None:
    model, _ = stubs.painter()
    made = generate(model, ["red", "blue", "red"], count=2, seed=7, best_of=2, ranker=stubs.clip())
    assert [one.prompt for one in made] == ["red", "red", "blue", "blue", "red", "red"]
    assert {one.seed for one in made} == {7}
    assert [one.number // 2 for one in made] == [0, 1, 0, 1, 2, 3], "each of two candidates, all of a prompt counted"
    assert len({one.pixels.numpy().tobytes() for one in made}) == 6
    for one in made:
        again = generate(model, [one.prompt], count=one.number + 1, seed=one.seed)[one.number]
        assert torch.equal(again.pixels, one.pixels)
        assert again.number == one.number


def test_choosing_batch_by_batch_is_choosing_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ranker = stubs.painter()[0], stubs.clip()
    whole = generate(model, ["red", "blue"], count=3, best_of=3, ranker=ranker)
    held: list[int] = []
    best = mm.run.generation.best

    def watched(paintings: list[Painting], *rest: Any) -> list[Painting]:
        held.append(len(paintings))
        return best(paintings, *rest)

    monkeypatch.setattr("mm.run.generation.best", watched)
    monkeypatch.setattr("mm.run.generation.BATCH_SIZE", 4)
    batches: list[tuple[int, float]] = []
    parts = generate(model, ["red", "blue"], count=3, best_of=3, ranker=ranker, on_batch=lambda *batch: batches.append(batch))
    assert [(one.prompt, one.number) for one in parts] == [(one.prompt, one.number) for one in whole]
    assert max(held) <= 6, "one batch and what did not fill a group before"
    assert sum(held) == 18
    assert [number for number, _ in batches] == [4, 4, 4, 4, 2]
    assert all(seconds > 0 for _, seconds in batches)
    assert all(one.pixels.untyped_storage().nbytes() == one.pixels.nbytes for one in parts), "no view of a whole batch"


def test_what_stays_is_pasted_back() -> None:
    model, _ = stubs.painter()
    shown: list[torch.Tensor] = []
    made = generate(model, ["red"], image=BLACK, keep="left", on_picture=lambda pictures, _: shown.append(pictures))[0].pixels
    half = stubs.SIDE // 2
    assert made[:, :, :half].eq(0).all()
    assert made[:, :, half:].any()
    assert all(pictures[..., :half].eq(0).all() for pictures in shown)
    assert generate(model, ["red"], image=BLACK, keep="left", paste=False)[0].pixels[:, :, :half].any()


@pytest.mark.parametrize("size", [(stubs.SIDE, stubs.SIDE), (40, 24)])
def test_a_mask_may_be_a_picture(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", (40, 24)).save(tmp_path / "image.png")
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(tmp_path / "mask.png")
    model, _ = stubs.painter()
    made = generate(model, ["red"], image=tmp_path / "image.png", keep=tmp_path / "mask.png")[0].pixels
    half = stubs.SIDE // 2
    assert made[:, :, :half].eq(0).all()
    assert made[:, :, half:].float().mean() > 50
    Image.new("L", (7, 7)).save(tmp_path / "small.png")
    with pytest.raises(UserError, match=r"the mask is \(7, 7\), the picture \(24, 40\)"):
        generate(model, ["red"], image=tmp_path / "image.png", keep=str(tmp_path / "small.png"))


def test_a_mask_follows_its_picture_into_the_square() -> None:
    picture = torch.full((3, 30, 40), 255, dtype=torch.uint8)
    picture[:, 10:20, 5:25] = 0
    for fit in ("crop", "squash", "content"):
        spec = ImageSpec(size=32, fit=fit)
        fitted = fit_image(picture, spec)[0] < 128
        assert fit_mask(picture[0] < 128, picture, spec)[fitted].float().mean() > 0.9
        inside = fit_mask(picture[0] > 128, picture, spec)[fitted]
        assert inside.float().mean() < 0.1


def test_prompts_that_are_too_long_are_told_before_painting() -> None:
    model, system = stubs.painter()
    long = "red " * 30
    told: list[tuple[str, str]] = []
    generate(model, ["blue", long], on_cut=lambda *cut: told.append(cut) if not system.batches else None)
    assert told == cut_prompts(model, [long])
    assert told[0][0] == long
    assert told[0][1]
    assert long.startswith(told[0][1])
    assert model.processor.text([told[0][1]]).ids.tolist() == model.processor.text([long]).ids.tolist()


def test_nothing_is_painted_before_the_ranker_is_known_to_choose() -> None:
    model, system = stubs.painter()
    with pytest.raises(UserError, match="ranker stub: has no shared space"):
        generate(model, ["red"], best_of=2, ranker=model)
    with pytest.raises(UserError, match=r"guidance_interval is 0.8 to 0.2"):
        generate(model, ["red"], sampling=Sampling(guidance_interval=(0.8, 0.2)))
    assert not system.batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "{there}"], "no pictures can be written there"),
        (["-o", "{there}/x.png"], "no pictures can be written there"),
        (["-o", "{folder}/made.jpg"], "pictures are written as .png"),
        (["-o", "{folder}/made.png", "--json", "{folder}/missing/made.json"], "the result cannot be written"),
        (["-o", "{folder}/made.png", "--json", "{folder}"], "the result cannot be written"),
        (["-o", "{folder}/made.png", "--best-of", "2", "--ranker", "emoji-clop"], "no model 'emoji-clop'"),
        (["-o", "{folder}/made.png", "--best-of", "2", "--ranker", "painter"], "no shared space"),
        (["-o", "{folder}/made.png", "--partial", "{there}"], "no pictures can be written there"),
        (["-o", "{folder}/made.png", "--keep", "top"], "give the picture with --image"),
    ],
)
def test_the_command_line_finds_out_before_painting(
    by_name: stubs.StubPainter, tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "afile").write_text("not a folder")
    given = [option.format(there=tmp_path / "afile", folder=tmp_path) for option in options]
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, ["generate", "stub", "red", *given], catch_exceptions=False)
    assert not by_name.batches
    assert (tmp_path / "afile").read_text() == "not a folder"
    assert [path.name for path in tmp_path.iterdir()] == ["afile"], "nothing is left behind"


def test_the_command_line_writes_what_was_made_and_its_making(by_name: stubs.StubPainter, tmp_path: Path) -> None:
    command = ["generate", "stub", "red " * 30, "blue", "-n", "2", "-o", str(tmp_path / "each"), "--seed", "5"]
    options = [
        "--json",
        str(tmp_path / "made.json"),
        "--partial",
        str(tmp_path / "making"),
        "--guidance-interval",
        "0.2",
        "0.8",
    ]
    done = CliRunner().invoke(app, [*command, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert "is too long for the model, which reads only 'red red" in done.stderr
    pictures = json.loads((tmp_path / "made.json").read_text())["pictures"]
    assert [(one["seed"], one["number"]) for one in pictures] == [(5, 0), (5, 1), (5, 0), (5, 1)]
    assert len(list((tmp_path / "each").glob("*.png"))) == 4
    assert sorted(path.name for path in (tmp_path / "making").iterdir()) == ["000-000.png", "000-001.png", "000.gif"]
    with Image.open(tmp_path / "making" / "000.gif") as animation:
        assert getattr(animation, "n_frames", 1) == 2
