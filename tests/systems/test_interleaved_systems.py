"""Frozen and Flamingo: what they compute equals brute force, what is frozen stays, what learns learns."""

import hashlib

import pytest
import torch
from torch import Tensor

from mm.errors import ConfigError, UserError
from mm.fusion.gated import GatedBlock
from mm.hub import Model, load, save
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.systems import build, clip, read_system
from mm.systems.clip import ClipConfig
from mm.systems.interleaved import InterleavedSystem
from mm.systems.language_model import Language, LanguageConfig
from mm.tokenizers.text import TextTokenizer
from mm.types import MEDIUM, Batch, Decoding, Interleaved, TextBatch

SIDE, VOCABULARY = 16, 60
IMAGE = {"backbone": "resnet18", "image_size": SIDE, "options": {"channels": [8, 8, 16, 16], "zero_init_last": False}}
NETWORK = {"vocab_size": VOCABULARY, "context_length": 64, "width": 32, "layers": 3, "heads": 4, "positions": "rotary"}
KINDS = {
    "pooled": {"name": "frozen"},
    "projected": {"name": "frozen", "embed_dim": 6, "prefix_length": 3},
    "tokens": {"name": "frozen", "prefix": "tokens"},
    "resampled": {"name": "frozen", "prefix": "resampled"},
    "flamingo": {"name": "flamingo", "latents": 3, "resampler_layers": 2, "gate_every": 2},
}
TRAINED_LANGUAGE = {"train_language": True}


def made(kind: str, **changes: object) -> InterleavedSystem:
    torch.manual_seed(0)
    values = {"image": IMAGE, "language": {"network": NETWORK}, **KINDS[kind], **changes}
    system = build(read_system(values, "test"))
    assert isinstance(system, InterleavedSystem)
    with torch.no_grad():
        for name, parameter in system.named_parameters():  # gates of 0 and nearly flat logits would hide faults
            if not name.startswith("image."):
                parameter.normal_(std=0.3)
    return system.eval()


def pictures(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def prompts(rows: list[list[int]]) -> Interleaved:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    count = sum(row.count(MEDIUM) for row in rows)
    return Interleaved(TextBatch(ids, torch.tensor(list(map(len, rows)))), pictures(count))


PROMPTS = [[MEDIUM, 1, 5, 6, 2, MEDIUM, 1, 7], [4, MEDIUM, 1], [9, 8, 1]]


def logits_of(system: InterleavedSystem, prompt: Interleaved) -> Tensor:
    reading = system.read(prompt)
    hidden = system.language(reading.vectors, reading.context, context_mask=reading.context_mask)
    return system.language.logits(hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_is_greedy_search_one_text_at_a_time(kind: str) -> None:
    """Together, from caches, with prompts of unequal lengths and numbers of pictures: as each alone, read anew for a word."""
    system, prompt = made(kind), prompts(PROMPTS)
    written = system.write(prompt, Decoding(max_tokens=5), [0, 1, 2])
    for row in range(len(PROMPTS)):
        alone, likelihood = prompt[row : row + 1], 0.0
        ids = PROMPTS[row]
        for _ in range(5):
            text = TextBatch(torch.tensor([ids]), torch.tensor([len(ids)]))
            with torch.no_grad():
                scores = logits_of(system, Interleaved(text, alone.image))[0, -1].log_softmax(-1)
            ids = [*ids, int(scores.argmax())]
            likelihood += float(scores.max())
        assert written[row].ids == tuple(ids[len(PROMPTS[row]) :])
        assert written[row].log_likelihood == pytest.approx(likelihood, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_of_candidates_are_those_of_whole_texts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm.generators.language_model.MAX_CANDIDATE_ROWS", 4)
    system, prompt = made(kind), prompts(PROMPTS)
    candidates = TextBatch(torch.tensor([[5, 6, 2], [7, 2, 0]]), torch.tensor([3, 2]))
    found = system.continuation_likelihoods(prompt, candidates)
    assert found.shape == (3, 2)
    for row, ids in enumerate(PROMPTS):
        for column, length in enumerate(candidates.lengths.tolist()):
            whole = ids + candidates.ids[column, :length].tolist()
            text = TextBatch(torch.tensor([whole]), torch.tensor([len(whole)]))
            with torch.no_grad():
                scores = logits_of(system, Interleaved(text, prompt[row : row + 1].image))[0].log_softmax(-1)
            expected = sum(float(scores[place - length - 1, whole[place - length]]) for place in range(length))
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_is_what_its_likelihood_says(kind: str) -> None:
    system, image = made(kind), pictures(2)
    beginning = TextBatch(torch.tensor([[1, 5], [1, 0]]), torch.tensor([2, 1]))
    written = system.caption(image, beginning, Decoding(max_tokens=4), [0, 1])
    ids = torch.tensor([[1, 5, *written[0].ids], [1, *written[1].ids, 0]])
    whole = system.caption_likelihoods(image, TextBatch(ids, torch.tensor([6, 5])))
    given = system.caption_likelihoods(image, beginning)
    expected = torch.tensor([one.log_likelihood for one in written])
    torch.testing.assert_close(whole - given, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, TRAINED_LANGUAGE, {"lock": ["image"], "remember_pictures": 10}])
def test_the_frozen_stay_and_gradients_reach_all_that_learns(kind: str, options: dict[str, object]) -> None:
    system = made(kind, **options).train()
    before = {name: _hash(tensor) for name, tensor in system.state_dict().items()}
    batch = Batch(ids=("a", "b"), interleaved=prompts([[MEDIUM, 1, 5, 6, 2, MEDIUM, 1, 7, 2], [MEDIUM, 1, 9, 2]]))
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        system.loss(batch, step).total.backward()
        lacking = [name for name, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not [name for name in lacking if not name.startswith("image.")]  # behind ReLU channels of the tiny encoder die
        optimizer.step()
    after = {name: _hash(tensor) for name, tensor in system.state_dict().items()}
    held = [name for name in before if before[name] == after[name]]
    language = [name for name in before if name.startswith("language.")]
    assert (set(language) <= set(held)) == (options != TRAINED_LANGUAGE)
    if "lock" in options:
        assert all(name in held for name in before if name.startswith(("image.", "projection.")))
    else:
        assert any(name not in held for name in before if name.startswith("image."))
    assert len(held) < len(before)


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_captions_is_one_of_interleaved_texts(kind: str) -> None:
    system, image = made(kind), pictures(2)
    text = TextBatch(torch.tensor([[1, 5, 6, 2], [1, 9, 2, 0]]), torch.tensor([4, 3]))
    interleaved = Interleaved(
        TextBatch(torch.tensor([[MEDIUM, 1, 5, 6, 2], [MEDIUM, 1, 9, 2, 0]]), torch.tensor([5, 4])), image
    )
    plain = system.loss(Batch(("a", "b"), image, text), 0)
    same = system.loss(Batch(("a", "b"), interleaved=interleaved), 0)
    torch.testing.assert_close(plain.total, same.total)
    halves = [system.loss(Batch(("a", "b"), interleaved=interleaved)[rows], 0).total for rows in (slice(0, 1), slice(1, 2))]
    torch.testing.assert_close(torch.stack(halves).mean(), same.total)


def test_flamingo_begins_as_its_language_model() -> None:
    """At initialisation logits equal the language model's to 1e-6, whatever pictures there are."""
    torch.manual_seed(0)
    trained = build(LanguageConfig.model_validate({"network": NETWORK}))
    assert isinstance(trained, Language)
    config = read_system({"image": IMAGE, "language": {"network": NETWORK}, **KINDS["flamingo"]}, "test")
    flamingo = build(config, {"language": trained})
    assert isinstance(flamingo, InterleavedSystem)
    flamingo.eval()
    prompt = prompts(PROMPTS)
    with torch.no_grad():
        vectors = flamingo.read(prompt).vectors
        expected = trained.network.eval().logits(trained.network(vectors))
        assert (logits_of(flamingo, prompt) - expected).abs().max() <= 1e-6
        words = Interleaved(TextBatch(torch.tensor([[4, 5, 6]]), torch.tensor([3])), pictures(0))
        alone = trained.network.logits(trained.network(trained.network.embed(words.text.ids)))
        assert (logits_of(flamingo, words) - alone).abs().max() <= 1e-6
    assert isinstance(flamingo.language.transformer.blocks[0], GatedBlock)
    assert flamingo.language.state_dict().keys() == trained.network.state_dict().keys()


def test_flamingos_words_see_the_picture_before_them_alone() -> None:
    """Masked attention to all pictures of a row is attention of each stretch of text to its own picture."""
    flamingo, prompt = made("flamingo"), prompts([[9, MEDIUM, 1, 5, MEDIUM, 1, 7]])
    reading = flamingo.read(prompt)
    gated, latents = flamingo.gated[0], flamingo.resampler(flamingo.see(prompt.image))
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        found = gated(x, reading.context, mask=reading.context_mask)
        none = x[:, :1] + gated.feed_forward_gate.tanh() * gated.feed_forward(gated.feed_forward_norm(x[:, :1]))
        parts = [none, gated(x[:, 1:4], latents[:1]), gated(x[:, 4:], latents[1:])]
    torch.testing.assert_close(found, torch.cat(parts, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pooled", "flamingo"])
def test_towers_and_language_models_give_what_they_have(kind: str) -> None:
    system = made(kind)
    start = clip.build(ClipConfig.model_validate({"image": IMAGE, "embed_dim": 6, "text": {"width": 32}}))
    given = system.state_from(start)
    assert {name for name in given if name.startswith("image.")} == {
        name for name in system.state_dict() if name.startswith("image.")
    }
    language = build(LanguageConfig.model_validate({"network": NETWORK}))
    assert system.state_from(language).keys() == {name for name in system.state_dict() if name.startswith("language.")}
    projected = made("projected")
    projected.load_state_dict(projected.state_dict() | projected.state_from(start))
    start.eval()
    with torch.no_grad():
        vectors = projected.see(pictures(2)).pooled
        torch.testing.assert_close(vectors / 6**0.5, start.embed_image(pictures(2)))


def test_a_model_held_fixed_cannot_learn() -> None:
    with pytest.raises(ConfigError, match="is held fixed"):
        read_system({"name": "frozen", "language": "gpt2", "train_language": True}, "test")
    with pytest.raises(ConfigError, match=r"lock: \[image\]"):
        read_system({"name": "frozen", "remember_pictures": 5}, "test")
    with pytest.raises(ConfigError, match="set it to 0"):
        read_system({"name": "frozen", "prefix": "tokens", "embed_dim": 6}, "test")


def test_too_long_a_prompt_is_refused() -> None:
    with pytest.raises(UserError, match="a prompt of 120 positions does not fit a context of 64"):
        made("pooled").write(prompts([[MEDIUM, 1] * 40]), Decoding(max_tokens=9), [0])


@pytest.mark.parametrize("kind", ["projected", "flamingo"])
def test_a_model_is_saved_loaded_and_cast(kind: str, tmp_path) -> None:
    tokenizer = TextTokenizer.train_bpe(["a"], 259)
    network = NETWORK | {"vocab_size": 259}
    system = made(kind, language={"network": network})
    spec = ImageSpec(size=SIDE)
    model = Model(system, Processor(image=spec, tokenizer=tokenizer, context_length=8), system.config, "test")
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", precision="fp32").system
    prompt = prompts(PROMPTS)
    torch.testing.assert_close(logits_of(again, prompt), logits_of(system, prompt))
    again.cast_(torch.bfloat16)
    assert again.language.transformer.rotary.frequencies.dtype == torch.float32
    assert len(again.write(prompt, Decoding(max_tokens=3), [0, 1, 2])) == 3
    rough = logits_of(again, prompt).float()[0, -1]
    assert torch.nn.functional.cosine_similarity(rough, logits_of(system, prompt)[0, -1], dim=0) > 0.98


def test_a_language_model_that_is_part_is_stored_once(tmp_path) -> None:
    tokenizer = TextTokenizer.train_bpe(["a"], 259)
    spec = ImageSpec(size=SIDE)
    config = LanguageConfig.model_validate({"network": NETWORK | {"vocab_size": 259}})
    torch.manual_seed(0)
    words = Model(build(config), Processor(image=spec, tokenizer=tokenizer, context_length=8), config, "words")
    save(words, tmp_path / "words")
    values = {"image": IMAGE, **KINDS["flamingo"], "language": str(tmp_path / "words")}
    config = read_system(values, "test")
    system = build(config, {"language": load(tmp_path / "words").system})
    model = Model(system.eval(), words.processor, config, "flamingo")
    save(model, tmp_path / "flamingo")
    again = load(tmp_path / "flamingo", precision="fp32")
    torch.testing.assert_close(logits_of(again.system, prompts(PROMPTS)), logits_of(system, prompts(PROMPTS)))
    assert not any(name.startswith("language.") for name in _stored(tmp_path / "flamingo"))


def _stored(folder) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())
