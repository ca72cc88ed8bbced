"""From a table of questions to a model that answers: training, exact resume, figures, commands, one-line errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.data.sources import open_source
from mm.errors import ConfigError, DataError, UserError
from mm.hub import Model
from mm.run.answering import answer_all, evaluate_vqa

COLOURS = ("red", "green", "blue", "white")
VILT: dict[str, Any] = {
    "name": "vilt",
    "image_size": 16,
    "patch_size": 8,
    "vocab_size": 300,
    "context_length": 12,
    "width": 32,
    "layers": 2,
    "heads": 2,
    "masked_weight": 0,
    "matching_weight": 0,
    "alignment_weight": 0,
    "answer_weight": 1,
    "num_answers": 50,
}
SIZES: dict[str, Any] = {
    "image": {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 16,
        "patch_size": 8,
        "options": {"embed_dim": 32, "depth": 1, "num_heads": 2},
    },
    "vocab_size": 300,
    "context_length": 12,
    "width": 32,
    "heads": 2,
    "text_layers": 1,
    "fusion_layers": 1,
    "embed_dim": 8,
}
ALBEF = SIZES | {"name": "albef", "momentum": 0, "queue_size": 0, "distillation": 0}
WRITER = SIZES | {"name": "albef-vqa", "num_answers": 50}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured pictures with two questions each, and in ``run`` a model that learned to answer them, beside a blind one."""
    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for number in range(16):
        colour = COLOURS[number % 4]
        picture = Image.new("RGB", (16, 16), colour)
        picture.putpixel((number, 3), (0, 0, 0))
        picture.save(folder / f"{number}.png")
        asked = {
            "image": f"{number}.png",
            "question": "which colour is it?",
            "answers": [colour] * 8 + ["x"] * 2,
            "kind": "colour",
        }
        red = {
            "image": f"{number}.png",
            "question": "is it red?",
            "answer": "yes" if colour == "red" else "no",
            "kind": "yes/no",
        }
        lines += [asked, red]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train(folder, "run", steps=60)
    train(folder, "blind", steps=40, system={"blind": True})
    return folder


