"""Folders that transformers itself writes, loaded by mm: equal features from the same raw pictures and texts."""

import functools
import json
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.encoders.text import TextEncoderConfig
from mm.errors import CheckpointError, UserError
from mm.hub import from_imported
from mm.published import huggingface
from mm.published.convert import import_file
from mm.tokenizers.text import TextTokenizer

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
TEXTS = ["a dog", "A photo of two  cats, on the grass!", "x", "tree " * 100]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"

VISION = {
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "vocab_size": 96,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
BERT_TEXT = {**TEXT, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}


@functools.cache
def whole_clip_tokenizer() -> Any:
    model = json.loads(TextTokenizer.clip_bpe().to_json())["tokenizer"]["model"]
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): i for token, i in model["vocab"].items()}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])


def small_clip_tokenizer() -> Any:
    """CLIP's manner with a vocabulary of single characters."""
    characters = LETTERS + ",!"
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(character + "</w>" for character in characters)]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def bert_tokenizer() -> Any:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *("##" + letter for letter in LETTERS)]
    return transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


def sentence_tokenizer(start: str | None = None, **settings: Any) -> Any:
    """Letters after a word mark, ``</s>`` behind a text, as in SigLIP's and XLM-RoBERTa's files."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "▁"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    template = "$A </s>" if start is None else f"{start} $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)


def siglip2_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *LETTERS, "▁", ",", "!"]
    tokenizer = transformers.Siglip2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_input_names=["input_ids"], padding_side="right"
    )
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return tokenizer


def clip_pictures(**changes: Any) -> Any:
    return transformers.CLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **changes}
    )


def squashed(kind: str, **changes: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, f"{kind}ImageProcessor")(**{"size": {"height": 32, "width": 32}, **changes})


class Case(NamedTuple):
    """How transformers makes a checkpoint, and which of its towers become the suite's own."""

    model: Callable[[], Any]
    tokenizer: Callable[[], Any] = small_clip_tokenizer
    preparation: Callable[[], Any] = clip_pictures
    own_image: bool = True
    own_text: bool = True


def dual(name: str, vision: dict[str, Any], text: dict[str, Any], **other: Any) -> Callable[[], Any]:
    def make() -> Any:
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(vision_config=vision, text_config=text, **other))

    return make


def library(model: Callable[[], Any], tokenizer: Callable[[], Any], preparation: Callable[[], Any] = clip_pictures) -> Case:
    return Case(model, tokenizer, preparation, own_image=False, own_text=False)


WHOLE_TEXT = {**TEXT, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
XLM_TEXT = {**TEXT, "max_position_embeddings": 26, "eos_token_id": 2, "project_dim": 20}
SIGLIP_TEXT = {**TEXT, "max_position_embeddings": 16, "eos_token_id": 2, "projection_size": 32}
GROUPS = {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 2]}
EFFICIENT_NET = {"image_size": 32, "width_coefficient": 0.2, "depth_coefficient": 0.2, "hidden_dim": 64}
TO_24 = {"projection_dim": 24}
GELU, NEW_GELU, RELU = {"hidden_act": "gelu"}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}
SHIFTED = {"rescale_factor": 1 / 127.5, "rescale_offset": True}
CUT = {"size": {"height": 39, "width": 39}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}


def first_siglip_tokenizer() -> Any:
    return sentence_tokenizer(model_input_names=["input_ids"], tokenizer_class="SiglipTokenizer")


def xlm_tokenizer() -> Any:
    return sentence_tokenizer("<s>")


