"""Figures about painters of which it is known what they paint: real pictures, training pictures, changed ones, noise."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stub_models as stubs
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.config import validate
from mm.data.sources import open_source
from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors, label_ranks
from mm.hub import Model
from mm.media.image import ImageSpec, open_image
from mm.processor import Processor
from mm.run.picture_controls import Training, check_independent, stand_in, training_pictures
from mm.run.picture_evaluation import evaluate_generation
from mm.systems import build
from mm.systems.vq import VqConfig

EACH = 6
"""Real pictures of a colour; the first one is what the stub painters know."""


def picture(colour: str, number: int, artist: int) -> np.ndarray:
    """A coloured ground with a few smooth spots; no two are alike, and none is like its mirror image."""
    random = np.random.default_rng([artist, number, *colour.encode()])
    y, x = np.mgrid[0 : stubs.SIDE, 0 : stubs.SIDE]
    canvas = np.zeros((stubs.SIDE, stubs.SIDE, 3)) + stubs.COLOURS[colour]
    for _ in range(4):
        spot = np.exp(-((x - random.uniform(0, 16)) ** 2 + (y - random.uniform(0, 16)) ** 2) / 8)
        canvas += spot[..., None] * random.uniform(-160, 160, 3)
    return canvas.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of five colours by two artists, in class folders ``real`` and ``train``, and ``captioned`` without labels."""
    folder = tmp_path_factory.mktemp("pictures")
    for artist, name in enumerate(("real", "train")):
        for colour in stubs.COLOURS:
            (folder / name / colour).mkdir(parents=True)
            for number in range(EACH if name == "real" else 1):
                Image.fromarray(picture(colour, number, artist)).save(folder / name / colour / f"{number}.png")
    (folder / "captioned").mkdir()
    rows = [("file", "alt")]
    for number in range(10):
        colour = list(stubs.COLOURS)[number % 5]
        Image.fromarray(picture(colour, number, 2)).save(folder / "captioned" / f"{number}.png")
        rows += [(f"captioned/{number}.png", f"{colour} {number}"), (f"captioned/{number}.png", f"number {number}")]
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def known(folder: Path, change: Callable[[Tensor], Tensor] = lambda pixels: pixels) -> stubs.Answer:
    """Answers a colour with its first picture in a folder of classes."""
    return lambda prompt, _: change(open_image(folder / prompt / "0.png"))


def measured(painter: Any, data: Path, **options: Any) -> Any:
    settings = {"judge": stubs.clip(1, embed_dim=12), "ranker": None, "train": str(data / "train")}
    return evaluate_generation(painter, str(data / "real"), **settings | options)


def values(result: Any) -> dict[str, float]:
    return {name: figure.value for name, figure in result.metrics.items()}


def test_a_painter_of_real_pictures_is_ranked_as_they_are(data: Path) -> None:
    judge = stubs.clip(1, embed_dim=12)
    found = values(measured(stubs.painter(known(data / "real"))[0], data, judge=judge))
    names = sorted(stubs.COLOURS)
    texts = class_vectors(judge.embed_texts, names, judge.processor.templates)
    for figure, count in (("clip_rank1", 1), ("clip_rank1_real", EACH)):
        files = [data / "real" / name / f"{number}.png" for name in names for number in range(count)]
        ranks = label_ranks(judge.embed_images(files), texts, torch.arange(5).repeat_interleave(count))
        assert found[figure] == pytest.approx((ranks < 1).double().mean().item())
    assert found["copies"] <= 0.4, "at most the two of the thirty real pictures that are nearest to the training artist's"
    assert found["copies_retrieved"] == 1
    assert {"kid", "precision", "recall"}.isdisjoint(found), "five pictures are no distribution"


@pytest.mark.parametrize(
    "change",
    [
        lambda pixels: pixels,
        lambda pixels: pixels.flip(-1),
        lambda pixels: (pixels.flip(-1).float() + torch.linspace(-12, 12, stubs.SIDE)).clamp(0, 255).to(torch.uint8),
    ],
    ids=["as they are", "mirrored", "mirrored and shaded"],
)
def test_a_painter_that_copies_is_found_out(data: Path, change: Callable[[Tensor], Tensor]) -> None:
    found = values(measured(stubs.painter(known(data / "train", change))[0], data))
    assert found["copies"] == found["copies_retrieved"] == 1
    assert found["nearest_train"] < 0.5 * found["nearest_train_real"]


