"""The command line as a person meets it: a stranger's pictures from folder to figures, and one-line errors for bad input."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

TINY = [
    "system.image.image_size=32",
    "system.image.options={channels: [8, 16, 24, 32]}",
    "system.text.width=32",
    "system.text.layers=1",
    "system.text.heads=2",
    "system.text.vocab_size=300",
    "system.embed_dim=32",
    "train.steps=150",
    "train.lr=0.005",
    "train.ema_decay=0.9",
    "train.batch_size=24",
    "train.warmup_steps=4",
    "train.log_every=10",
    "train.validate_every=50",
    "train.tensorboard=false",
    "data.workers=0",
]
COLORS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("disc", "square", "bar")


def mm(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    command = [sys.executable, "-m", "mm.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def draw(color: tuple[int, int, int], shape: str, rng: np.random.Generator) -> Image.Image:
    picture = Image.new("RGB", (40, 40), "white")
    x, y, side = *rng.integers(2, 12, 2), rng.integers(16, 25)
    height = side // 3 if shape == "bar" else side
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "disc" else pen.rectangle)([x, y, x + side, y + height], fill=color)
    return picture


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 of a stranger's own pictures with a CSV, three of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(300):
        color, shape = list(COLORS)[number % 4], SHAPES[number % 3]
        name = f"{number:03d}.png"
        draw(COLORS[color], shape, rng).save(folder / name)
        rows.append((name, f"a {color} {shape}", color))
    (folder / "007.png").write_bytes(b"")
    (folder / "008.png").write_bytes((folder / "009.png").read_bytes()[:60])
    (folder / "010.png").write_text("<html>not found</html>")
    with (folder / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "caption", "label"])
        writer.writerows(rows)
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained on the stranger's pictures."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    done = mm("train", "configs/own.yaml", f"data.train={photos / 'captions.csv'}", *TINY, "--out", folder)
    assert "step 150" in done.stdout
    return folder


def test_check_counts_the_broken_pictures_by_cause(photos: Path, tmp_path: Path) -> None:
    done = mm("data", "check", photos / "captions.csv", "--json", tmp_path / "report.json", check=False)
    assert done.returncode == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["samples"] == 300
    assert report["good"] == 297
    assert sum(report["bad"].values()) == 3


def test_retrieval_of_the_own_pictures(photos: Path, run: Path, tmp_path: Path) -> None:
    mm("eval", "retrieval", run, "--data", photos / "captions.csv", "--json", tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert {"image_to_text_r1", "text_to_image_r10"} <= found["metrics"].keys()
    assert "297 delivered" in found["protocol"]["samples"]


def test_zero_shot_learns_the_colours(photos: Path, run: Path, tmp_path: Path) -> None:
    mm("eval", "zero-shot", run, "--data", photos / "captions.csv", "--json", tmp_path / "z.json")
    top1 = json.loads((tmp_path / "z.json").read_text())["metrics"]["top1"]
    assert top1["low"] > 0.3, "chance is 0.25"


def test_classify_and_search(photos: Path, run: Path, tmp_path: Path) -> None:
    mm("classify", run, photos / "000.png", photos / "001.png", "--labels", "red, green", "--json", tmp_path / "c.json")
    entries = json.loads((tmp_path / "c.json").read_text())["predictions"]
    assert [set(entry["labels"]) for entry in entries] == [{"red", "green"}] * 2
    assert all(sum(entry["probabilities"]) == pytest.approx(1, abs=1e-4) for entry in entries)
    done = mm(
        "search",
        run,
        "--index",
        photos,
        "--image",
        photos / "000.png",
        "-k",
        "3",
        "--out",
        tmp_path / "s.png",
        "--json",
        tmp_path / "s.json",
    )
    hits = json.loads((tmp_path / "s.json").read_text())["hits"]
    assert hits[0]["file"].endswith("000.png")
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    assert "3 files left out" in done.stderr
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 100


def test_training_again_finds_the_run_finished(photos: Path, run: Path) -> None:
    weights = (run / "checkpoints" / "step-00000150" / "model.safetensors").read_bytes()
    mm("train", "configs/own.yaml", f"data.train={photos / 'captions.csv'}", *TINY, "--out", run)
    assert (run / "checkpoints" / "step-00000150" / "model.safetensors").read_bytes() == weights


def test_pack_index_and_train_from_shards_agree(photos: Path, tmp_path: Path) -> None:
    done = mm("data", "pack", photos / "captions.csv", "--out", tmp_path / "shards")
    assert "298 samples in 1 shards" in done.stdout
    assert "left out: 2 (unknown format)" in done.stdout
    assert "1 shards, 298 samples" in mm("data", "index", tmp_path / "shards").stdout
    report = mm("data", "check", tmp_path / "shards", "--json", tmp_path / "report.json", check=False)
    assert report.returncode == 1
    assert json.loads((tmp_path / "report.json").read_text())["good"] == 297


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "configs/absent.yaml"], "no such configuration file"),
        (["train", "configs/own.yaml", "data.trian=x"], "did you mean 'train'?"),
        (["train", "configs/own.yaml", "data.train=nowhere"], "nowhere: not found"),
        (["eval", "zero-shot", "emoji-clap", "--data", "emoji:test"], "no model 'emoji-clap'"),
        (["eval", "retrieval", "emoji-clip", "--data", "emoji:tset"], "write emoji:train"),
        (["info", "README.md"], "no model 'README.md'"),
        (["classify", "emoji-clip", "README.md", "--labels", "a,b"], "README.md"),
        (["classify", "emoji-clip", "README.md", "--labels", "a"], "at least two"),
        (["search", "emoji-clip", "--index", "absent", "--text", "x"], "absent: no such folder"),
        (["search", "emoji-clip", "--index", "configs", "--text", "x"], "no readable picture"),
        (["search", "emoji-clip", "--index", "configs"], "exactly one query"),
        (["ground", "emoji-clip", "README.md", "x"], "cannot tell where words are"),
        (["data", "build", "emojis"], "no such embedded data"),
        (["data", "check", "zip::https://example.org/x.tar"], "shards are read from"),
        (["export", "emoji-clip", "--to", "coreml", "-o", "x"], "export to 'coreml'"),
        (["export", "emoji-clip", "--to", "hf", "-o", "x"], "export to huggingface"),
        (["convert", "absent.pt", "-o", "x"], "no such file"),
        (["convert", "README.md", "-o", "x"], "--i-trust-this-file"),
        (["info", "ViT-B-32/opnai"], "did you mean 'ViT-B-32/openai'"),
    ],
)
def test_bad_input_is_one_line_and_a_nonzero_code(arguments: list[str], expected: str) -> None:
    done = mm(*arguments, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("mm: error: ")


def test_debug_shows_the_traceback() -> None:
    done = mm("--debug", "info", "nothing", check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_help_and_import_load_nothing_heavy() -> None:
    code = "import sys, mm, mm.cli; print([name for name in ('torch', 'timm', 'numpy', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_list_and_info_name_what_is_shipped() -> None:
    assert "emoji-clip" in mm("list").stdout
    shown = mm("info", "emoji-clip").stdout
    assert "embeds" in shown
    assert "fingerprint" in shown


def test_unusual_columns_can_be_named_everywhere(photos: Path, run: Path, tmp_path: Path) -> None:
    rows = [line.split(",") for line in (photos / "captions.csv").read_text().splitlines()[1:41]]
    table = photos / "odd.csv"
    table.write_text("src,alt,title\n" + "\n".join(f"{name},{caption},wrong" for name, caption, _ in rows))
    columns = ("--image-field", "src", "--text-field", "alt")
    assert "3" in mm("data", "check", table, *columns, check=False).stdout
    mm("eval", "retrieval", run, "--data", table, *columns, "--json", tmp_path / "named.json", "--no-cache")
    assert json.loads((tmp_path / "named.json").read_text())["metrics"]["text_to_image_r10"]["value"] > 0.3
    table.unlink()


def test_class_numbers_and_captions_serve_as_labels(photos: Path, run: Path, tmp_path: Path) -> None:
    names = list(COLORS)
    (tmp_path / "classes.txt").write_text("\n".join(names))
    lines = [json.dumps({"file": str(photos / f"{n:03d}.png"), "caption": names[n % 4], "label": n % 4}) for n in range(20, 60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    figures = []
    for label in ("label", "txt"):
        options = ("--classes", tmp_path / "classes.txt", "--label", label, "--json", tmp_path / f"{label}.json")
        mm("eval", "zero-shot", run, "--data", tmp_path / "rows.jsonl", *options)
        figures.append(json.loads((tmp_path / f"{label}.json").read_text())["metrics"]["top1"]["value"])
    assert figures[0] == figures[1] >= 0.4
