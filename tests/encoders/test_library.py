"""Towers of other libraries: equal to the library's whole model, whatever the padding; built from their configuration alone."""

from typing import Any

import pytest
import torch

from mm.config import validate
from mm.encoders.library import (
    LibraryImageConfig,
    LibraryTextConfig,
    LibraryTextEncoder,
    build_library_image_encoder,
    build_library_text_encoder,
)
from mm.errors import UserError
from mm.types import TextBatch

open_clip = pytest.importorskip("open_clip")
transformers = pytest.importorskip("transformers")

SIZE, WIDTH, CONTEXT, PAD = 32, 24, 12, 0
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
VIT = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
VISION = {
    "vit": VIT,
    "attention-pool": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "resnet": {"image_size": SIZE, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
    "timm-mlp": {"timm_model_name": "resnet18", "timm_pool": "avg", "timm_proj": "mlp", "image_size": SIZE},
}
TRANSFORMER = {"context_length": CONTEXT, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
TEXTS = {
    "causal": TRANSFORMER,
    "layer-scale": {**TRANSFORMER, "ls_init_value": 0.1},
    "end-pooling": {**TRANSFORMER, "pool_type": "eos", "eos_id": 49},
    "coca": {**TRANSFORMER, "embed_cls": True, "output_tokens": True},
    "both-ways": {**TRANSFORMER, "no_causal_mask": True, "pool_type": "first", "proj_bias": True},
}
SECTION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROBERTA = {**SECTION, "model_type": "roberta", "vocab_size": 50, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1}
T5 = {"model_type": "mt5", "vocab_size": 50, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
DUAL = {
    "projection_dim": WIDTH,
    "vision_config": {**SECTION, "image_size": SIZE, "patch_size": 8},
    "text_config": {**SECTION, "vocab_size": 50, "max_position_embeddings": CONTEXT, "eos_token_id": 49, "bos_token_id": 48},
}
WORDS = TextBatch(torch.tensor([[48, 5, 6, 7, 49], [48, 9, 49, 0, 0], [48, 49, 0, 0, 0]]), torch.tensor([5, 3, 2]))


def image_config(vision: dict[str, Any], library: str = "open_clip", architecture: str = "vision") -> LibraryImageConfig:
    config = {"embed_dim": WIDTH, "quick_gelu": True, "vision_cfg": vision} if library == "open_clip" else {"model": vision}
    values = {"library": library, "architecture": architecture, "config": config, "image_size": SIZE, "mean": MEAN, "std": STD}
    return validate(LibraryImageConfig, values, "test")


def text_config(text: dict[str, Any], library: str = "open_clip", architecture: str = "text", **more: Any) -> LibraryTextConfig:
    config = {"embed_dim": WIDTH, "quick_gelu": True, "text_cfg": text} if library == "open_clip" else {"model": text}
    values = {"library": library, "architecture": architecture, "config": {**config, "pad_id": PAD, **more}}
    return validate(LibraryTextConfig, {**values, "context_length": CONTEXT, "vocab_size": 50}, "test")


def seeded(build: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return build(config).eval()


def pictures(count: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def padded(text: TextBatch, pad: int) -> torch.Tensor:
    """Ids filled up to the context."""
    ids = torch.full((len(text), CONTEXT), pad)
    for row, values, length in zip(ids, text.ids, text.lengths, strict=True):
        row[:length] = values[:length]
    return ids


@pytest.mark.parametrize("kind", VISION)
def test_picture_towers_are_open_clips_from_normalised_pixels(kind: str) -> None:
    encoder = seeded(build_library_image_encoder, image_config(VISION[kind]))
    whole = open_clip.model.CustomTextCLIP(WIDTH, VISION[kind], TRANSFORMER, quick_gelu=True).eval()
    whole.visual.load_state_dict(encoder.tower.state_dict())
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    with torch.no_grad():
        expected = whole.encode_image((pictures() / 255 - mean) / std)
        encoded, from_floats = encoder(pictures()), encoder(pictures() / 255)
    torch.testing.assert_close(encoded.pooled, expected)
    torch.testing.assert_close(from_floats.pooled, expected)
    assert encoded.pooled.shape == (2, encoder.width)
    assert encoded.tokens.shape[:2] == encoded.mask.shape
    assert (encoded.pooled[0] - encoded.pooled[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", TEXTS)
def test_text_towers_are_open_clips_however_the_batch_is_padded(kind: str) -> None:
    encoder = seeded(build_library_text_encoder, text_config(TEXTS[kind]))
    whole = open_clip.model.CustomTextCLIP(WIDTH, VIT, {**TEXTS[kind], "output_tokens": False}, quick_gelu=True).eval()
    whole.text.load_state_dict(encoder.tower.state_dict())
    with torch.no_grad():
        expected = whole.encode_text(padded(WORDS, PAD))
        trimmed = encoder(WORDS)
        arbitrary = encoder(TextBatch(torch.nn.functional.pad(WORDS.ids, (0, 4), value=33), WORDS.lengths))
    torch.testing.assert_close(trimmed.pooled, expected)
    torch.testing.assert_close(arbitrary.pooled, expected)
    assert trimmed.tokens.shape[:2] == trimmed.mask.shape == (3, CONTEXT)
    assert trimmed.mask.sum(1).tolist() == WORDS.lengths.tolist()


@pytest.mark.parametrize(("hf_config", "pooler"), [(ROBERTA, "mean_pooler"), (ROBERTA, "cls_pooler"), (T5, "mean_pooler")])
def test_text_models_of_transformers_in_open_clip_need_no_network(hf_config: dict[str, Any], pooler: str) -> None:
    text = {"hf_model_name": "someone/some-model", "hf_pooler_type": pooler, "hf_proj_type": "mlp", "context_length": CONTEXT}
    pad = hf_config.get("pad_token_id", 0)
    encoder = seeded(build_library_text_encoder, text_config(text, hf_config=hf_config, pad_id=pad))
    with torch.no_grad():
        short, whole = encoder(WORDS).pooled, encoder.tower(padded(WORDS, pad))
    torch.testing.assert_close(short, whole[0] if isinstance(whole, tuple) else whole)
    assert short.shape == (3, WIDTH)
    assert any("pooler" in name for name in encoder.tower.state_dict()) == (pooler == "cls_pooler")
    with pytest.raises(UserError, match="hf_config"):
        build_library_text_encoder(text_config(text))


def test_half_a_model_of_transformers_has_the_weights_and_the_features_of_the_whole() -> None:
    torch.manual_seed(0)
    whole = transformers.CLIPModel(transformers.CLIPConfig.from_dict(DUAL)).eval()
    image = seeded(build_library_image_encoder, image_config(DUAL, "transformers", "CLIPModel"))
    text = seeded(build_library_text_encoder, text_config(DUAL, "transformers", "CLIPModel"))
    names = {*image.tower.state_dict(), *text.tower.state_dict()}
    assert names == {name for name, _ in whole.named_parameters() if name != "logit_scale"}
    image.tower.load_state_dict({name: whole.state_dict()[name] for name in image.tower.state_dict()})
    text.tower.load_state_dict({name: whole.state_dict()[name] for name in text.tower.state_dict()})
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    with torch.no_grad():
        expected = whole.get_image_features((pictures() / 255 - mean) / std).pooler_output
        torch.testing.assert_close(image(pictures()).pooled, expected)
        torch.testing.assert_close(text(WORDS).pooled, whole.get_text_features(padded(WORDS, PAD)).pooler_output)


def test_a_tower_that_attends_to_padding_gets_all_of_it() -> None:
    values = {"vision_config": DUAL["vision_config"], "text_config": {**DUAL["text_config"], "projection_size": WIDTH}}
    encoder = seeded(
        build_library_text_encoder, text_config(values, "transformers", "SiglipModel", attend_padding=True, pad_id=3)
    )
    assert isinstance(encoder, LibraryTextEncoder)
    with torch.no_grad():
        encoded, expected = encoder(WORDS), encoder.tower.get_text_features(padded(WORDS, 3)).pooler_output
        other = encoder.tower.get_text_features(padded(WORDS, 4)).pooler_output
    torch.testing.assert_close(encoded.pooled, expected)
    assert encoded.mask.all()
    assert not torch.allclose(other, expected, atol=1e-3)


def test_towers_can_be_held_in_bf16() -> None:
    image = seeded(build_library_image_encoder, image_config(VIT))
    text = seeded(build_library_text_encoder, text_config(TEXTS["coca"]))
    with torch.no_grad():
        exact = image(pictures()).pooled, text(WORDS).pooled
        image.cast_(torch.bfloat16)
        text.cast_(torch.bfloat16)
        rounded = image(pictures()).pooled, text(WORDS).pooled
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(ours.float(), theirs).min() > 0.999


def test_other_sizes_are_refused() -> None:
    image = seeded(build_library_image_encoder, image_config(VIT))
    text = seeded(build_library_text_encoder, text_config(TRANSFORMER))
    with pytest.raises(UserError, match=r"\(3, 32, 32\) is expected"):
        image(torch.zeros(1, 3, 48, 48))
    with pytest.raises(UserError, match="13 tokens do not fit"):
        text(TextBatch(torch.ones(1, 13, dtype=torch.int64), torch.tensor([13])))


@pytest.mark.parametrize(
    "config",
    [
        image_config({**VIT, "colour": 1}),
        image_config({**VIT, "patch_size": 0}),
        image_config({"timm_model_name": "no_such_backbone", "image_size": SIZE}),
        image_config(DUAL, "transformers", "GPT2Model"),
        image_config({}, "transformers", "CLIPModel"),
    ],
    ids=["option", "patch size", "backbone", "architecture", "incomplete"],
)
def test_what_no_library_can_build_is_refused_in_one_line(config: LibraryImageConfig) -> None:
    with pytest.raises(UserError, match="image tower") as caught:
        build_library_image_encoder(config)
    assert "\n" not in str(caught.value)


def test_a_configuration_never_fetches_pretrained_weights() -> None:
    named = {"timm_model_name": "resnet18", "timm_model_pretrained": True, "timm_proj": "mlp", "image_size": SIZE}
    torch.manual_seed(0)
    first = build_library_image_encoder(image_config(named)).tower.state_dict()
    torch.manual_seed(0)
    second = build_library_image_encoder(image_config({**named, "timm_model_pretrained": False})).tower.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