def test_the_control_is_a_painter_that_copies(data: Path) -> None:
    found = values(measured(stubs.painter(known(data / "train"))[0], data))
    assert found["clip_rank1"] == found["clip_rank1_retrieved"]
    assert found["nearest_train"] == found["nearest_train_retrieved"] == 0


class Greys(nn.Module):
    """A tokenizer that keeps the brightness of each pixel, in 16 steps."""

    vocab_size, grid = 16, (stubs.SIDE, stubs.SIDE)

    def __init__(self, config: VqConfig | None = None) -> None:
        super().__init__()
        self.config = config

    def encode(self, image: Tensor) -> Tensor:
        return image.float().mean(1).flatten(1).long() // 16

    def decode(self, ids: Tensor) -> Tensor:
        return (16 * ids + 8).view(-1, 1, *self.grid).expand(-1, 3, -1, -1).to(torch.uint8)


def test_what_tokens_leave_is_the_ceiling_of_both_controls(data: Path, tmp_path: Path) -> None:
    tokens, only = Greys(), tmp_path / "only"
    for colour in stubs.COLOURS:
        (only / colour).mkdir(parents=True)
        Image.fromarray(picture(colour, 0, 0)).save(only / colour / "0.png")

    def coded(pixels: Tensor) -> Tensor:
        return tokens.decode(tokens.encode(pixels[None]))[0]

    painter, _ = stubs.painter(known(only, coded), tokens)
    found = values(evaluate_generation(painter, str(only), judge=stubs.clip(1, embed_dim=12), ranker=None, train=str(only)))
    assert found["clip_rank1"] == found["clip_rank1_real_tokens"] == found["clip_rank1_retrieved"]
    training = training_pictures(painter, str(only), ["red", "nothing"], label=None, seed=0)
    names, pictures = stand_in(painter, training, ["red", "nothing"]) or ([], torch.empty(0))
    assert names == ["red"]
    assert torch.equal(pictures[0], coded(open_image(only / "red" / "0.png")))
    assert stand_in(painter, Training(None, {}, ""), ["red"]) is None


def test_captions_are_prompts_where_there_are_no_names(data: Path) -> None:
    painter, system = stubs.painter()
    options = {"judge": stubs.clip(1, embed_dim=12), "ranker": None, "text_field": "alt", "seed": 3}
    result = evaluate_generation(painter, str(data / "captions.csv"), limit=9, **options)
    found = values(result)
    assert {"clipscore", "clipscore_torchmetrics", "kid", "precision", "recall"} <= set(found)
    assert not any(name.startswith("clip_rank") for name in found)
    assert result.protocol["prompts"].startswith("9 captions, one a picture of")
    assert result.protocol["real"] == 9
    assert "not measured" in result.protocol["copies"]
    assert system.batches == [9]
    again = evaluate_generation(painter, str(data / "captions.csv"), limit=9, **options)
    assert values(again)["clipscore"] == found["clipscore"]
    assert "'A photo depicts '" in result.protocol["clipscore"]
    assert "as they are" in result.protocol["clipscore_torchmetrics"]


def test_the_protocol_says_how_it_was_timed_and_drawn(data: Path) -> None:
    painter, system = stubs.painter()
    result = measured(painter, data, ranker=stubs.clip(), best_of=3, limit=2)
    assert system.batches == [6]
    assert result.protocol["seconds_per_candidate"] == "in the painter alone, 64 at a time"
    assert result.protocol["seconds_per_image"] == "3 candidates of each picture and choosing one"
    found = values(result)
    assert 0 < 3 * found["seconds_per_candidate"] < found["seconds_per_image"]
    assert "over prompts" in result.protocol["interval"]
    assert "over pairs" in result.protocol["interval"]