def train(
    folder: Path, name: str, *, steps: int, base: dict[str, Any] = VILT, system: dict[str, Any] | None = None, **more: Any
) -> Path:
    values = {
        "system": base | (system or {}),
        "data": {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl")},
        "train": {"steps": steps, "batch_size": 16, "lr": 0.003, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.5}
        | {"tensorboard": False, "precision": "fp32"},
    } | more
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    mm.train(file, out=folder / name, progress=False)
    return folder / name


@pytest.fixture(scope="module")
def model(workshop: Path) -> Model:
    return mm.load(workshop / "run", device="cpu")


@pytest.fixture(scope="module")
def aligned(workshop: Path) -> str:
    """An ALBEF that met the questions as captions."""
    return str(train(workshop, "albef", steps=3, base=ALBEF))


@pytest.fixture(scope="module")
def writer(workshop: Path, aligned: str) -> Model:
    """Learned to write the same answers, from the ALBEF on."""
    return mm.load(train(workshop, "writer", steps=200, base=WRITER, init_from=aligned), device="cpu")


def test_the_model_answers_and_the_blind_one_guesses(workshop: Path, model: Model) -> None:
    data = str(workshop / "rows.jsonl")
    result = mm.evaluate("vqa", model, data, train=data)
    values = {name: interval.value for name, interval in result.metrics.items()}
    assert values["accuracy"] == values["accuracy_colour"] == values["accuracy_yes/no"] == 1
    assert values["blind_accuracy_yes/no"] == 0.75
    assert values["blind_accuracy_colour"] == pytest.approx(0.6), "two of ten people said x, of every picture"
    assert values["majority_accuracy"] < values["blind_accuracy"] < 1
    assert result.protocol["answers"] == "7 known, at best 100.0% right"
    blind = mm.evaluate("vqa", workshop / "blind", data, device="cpu")
    assert blind.metrics["accuracy"].value <= values["blind_accuracy"] + 1e-9
    assert "blind_accuracy" not in blind.metrics


def test_answers_are_what_evaluation_counts(workshop: Path, model: Model) -> None:
    source = open_source(str(workshop / "rows.jsonl"))
    asked, accounting = answer_all(model, source)
    assert accounting.delivered == len(asked) == 32
    for one in asked[:6]:
        assert model.answer(workshop / one.question.picture, one.question.text, k=1).answers == (one.answer,)


def test_a_few_answers_can_be_chosen_among(workshop: Path, model: Model) -> None:
    found = model.answer(workshop / "1.png", "which colour is it?", candidates=["red", "blue"])
    assert set(found.answers) == {"red", "blue"}
    with pytest.raises(UserError, match="at least one answer"):
        model.answer(workshop / "1.png", "which colour is it?", candidates=[])
    with pytest.raises(UserError, match="'pink' is none of the"):
        model.answer(workshop / "1.png", "which colour is it?", candidates=["pink"])


def test_a_decoder_writes_the_answers(workshop: Path, writer: Model, tmp_path: Path) -> None:
    data = str(workshop / "rows.jsonl")
    result = mm.evaluate("vqa", writer, data, train=data)
    assert result.metrics["accuracy"].value == 1
    assert result.protocol["answers"] == "7 known, at best 100.0% right"
    last = [json.loads(line) for line in (workshop / "writer" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["validation"]["accuracy"] == 1
    asked = workshop / "2.png", "which colour is it?"
    assert writer.answer(*asked, k=1).answers == ("blue",)
    found = writer.answer(*asked, candidates=["pink", "blue", "blue green"])
    assert sorted(found.answers) == ["blue", "blue green", "pink"], "a decoder reads any candidates"
    assert (found.answers[0], found.scores[0]) == ("blue", pytest.approx(writer.answer(*asked, k=1).scores[0], rel=1e-4))
    mm.save(writer, tmp_path / "saved")
    again = mm.load(tmp_path / "saved", device="cpu")
    assert again.answer(*asked, k=7) == writer.answer(*asked, k=7)
    assert again.fingerprint == writer.fingerprint
    runner = CliRunner().invoke(
        app, ["answer", str(tmp_path / "saved"), *map(str, asked), "--json", str(tmp_path / "out.json")]
    )
    assert runner.exit_code == 0, runner.output
    assert json.loads((tmp_path / "out.json").read_text())["answers"][0]["answer"] == "blue"


def test_a_decoder_writes_freely(workshop: Path, writer: Model, tmp_path: Path) -> None:
    run, data, out = str(workshop / "writer"), str(workshop / "rows.jsonl"), tmp_path / "out.json"
    asked = str(workshop / "2.png"), "which colour is it?"
    listed, found = writer.answer(*asked, k=3), writer.answer(*asked, k=7, free=True)
    assert found.answers[0] == listed.answers[0] == "blue"
    assert found.scores[0] == pytest.approx(listed.scores[0], rel=1e-3)
    assert len(set(found.answers)) == len(found.answers) <= 7
    assert list(found.scores) == sorted(found.scores, reverse=True)
    assert set(found.answers) - set(writer.config.known_answers), "the seventh beam has left the list"
    with pytest.raises(UserError, match="free and candidates"):
        writer.answer(*asked, candidates=["blue"], free=True)
    done = CliRunner().invoke(app, ["answer", run, *asked, "--free", "-k", "2", "--device", "cpu", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(out.read_text())["answers"][0]["answer"] == "blue"
    done = CliRunner().invoke(
        app, ["eval", "vqa", run, "--data", data, "--free", "--train", "none", "--device", "cpu", "--json", str(out)]
    )
    assert done.exit_code == 0, done.output
    measured = json.loads(out.read_text())
    assert measured["metrics"]["accuracy"]["value"] == 1
    assert measured["protocol"]["answers"] == "written freely by 5 beams, 100.0% of them among the 7 known"


def test_a_blind_decoder_guesses(workshop: Path, writer: Model) -> None:
    blind = mm.load(train(workshop, "blind-writer", steps=60, base=WRITER, system={"blind": True}), device="cpu")
    data = str(workshop / "rows.jsonl")
    found = mm.evaluate("vqa", blind, data, train=data).metrics
    assert found["accuracy"].value <= found["blind_accuracy"].value + 1e-9


def test_pairs_can_be_classified(workshop: Path, aligned: str) -> None:
    """A picture and a sentence belong to one of two classes; the questions that have other answers teach nothing."""
    data, pair = str(workshop / "rows.jsonl"), {"head": "classes", "num_answers": 0, "answers": ["yes", "no"]}
    model = mm.load(
        train(workshop, "classes", steps=60, base=WRITER, system=pair, init_from=str(workshop / "albef")), device="cpu"
    )
    assert mm.evaluate("vqa", model, data, train="none").metrics["accuracy_yes/no"].value == 1
    found = model.answer(workshop / "0.png", "is it red?")
    assert found.answers == ("yes", "no")
    assert sum(found.scores) == pytest.approx(1)
    with pytest.raises(UserError, match=r"classes cannot write answers freely \(it can: answers\); take one with a decoder"):
        model.answer(workshop / "0.png", "is it red?", free=True)


@pytest.mark.usefixtures("writer")
def test_a_resumed_decoder_keeps_its_list(workshop: Path, aligned: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((workshop / "rows.jsonl").read_text().replace('"image": "', f'"image": "{workshop}/'))
    train(tmp_path, "parts", steps=3, base=WRITER, init_from=aligned)
    parts = train(tmp_path, "parts", steps=6, base=WRITER, system={"num_answers": 2}, init_from=aligned)
    whole = train(tmp_path, "whole", steps=6, base=WRITER, init_from=aligned)
    first, second = (load_file(run / "checkpoints" / "step-00000006" / "model.safetensors") for run in (parts, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    assert first["answer_ids"].any()
    tuned = train(tmp_path, "few", steps=1, base=WRITER, system={"num_answers": 3}, init_from=str(workshop / "writer"))
    assert mm.load(tuned, device="cpu").config.known_answers == ("no", "x", "blue")
    with pytest.raises(ConfigError, match="another network"):
        train(tmp_path, "wide", steps=1, base=WRITER, system={"width": 64}, init_from=aligned)


def test_the_list_holds_normalised_answers_by_frequency(model: Model) -> None:
    assert model.config.known_answers == ("no", "x", "blue", "green", "red", "white", "yes")


def test_validation_measures_answers(workshop: Path) -> None:
    last = [json.loads(line) for line in (workshop / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["validation"]["accuracy"] == 1
    assert last["validation"]["answer"] < 1


def test_a_resumed_run_ends_in_the_same_bits(workshop: Path, tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "rows.jsonl").write_text((workshop / "rows.jsonl").read_text().replace('"image": "', f'"image": "{workshop}/'))
    train(folder, "parts", steps=3)
    parts = train(folder, "parts", steps=6)
    whole = train(folder, "whole", steps=6)
    for name in ("model", "ema"):
        first, second = (load_file(run / "checkpoints" / "step-00000006" / f"{name}.safetensors") for run in (parts, whole))
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    kept = mm.load(parts, device="cpu").config.known_answers
    fewer = train(folder, "parts", steps=7, system={"num_answers": 2})
    assert mm.load(fewer, device="cpu").config.known_answers == kept, "the weights know their places"


def test_other_weights_can_be_taken_over_with_a_fresh_list(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text((workshop / "rows.jsonl").read_text().replace('"image": "', f'"image": "{workshop}/'))
    start = str(workshop / "run")
    few = VILT | {"vocab_size": mm.load(start, device="cpu").config.model_dump()["vocab_size"], "num_answers": 3}
    tuned = mm.load(train(tmp_path, "few", steps=1, system=few, init_from=start), device="cpu")
    assert tuned.config.known_answers == ("no", "x", "blue")
    matching = few | {"num_answers": 0, "answer_weight": 0, "matching_weight": 1}
    assert mm.load(train(tmp_path, "match", steps=1, system=matching, init_from=start), device="cpu").capabilities == {
        "matches"
    }
    with pytest.raises(ConfigError, match="another network"):
        train(tmp_path, "wide", steps=1, system=few | {"width": 64}, init_from=start)


def test_the_commands(workshop: Path, tmp_path: Path) -> None:
    run, data, out = str(workshop / "run"), str(workshop / "rows.jsonl"), tmp_path / "out.json"
    runner = CliRunner()
    done = runner.invoke(app, ["answer", run, str(workshop / "2.png"), "which colour is it?", "-k", "3", "--json", str(out)])
    assert done.exit_code == 0, done.output
    answers = json.loads(out.read_text())["answers"]
    assert [len(answers), answers[0]["answer"]] == [3, "blue"]
    assert 0.5 < answers[0]["probability"] <= 1
    assert "blue" in done.output
    done = runner.invoke(app, ["eval", "vqa", run, "--data", data, "--train", data, "--limit", "8", "--json", str(out)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert {"accuracy", "blind_accuracy", "majority_accuracy", "accuracy_colour"} <= written["metrics"].keys()
    assert written["protocol"]["questions"] == 8


def test_bad_input_is_told_in_one_line(workshop: Path, model: Model, tmp_path: Path) -> None:
    run, data = str(workshop / "run"), str(workshop / "rows.jsonl")
    (tmp_path / "captions.csv").write_text(f"image,caption\n{workshop}/1.png,a picture\n")
    (tmp_path / "broken.png").write_bytes(b"broken")
    (tmp_path / "broken.csv").write_text("image,question,answer\nbroken.png,what?,dog\n")
    cases = [
        (["answer", "emoji-clip", data, "what?"], "emoji-clip cannot answer questions (it can: embeds); take a model"),
        (["eval", "vqa", "emoji-clip", "--data", data], "emoji-vqa"),
        (["eval", "vqa", run, "--data", str(tmp_path / "captions.csv")], "no field 'question'"),
        (["eval", "vqa", run, "--data", data, "--train", str(tmp_path / "captions.csv")], "no field 'question'"),
        (["eval", "vqa", run, "--data", str(tmp_path / "broken.csv")], "too few samples can be used"),
        (["answer", run, str(tmp_path / "broken.png"), "what?"], "broken.png"),
        (["answer", run, str(workshop / "1.png"), "what?", "--free"], "cannot write answers freely (it can: answers)"),
        (["eval", "vqa", run, "--data", data, "--free"], "cannot write answers freely"),
        (["answer", run, str(tmp_path / "none.png"), "what?"], "none.png"),
        (["eval", "retrieval", run, "--data", data], "no shared embedding space (it can: answers)"),
    ]
    for arguments, message in cases:
        done = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
        assert isinstance(done.exception, UserError), (arguments, done.exception, done.output)
        assert message in str(done.exception), done.exception
        assert "\n" not in str(done.exception)
    with pytest.raises(UserError, match="cannot answer questions"):
        evaluate_vqa("emoji-clip", data)
    with pytest.raises(DataError, match="too few"):
        evaluate_vqa(model, str(tmp_path / "broken.csv"))


def test_training_needs_questions(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": f"{workshop}/1.png", "caption": "a picture"}))
    with pytest.raises(UserError, match="no field 'question'"):
        train(tmp_path, "run", steps=1)
    assert not (tmp_path / "run").exists()
