"""Language models from folders that transformers wrote compute, decode and split texts as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mm.errors import CheckpointError, UserError
from mm.hub import Model, load, save
from mm.published.convert import import_file
from mm.systems.language_model import Language
from mm.types import MEDIUM, Decoding, Interleaved, TextBatch

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
CONTEXT = 48
TEXTS = ("a smiling face with big eyes", "Grinning  cat!", "", "größer als 3.14, 猫 — don't", " leading space\nand a line", "x")
SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
ROPE = {"rope_theta": 5000.0, "rope_type": "default"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GATED = SIZES | {"num_key_value_heads": 2, "intermediate_size": 56, "rope_parameters": ROPE}
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4}),
    "gpt2-inner": (
        "GPT2",
        {"n_positions": CONTEXT, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_inner": 40, "layer_norm_epsilon": 1e-3},
    ),
    "opt": ("OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "opt-untied": (
        "OPT",
        SIZES | {"ffn_dim": 40, "word_embed_proj_dim": 32, "enable_bias": False, "tie_word_embeddings": False},
    ),
    "llama": ("Llama", GATED),
    "llama-stretched": ("Llama", GATED | {"rope_parameters": LLAMA3, "attention_bias": True, "tie_word_embeddings": True}),
    "mistral": ("Mistral", GATED | {"sliding_window": CONTEXT}),
    "qwen2": ("Qwen2", GATED),
}


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "the face of a cat, the face of a dog"] * 3, trainer)
    return tokenizer


def write_tokenizer(folder: Path, name: str) -> None:
    """As publishers do: GPT-2 and OPT as a vocabulary with merges, the others as a ``tokenizer.json``."""
    tokenizer = bpe()
    if name.startswith(("gpt2", "opt")):
        tokenizer.model.save(str(folder))
        settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": CONTEXT}
        settings |= {"unk_token": "</s>", "bos_token": "</s>", "eos_token": "</s>"}
        if name.startswith("opt"):
            settings |= {"add_bos_token": True, "pad_token": "<pad>"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def checkpoint(folder: Path, name: str, *, shards: bool = False, **changes: Any) -> Any:
    """Write a small random checkpoint; returns transformers' model."""
    kind, settings = CHECKPOINTS[name]
    settings = {"vocab_size": 310, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1} | settings | changes
    config = getattr(transformers, f"{kind}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # gains and biases too, so that none may be left out
        torch.nn.init.normal_(parameter, mean=0.0 if parameter.ndim > 1 else 0.5, std=0.25)
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
    write_tokenizer(folder, name)
    return model


def own(folder: Path) -> tuple[Model, Language]:
    model = load(folder, device="cpu", precision="fp32")
    assert isinstance(model.system, Language)
    return model, model.system


def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randint(3, 300, (3, 12)), torch.tensor([12, 5, 8])


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_logits_and_cached_steps_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, name)
    _, language = own(tmp_path)
    ids, lengths = prompts()
    network, real = language.network, torch.arange(12) < lengths[:, None]
    expected = reference(input_ids=ids, attention_mask=real.long()).logits
    found = network.logits(network(network.embed(ids)))
    torch.testing.assert_close(found[real], expected[real], atol=TOLERANCE, rtol=0)
    logits, state = network.prefill(network.embed(ids), lengths, 9)
    caches = [reference(input_ids=row[None, :length], use_cache=True) for row, length in zip(ids, lengths, strict=True)]
    for index in range(8):
        torch.testing.assert_close(logits, torch.cat([out.logits[:, -1] for out in caches]), atol=TOLERANCE, rtol=0)
        words = logits.argmax(1)
        caches = [
            reference(input_ids=word.view(1, 1), past_key_values=out.past_key_values, use_cache=True)
            for word, out in zip(words, caches, strict=True)
        ]
        logits = network.step(words, index, state)


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama", "llama-stretched"])
def test_greedy_writing_is_that_of_generate(name: str, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, name)
    _, language = own(tmp_path)
    ids, lengths = prompts()
    written = language.write(_prompt(ids, lengths), Decoding(max_tokens=20, end=2), [0, 1, 2])
    for row, length, found in zip(ids, lengths, written, strict=True):
        mask = torch.ones(1, int(length), dtype=torch.int64)
        made = reference.generate(row[None, :length], attention_mask=mask, max_new_tokens=20, do_sample=False)
        expected = made[0, length:].tolist()
        ended = 2 in expected
        assert list(found.ids) == (expected[: expected.index(2)] if ended else expected)
        assert found.finished == ended