CASES: dict[str, Case] = {
    "clip-quickgelu": Case(dual("CLIPModel", VISION, WHOLE_TEXT, **TO_24), whole_clip_tokenizer),
    "clip-gelu": Case(dual("CLIPModel", VISION | GELU, WHOLE_TEXT | GELU, **TO_24), whole_clip_tokenizer),
    "clip-legacy-end": Case(dual("CLIPModel", VISION, WHOLE_TEXT | {"eos_token_id": 2}, **TO_24), whole_clip_tokenizer),
    "clip-own-vocabulary": Case(dual("CLIPModel", VISION, TEXT, **TO_24)),
    "clip-unusual": library(dual("CLIPModel", VISION | NEW_GELU, TEXT | {"eos_token_id": 2}, **TO_24), small_clip_tokenizer),
    "metaclip2": Case(dual("MetaClip2Model", VISION, TEXT | {"eos_token_id": 2}, **TO_24), xlm_tokenizer),
    "siglip": Case(dual("SiglipModel", VISION, SIGLIP_TEXT), first_siglip_tokenizer, squashed("Siglip")),
    "siglip2": Case(dual("SiglipModel", VISION, SIGLIP_TEXT), siglip2_tokenizer, squashed("Siglip", resample=2)),
    "siglip-cut-pixels": Case(
        dual("SiglipModel", VISION | {"patch_size": 7}, SIGLIP_TEXT), siglip2_tokenizer, squashed("Siglip"), own_image=False
    ),
    "siglip-relu": library(dual("SiglipModel", VISION | RELU, SIGLIP_TEXT | RELU), siglip2_tokenizer, squashed("Siglip")),
    "align": library(
        dual("AlignModel", EFFICIENT_NET, BERT_TEXT, projection_dim=64),
        bert_tokenizer,
        squashed("EfficientNet", **SHIFTED, **CUT),
    ),
    "altclip": library(dual("AltCLIPModel", VISION, XLM_TEXT, **TO_24), xlm_tokenizer),
    "blip": library(dual("BlipModel", VISION, BERT_TEXT, **TO_24), bert_tokenizer, squashed("Blip")),
    "blip-retrieval": library(
        dual("BlipForImageTextRetrieval", VISION, BERT_TEXT, image_text_hidden_size=24), bert_tokenizer, squashed("Blip")
    ),
    "chinese-clip": library(
        dual("ChineseCLIPModel", VISION, BERT_TEXT, **TO_24), bert_tokenizer, squashed("ChineseCLIP", do_center_crop=False)
    ),
    "groupvit": library(
        dual("GroupViTModel", VISION | GROUPS, TEXT, **TO_24, projection_intermediate_dim=28), small_clip_tokenizer
    ),
}


def written(folder: Path, case: Case) -> tuple[Any, Any, Any]:
    """Random weights and preparation, written by transformers; returns its model, tokenizer and picture preparation."""
    torch.manual_seed(0)
    model, tokenizer, preparation = case.model(), case.tokenizer(), case.preparation()
    with torch.no_grad():
        for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            if tensor.ndim > 1:  # the libraries' own initial weights are so small that features hardly depend on the input
                tensor.normal_(std=((8 if tensor.ndim == 4 else 2) / tensor[0].numel()) ** 0.5)
            else:  # biases and gains that are equal everywhere would hide a swapped name
                tensor.add_(torch.rand_like(tensor) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    preparation.save_pretrained(folder)
    return model.eval(), tokenizer, preparation


def pictures() -> list[Image.Image]:
    """A lying colour ramp and upright noise; the middle of neither falls on a pixel."""
    ramp = np.linspace(0, 255, 66)
    lying = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:60, None], 128.0), -1)
    upright = np.random.default_rng(0).integers(0, 255, (55, 50, 3))
    return [Image.fromarray(array.astype(np.uint8)) for array in (lying, upright)]


def their_input(model: Any, tokenizer: Any, preparation: Any) -> tuple[Any, Any]:
    """Pixels and ids by transformers, from raw input."""
    first_siglip = tokenizer.init_kwargs.get("tokenizer_class") == "SiglipTokenizer"  # its punctuation is not in tokenizer.json
    padding, length = ("max_length", 16) if type(model).__name__ == "SiglipModel" else (True, 24)
    words = tokenizer(
        [canonical(text) for text in TEXTS] if first_siglip else TEXTS,
        return_tensors="pt",
        padding=padding,
        truncation=True,
        max_length=length,
        return_token_type_ids=False,
    )
    return preparation(pictures(), return_tensors="pt"), words


