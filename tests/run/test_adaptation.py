"""Adapting a model: averages of weights, probes on its vectors, learned prompts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mm
from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.run.adaptation import evaluate_probe, interpolate, learn_prompt


@pytest.fixture(scope="module")
def model() -> Model:
    return mm.load("emoji-clip", device="cpu")


@pytest.fixture(scope="module")
def tuned(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    options = ["train.steps=3", "train.batch_size=4", "train.tensorboard=false", "data.train=emoji:train/core/noto/novel/seen"]
    mm.train("configs/finetune.yaml", options, out=folder)
    return mm.load(folder, device="cpu")


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.system.state_dict().items() if not name.startswith("queues.")}


def test_averages_are_exact_at_both_ends_and_even_between(model: Model, tuned: Model) -> None:
    first, half, last = (weights(interpolate(model, tuned, alpha)) for alpha in (0.0, 0.5, 1.0))
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(model).items())
    assert all(torch.equal(last[name], tensor) for name, tensor in weights(tuned).items())
    name = "towers.projections.image.weight"
    torch.testing.assert_close(half[name], (first[name] + last[name]) / 2)
    assert not torch.equal(first[name], last[name])


def test_only_a_model_and_its_own_fine_tuning_are_averaged(model: Model, tuned: Model) -> None:
    from mm.tokenizers.text import TextTokenizer

    stranger = replace(
        model,
        processor=type(model.processor)(
            image=model.processor.image_spec, tokenizer=TextTokenizer.train_bpe(["x"], 300), context_length=24
        ),
    )
    with pytest.raises(UserError, match="different vocabularies"):
        interpolate(stranger, tuned, 0.5)
    with pytest.raises(UserError, match="not between"):
        interpolate(model, tuned, 1.5)


@pytest.mark.parametrize(("method", "expected"), [("linear", 0.5), ("knn", 0.5), ("tip", 0.05)])
def test_examples_of_one_artist_teach_another(model: Model, method: str, expected: float) -> None:
    """Concepts whose names mean nothing to the model (0 % zero-shot): the more a probe listens to the names, the less it learns."""
    found = evaluate_probe(model, "emoji:all/noto/novel", "emoji:all/twemoji/novel", method=method)
    assert found.metrics["top1"].value > expected
    assert found.protocol["examples_from"] == "emoji:all/noto/novel"


def test_an_unknown_probe_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="linear, knn, tip"):
        evaluate_probe(model, "emoji:all/noto/novel", "emoji:all/twemoji/novel", method="svm")


def test_learned_prompts_fit_the_examples_and_leave_the_model_alone(model: Model) -> None:
    names = ["zebra", "red apple", "pizza", "automobile", "umbrella"]
    before, fingerprint = class_vectors(model.embed_texts, names, ("{}",)), model.fingerprint
    images = torch.nn.functional.normalize(before.roll(1, 0) + 0.7 * before, dim=1)  # half way to a wrong name
    labels = torch.arange(5)
    context, vectors = learn_prompt(model, images, labels, names, length=3, steps=60, lr=0.05)
    assert context.shape == (3, 160)
    scale = 20.0
    plain = torch.nn.functional.cross_entropy(scale * images @ before.T, labels)
    learned = torch.nn.functional.cross_entropy(scale * images @ vectors(names).T, labels)
    assert learned < plain - 0.1
    assert model.fingerprint == fingerprint


def test_a_name_without_room_for_the_context_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        learn_prompt(model, torch.eye(2, 192), torch.arange(2), ["x", "a b c d e f g h i j k l m n o p q r s t u v"], steps=1)


def test_a_published_model_is_fine_tuned_by_its_name_alone(tmp_path: Path) -> None:
    """The network comes from ``init_from``; the configuration says only what changes."""
    from mm.run.training import load_run_config

    config = load_run_config(Path("configs/finetune.yaml"), ["system.lock=[text]"])
    assert config.system.lock == ("text",)
    assert config.system.queue_size == 0
    assert config.system.embed_dim == 192
