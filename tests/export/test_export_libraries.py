"""open_clip and transformers load what is written for them and compute the model's vectors from raw texts and pixels."""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tiny_dual_towers import PYRAMID, SIGLIP_TEXT, SIGLIP_VISION, TEXTS, VISION, pictures, tiny
from torch import Tensor

from mm.errors import UserError
from mm.export import export
from mm.export.towers import Towers
from mm.hub import Model, from_imported
from mm.published.resolve import import_folder
from mm.tokenizers.text import TextTokenizer

QUICK = {**VISION, "options": {**VISION["options"], "act_layer": "quick_gelu"}}
AVERAGE = {**QUICK, "pool": "avg", "options": {**QUICK["options"], "pre_norm": False, "init_values": 0.1}}
CONVNET = {"backbone": "test_convnext", "image_size": 40}
AFFINE = {"image_projection": "affine", "text_projection": "affine"}
FINAL = {"causal": False, "attend_padding": True, "pooling": "final"}


def normalised(model: Model, pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.config.image.mean, model.config.image.std))
    return (pixels / 255 - mean) / std


def assert_close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(F.normalize(theirs, dim=-1), ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("image", "text", "options"),
    [
        (VISION, {}, {}),
        (QUICK, {"activation": "quick_gelu"}, {"loss": "siglip", "text_projection": "affine"}),
        (AVERAGE, {"activation": "quick_gelu", "norm_eps": 1e-6}, {}),
        (CONVNET, {"activation": "gelu_tanh"}, AFFINE),
        (CONVNET, FINAL, {"text_projection": "none", "embed_dim": 32}),
        (CONVNET, {**FINAL, "pooling": "first"}, {}),
    ],
    ids=["vit", "quick-siglip", "average", "convnet", "final", "first"],
)
@torch.no_grad()
def test_open_clip_computes_the_same(image: Any, text: Any, options: Any, tmp_path: Path) -> None:
    model = tiny(image, text, **options)
    folder = export(model, tmp_path / "out", to="open_clip")
    theirs: Any = open_clip.create_model(f"local-dir:{folder}").eval()
    pixels = pictures(model, 4)
    images = theirs.encode_image(normalised(model, pixels))
    texts = theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS))
    assert_close(images, model.embed_pixels(pixels))
    assert_close(texts, model.embed_texts(TEXTS))
    scores = theirs.logit_scale.exp() * F.normalize(images) @ F.normalize(texts).T
    bias = 0.0 if theirs.logit_bias is None else theirs.logit_bias
    torch.testing.assert_close(scores + bias, model.scores(model.embed_pixels(pixels), model.embed_texts(TEXTS)))


