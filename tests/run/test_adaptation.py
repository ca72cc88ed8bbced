"""Adapting a model: averages of weights, probes on its vectors, learned prompts."""

from dataclasses import replace
from pathlib import Path

import benchmark_copies as copies
import pytest
import torch

import mm
from mm.data.labels import label_task
from mm.data.sources import Subset, open_source
from mm.errors import UserError
from mm.evaluation.zero_shot import class_vectors
from mm.hub import Model
from mm.run.adaptation import _logit_scale, best_alpha, evaluate_probe, interpolate, learn_prompt, sweep
from mm.run.evaluation import evaluate_zero_shot, stamp
from mm.run.training import assemble, load_run_config
from mm.systems import build
from mm.systems.clip import Clip
from mm.types import Embeds


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


def test_queues_of_any_length_are_no_part_of_an_average(model: Model) -> None:
    configs = [model.config.model_copy(update={"queue_size": size}) for size in (0, 8, 16)]
    none, short, long = (replace(model, config=config, system=build(config)) for config in configs)
    mixed = interpolate(short, long, 0.5).system.state_dict()
    assert torch.equal(mixed["queues.image.features"], long.system.state_dict()["queues.image.features"])
    assert mixed.keys() == interpolate(none, long, 0.5).system.state_dict().keys()


def test_other_networks_are_not_averaged(model: Model) -> None:
    config = model.config.model_copy(update={"loss": "siglip", "queue_size": 0})
    with_bias = replace(model, config=config, system=build(config))
    for pair in ((model, with_bias), (with_bias, model)):
        with pytest.raises(UserError, match=r"different networks.*logit_bias"):
            interpolate(*pair, 0.5)


def test_a_sweep_measures_each_average(model: Model, tuned: Model) -> None:
    data = Subset(open_source("emoji:validation/core/seen", image_size=48), range(0, 600, 10))
    found = sweep(model, tuned, data, alphas=(0.0, 0.5), options={"templates": ["{}"]})
    half = evaluate_zero_shot(interpolate(model, tuned, 0.5), data, templates=["{}"], baseline="none", cache=False)
    assert found[0.5].metrics["top1"] == half.metrics["top1"]
    assert found[0.5].metrics["top1"].value > 0.2
    assert found[0.0].protocol["model_fingerprint"] != found[0.5].protocol["model_fingerprint"]


def test_of_equal_figures_the_smallest_alpha_is_best() -> None:
    assert best_alpha({1.0: 0.6, 0.5: 0.7, 0.25: 0.7, 0.0: 0.5}) == 0.25