def test_all_that_is_given_is_read_before_anything_is_painted(data: Path, tmp_path: Path) -> None:
    painter, system = stubs.painter()
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    for options, message in (
        ({"train": str(data / "missing")}, "missing: not found"),
        ({"features": str(tmp_path / "weights.pth")}, "cannot be read as weights"),
        ({"features": str(tmp_path / "none.pth")}, "weights cannot be read: No such file"),
        ({"judge": painter}, "paints"),
        ({"ranker": painter}, "no shared space"),
        ({"label": "kind"}, "no sample has a field 'kind'"),
    ):
        with pytest.raises(UserError, match=message):
            measured(painter, data, **options)
    assert not system.batches


def test_a_judge_that_chose_or_taught_is_refused(data: Path) -> None:
    painter, _ = stubs.painter()
    with pytest.raises(UserError, match="clip-0 also chooses"):
        measured(painter, data, judge=stubs.clip(), ranker=stubs.clip())
    with pytest.raises(UserError, match="clip-1 has the same architecture as clip-0"):
        measured(painter, data, judge=stubs.clip(1), ranker=stubs.clip(0))
    taught, _ = stubs.painter(stubs.noise, Greys(VqConfig(perceptual="clip-1")))
    with pytest.raises(UserError, match="trained with clip-1, the same model"):
        measured(taught, data)


def test_a_judge_that_taught_the_teacher_is_refused(data: Path, tmp_path: Path) -> None:
    """By its weights, whatever it is called, and though the teacher's teacher names the student again."""
    mm.save(stubs.clip(1), tmp_path / "judge")
    tiny: dict[str, Any] = {"tokenizer": {"image_size": 16, "patch": 8, "widths": [4]}}
    for name, taught_by in (("teacher", "judge"), ("innocent", "nobody"), ("loop", "loop")):
        config = validate(VqConfig, tiny | {"perceptual": str(tmp_path / taught_by)}, "test")
        processor = Processor(image=ImageSpec(size=16))
        mm.save(Model(system=build(config).eval(), processor=processor, config=config, name=name), tmp_path / name)

    def student(teacher: str) -> Model:
        return stubs.painter(stubs.noise, Greys(VqConfig(perceptual=str(tmp_path / teacher))))[0]

    with pytest.raises(UserError, match=r"was trained with .*judge, the same model"):
        check_independent(stubs.clip(1), student("teacher"), None)
    check_independent(stubs.clip(2), student("teacher"), None)
    check_independent(stubs.clip(1), student("innocent"), None)
    check_independent(stubs.clip(1), student("loop"), None)


def test_what_a_run_learned_from_is_only_a_hint(data: Path) -> None:
    painter, _ = stubs.painter(known(data / "train"))
    painter.card = {"training_data": {"train": str(data / "train")}}
    assert values(measured(painter, data, train=None))["copies"] == 1
    painter.card = {"training_data": {"train": str(data / "moved")}}
    result = measured(painter, data, train=None)
    assert "copies" not in result.metrics
    assert "cannot be read" in result.protocol["copies"]


def test_the_command_needs_no_options(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {"stub": stubs.painter()[0], "emoji-judge": stubs.clip(1, embed_dim=12), "emoji-clip": stubs.clip()}
    monkeypatch.setattr("mm.run.evaluation.load", lambda name, **_: shipped[str(name)])
    command = ["eval", "generation", "stub", "--data", str(data / "real"), "--limit", "2"]
    out = [*command, "--json", str(tmp_path / "made.json"), "--sheet", str(tmp_path / "made.png")]
    assert CliRunner().invoke(app, out, catch_exceptions=False).exit_code == 0
    assert "clip_rank1" in json.loads((tmp_path / "made.json").read_text())["metrics"]
    assert (tmp_path / "made.png").stat().st_size > 100
    with pytest.raises(UserError, match=r"written as \.png"):
        CliRunner().invoke(app, [*command, "--sheet", str(tmp_path / "made.jpg")], catch_exceptions=False)


def test_pictures_of_a_prompt_are_drawn_by_the_seed(data: Path) -> None:
    painter, source = stubs.painter()[0], open_source(str(data / "real"))
    drawn = [training_pictures(painter, source, ["red"], label=None, seed=seed).retrieved["red"] for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(drawn[0], drawn[1])
    assert any(not torch.equal(drawn[0], other) for other in drawn[2:])