def their_features(model: Any, pixels: Any, words: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of pictures and of texts."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            image, text = model.get_image_features(**pixels).pooler_output, model.get_text_features(**words).pooler_output
        else:
            image = model.vision_proj(model.vision_model(**pixels).last_hidden_state[:, 0])
            text = model.text_proj(model.text_encoder(**words).last_hidden_state[:, 0])
    return torch.nn.functional.normalize(image), torch.nn.functional.normalize(text)


def their_scores(model: Any, pixels: Any, words: Any) -> torch.Tensor:
    """Logits of every picture with every text."""
    with torch.no_grad():
        if hasattr(model, "itm_head"):
            return model(**pixels, **words, use_itm_head=False).itm_score
        return model(**pixels, **words).logits_per_image


def canonical(text: str) -> str:
    """SigLIP's published preparation of texts."""
    return re.sub(r"\s+", " ", "".join(c for c in text.lower() if c not in string.punctuation)).strip()


@pytest.mark.parametrize("name", CASES)
def test_features_of_raw_input_equal_transformers(name: str, tmp_path: Path) -> None:
    reference, tokenizer, preparation = written(tmp_path, CASES[name])
    inputs = their_input(reference, tokenizer, preparation)
    image, text = their_features(reference, *inputs)
    assert min((image[0] - image[1]).abs().max(), (text[0] - text[1]).abs().max()) > 100 * TOLERANCE, "tells nothing apart"
    model = mm.load(tmp_path, device="cpu")
    assert isinstance(model.config.image, ImageEncoderConfig) == CASES[name].own_image
    assert isinstance(model.config.text, TextEncoderConfig) == CASES[name].own_text
    torch.testing.assert_close(model.embed_images(pictures()), image, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.embed_texts(TEXTS), text, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.scores(image, text), their_scores(reference, *inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip-own-vocabulary", "siglip2", "altclip"])
def test_a_saved_checkpoint_is_the_same_model_without_its_library_files(name: str, tmp_path: Path) -> None:
    written(tmp_path / "published", CASES[name])
    first = mm.load(tmp_path / "published", device="cpu")
    second = mm.load(mm.save(first, tmp_path / "own"), device="cpu")
    assert second.fingerprint == first.fingerprint
    torch.testing.assert_close(second.embed_texts(TEXTS), first.embed_texts(TEXTS), rtol=0, atol=0)
    torch.testing.assert_close(second.embed_images(pictures()), first.embed_images(pictures()), rtol=0, atol=0)


def test_processors_of_the_newest_layout_and_of_the_oldest_one(tmp_path: Path) -> None:
    reference, tokenizer, preparation = written(tmp_path, CASES["clip-own-vocabulary"])
    image, _ = their_features(reference, *their_input(reference, tokenizer, preparation))
    (tmp_path / "preprocessor_config.json").unlink()
    transformers.CLIPProcessor(preparation, tokenizer).save_pretrained(tmp_path)
    torch.testing.assert_close(mm.load(tmp_path, device="cpu").embed_images(pictures()), image, rtol=0, atol=TOLERANCE)
    oldest = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 32, "crop_size": 32, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(oldest))
    torch.testing.assert_close(mm.load(tmp_path, device="cpu").embed_images(pictures()), image, rtol=0, atol=TOLERANCE)


def test_the_published_normalisation_is_taken_over(tmp_path: Path) -> None:
    changes = {"resample": 2, "rescale_factor": 0.003, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.6, 0.5, 0.4]}
    case = CASES["clip-own-vocabulary"]
    reference, tokenizer, preparation = written(tmp_path, case._replace(preparation=lambda: clip_pictures(**changes)))
    image, _ = their_features(reference, *their_input(reference, tokenizer, preparation))
    torch.testing.assert_close(mm.load(tmp_path, device="cpu").embed_images(pictures()), image, rtol=0, atol=TOLERANCE)


def test_a_vocabulary_without_a_tokenizer_file_is_converted(tmp_path: Path) -> None:
    reference, tokenizer, preparation = written(tmp_path, CASES["chinese-clip"])
    _, text = their_features(reference, *their_input(reference, tokenizer, preparation))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)))
    torch.testing.assert_close(mm.load(tmp_path, device="cpu").embed_texts(TEXTS), text, rtol=0, atol=TOLERANCE)