def test_sources_may_name_their_class_fields_and_order_their_classes_differently(model: Model, tmp_path: Path) -> None:
    """A folder of pictures (``cls``, alphabetic order) teaches a source whose class is ``name`` among 1,451."""
    source = open_source("emoji:all/noto/novel", image_size=48)
    for row in range(len(source)):
        folder = tmp_path / "photos" / source.fields(row)["name"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(source.read(row).media["image"])
    found = evaluate_probe(model, str(tmp_path / "photos"), "emoji:all/noto/novel", method="knn")
    assert found.metrics["top1"].value > 0.95


@pytest.mark.parametrize(("method", "expected"), [("linear", 0.5), ("knn", 0.5), ("tip", 0.05)])
def test_examples_of_one_artist_teach_another(model: Model, method: str, expected: float) -> None:
    """The names mean nothing to the model (0 % zero-shot): the more a probe listens to them, the less it learns."""
    found = evaluate_probe(model, "emoji:all/noto/novel", "emoji:all/twemoji/novel", method=method)
    assert found.metrics["top1"].value > expected
    assert found.protocol["examples_from"] == "emoji:all/noto/novel"


def test_probes_use_the_published_prompts_and_the_models_own_scale(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies.dtd(tmp_path)
    templates = ("{} texture", "a fine photo of a {}")
    source = open_source(f"dtd:{tmp_path}")
    monkeypatch.setattr(source, "templates", templates)
    seen: list[str] = []
    embed = Model.embed_texts
    monkeypatch.setattr(Model, "embed_texts", lambda self, texts, **more: seen.extend(texts) or embed(self, texts, **more))
    found = evaluate_probe(model, source, source, method="tip")
    assert found.protocol["templates"] == list(templates)
    assert set(seen) == {template.replace("{}", name) for template in templates for name in label_task(source).classes}
    assert isinstance(model.system, Clip)
    assert found.protocol["scale"] == pytest.approx(model.system.towers.scale().item(), rel=1e-4)
    prompt = evaluate_probe(model, source, source, method="prompt")
    assert prompt.protocol["classifier"] == "learned prompt, from 'a fine photo of a'"


def test_a_scale_is_found_beside_a_bias(model: Model) -> None:
    config = model.config.model_copy(update={"loss": "siglip", "queue_size": 0})
    system = build(config)
    assert isinstance(system, Clip)
    assert _logit_scale(replace(model, config=config, system=system)) == pytest.approx(10.0, rel=1e-4)


def test_a_probe_states_what_every_evaluation_states(model: Model) -> None:
    train, test = (open_source(f"emoji:all/{artist}/novel", image_size=48) for artist in ("noto", "twemoji"))
    found = evaluate_probe(model, train, test, method="knn")
    expected = stamp(model, test, f"{len(test)} delivered, 0 skipped, 0 tail of {len(test)}")
    assert expected.items() <= found.protocol.items()
    assert {"precision", "resize", "model_fingerprint", "data_fingerprint"} <= expected.keys()
    assert found.protocol["examples_samples"].startswith(f"{len(train)} delivered")
    assert found.protocol["examples_fingerprint"] == train.fingerprint[:16]


def test_a_learned_prompt_tells_classes_that_had_no_example_too(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.run.adaptation.PROMPT_NAMES", 24)
    source = open_source("emoji:validation/core/seen", image_size=48)
    train, test = Subset(source, range(0, 600, 30)), Subset(source, range(6, 600, 12))
    found = evaluate_probe(model, train, test, method="prompt")
    assert found.metrics["top1"].value > 0.2
    assert found.protocol["examples"] == 20
    assert "1 of 1451 classes" in found.protocol["task"]


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


def test_a_prompt_that_begins_as_words_begins_as_good_as_they_are(model: Model) -> None:
    names = ["zebra", "red apple", "pizza"]
    expected = class_vectors(model.embed_texts, names, ("an emoji of {}",))
    _, vectors = learn_prompt(model, expected, torch.arange(3), names, words="an emoji of", steps=1, lr=1e-9)
    torch.testing.assert_close(vectors(names), expected, atol=1e-4, rtol=0)


def test_a_name_without_room_for_the_context_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="leaves no room"):
        learn_prompt(model, torch.eye(2, 192), torch.arange(2), ["x", "a b c d e f g h i j k l m n o p q r s t u v"], steps=1)


def test_a_published_model_is_fine_tuned_by_its_name_alone(tmp_path: Path) -> None:
    """The network comes from ``init_from``; the configuration says only what changes."""
    config = load_run_config(Path("configs/finetune.yaml"), ["system.lock=[text]"])
    assert config.system.lock == ("text",)
    assert config.system.queue_size == 0
    assert config.system.embed_dim == 192


def test_albef_begins_as_the_dual_tower_it_starts_from(model: Model) -> None:
    options = ["init_from=emoji-clip", "data.train=emoji:train/core/noto/novel/seen", "data.validation=null"]
    begun = assemble(load_run_config(Path("configs/albef.yaml"), [*options, "train.batch_size=16"])).system.eval()
    assert isinstance(begun, Embeds)
    assert isinstance(model.system, Embeds)
    texts = model.processor.text(["zebra", "red apple"])
    image = torch.randint(0, 255, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(begun.embed_text(texts), model.system.embed_text(texts), atol=1e-5, rtol=0)
    torch.testing.assert_close(begun.embed_image(image), model.system.embed_image(image), atol=1e-5, rtol=0)


def test_albef_refuses_towers_that_compute_something_else() -> None:
    """Equal shapes are not enough: heads and pooling leave no trace in the weights."""
    options = ["init_from=emoji-clip", "data.train=emoji:train/core/noto/novel/seen", "data.validation=null"]
    for change, name in (("system.heads=2", "heads 4"), ("system.text_pooling=first", "text_pooling mean")):
        with pytest.raises(UserError, match=f"its towers have {name}"):
            assemble(load_run_config(Path("configs/albef.yaml"), [*options, "train.batch_size=16", change]))


def test_albef_refuses_towers_of_other_sizes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another network than 'system' describes \(first difference: network.towers"):
        mm.train("configs/albef.yaml", ["init_from=emoji-clip", "system.embed_dim=64"], out=tmp_path / "run")
