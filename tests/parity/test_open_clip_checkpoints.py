"""Folders that open_clip itself writes, loaded by mm: equal features from the same raw pictures and texts."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.encoders.text import TextEncoderConfig
from mm.errors import CheckpointError
from mm.hub import from_imported
from mm.published.openai import import_openai

TOLERANCE = 1e-4
TEXTS = ["a dog", "A photo of two  cats &amp; a cup, on the grass!", "x", "tree " * 100]
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
SIGLIP_TEXT = {
    "context_length": 16,
    "vocab_size": 300,
    "hf_tokenizer_name": "local",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "width": 64,
    "heads": 2,
    "layers": 2,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}


def timm_tower(name: str, pool: str = "", proj: str | None = "linear", size: int = 224) -> dict[str, Any]:
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": size}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "clip-vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "clip-vit-quickgelu": {"vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "clip-vit-mlp-ratio": {"vision_cfg": {**VIT, "mlp_ratio": 3.0}, "text_cfg": {**TEXT, "mlp_ratio": 2.0}},
    "clip-vit-layer-scale": {"vision_cfg": {**VIT, "ls_init_value": 0.1}, "text_cfg": TEXT},
    "clip-custom-text": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "clip-eos-pooling": {"vision_cfg": VIT, "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}},
    "clip-text-layer-scale": {"vision_cfg": VIT, "text_cfg": {**TEXT, "ls_init_value": 0.1}},
    "clip-resnet": {
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16},
        "text_cfg": TEXT,
        "quick_gelu": True,
    },
    "clip-no-causal-mask": {"vision_cfg": VIT, "text_cfg": {**TEXT, "no_causal_mask": True}, "custom_text": True},
    "clipa": {
        "vision_cfg": {**VIT, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {**TEXT, "pool_type": "last", "no_causal_mask": True},
    },
    "siglip-vit": {
        "vision_cfg": timm_tower("vit_base_patch16_siglip_224", "map", "none"),
        "text_cfg": {**SIGLIP_TEXT, "width": 64},
        "custom_text": True,
        "init_logit_bias": -10,
        "embed_dim": 768,
    },
    "siglip2-tanh": {
        "vision_cfg": timm_tower("vit_tiny_patch16_224", "avg", "none"),
        "text_cfg": {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}},
        "custom_text": True,
        "init_logit_bias": -10,
        "embed_dim": 192,
    },
    "convnext": {"vision_cfg": timm_tower("convnext_atto"), "text_cfg": TEXT, "custom_text": True},
    "timm-resnet": {"vision_cfg": timm_tower("resnet18", "avg"), "text_cfg": TEXT, "custom_text": True},
    "timm-vit-classifier": {
        "vision_cfg": timm_tower("vit_tiny_patch16_224", "token", None),
        "text_cfg": TEXT,
        "custom_text": True,
    },
    "timm-mlp-head": {"vision_cfg": timm_tower("resnet18", "avg", "mlp"), "text_cfg": TEXT, "custom_text": True},
    "eva02": {"vision_cfg": timm_tower("eva02_tiny_patch14_224", "token"), "text_cfg": TEXT, "custom_text": True},
    "mobileclip-s1": {
        "vision_cfg": timm_tower("fastvit_mci0", "avg", None, 256),
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "vitamin": {"vision_cfg": timm_tower("vitamin_small_224"), "text_cfg": TEXT, "custom_text": True},
    "coca": {
        "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
        "custom_text": True,
    },
}
OWN_IMAGE_TOWER = ARCHITECTURES.keys() - {"clip-resnet", "timm-mlp-head", "eva02", "coca"}
OWN_TEXT_TOWER = ARCHITECTURES.keys() - {"clip-text-layer-scale", "coca"}


def sentencepiece_like_tokenizer(folder: Path) -> None:
    """A tokenizer in the layout of SigLIP's: no start, ``</s>`` behind a text and as padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 ▁"))
    vocabulary = {"<unk>": 0, "</s>": 1} | {letter: i for i, letter in enumerate(letters, start=2)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.save_pretrained(folder)


def roberta_like(folder: Path) -> None:
    """A small text model of transformers with its tokenizer, as its publisher has them on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    names = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz▁"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    RobertaModel(RobertaConfig(vocab_size=40, max_position_embeddings=32, pad_token_id=1, **sizes)).save_pretrained(folder)


def written(folder: Path, architecture: dict[str, Any], preprocessing: dict[str, Any] | None = None) -> Any:
    """Random weights of an architecture, written as open_clip writes folders; returns open_clip's model."""
    torch.manual_seed(0)
    config = json.loads(json.dumps({"embed_dim": 32, **architecture}))
    folder.mkdir()
    if config["text_cfg"].get("hf_tokenizer_name") == "local":
        sentencepiece_like_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing or {}}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = open_clip.create_model(f"local-dir:{folder}")
    for parameter in model.parameters():  # biases and gains that are equal everywhere would hide a swapped name
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return model.eval()


def picture() -> Image.Image:
    ramp = np.linspace(0, 255, 90)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[None, :], ramp[:60, None], 128.0), -1).astype(np.uint8))


