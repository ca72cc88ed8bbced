"""Starts of ALBEF from BERT: the words are transformers' BERT, the pictures those of the encoder that is given."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.errors import CheckpointError, UserError
from mm.hub import Model
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.run.conversion import convert
from mm.systems import image_tower
from mm.systems.image_tower import ImageTowerConfig

pytest.importorskip("transformers")

import transformers
from albef_reference import WORDS, Reference, bert_tokenizer, drawn_set, near, pictures, tuned

SIZES = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 40}
EPS = 1e-3
TEXTS = ["the dog", "x", "unable , person"]
PICTURES: dict[str, dict[str, Any]] = {
    "patches": {
        "backbone": "vit_tiny_patch16_224",
        "image_size": 16,
        "patch_size": 8,
        "options": {"embed_dim": 48, "depth": 1, "num_heads": 2},
    },
    "feature map": {"backbone": "resnet18", "image_size": 32, "options": {"channels": [8, 8, 8, 8]}},
}


@dataclass
class Start:
    """A BERT of transformers and its folder, and the model of a picture encoder."""

    bert: Any
    folder: Path
    picture: Path

    def convert(self, name: str = "start", **options: Any) -> Model:
        out = self.folder.parent / name
        convert(self.folder, out, **{"image": str(self.picture), **options})
        return mm.load(out, device="cpu", precision="fp32")


def begun(folder: Path, *, kind: str = "BertForPreTraining", picture: str = "patches", layers: int = 4) -> Start:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(WORDS), num_hidden_layers=layers, layer_norm_eps=EPS, **SIZES)
    bert = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    bert.save_pretrained(folder / "bert")
    bert_tokenizer().save_pretrained(folder / "bert")
    tower = ImageTowerConfig(image=ImageEncoderConfig(**PICTURES[picture]))
    processor = Processor(image=ImageSpec(size=tower.picture_side, fit="squash"))
    mm.save(Model(system=image_tower.build(tower).eval(), processor=processor, config=tower, name="tower"), folder / "tower")
    return Start(bert, folder / "bert", folder / "tower")


@pytest.mark.parametrize("picture", PICTURES)
@torch.no_grad()
def test_a_start_reads_with_bert_and_sees_with_the_given_encoder(picture: str, tmp_path: Path) -> None:
    start = begun(tmp_path, picture=picture)
    model: Any = start.convert()
    system, text = model.system, model.processor.text(TEXTS)
    rows = zip(text.ids.tolist(), text.lengths.tolist(), strict=True)
    assert [row[:length] for row, length in rows] == bert_tokenizer()(TEXTS)["input_ids"]
    inside = text.valid()
    halves = start.bert.bert(text.ids, attention_mask=inside.long(), output_hidden_states=True).hidden_states
    near(system.encode_text(text).tokens[inside], halves[2][inside])

    pixels = pictures(side=model.processor.image_spec.size)
    image, seen = system.encode_image(pixels), mm.load(start.picture, device="cpu", precision="fp32").system.encoder(pixels)
    near(system.encoders()["image"](pixels).tokens, seen.tokens)
    near(image.tokens, system.network.picture_tokens(seen.tokens))

    expected = with_cross_attention(start, system).fused(halves[2], text, image.tokens)
    found = system.fuse(image, system.encode_text(text)).tokens
    near(found[inside], expected[inside])
    near(system.network.words(found)[inside], start.bert.cls.predictions(expected)[inside])


def with_cross_attention(start: Start, system: Any) -> Reference:
    """The reference with all of BERT's weights and the cross-attention of a start, which is fresh."""
    reference = Reference()
    config = transformers.BertConfig(
        **{"vocab_size": len(WORDS), "num_hidden_layers": 4, "layer_norm_eps": EPS, **SIZES},
        is_decoder=True,
        add_cross_attention=True,
        attn_implementation="eager",
    )
    reference.text_encoder = transformers.BertLMHeadModel(config).eval()
    reference.text_encoder.load_state_dict(start.bert.state_dict(), strict=False)
    for layer, block in zip(
        reference.text_encoder.bert.encoder.layer[2:], system.network.fusion.transformer.blocks, strict=True
    ):
        theirs, ours = layer.crossattention, block.cross_attention
        weight, bias = ours.key_value.weight, ours.key_value.bias
        for name, rows in (("key", slice(64)), ("value", slice(64, None))):
            linear = nn.Linear(weight.shape[1], 64)
            linear.weight, linear.bias = nn.Parameter(weight[rows]), nn.Parameter(bias[rows])
            setattr(theirs.self, name, linear)
        theirs.self.query, theirs.output.dense = ours.query, ours.output
        theirs.output.LayerNorm = block.cross_attention_residual.norm
    return reference


