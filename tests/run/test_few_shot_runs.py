"""Episodes as batches, and what they measure: a model that looks things up is right, one that sees nothing is not."""

import pickle
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mm.data.augment import AugmentConfig
from mm.data.captions import Captioner, CaptionTemplate
from mm.data.emoji import open_emoji
from mm.data.episodes import EpisodeConfig, Pool
from mm.data.loader import Loader
from mm.data.sources import Subset
from mm.errors import ConfigError, UserError
from mm.hub import Model, load, save
from mm.processor import Processor
from mm.run.config import CONFIGS
from mm.run.episodes import EpisodePreparation, captioned, endings
from mm.run.few_shot import evaluate_few_shot
from mm.run.preparation import TrainPreparation
from mm.run.training import assemble, load_run_config, train
from mm.systems import build
from mm.systems.frozen import FrozenConfig
from mm.systems.language_model import LanguageConfig
from mm.tokenizers.text import TextTokenizer
from mm.types import MEDIUM, Batch, Decoding, Interleaved, System, TextBatch, Written


@pytest.fixture(scope="module")
def clip() -> Model:
    return load("emoji-clip", precision="fp32")


def preparation(clip: Model, source, **changes) -> EpisodePreparation:
    base = TrainPreparation(
        clip.processor, Captioner([CaptionTemplate(template="{name}")]), AugmentConfig(noise=1.0), "none", seed=3
    )
    config = EpisodeConfig(concept="key", apart="artist", **changes)
    return EpisodePreparation(base, Pool(source, "key", apart="artist"), config)


@pytest.fixture(scope="module")
def source():
    whole = open_emoji("emoji:train/core", 48)
    return Subset(whole, lambda fields: fields["group"] == "food-drink")


def batches(clip: Model, source, count: int, state=None, **changes) -> tuple[list[Batch], Loader]:
    prepare = preparation(clip, source, **changes)
    loader = Loader(source, prepare, prepare.collate, batch_size=4, seed=3)
    if state is not None:
        loader.restore(state)
    stream = iter(loader)
    return [next(stream) for _ in range(count)], loader


def same(first: Batch, second: Batch) -> bool:
    assert first.interleaved is not None
    assert second.interleaved is not None
    return (
        first.ids == second.ids
        and torch.equal(first.interleaved.text.ids, second.interleaved.text.ids)
        and torch.equal(first.interleaved.image, second.interleaved.image)
    )


def test_episodes_are_a_pure_function_of_seed_epoch_and_sample(clip: Model, source) -> None:
    """A resumed run, with or without remembered pictures, gets the very same episodes."""
    straight, _ = batches(clip, source, 3)
    first, loader = batches(clip, source, 1)
    rest, _ = batches(clip, source, 2, state=loader.state(), remember=1000)
    assert all(same(one, other) for one, other in zip(straight, [*first, *rest], strict=True))
    pickle.loads(pickle.dumps(preparation(clip, source)))  # noqa: S301 - loader workers get it so


def test_a_sample_is_an_episode_that_ends_with_itself(clip: Model, source) -> None:
    prepare = preparation(clip, source, captions=0.0, ways=(3, 3), shots=(2, 2), template="a {}")
    sample = source.read(5)
    item, again = prepare(sample, 0), prepare(sample, 1)
    assert len(item.shown) == len(item.texts) == 7
    assert sorted(item.texts.count(text) for text in set(item.texts)) == [2, 2, 3]
    assert item.texts.count(item.texts[-1]) == 3
    assert all(text.startswith("a ") for text in item.texts)
    assert torch.equal(item.shown[-1].image, again.shown[-1].image)
    assert item.texts != again.texts
    assert len(set(item.augment_seeds)) == 7
    [caption] = preparation(clip, source, captions=1.0)(sample, 0).texts
    assert caption == sample.fields["name"]


def test_rows_are_pictures_with_their_texts(clip: Model) -> None:
    processor = clip.processor
    tokenizer = processor.tokenizer
    rows = captioned(processor, [["a cat", "dog"], []], "a")
    chunks = [[MEDIUM, tokenizer.start, *tokenizer.encode(text), tokenizer.end] for text in ("a cat", "dog")]
    begun = [MEDIUM, tokenizer.start, *tokenizer.encode("a")]
    assert rows.ids[0].tolist() == [*chunks[0], *chunks[1], *begun]
    assert rows.ids[1, : rows.lengths[1]].tolist() == begun
    found = endings(processor, "a {}", ["cat", "red apple"])
    assert found.ids[0, : found.lengths[0]].tolist() == [*tokenizer.encode("cat"), tokenizer.end]
    assert tokenizer.decode(found.ids[1].tolist()) == "red apple"


class LooksUp(System):
    """Continues a prompt with the text behind the example that looks most like the last picture, by emoji-clip."""

    def __init__(self, clip: Model) -> None:
        super().__init__()
        self.clip = clip.system
        self.anchor = nn.Parameter(torch.zeros(1))

    def write(self, prompt: Interleaved, decoding: Decoding, seeds: Sequence[int], *, on_tokens=None) -> list[Written]:
        ids = prompt.text.ids[0].tolist()
        starts = [place for place, token in enumerate(ids) if token == MEDIUM]
        chunks = [ids[a + 2 : b] for a, b in pairwise(starts)]
        if not chunks:
            return [Written((), 0.0, True)]
        vectors = self.clip.embed_image(prompt.image)  # pyright: ignore[reportCallIssue]
        best = chunks[int((vectors[:-1] @ vectors[-1]).argmax())]
        assert best[-1] == decoding.end
        return [Written(tuple(best[:-1]), 0.0, True)]

    def continuation_likelihoods(self, prompt: Interleaved, candidates: TextBatch) -> Tensor:
        [best] = self.write(prompt, Decoding(end=2), [0])
        rows = zip(candidates.ids.tolist(), candidates.lengths.tolist(), strict=True)
        return torch.tensor([[-float(tuple(ids[: length - 1]) != best.ids) for ids, length in rows]])