def test_open_clip_has_clips_vocabulary_and_prepares_pictures_alike(tmp_path: Path) -> None:
    model = tiny(VISION, {}, tokenizer=TextTokenizer.clip_bpe())
    folder = export(model, tmp_path / "out", to="open_clip")
    assert not (folder / "tokenizer.json").exists()
    _, _, prepare = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    picture = Image.fromarray(pictures(model, 1)[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(prepare(picture), normalised(model, model.processor.images([picture]))[0])  # pyright: ignore
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["A photo of the café &amp; bar"])
    expected = model.processor.text(["A photo of the café &amp; bar"]).ids
    assert torch.equal(ids[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_the_suite_reads_what_it_wrote(to: Any, tmp_path: Path) -> None:
    model = tiny(QUICK, {"activation": "quick_gelu"}, tokenizer=TextTokenizer.clip_bpe())
    folder = export(model, tmp_path / "out", to=to)
    imported = import_folder(folder)
    assert imported is not None
    again = from_imported(imported, name="again", device="cpu", precision="fp32")
    pixels = pictures(model, 2)
    torch.testing.assert_close(again.embed_pixels(pixels), model.embed_pixels(pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(again.embed_texts(TEXTS), model.embed_texts(TEXTS), rtol=0, atol=1e-5)
    centre = "nearest" if to == "open_clip" else "down"  # transformers cannot round otherwise; export.json says so
    assert again.processor.image_spec == model.processor.image_spec.model_copy(update={"centre": centre})
    deviations = json.loads((folder / "export.json").read_text())["deviations"]
    assert any("one pixel away" in each for each in deviations) == (to == "huggingface")


@pytest.mark.parametrize(
    ("kind", "image", "text", "options"),
    [
        (transformers.CLIPModel, QUICK, {"norm_eps": 1e-6}, {}),
        (transformers.SiglipModel, SIGLIP_VISION, SIGLIP_TEXT, {"image_projection": "none", "text_projection": "affine"}),
    ],
    ids=["clip", "siglip"],
)
@torch.no_grad()
def test_transformers_computes_the_same(kind: Any, image: Any, text: Any, options: Any, tmp_path: Path) -> None:
    model = tiny(image, text, fit="squash", **options)
    folder = export(model, tmp_path / "out", to="huggingface")
    theirs = kind.from_pretrained(folder).eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    prepare: Any = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = pictures(model, 4)
    words = tokenizer(TEXTS, padding="max_length" if kind is transformers.SiglipModel else True, return_tensors="pt")
    words = {"input_ids": words["input_ids"]} if kind is transformers.SiglipModel else words
    prepared = prepare([picture.permute(1, 2, 0).numpy() for picture in pixels], return_tensors="pt")["pixel_values"]
    assert_close(theirs.get_image_features(pixel_values=prepared).pooler_output, model.embed_pixels(pixels))
    assert_close(theirs.get_text_features(**words).pooler_output, model.embed_texts(TEXTS))


def transformers_towers(end: int) -> tuple[dict[str, Any], dict[str, Any]]:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    values = {
        "model_type": "clip",
        "projection_dim": 24,
        "vision_config": {**shape, "image_size": 32, "patch_size": 16},
        "text_config": {**shape, "vocab_size": 300, "max_position_embeddings": 16, "eos_token_id": end},
    }
    half = {"library": "transformers", "architecture": "CLIPModel"}
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return (
        {**half, "config": {"model": values}, "image_size": 32, **colours},
        {**half, "config": {"model": values, "pad_id": 0}, "context_length": 16, "vocab_size": 300},
    )


def test_library_towers_go_back_to_their_library(tmp_path: Path) -> None:
    image, text = transformers_towers(end=5)
    model = tiny(image, text, image_projection="none", text_projection="none")
    folder = export(model, tmp_path / "hf", to="huggingface")
    theirs: Any = transformers.CLIPModel.from_pretrained(folder)
    pixels = pictures(model, 2)
    with torch.no_grad():
        features = theirs.get_image_features(pixel_values=normalised(model, pixels)).pooler_output
    assert_close(features, model.embed_pixels(pixels))

    shared = {"embed_dim": 24, "quick_gelu": False}
    residual = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}
    coca = {"context_length": 16, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1, "embed_cls": True}
    image = {**image, "library": "open_clip", "architecture": "vision", "config": {**shared, "vision_cfg": residual}}
    text = {**text, "library": "open_clip", "architecture": "text", "config": {**shared, "pad_id": 0, "text_cfg": coca}}
    model = tiny(image, text, image_projection="none", text_projection="none")
    folder = export(model, tmp_path / "open_clip", to="open_clip")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    with torch.no_grad():
        assert_close(theirs.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)), model.embed_texts(TEXTS))


@pytest.mark.parametrize(
    ("to", "image", "text", "options", "why"),
    [
        ("open_clip", PYRAMID, {}, {}, "no pool: pyramid"),
        ("open_clip", VISION, {}, AFFINE, "without options, this one has depth, embed_dim, num_heads, patch_size"),
        ("open_clip", {"backbone": "test_vit", "image_size": 64}, {}, AFFINE, "pos_embed has another shape there"),
        ("open_clip", VISION, {"activation": "quick_gelu"}, {}, "one switch only"),
        ("open_clip", CONVNET, {"pooling": "mean"}, {}, "averages tokens"),
        ("open_clip", CONVNET, {"causal": False}, {}, "hides the padding"),
        ("open_clip", CONVNET, {}, {"fit": "content"}, "fit: content"),
        ("huggingface", CONVNET, {}, {}, "a class token and a norm before its blocks, unlike this test_convnext"),
        ("huggingface", VISION, {}, AFFINE, "linear without bias"),
        ("huggingface", VISION, {"pooling": "mean"}, {}, "not by pooling: mean"),
        ("huggingface", SIGLIP_VISION, {"causal": False}, {"image_projection": "none"}, "attends to its padding"),
        ("huggingface", VISION, SIGLIP_TEXT, {}, "pool: map and no projection"),
        ("huggingface", VISION, {}, {"fit": "content"}, "fit: content"),
    ],
)
def test_what_cannot_be_expressed_is_refused(to: Any, image: Any, text: Any, options: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why) as error:
        export(tiny(image, text, **options), tmp_path / "out", to=to)
    assert str(error.value).startswith(f"export to {to}: ")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_a_difference_is_found_and_leaves_nothing(to: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Towers.embed
    offset = 0.001 * torch.randn(24, generator=torch.Generator().manual_seed(0))  # a cosine of 0.9999 would pass this
    monkeypatch.setattr(Towers, "embed", lambda self, name, value: embed(self, name, value) + offset)
    with pytest.raises(UserError, match="computes something else than the model"):
        export(tiny(VISION, {}), tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []
