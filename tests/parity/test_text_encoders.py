"""Text encoders published in transformers' layout give transformers' features, and tell generators what a text says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import mm
from mm.errors import CheckpointError, UserError
from mm.types import ReadsTexts

TOLERANCE = 1e-5
SIZES = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
WORDS = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁heart", "▁dog", "s", "a", "r", "e", "d", "h", "t", "o", "g"]
TEXTS = ["a red heart", "dogs", "a a a a red dog"]


def folder_of(place: Path, kind: str) -> tuple[Path, Any]:
    import transformers

    torch.manual_seed(0)
    name = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "whole": "T5ForConditionalGeneration"}[kind]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**SIZES, vocab_size=len(WORDS) + 3, decoder_start_token_id=0)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(place)
    tokenizer = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(WORDS)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(place / "tokenizer.json"))
    settings = {"pad_token": "<pad>", "eos_token": "</s>", "model_max_length": 12, "tokenizer_class": "T5TokenizerFast"}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place, model


@pytest.mark.parametrize("kind", ["t5", "umt5", "whole"])
@torch.no_grad()
def test_features_are_transformers(tmp_path: Path, kind: str) -> None:
    folder, reference = folder_of(tmp_path, kind)
    model = mm.load(folder, device="cpu", precision="fp32")
    text = model.processor.text(TEXTS)
    theirs = [Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids for text in TEXTS]
    assert [row[:length].tolist() for row, length in zip(text.ids, text.lengths, strict=True)] == theirs
    assert model.processor.context_length == 12
    system = model.system
    assert isinstance(system, ReadsTexts)
    found = system.read_texts(text)
    for row, ids in enumerate(theirs):
        expected = reference.get_encoder()(torch.tensor([ids])).last_hidden_state[0]
        torch.testing.assert_close(found.tokens[row, : len(ids)], expected, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(found.pooled[row], expected.mean(0), rtol=0, atol=TOLERANCE)
    assert ("left_out" in model.card) == (kind == "whole")
    with pytest.raises(UserError, match="takes no pictures"):
        model.embed_images([torch.zeros(3, 4, 4, dtype=torch.uint8)])


def test_a_converted_model_is_the_same_and_generators_read_it(tmp_path: Path) -> None:
    from mm.systems import build, read_system

    folder, _ = folder_of(tmp_path, "t5")
    model = mm.load(folder, device="cpu", precision="fp32")
    again = mm.load(mm.save(model, tmp_path / "saved"), device="cpu", precision="fp32")
    assert torch.equal(again.embed_texts(TEXTS), model.embed_texts(TEXTS))
    config = read_system({"name": "flow", "latents": {"image_size": 8}, "text": str(folder), "denoiser": {"patch": 4}}, "test")
    flow: Any = build(config, {"text": again.system})
    condition = flow.condition(model.processor.text(TEXTS))
    assert condition.words.shape == (3, 7, 16)
    assert condition.vector.shape == (3, 16)
    assert not any(parameter.requires_grad for parameter in flow.text.parameters())


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "t5")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"num_layers": 3}))
    with pytest.raises(CheckpointError, match="its weights have no"):
        mm.load(folder)
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 4}))
    with pytest.raises(CheckpointError, match="do not belong together"):
        mm.load(folder)
