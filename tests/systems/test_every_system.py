"""The list of systems is whole: each has its configuration, its file, its words in the catalogue, its capabilities."""

from collections.abc import Mapping
from typing import Any

import pytest
import tiny_stable_diffusion as tiny
import torch
from tiny_stable_diffusion import SIDE, UNET

from mm.errors import ConfigError
from mm.generators.unet import FIXED
from mm.processor import padded
from mm.run.catalogue import catalogue
from mm.systems import CONFIGS, MODULES, SystemConfig, build, read_system
from mm.systems.imagen import Imagen
from mm.systems.text_tower import TextTower
from mm.systems.wav2vec2 import Wav2Vec2
from mm.systems.wav2vec2_ctc import Wav2Vec2Ctc
from mm.tokenizers.library_vae import FIXED as FIXED_IN_VAE
from mm.types import (
    CAPABILITIES,
    MEDIUM,
    Answers,
    AudioBatch,
    Candidates,
    Captions,
    Decoding,
    Hears,
    Interleaved,
    Matches,
    Paints,
    Sampling,
    System,
    TextBatch,
    Tokenizes,
    Writes,
    capabilities,
)

PUBLISHED_VQ = {"tokenizer": {"kind": "dvae", "image_size": 16, "width": 8, "vocab_size": 16, "code_width": 8, "num_blocks": 1}}
VQ = {"tokenizer": {"name": "vq", "tokenizer": {"image_size": 16, "patch": 2, "widths": [8, 16]}}}
T5 = {
    "library": "transformers",
    "architecture": "T5EncoderModel",
    "config": {"model": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 40}},
    "context_length": 12,
    "vocab_size": 40,
}
VAE = {"vae": {"image_size": SIDE, "options": {name: value for name, value in tiny.VAE.items() if name not in FIXED_IN_VAE}}}
SPEECH = {"conv_layers": [[16, 10, 5], [16, 4, 4]], "width": 32, "layers": 1, "heads": 2, "hidden": 48, "position_kernel": 8}
REQUIRED: Mapping[str, Mapping[str, object]] = {
    "published-vq": PUBLISHED_VQ,
    "dalle": VQ,
    "muse": VQ,
    "albef-vqa": {"num_answers": 7},
    "flow": {"latents": VQ["tokenizer"], "text": {"width": 16, "layers": 1, "heads": 2}},
    "text-tower": {"text": T5},
    "imagen": {"text": {"name": "text-tower", "text": T5}, "base": {"image_size": 16, "denoiser": {"patch": 4}}},
    "dalle2": {"latents": VQ["tokenizer"], "text": {"name": "clip"}},
    "imagebind": {"hub": {"name": "clip"}},
    "published-vae": VAE,
    "latent-diffusion": {
        "latents": VAE | {"name": "published-vae"},
        "text": {"width": 16, "layers": 1, "heads": 2, "attend_padding": True},
        "denoiser": {"kind": "unet", "options": {name: value for name, value in UNET.items() if name not in FIXED}},
        "empty_prompt": [1, 2],
    },
    "wav2vec2": {"audio": SPEECH},
    "wav2vec2-ctc": {"audio": SPEECH},
}
TOLD_BY_A_MODEL = ("imagen", "dalle2")
"""Their texts are read by a given model, which keeps its vocabulary."""

ABLE = {
    "clip": {"embeds"},
    "clap": {"hears"},
    "imagebind": {"embeds", "hears"},
    "image-tower": {"embeds"},
    "text-tower": {"embeds"},
    "vq": {"tokenizes", "compresses"},
    "kl": {"compresses"},
    "published-vq": {"tokenizes"},
    "dalle": {"paints", "expects"},
    "muse": {"paints"},
    "vilt": {"matches"},
    "albef": {"embeds", "matches", "grounds"},
    "albef-vqa": {"answers", "answers_freely"},
    "captioner": {"captions"},
    "coca": {"embeds", "captions"},
    "language-model": {"writes"},
    "frozen": {"captions", "writes"},
    "flamingo": {"captions", "writes"},
    "flow": {"paints"},
    "imagen": {"paints"},
    "dalle2": {"paints", "varies"},
    "published-vae": {"compresses"},
    "latent-diffusion": {"paints"},
    "wav2vec2": set(),
    "wav2vec2-ctc": {"transcribes"},
}


def test_every_declared_capability_is_some_systems() -> None:
    options = {"answer_weight": 1, "num_answers": 7}
    answering = build(read_system({"name": "vilt", **options}, "test").with_answers(("yes", "no")))
    assert capabilities(answering) == {"matches", "answers"}
    varying = build(read_system({"name": "flow", "latents": VQ["tokenizer"], "text": {"name": "clip"}}, "test"))
    assert capabilities(varying) == {"paints", "varies"}
    assert set().union(*ABLE.values(), capabilities(varying)) == CAPABILITIES.keys()


def small(name: str) -> tuple[SystemConfig, System]:
    torch.manual_seed(0)
    config = read_system({"name": name, **REQUIRED.get(name, {})}, "test")
    return config, build(config)


def test_both_lists_and_the_catalogue_name_the_same_systems() -> None:
    assert MODULES.keys() == CONFIGS.keys() == ABLE.keys()
    words = catalogue()["systems"]
    assert words.keys() == MODULES.keys()
    assert all(len(line) > 20 for line in words.values())


@pytest.mark.parametrize("name", MODULES)
def test_a_system_is_what_its_configuration_says(name: str) -> None:
    config, system = small(name)
    assert config.name == name
    assert capabilities(system) == ABLE[name]
    assert ABLE[name] <= CAPABILITIES.keys()
    blind = ("language-model", "text-tower", "clap", "wav2vec2", "wav2vec2-ctc")
    assert (config.picture_side is None) == (name in blind)
    assert config.hears == (name in ("clap", "imagebind", "wav2vec2", "wav2vec2-ctc"))
    limits = config.text_limits
    if limits is not None and name not in TOLD_BY_A_MODEL:
        assert config.with_vocabulary(limits[0] + 5).text_limits == (limits[0] + 5, limits[1])
    answers = "answers" in ABLE[name]
    assert (config.learns_answers, config.answer_limit, config.known_answers) == (answers, 7 * answers, ())
    assert read_system(config.model_dump(mode="json"), "test") == config


@pytest.mark.parametrize("name", MODULES)
def test_casting_for_inference_keeps_a_system_usable(name: str) -> None:
    """In bf16 a system gives nearly what it gives in fp32; tokens stay exactly the same."""
    config, system = small(name)
    system.eval()
    side = config.picture_side or 1
    image = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
    with torch.no_grad():
        before = _what_it_gives(system, image)
        system.cast_(torch.bfloat16)
        after = _what_it_gives(system, image)
        text = TextBatch(torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3]))
        if isinstance(system, Paints):
            assert system.paint(text, [0, 1], Sampling(steps=3)).shape == image.shape
        if "captions" in capabilities(system):
            assert isinstance(system, Captions)
            assert len(system.caption(image, text, Decoding(max_tokens=2, beams=2), [0, 1])) == 2
        if isinstance(system, Matches):
            assert system.match(system.encode_image(image), system.encode_text(text)).dtype == torch.float32
    if before.is_floating_point():
        assert torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1).min() > 0.98
    else:
        assert torch.equal(before, after)


def _what_it_gives(system: System, image: torch.Tensor) -> torch.Tensor:  # noqa: PLR0911 - a case each
    able = capabilities(system)
    if isinstance(system, Hears):
        generator = torch.Generator().manual_seed(0)
        waves = torch.randn(2, 8_000, generator=generator)
        return system.embed_audio(AudioBatch(waves * (torch.arange(8_000) < 6_000), torch.tensor([6_000, 6_000])))
    if isinstance(system, Wav2Vec2 | Wav2Vec2Ctc):
        return system.encode_audio(padded([torch.sin(torch.arange(900.0)), torch.cos(torch.arange(400.0))])).pooled
    if isinstance(system, TextTower):
        return system.embed_text(TextBatch(torch.tensor([[1, 5, 2], [6, 2, 0]]), torch.tensor([3, 2])))
    if "embeds" in able:
        return system.embed_image(image)  # pyright: ignore[reportCallIssue]
    if "matches" in able:
        return system.encode_image(image).tokens  # pyright: ignore[reportCallIssue]
    if isinstance(system, Answers):
        words = Candidates(("a", "b", "c"), TextBatch(torch.tensor([[1, 5, 2], [1, 6, 2], [1, 7, 2]]), torch.tensor([3, 3, 3])))
        found = system.answer(image, TextBatch(torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3])), words, k=3)
        return torch.tensor([[dict(zip(one.answers, one.scores, strict=True))[word] for word in words.words] for one in found])
    if isinstance(system, Writes):
        prompts = TextBatch(torch.tensor([[MEDIUM, 1, 5, 6], [MEDIUM, 1, 7, 0]]), torch.tensor([4, 3]))
        if "captions" not in able:  # no picture is read
            prompts, image = TextBatch(prompts.ids[:, 1:], prompts.lengths - 1), image[:0]
        return system.continuation_likelihoods(
            Interleaved(prompts, image), TextBatch(torch.arange(8)[:, None], torch.ones(8).long())
        )
    if isinstance(system, Captions):
        texts = TextBatch(torch.tensor([[1, 5, 6, 7], [1, 7, 2, 0]]), torch.tensor([4, 3]))
        return torch.stack([system.caption_likelihoods(image, texts) for image in (image, 255 - image)])
    whole: Any = system
    if isinstance(system, Imagen):
        return whole.paint(TextBatch(torch.ones(2, 3).long(), torch.tensor([3, 2])), [0, 1], Sampling(steps=1)).flatten(1) / 255
    tokenizer = getattr(system, "latents", getattr(system, "tokenizer", None)) if "paints" in able else whole
    return tokenizer.encode(image) if isinstance(tokenizer, Tokenizes) else tokenizer.to_latents(image).flatten(1)


def test_an_unknown_system_is_told_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dalle'"):
        read_system({"name": "dall-e"}, "test")
    with pytest.raises(ConfigError, match="systems: clip"):
        read_system(None, "test")
