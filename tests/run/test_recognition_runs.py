"""From recordings to a recogniser: pretraining, CTC on a share of the labels, error rates, files; exact resuming."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mm
from mm.cli import app
from mm.config import validate
from mm.data.config import DataConfig
from mm.data.sources import open_training_source
from mm.data.write import write_shards
from mm.errors import ConfigError, UserError
from mm.run.config import RunConfig
from mm.run.recognition import evaluate_recognition, transcribe
from mm.run.training import train
from mm.training.checkpoint import find_checkpoint
from mm.types import Sample

RATE = 16_000
AUDIO: dict[str, Any] = {
    "extractor": "layer_norm",
    "conv_layers": [[8, 20, 20], [8, 8, 8]],
    "width": 16,
    "layers": 1,
    "heads": 2,
    "hidden": 16,
    "position_kernel": 4,
    "position_groups": 2,
}
TRAIN = {
    "steps": 4,
    "batch_size": 4,
    "schedule": "constant",
    "warmup_steps": 0,
    "ema_decay": 0,
    "device": "cpu",
    "precision": "fp32",
    "tensorboard": False,
}


def flac(seed: int) -> bytes:
    file = io.BytesIO()
    wave = 0.2 * torch.randn(RATE // 4 + 400 * seed, generator=torch.Generator().manual_seed(seed))
    soundfile.write(file, wave.numpy(), RATE, format="FLAC")
    return file.getvalue()


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> str:
    def samples() -> Iterator[Sample]:
        for seed in range(12):
            yield Sample(f"s{seed:02}", {"audio": flac(seed)}, (f"word {'abc'[seed % 3]}!",))

    folder = tmp_path_factory.mktemp("speech")
    write_shards(samples(), folder)
    return str(folder)


def config(speech: str, name: str, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "system": {"name": name, "audio": AUDIO},
        "data": {"train": speech, "augment_audio": {"gain": 3, "noise": 0.5}},
        "processor": {"tokenizer": "characters", "audio": {"max_seconds": 0.6}},
        "train": TRAIN,
    }
    if name == "wav2vec2":
        values["system"]["objective"] = {"mask_length": 2, "codes": 4, "code_width": 8, "width": 8, "negatives": 5}
    return validate(RunConfig, values | changes, "test")


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = find_checkpoint(run, lambda _: None)
    assert checkpoint is not None
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def pretrained(speech: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    result = train(config(speech, "wav2vec2", data={"train": speech, "validation": speech}), out=run, progress=False)
    assert {"loss", "contrastive", "code_use"} <= result.metrics.keys()
    return run


@pytest.mark.parametrize("name", ["wav2vec2", "wav2vec2-ctc"])
def test_a_resumed_run_ends_in_the_same_bits(speech: str, tmp_path: Path, name: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(config(speech, name), out=whole, progress=False)
    train(config(speech, name), ["train.steps=2"], out=parts, progress=False)
    train(config(speech, name), out=parts, progress=False)
    expected, found = weights(whole), weights(parts)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_recogniser_begins_with_the_pretrained_encoder(speech: str, pretrained: Path, tmp_path: Path) -> None:
    settings = config(speech, "wav2vec2-ctc", init_from=str(pretrained))
    result = train(
        settings, ["train.lr=1e-12", "data.keep=0.6", f"data.validation={speech}"], out=tmp_path / "ctc", progress=False
    )
    assert {"loss", "wer", "cer"} <= result.metrics.keys()
    before, after = weights(pretrained), weights(tmp_path / "ctc")
    encoder = [name for name in after if name.startswith(("encoder.", "mask_vector"))]
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in encoder)
    model = mm.load(tmp_path / "ctc", precision="fp32")
    assert set("abc word") <= {
        model.processor.tokenizer.decode([i]) or " " for i in range(model.processor.tokenizer.vocab_size)
    }

    clip = tmp_path / "clip.flac"
    clip.write_bytes(flac(3))
    [one] = transcribe(model, [clip])
    [same] = transcribe(model, [tmp_path / "clip.flac"], beams=8)
    assert (one.audio, one.text) == (str(clip), same.text)
    (tmp_path / "sounds" / "folder.wav").mkdir(parents=True)
    (tmp_path / "sounds" / "B.FLAC").write_bytes(flac(3))
    [found] = transcribe(model, [tmp_path / "sounds"])
    assert (found.audio, found.text) == (str(tmp_path / "sounds" / "B.FLAC"), same.text)
    measured = evaluate_recognition(model, speech, beams=2)
    assert measured.metrics.keys() == {"wer", "cer", "exact"}
    outcome = CliRunner().invoke(app, ["transcribe", str(tmp_path / "ctc"), str(clip), "--json", str(tmp_path / "t.json")])
    assert outcome.exit_code == 0, outcome.output
    assert json.loads((tmp_path / "t.json").read_text())["transcripts"][0].keys() == {"audio", "text"}
    (tmp_path / "sounds" / "bad.wav").write_bytes(b"no sound")
    outcome = CliRunner().invoke(
        app, ["transcribe", str(tmp_path / "ctc"), str(tmp_path / "sounds"), "--json", str(tmp_path / "t.json")]
    )
    assert outcome.exit_code == 1
    told = json.loads((tmp_path / "t.json").read_text())
    assert [one["text"] for one in told["transcripts"]] == [same.text]
    assert [reason.partition(": not a usable recording")[0] for reason in told["left_out"]] == [
        str(tmp_path / "sounds" / "bad.wav")
    ]
    (tmp_path / "sounds" / "B.FLAC").unlink()
    with pytest.raises(UserError, match="none of the recordings"):
        transcribe(model, [tmp_path / "sounds"], on_unusable=lambda _: None)
    with pytest.raises(UserError, match="unknown format"):
        transcribe(model, [tmp_path / "sounds"])
    outcome = CliRunner().invoke(
        app, ["eval", "recognition", str(tmp_path / "ctc"), "--data", speech, "--json", str(tmp_path / "e.json")]
    )
    assert outcome.exit_code == 0, outcome.output
    assert {"wer", "cer"} <= json.loads((tmp_path / "e.json").read_text())["metrics"].keys()


def test_what_does_not_fit_is_told(speech: str, pretrained: Path, tmp_path: Path) -> None:
    other = {"tokenizer": "characters", "audio": {"normalise": True}}
    with pytest.raises(ConfigError, match=r"set both in processor\.audio"):
        train(config(speech, "wav2vec2-ctc", init_from=str(pretrained), processor=other), out=tmp_path / "x", progress=False)
    with pytest.raises(UserError, match="does not recognise speech"):
        transcribe(str(pretrained), [tmp_path])
    with pytest.raises(UserError, match="does not recognise speech"):
        evaluate_recognition(str(pretrained), speech)
    for run in (transcribe, evaluate_recognition):
        with pytest.raises(UserError, match="beams 0: give 1"):
            run("absent", speech, beams=0)


def test_a_share_of_the_labels_is_the_same_everywhere_and_nested(speech: str) -> None:
    def kept(share: float) -> list[str]:
        source = open_training_source(DataConfig(train=speech, keep=share))
        return [source.key(index) for index in range(len(source))]

    assert len(kept(1)) == 12
    assert kept(0.5) == kept(0.5)
    assert set(kept(0.3)) < set(kept(0.7)) < set(kept(1))
    with pytest.raises(UserError, match="leaves none"):
        kept(1e-9)