def test_half_precision_shards_are_the_whole_checkpoint(tmp_path: Path) -> None:
    reference, tokenizer, preparation = written(tmp_path, CASES["clip-own-vocabulary"])
    reference.half().save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink()
    image, text = their_features(reference.float(), *their_input(reference.float(), tokenizer, preparation))
    model = mm.load(tmp_path, device="cpu")
    torch.testing.assert_close(model.embed_images(pictures()), image, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(model.embed_texts(TEXTS), text, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["clip-own-vocabulary", "align"])  # the suite's names, and renamed with batch norms
def test_pickled_weights_are_converted_as_the_refusal_says(name: str, tmp_path: Path) -> None:
    written(tmp_path, CASES[name])
    expected = mm.load(tmp_path, device="cpu")
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for i in range(2):
        torch.save(dict(list(state.items())[i::2]), tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    torch.save({"lr": 1.0}, tmp_path / "training_args.bin")
    with pytest.raises(CheckpointError, match=f"mm convert {tmp_path} --i-trust-this-file -o DIR"):
        mm.load(tmp_path, device="cpu")
    with pytest.raises(UserError, match="--i-trust-this-file"):
        import_file(tmp_path, architecture=None, trusted=False)
    converted = from_imported(import_file(tmp_path, architecture=None, trusted=True), name="converted", device="cpu")
    assert converted.fingerprint == expected.fingerprint


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_text(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**config["text_config"], **changes})


def without(folder: Path, name: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state[name]
    save_file(state, folder / "model.safetensors")


def shards(folder: Path, **index: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    # what is wrong: checkpoint, damage, part of the message
    "pickled": ("clip-own-vocabulary", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "mm convert"),
    "no weights": ("clip-own-vocabulary", lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "missing tensor": ("clip-own-vocabulary", lambda f: without(f, "visual_projection.weight"), "visual_projection.weight"),
    "tensor made up": ("blip", lambda f: without(f, "visual_projection.weight"), "visual_projection.weight"),
    "shards outside": (
        "clip-own-vocabulary",
        lambda f: shards(f, weight_map={"a": "../other.safetensors"}),
        "no list of files",
    ),
    "list of shards": ("clip-own-vocabulary", lambda f: shards(f, weight_map=["model.safetensors"]), "index.json"),
    "nested shards": ("clip-own-vocabulary", lambda f: shards(f, weight_map={"a": {}}), "index.json"),
    "no shards": ("clip-own-vocabulary", shards, "index.json"),
    "two means": ("clip-own-vocabulary", lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5, 0.5]), "preparation"),
    "words for means": ("blip", lambda f: edit(f / "preprocessor_config.json", image_mean=["a", "b", "c"]), "preparation"),
    "word for a size": (
        "clip-own-vocabulary",
        lambda f: edit(f / "preprocessor_config.json", size={"shortest_edge": "x"}),
        "preparation",
    ),
    "short size": ("blip", lambda f: edit(f / "preprocessor_config.json", size=["x"]), "preprocessor_config.json"),
    "no scale": ("blip", lambda f: edit(f / "preprocessor_config.json", rescale_factor=0), "preparation"),
    "word for a scale": ("blip", lambda f: edit(f / "preprocessor_config.json", rescale_factor="x"), "preparation"),
    "word for a length": ("blip", lambda f: edit(f / "tokenizer_config.json", model_max_length="x"), "model_max_length"),
    "endless length": ("blip", lambda f: edit(f / "tokenizer_config.json", model_max_length=float("inf")), "model_max_length"),
    "damaged tokenizer": (
        "blip",
        lambda f: (f / "tokenizer.json").write_text('{"model": {}}'),
        "cannot be read as a tokenizer",
    ),
    "audio": ("clip-own-vocabulary", lambda f: edit(f / "config.json", model_type="clap"), "audio tower"),
    "single tower": ("clip-own-vocabulary", lambda f: edit(f / "config.json", model_type="vilt"), "one tower"),
    "unknown model": ("clip-own-vocabulary", lambda f: edit(f / "config.json", model_type="bert"), "'bert' is not supported"),
    "captioner": ("blip", lambda f: edit(f / "config.json", architectures=["BlipForConditionalGeneration"]), "no shared space"),
    "no preparation": (
        "clip-own-vocabulary",
        lambda f: (f / "preprocessor_config.json").unlink(),
        "no preprocessor_config.json",
    ),
    "unknown processor": ("blip", lambda f: edit(f / "preprocessor_config.json", image_processor_type="Odd"), "by Odd"),
    "filter": ("blip", lambda f: edit(f / "preprocessor_config.json", resample=1), "filter 1"),
    "no square": ("clip-own-vocabulary", lambda f: edit(f / "preprocessor_config.json", do_center_crop=False), "no square"),
    "no resize": ("blip", lambda f: edit(f / "preprocessor_config.json", do_resize=False), "does not resize"),
    "pads": ("blip", lambda f: edit(f / "preprocessor_config.json", do_pad=True), "pads"),
    "size": ("blip", lambda f: edit(f / "preprocessor_config.json", size={"height": 48, "width": 48}), "tower of 32 px"),
    "no tokenizer": ("clip-own-vocabulary", lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no padding": ("blip", lambda f: edit(f / "tokenizer_config.json", pad_token="[NO]"), "padding token"),
    "other tokenizer": ("clip-own-vocabulary", lambda f: whole_clip_tokenizer().save_pretrained(f), "do not belong together"),
    "other end": ("metaclip2", lambda f: edit_text(f, eos_token_id=5), "end token 5) and tokenizer (2)"),
    "short tokenizer": ("siglip2", lambda f: edit(f / "tokenizer_config.json", model_max_length=8), "ends at 8 tokens"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_honoured_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    name, damage, message = FAULTS[fault]
    written(tmp_path, CASES[name])
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        mm.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_without_a_network_the_hub_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="'someone/some-model@main': the hub cannot be reached") as caught:
        mm.load("someone/some-model@main")
    assert "\n" not in str(caught.value)


def test_an_earlier_download_serves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--someone--some-model" / "snapshots" / commit
    written(snapshot, CASES["clip-own-vocabulary"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert huggingface.resolve_repo("someone/some-model", commit) == snapshot
    model = mm.load(f"someone/some-model@{commit}", device="cpu")
    assert model.card["revision"] == commit
