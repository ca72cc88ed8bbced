"""Two-stage retrieval of a saved model: the figures are those of its scores, for any score, k and number of processes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import benchmark_copies as copies
import pytest
import torch
from safetensors.torch import load_file

import mm
from mm.data.sources import open_source
from mm.errors import ConfigError, UserError
from mm.evaluation.retrieval import ranks_of_scores
from mm.hub import Model
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.training import _adopt
from mm.systems.albef import AlbefConfig, build
from mm.tokenizers.text import TextTokenizer

NUM_PICTURES = 7
CAPTIONS = [[f"picture {number}", f"another of number {number}"] for number in range(NUM_PICTURES)]

SIZES = {"context_length": 12, "width": 16, "heads": 2, "text_layers": 1, "fusion_layers": 1, "embed_dim": 8, "queue_size": 4}


def tiny(**options: object) -> Model:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train_bpe((text for texts in CAPTIONS for text in texts), 280)
    values: dict[str, object] = {
        "image": {"backbone": "resnet18", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}},
        "vocab_size": tokenizer.vocab_size,
    }
    config = AlbefConfig.model_validate(values | SIZES | options)
    processor = Processor(image=ImageSpec(size=32), tokenizer=tokenizer, context_length=12)
    return Model(system=build(config).eval(), processor=processor, config=config, name="tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captioned pictures in ``pictures.csv`` and a model in ``model``."""
    folder = tmp_path_factory.mktemp("reranking")
    for number in range(NUM_PICTURES):
        copies.picture(folder / f"{number}.png", number)
    rows = [f"{number}.png,{text}" for number, texts in enumerate(CAPTIONS) for text in texts]
    (folder / "pictures.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    mm.save(tiny(), folder / "model")
    return folder


def test_a_saved_model_has_no_momentum_and_is_the_same(folder: Path) -> None:
    names = load_file(folder / "model" / "model.safetensors").keys()
    assert not [name for name in names if name.startswith(("momentum.", "queues."))]
    loaded = mm.load(folder / "model", device="cpu")
    assert loaded.fingerprint == mm.load(folder / "model", device="cpu").fingerprint == tiny().fingerprint
    kept = loaded.system.state_dict().keys()
    assert kept == names, "nor has the one that is loaded"
    assert loaded.config == tiny().config, "but it knows how it was trained"


def test_training_may_begin_from_a_model_with_or_without_momentum() -> None:
    with_momentum, without = tiny(), tiny(momentum=0, queue_size=0, distillation=0)
    for start, system in ((with_momentum, without), (without, with_momentum)):
        with torch.no_grad():
            start.system.network.word_bias.add_(1)
        _adopt(system.system, start.system, "tiny")
        assert torch.equal(system.system.network.word_bias, start.system.network.word_bias)
    torch.testing.assert_close(
        with_momentum.system.momentum.average.word_bias.detach(), without.system.network.word_bias.detach()
    )


@pytest.mark.parametrize(("score", "weight"), [("itm", 1.0), ("sum", 1.0), ("sum", 0.25)])
def test_with_all_candidates_it_is_the_order_of_the_scores(folder: Path, score: str, weight: float) -> None:
    model, data = mm.load(folder / "model", device="cpu"), str(folder / "pictures.csv")
    result = mm.evaluate("retrieval", model, data, score=score, itm_weight=weight, top_k=1000)
    source = open_source(data)
    samples = [source.read(row) for row in range(len(source))]
    texts = [text for sample in samples for text in sample.texts]
    owner = torch.tensor([row for row, sample in enumerate(samples) for _ in sample.texts])
    pixels = model.processor.images([sample.media["image"] for sample in samples])
    with torch.no_grad():
        images, words = model.system.encode_image(pixels), model.system.encode_text(model.processor.text(texts))
        everyone = [images[torch.full((len(texts),), row)] for row in range(len(samples))]
        logits = torch.stack([model.system.match(image, words) for image in everyone])
        contrastive = model.system.scores(images.pooled, words.pooled)
    for prefix, scores in (("", weight * logits + contrastive if score == "sum" else logits), ("contrastive_", contrastive)):
        found = ranks_of_scores(scores, owner)
        assert result.metrics[f"{prefix}image_to_text_r1"].value == pytest.approx((found.image_to_text < 1).double().mean())
        assert result.metrics[f"{prefix}text_to_image_r5"].value == pytest.approx((found.text_to_image < 5).double().mean())
    assert result.protocol["reranked"].startswith(f"the {len(texts)} nearest texts of each image and {NUM_PICTURES} nearest")


def test_what_is_not_asked_for_is_as_the_card_recommends(folder: Path) -> None:
    plain, data = mm.load(folder / "model", device="cpu"), str(folder / "pictures.csv")
    advice = {"score": "sum", "itm_weight": 0.25, "top_k": 3}
    mm.save(plain, folder / "advised", card={"evaluation": {"retrieval": advice}})
    advised = mm.load(folder / "advised", device="cpu")
    usual = {"score": "itm", "itm_weight": 1.0, "top_k": 128}
    for given, taken, expected in (
        ({}, "score, itm_weight, top_k", advice),
        ({"top_k": 2}, "score, itm_weight", advice | {"top_k": 2}),
        ({"itm_weight": 0.5}, "score, top_k", advice | {"itm_weight": 0.5}),
        ({"score": "sum"}, "itm_weight, top_k", advice),
        ({"score": "itm"}, "top_k", {"score": "itm", "top_k": 3}),
        (usual | {"itm_weight": 2.0, "score": "sum"}, None, usual | {"itm_weight": 2.0, "score": "sum"}),
    ):
        found = mm.evaluate("retrieval", advised, data, **given)
        same = mm.evaluate("retrieval", plain, data, **expected)
        assert found.metrics == same.metrics
        said = found.protocol.get("recommended")
        assert said == (taken and f"{taken} by the card of the model")
        assert {**found.protocol, "recommended": None, "model": None} == {**same.protocol, "recommended": None, "model": None}
    assert "recommended" not in mm.evaluate("retrieval", plain, data).protocol


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"retrieval": {"score": "both"}}, "'evaluation' section of its card: 'retrieval.score'"),
        ({"retrieval": {"topk": 3}}, "did you mean 'top_k'"),
        ({"retrieval": {"top_k": 0}}, "retrieval.top_k"),
        ("sum", "'evaluation' section of its card"),
    ],
)
def test_a_card_that_cannot_be_understood_is_an_error(folder: Path, evaluation: object, message: str) -> None:
    model = replace(mm.load(folder / "model", device="cpu"), card={"evaluation": evaluation})
    with pytest.raises(ConfigError, match=message) as error:
        mm.evaluate("retrieval", model, str(folder / "pictures.csv"))
    assert "\n" not in str(error.value)