def test_every_layout_of_bert_gives_the_same_start(tmp_path: Path) -> None:
    start = begun(tmp_path)
    folder, weights = start.folder, start.folder / "model.safetensors"
    state = load_file(weights)
    with_json: Any = start.convert("with tokenizer.json")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    with_text: Any = start.convert("with vocab.txt")
    texts = ["The dog, unable [SEP]", "日本 Äpfel"]
    assert with_text.processor.text(texts).ids.tolist() == with_json.processor.text(texts).ids.tolist()
    own, other = (dict(model.system.network.named_parameters()) for model in (with_json, with_text))
    assert all(torch.equal(parameter, own[name]) for name, parameter in other.items())

    old = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t.clone() for name, t in state.items()}
    save_file(old, weights)
    assert start.convert("with old names").fingerprint == with_text.fingerprint
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        start.convert("without weights")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="--i-trust-this-file"):
        start.convert("untrusted")
    assert start.convert("pickled", trusted=True).fingerprint == with_text.fingerprint


def test_bert_alone_gets_a_fresh_head_and_an_uneven_half(tmp_path: Path) -> None:
    model: Any = begun(tmp_path, kind="BertModel", layers=3).convert(image_size=24)
    assert (model.config.text_layers, model.config.fusion_layers) == (2, 1)
    assert model.system.network.word_bias.abs().sum() == 0
    assert model.system.network.masked_head[0].weight.std() > 0
    assert model.system.encode_image(pictures(side=24)).tokens.shape[1] == 10
    assert model.processor.image_spec.size == 24


def test_training_begins_with_a_start(tmp_path: Path) -> None:
    before: Any = begun(tmp_path).convert()
    tuned(tmp_path / "start", drawn_set(tmp_path), tmp_path / "run")
    after = mm.load(tmp_path / "run", device="cpu").system.state_dict()
    trainable = {name: parameter for name, parameter in before.system.named_parameters() if parameter.requires_grad}
    assert not [name for name, parameter in trainable.items() if torch.equal(parameter, after[name])]


def test_a_bad_start_is_one_line(tmp_path: Path) -> None:
    start = begun(tmp_path)
    values = json.loads((start.folder / "config.json").read_text())

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            start.convert("refused", **options)
        assert "\n" not in str(caught.value)

    refused("BERT, which reads no pictures; .* --image MODEL", image=None)
    refused("takes no --vocab", vocab=tmp_path / "vocab.txt")
    refused("no model 'nothing'", image="nothing")
    refused("20 is not a multiple of the patch size 8", image_size=20)
    with pytest.raises(CheckpointError, match="mm convert FOLDER --image MODEL"):
        mm.load(start.folder)
    for key, value, message in (
        ("hidden_act", "relu", "another activation"),
        ("num_attention_heads", 5, "multiple of heads"),
        ("intermediate_size", 80, "its configuration says"),
    ):
        (start.folder / "config.json").write_text(json.dumps(values | {key: value}))
        refused(message)
    (start.folder / "config.json").write_text(json.dumps(values))
    transformers.BertTokenizer(vocab={word: i for i, word in enumerate(WORDS[:-1])}).save_pretrained(start.folder)
    refused(f"holds {len(WORDS) - 1} words, its weights {len(WORDS)}")
    save_file({"bert.pooler.dense.weight": torch.ones(2)}, start.folder / "model.safetensors")
    refused("word_embeddings")