@pytest.fixture(scope="module")
def looker(clip: Model) -> Model:
    return Model(LooksUp(clip).eval(), clip.processor, FrozenConfig(), "looker")


def test_examples_are_what_is_measured(looker: Model, clip: Model) -> None:
    result = evaluate_few_shot(looker, "emoji:validation/core/novel", limit=40, shots=(0, 1, 4), ways=2)
    figures = {name: interval.value for name, interval in result.metrics.items()}
    assert figures["exact_4shot"] == figures["accuracy_4shot"] > 0.9
    assert figures["accuracy_4shot"] >= figures["accuracy_1shot"]
    assert figures["exact_0shot"] == 0
    assert 0.2 < figures["accuracy_0shot"] < 0.8
    assert 0.2 < figures["blind_accuracy_4shot"] < 0.8
    assert result.protocol["pool"] == "emoji:train/all-concepts"
    assert result.protocol["chance"] == "50.0%"
    again = evaluate_few_shot(looker, "emoji:validation/core/novel", limit=40, shots=(4,), ways=2, repeats=2)
    assert again.metrics["exact_4shot"].value == figures["exact_4shot"]  # an example shown twice looks no more like the query


@pytest.mark.slow
def test_similar_pictures_as_examples_with_real_names(looker: Model, clip: Model) -> None:
    result = evaluate_few_shot(
        looker, "emoji:validation/core/seen", pool="emoji:train/core", rices=clip, shots=(0, 2), limit=30
    )
    figures = {name: interval.value for name, interval in result.metrics.items()}
    assert figures["exact_2shot"] == pytest.approx(figures["nearest_exact"])  # it copies the most similar
    assert figures["exact_2shot"] > 0.3
    assert figures["exact_0shot"] == 0
    assert not any(name.startswith("accuracy") for name in figures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 1}, "at least 2 concepts"),
        ({"shots": (1, 1)}, "different numbers"),
        ({"shots": ()}, "different numbers"),
        ({"repeats": 0}, "from 1 on"),
        ({"template": "x"}, "write {} once"),
        ({"ways": 500}, "no picture has a concept"),
    ],
)
def test_options_that_mean_nothing_are_refused(looker: Model, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate_few_shot(looker, "emoji:validation/core/novel", **options)


def test_a_model_that_reads_no_pictures_among_words_is_refused(clip: Model) -> None:
    with pytest.raises(UserError, match="reads no texts in which pictures stand"):
        evaluate_few_shot(clip, "emoji:validation/core/novel")


@pytest.mark.parametrize("config", ["frozen", "flamingo"])
def test_a_run_takes_steps_on_episodes_and_is_measured(config: str, tmp_path, source) -> None:
    changes = ["train.steps=2", "train.batch_size=2", "system.remember_pictures=0", "data.train=emoji:train/core/noto"]
    changes += [
        "data.validation=null",
        "data.episodes.apart=null",
        "data.episodes.shots=[1, 2]",
        "system.language.network.layers=1",
    ]
    result = train(CONFIGS / f"{config}.yaml", changes, out=tmp_path)
    assert result.step == 2
    figures = evaluate_few_shot(tmp_path, "emoji:validation/core/novel", limit=2, shots=(1,), precision="fp32")
    assert {"accuracy_1shot", "blind_exact_1shot"} <= figures.metrics.keys()


def test_episodes_need_a_system_that_reads_them() -> None:
    config = load_run_config(CONFIGS / "clip.yaml", ["data.episodes={concept: key}", "data.validation=null"])
    with pytest.raises(ConfigError, match="take frozen or flamingo"):
        assemble(config)


def test_a_language_model_that_is_part_brings_its_tokens(clip: Model, tmp_path) -> None:
    tokenizer = TextTokenizer.train_bpe(["a few words"], 300)
    network = {"vocab_size": tokenizer.vocab_size, "context_length": 64, "width": 16, "layers": 1, "positions": "rotary"}
    config = LanguageConfig.model_validate({"network": network})
    words = Model(build(config), Processor(tokenizer=tokenizer, context_length=16), config, "words")
    save(words, tmp_path / "words")
    changes = [
        f"system.language={tmp_path / 'words'}",
        "system.train_language=false",
        "data.validation=null",
        "data.episodes.ways=[2,2]",
    ]
    run = assemble(load_run_config(CONFIGS / "frozen.yaml", [*changes, "data.train=emoji:train/core/noto"]))
    assert run.processor.tokenizer.to_json() == tokenizer.to_json()
    assert run.processor.image_spec == clip.processor.image_spec
    assert not any(p.requires_grad for p in run.system.get_submodule("language").parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["system.language.network.context_length=48"], "positions do not fit system.language.network.context_length 48"),
        (["data.episodes.ways=[2,60]"], "2 to 40"),
        (["system.prefix=resampled", "system.embed_dim=0", "system.resampler_heads=7"], "must divide the width"),
    ],
)
def test_what_episodes_cannot_be_is_told_before_training(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(load_run_config(CONFIGS / "frozen.yaml", overrides))