def their_features(folder: Path, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    config = json.loads((folder / "open_clip_config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        if config["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=16, clean="canonicalize")
        else:
            tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        with torch.no_grad():
            image = model.encode_image(transform(picture())[None], normalize=True)
            text = model.encode_text(tokenizer(TEXTS), normalize=True)
    return image, text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_of_raw_input_equal_open_clips(name: str, tmp_path: Path) -> None:
    reference = written(tmp_path / "model", ARCHITECTURES[name])
    image, text = their_features(tmp_path / "model", reference)
    model = mm.load(tmp_path / "model", device="cpu")
    assert isinstance(model.config.image, ImageEncoderConfig) == (name in OWN_IMAGE_TOWER)
    assert isinstance(model.config.text, TextEncoderConfig) == (name in OWN_TEXT_TOWER)
    torch.testing.assert_close(model.embed_images([picture()]), image, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.embed_texts(TEXTS), text, rtol=0, atol=TOLERANCE)
    ours = model.scores(image, text)
    theirs = reference.logit_scale.exp() * image @ text.T + (0 if reference.logit_bias is None else reference.logit_bias)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-4)


def test_a_saved_checkpoint_is_the_same_model(tmp_path: Path) -> None:
    written(tmp_path / "model", ARCHITECTURES["siglip2-tanh"])
    first = mm.load(tmp_path / "model", device="cpu")
    second = mm.load(mm.save(first, tmp_path / "saved"), device="cpu")
    assert second.fingerprint == first.fingerprint
    torch.testing.assert_close(second.embed_texts(TEXTS), first.embed_texts(TEXTS), rtol=0, atol=0)


@pytest.mark.parametrize("vision", [{**VIT, "width": 128, "head_width": 64}, ARCHITECTURES["clip-resnet"]["vision_cfg"]])
def test_openai_files_need_no_configuration(vision: dict[str, Any], tmp_path: Path) -> None:
    config = {"vision_cfg": vision, "text_cfg": {**TEXT, "width": 128, "heads": 2}, "quick_gelu": True}
    reference = written(tmp_path / "model", config)
    image, text = their_features(tmp_path / "model", reference)
    model = from_imported(import_openai(reference.half().state_dict(), "file"), name="file", device="cpu")
    torch.testing.assert_close(model.embed_images([picture()]), image, rtol=0, atol=3e-3)  # the file holds half precision
    torch.testing.assert_close(model.embed_texts(TEXTS), text, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("preprocessing", "message"),
    [({"resize_mode": "longest"}, "resize_mode 'longest'"), ({"interpolation": "random"}, "random")],
)
def test_a_preparation_that_cannot_be_honoured_is_refused(preprocessing: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "model", ARCHITECTURES["clip-vit"], preprocessing)
    with pytest.raises(CheckpointError, match=message):
        mm.load(tmp_path / "model")


def test_the_published_preparation_is_taken_over(tmp_path: Path) -> None:
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "resize_mode": "squash"}
    reference = written(tmp_path / "model", ARCHITECTURES["clip-vit"], preprocessing)
    image, _ = their_features(tmp_path / "model", reference)
    model = mm.load(tmp_path / "model", device="cpu")
    assert model.processor.image_spec.fit == "squash"
    torch.testing.assert_close(model.embed_images([picture()]), image, rtol=0, atol=TOLERANCE)


def test_pickled_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    written(tmp_path / "model", ARCHITECTURES["clip-vit"])
    (tmp_path / "model" / "open_clip_model.safetensors").rename(tmp_path / "model" / "open_clip_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"mm convert {tmp_path / 'model'} --i-trust-this-file"):
        mm.load(tmp_path / "model")


@pytest.mark.parametrize("pooler", ["mean_pooler", "cls_pooler"])
def test_a_text_tower_of_transformers_equals_open_clips(pooler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are read beside the weights or from the hub's cache; without both, the message says so."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    published, folder = tmp_path / "text", tmp_path / "model"
    roberta_like(published)
    text = {"hf_model_name": str(published), "hf_tokenizer_name": str(published), "hf_pooler_type": pooler}
    reference = written(folder, {"vision_cfg": VIT, "text_cfg": {**text, "context_length": 20}})
    with torch.no_grad():
        ids = open_clip.tokenizer.HFTokenizer(str(published), context_length=20)(TEXTS)
        expected = reference.encode_text(ids, normalize=True)
    config = folder / "open_clip_config.json"
    config.write_text(config.read_text().replace(str(published), "someone/text"))
    with pytest.raises(CheckpointError, match=r"someone/text of transformers, whose config\.json is neither beside"):
        mm.load(folder, device="cpu")

    files = ("config.json", "tokenizer.json", "tokenizer_config.json")
    for name in files:
        (folder / name).write_bytes((published / name).read_bytes())
    beside = mm.load(folder, device="cpu")
    torch.testing.assert_close(beside.embed_texts(TEXTS), expected, rtol=0, atol=TOLERANCE)
    saved = mm.load(mm.save(beside, tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(saved.embed_texts(TEXTS), expected, rtol=0, atol=TOLERANCE)

    repository, commit = tmp_path / "cache" / "models--someone--text", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    for name in files:
        (folder / name).rename(repository / "snapshots" / commit / name)
    assert mm.load(folder, device="cpu").fingerprint == beside.fingerprint


def test_an_unknown_tag_names_the_nearest() -> None:
    with pytest.raises(CheckpointError, match="did you mean 'ViT-B-32/openai'"):
        mm.load("ViT-B-32/opnai")
    with pytest.raises(CheckpointError, match="name the weights too"):
        mm.load("ViT-B-32")
