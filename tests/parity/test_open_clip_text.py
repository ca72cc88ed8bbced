"""Our text encoder with the weights of open_clip's CLIP text tower gives its features, padded or trimmed."""

import open_clip
import pytest
import torch

from mm.encoders.text import TextEncoderConfig, build_text_encoder, from_open_clip
from mm.tokenizers.text import TextTokenizer

WIDTH, LAYERS, HEADS, VOCABULARY = 64, 3, 4, 49408
TEXTS = ["a photo of a cat", "", "two dogs play in the snow, it's 5 o'clock & cold", "été 雨 😀", "word " * 100]


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_features_equal_open_clip(quick_gelu: bool) -> None:
    torch.manual_seed(0)
    text_config = {"context_length": 77, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": LAYERS}
    vision_config = {"image_size": 16, "patch_size": 8, "layers": 1, "width": 64}
    reference = open_clip.CLIP(32, vision_config, text_config, quick_gelu=quick_gelu).eval()  # pyright: ignore[reportArgumentType]
    for parameter in reference.parameters():  # biases and gains away from 0 and 1, so that a mixed-up one shows
        torch.nn.init.normal_(parameter, mean=0.05, std=0.1)
    ours = build_text_encoder(
        TextEncoderConfig(
            width=WIDTH,
            layers=LAYERS,
            heads=HEADS,
            context_length=77,
            vocab_size=VOCABULARY,
            activation="quick_gelu" if quick_gelu else "gelu",
        )
    ).eval()
    ours.load_state_dict(from_open_clip(reference.state_dict()))

    padded_ids = open_clip.tokenize(TEXTS)
    expected = reference.encode_text(padded_ids)
    batch = TextTokenizer.clip_bpe()(TEXTS, 77)
    padded = type(batch)(padded_ids, batch.lengths)
    trimmed = batch[:4]
    trimmed = type(batch)(trimmed.ids[:, : int(trimmed.lengths.max())], trimmed.lengths)
    assert trimmed.ids.shape[1] < 77
    for text, rows in ((padded, slice(None)), (batch, slice(None)), (trimmed, slice(4))):
        features = ours(text).pooled @ reference.text_projection
        assert (features - expected[rows]).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