def test_contrastive_scores_need_no_second_stage(folder: Path) -> None:
    result = mm.evaluate("retrieval", str(folder / "model"), str(folder / "pictures.csv"), score="itc")
    values = {name: figure.value for name, figure in result.metrics.items()}
    assert all(values[name.removeprefix("contrastive_")] == value for name, value in values.items())
    assert "reranked" not in result.protocol


def test_impossible_options_are_refused(folder: Path) -> None:
    model, data = str(folder / "model"), str(folder / "pictures.csv")
    for options, message in (({"score": "both"}, "there are itm, itc, sum"), ({"top_k": 0}, "at least one candidate")):
        with pytest.raises(UserError, match=message):
            mm.evaluate("retrieval", model, data, **options)
    with pytest.raises(UserError, match="both embed and match"):
        mm.evaluate("retrieval", "emoji-clip", data, score="itm")


@pytest.mark.parametrize(("pictures", "processes"), [(NUM_PICTURES, 2), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_figures_do_not_depend_on_the_number_of_processes(folder: Path, pictures: int, processes: int) -> None:
    """Nor does one that has no picture to read."""
    metrics, lines = [], (folder / "pictures.csv").read_text().splitlines()
    (folder / "some.csv").write_text("\n".join(lines[: 1 + 2 * pictures]) + "\n")
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]):
        output = folder / f"{len(metrics)}.json"
        command = ["eval", "retrieval", "model", "--data", "some.csv", "--score", "sum", "--top-k", "3"]
        command += ["--no-cache", "--json", str(output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "mm.cli", *command],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        metrics.append(json.loads(output.read_text())["metrics"])
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(("score", "weight"), [("itm", 0.5), ("sum", -1.0)])
def test_a_weight_without_a_sum_is_refused(folder: Path, score: str, weight: float) -> None:
    with pytest.raises(UserError, match="itm_weight"):
        mm.evaluate("retrieval", str(folder / "model"), str(folder / "pictures.csv"), score=score, itm_weight=weight)