def test_likelihoods_of_continuations_are_those_of_transformers(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, "opt")
    _, language = own(tmp_path)
    ids, lengths = prompts()
    candidates = TextBatch(torch.tensor([[5, 6, 2, 1], [7, 2, 1, 1], [9, 10, 11, 2]]), torch.tensor([3, 2, 4]))
    found = language.continuation_likelihoods(_prompt(ids, lengths), candidates)
    for i, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        for j, (candidate, count) in enumerate(zip(candidates.ids, candidates.lengths, strict=True)):
            whole = torch.cat([row[:length], candidate[:count]])[None]
            with torch.no_grad():
                scores = reference(input_ids=whole).logits[0].log_softmax(-1)
            expected = sum(float(scores[length - 1 + k, candidate[k]]) for k in range(count))
            assert float(found[i, j]) == pytest.approx(expected, abs=TOLERANCE)


def _prompt(ids: torch.Tensor, lengths: torch.Tensor) -> Interleaved:
    return Interleaved(TextBatch(ids, lengths), torch.empty(0, 3, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_texts_are_split_as_the_publisher_does_and_end(name: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, name)
    tokenizer = own(tmp_path)[0].processor.tokenizer
    published = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.start == {"gpt2": None, "opt": 2, "llama": 0}[name]
    for text in TEXTS:
        batch = tokenizer([text], CONTEXT)
        assert batch.ids[0, : batch.lengths[0]].tolist() == [*published(text).input_ids, 2]
        assert tokenizer.decode(batch.ids[0].tolist()) == text.strip()


def test_shards_and_a_saved_copy_give_the_same(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path / "published", "llama", shards=True)
    assert len(list((tmp_path / "published").glob("*.safetensors"))) > 1
    model, language = own(tmp_path / "published")
    save(model, tmp_path / "copy")
    assert "image" not in json.loads((tmp_path / "copy" / "processor.json").read_text())
    again, copy = own(tmp_path / "copy")
    assert again.fingerprint == model.fingerprint
    assert again.capabilities == {"writes"}
    ids, _ = prompts()
    with torch.no_grad():
        found = copy.network.logits(copy.network(copy.network.embed(ids)))
        torch.testing.assert_close(found, reference(input_ids=ids).logits, atol=TOLERANCE, rtol=0)
    assert again.processor.tokenizer.end == 2
    assert language.config == copy.config


def test_pickled_weights_are_read_on_the_users_word(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    state = {name.removeprefix("transformer."): tensor for name, tensor in reference.state_dict().items()}
    torch.save(state | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "pytorch_model.bin")  # as GPT-2 was published
    with pytest.raises(UserError, match="i-trust-this-file"):
        load(tmp_path)
    imported = import_file(tmp_path, architecture=None, trusted=True)
    assert torch.equal(imported.state["network.embedding.tokens.weight"], reference.transformer.wte.weight)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"activation_function": "silu"}, "activation silu"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before False"),
        ("opt", {"word_embed_proj_dim": 16}, "350 million"),
        ("llama", {"head_dim": 16}, "4 heads of 16 values"),
        ("llama", {"mlp_bias": True}, "mlp_bias True"),
        ("llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}}, "kind 'linear'"),
        ("llama", {"hidden_act": "gelu"}, "gelu instead of silu"),
    ],
)
def test_what_would_change_the_result_is_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, name, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_prompts_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    checkpoint(tmp_path, "gpt2")
    _, language = own(tmp_path)
    ids, lengths = prompts()
    ids[1, 2] = MEDIUM
    with pytest.raises(UserError, match="reads no pictures"):
        language.write(_prompt(ids, lengths), Decoding(max_tokens=2), [0, 1, 2])
    with pytest.raises(UserError, match="empty prompt"):
        language.write(_prompt(prompts()[0], lengths * 0), Decoding(max_tokens=2), [0, 1, 2])
    ids, lengths = prompts()
    room = language.network.context_length
    written = language.write(_prompt(ids, lengths), Decoding(max_tokens=10 * room), [0, 1, 2])
    assert {len(one.ids) for one in written} == {room - ids.shape[1] + 1}
    with pytest.raises(UserError, match="does not fit a context"):
        language.write(_prompt(ids.repeat(1, room), lengths), Decoding(), [0, 1, 2])
