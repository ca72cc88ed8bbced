"""wav2vec 2.0 and its CTC head learn, resume, and give the same text however a batch is made up."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mm.errors import ConfigError, UserError
from mm.hub import Model, load, save
from mm.media.audio import AudioSpec
from mm.nn.product_quantize import ProductQuantizer
from mm.processor import Processor, padded
from mm.systems import build, read_system
from mm.systems.wav2vec2 import Wav2Vec2, contrast
from mm.systems.wav2vec2_ctc import Wav2Vec2Ctc, Wav2Vec2CtcConfig
from mm.tokenizers.text import TextTokenizer
from mm.types import AudioBatch, Batch, TextBatch

AUDIO: dict[str, Any] = {
    "extractor": "layer_norm",
    "conv_layers": [[16, 10, 5], [16, 4, 4], [24, 4, 4]],
    "conv_bias": True,
    "width": 32,
    "layers": 2,
    "heads": 4,
    "hidden": 64,
    "position_kernel": 8,
    "position_groups": 4,
    "norm_first": True,
    "dropout": 0,
    "projection_dropout": 0,
    "attention_dropout": 0,
    "layer_drop": 0,
}
OBJECTIVE = {"mask_length": 4, "codes": 8, "code_width": 16, "width": 16, "negatives": 10, "feature_gradient": 1.0}
WORDS = ("abba", "cab", "b", "ac ca")
TONES = {"a": 0.05, "b": 0.13, "c": 0.29, " ": 0.0}


def spoken(words: str) -> torch.Tensor:
    """A tone of 320 samples for each letter, with a pause behind each."""
    parts = [torch.cat([torch.sin(6.283 * TONES[letter] * torch.arange(320.0)), torch.zeros(160)]) for letter in words]
    return torch.cat(parts)


def sounds() -> AudioBatch:
    return padded([spoken(words) for words in WORDS])


def pretraining() -> Wav2Vec2:
    torch.manual_seed(0)
    system = build(read_system({"name": "wav2vec2", "audio": AUDIO, "objective": OBJECTIVE}, "test"))
    assert isinstance(system, Wav2Vec2)
    return system


def recogniser(**changes: Any) -> tuple[Wav2Vec2Ctc, Batch, TextTokenizer]:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train_characters(WORDS)
    values = {"name": "wav2vec2-ctc", "audio": AUDIO, "vocab_size": tokenizer.vocab_size, "dropout": 0, **changes}
    system = build(read_system(values, "test"))
    assert isinstance(system, Wav2Vec2Ctc)
    return system, Batch(WORDS, audio=sounds(), text=tokenizer(WORDS, 20)), tokenizer


def learn(system: Any, batch: Batch, steps: int, lr: float = 3e-3) -> list[float]:
    optimizer = torch.optim.Adam(system.parameters(), lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = system.loss(batch, step).total
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_pretraining_learns_its_batch_and_every_parameter() -> None:
    system, batch = pretraining(), Batch(WORDS, audio=sounds())
    torch.manual_seed(1)
    first = system.loss(batch, 0)
    first.total.backward()
    assert not [name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()]
    assert set(first.parts) == {"contrastive", "accuracy", "code_use", "code_spread", "features"}
    learn(system, batch, 120)
    torch.manual_seed(1)
    assert system.loss(batch, 0).parts["contrastive"] < 0.6 * first.parts["contrastive"]


def test_the_temperature_of_draws_falls_with_the_steps() -> None:
    system, batch = pretraining(), Batch(WORDS, audio=sounds())
    temperatures = []
    for step in (0, 1000, 10_000_000):
        system.loss(batch, step)
        temperatures.append(system.quantizer.temperature)
    assert temperatures == pytest.approx([2.0, 2.0 * 0.999995**1000, 0.5])


def test_masks_come_from_torchs_generator() -> None:
    system, batch = pretraining(), Batch(WORDS, audio=sounds())
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(system.loss(batch, 0).total.item())
    assert values[0] == values[1] != values[2]


def test_contrast_is_the_mean_over_hidden_frames_by_brute_force() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 5), torch.randint(0, 2, (2, 5, 2))
    hidden = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    negatives = torch.randint(0, 5, (2, 5, 6))
    losses, hits = [], []
    for row, frame in hidden.nonzero().tolist():
        others = [int(n) for n in negatives[row, frame] if not torch.equal(ids[row, n], ids[row, frame])]
        choices = logits[row, frame, [frame, *others]]
        losses.append(-choices.log_softmax(0)[0])
        hits.append(bool((choices[0] >= choices).all()))
    loss, accuracy = contrast(logits, ids, hidden, negatives)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert float(accuracy) == pytest.approx(sum(hits) / len(hits))


def test_codes_that_are_all_the_same_cost_nothing_unless_twins_count() -> None:
    hidden, logits = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 6, 6)
    negatives = torch.arange(6).roll(1)[None, :, None].expand(1, 6, 3)
    ignored, _ = contrast(logits, torch.zeros(1, 6, 2, dtype=torch.int64), hidden, negatives)
    counted, accuracy = contrast(logits, None, hidden, negatives)
    assert float(ignored) == 0
    assert float(counted) == pytest.approx(math.log(4))
    assert float(accuracy) == 0, "nothing is told apart where all are alike"


def test_codes_in_use_are_not_those_that_undecided_frames_might_draw() -> None:
    torch.manual_seed(0)
    quantizer = ProductQuantizer(3, groups=2, codes=8, width=4).train()
    with torch.no_grad():
        quantizer.logits.weight.zero_()
        quantizer.logits.bias.copy_(0.01 * torch.arange(16.0))  # each frame of each codebook leans to the last code
    found = quantizer(torch.randn(2, 50, 3), torch.ones(2, 50, dtype=torch.bool))
    assert float(found.perplexity.detach()) == pytest.approx(16, rel=1e-2)
    assert float(found.used.detach()) == pytest.approx(2, rel=1e-3)


def test_recordings_too_short_for_a_span_cost_nothing() -> None:
    losses = pretraining().loss(Batch(("a",), audio=padded([torch.randn(60)])), 0)
    assert losses.parts["contrastive"] == 0
    assert losses.total.isfinite()


def test_an_encoder_without_its_objective_is_not_pretrained() -> None:
    system = build(read_system({"name": "wav2vec2", "audio": AUDIO, "objective": None}, "test"))
    with pytest.raises(ConfigError, match="without its objective"):
        system.loss(Batch(WORDS, audio=sounds()), 0)


def test_recognition_writes_down_its_own_batch_in_any_company() -> None:
    system, batch, tokenizer = recogniser(mask_share=0)
    losses = learn(system, batch, 100, lr=1e-2)
    assert losses[-1] < 0.1 * losses[0]
    system.eval()
    assert batch.audio is not None
    for beams in (1, 4):
        assert [tokenizer.decode(ids) for ids in system.transcribe(batch.audio, beams=beams)] == list(WORDS)
        alone = [system.transcribe(padded([spoken(words)]), beams=beams)[0] for words in WORDS]
        assert alone == system.transcribe(batch.audio, beams=beams)


@pytest.mark.parametrize("length", [3_000, 3_001, 4_000, 5_555, 9_999])
def test_windows_of_a_long_recording_meet_frame_by_frame(length: int) -> None:
    """Without attention a frame sees only its neighbours, so that it is the same in any window that holds them."""
    system, _, _ = recogniser()
    system.eval()
    for layer in system.encoder.trunk.encoder.transformer.layers:
        for parameter in layer.attention.out_proj.parameters():
            parameter.data.zero_()
    wave = 0.3 * torch.randn(length, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        shares, _ = system.log_shares(padded([wave]))
        torch.testing.assert_close(system._windowed(wave, 3_000), shares[0], atol=1e-5, rtol=1e-5)
        both = padded([wave, wave[:1_000]])
        for beams in (1, 4):
            alone = [system.transcribe(padded([one]), beams=beams)[0] for one in (wave, wave[:1_000])]
            assert system.transcribe(both, beams=beams, window=3_000) == alone
            assert all(alone)
    with pytest.raises(UserError, match="long recordings need 6"):
        system.transcribe(both, window=300)


def test_every_parameter_of_the_recogniser_learns_unless_it_is_held() -> None:
    system, batch, _ = recogniser(mask_share=0.5, mask_length=2)
    system.loss(batch, 0).total.backward()
    assert not [name for name, p in system.named_parameters() if p.grad is None or not p.grad.any()]
    held, batch, _ = recogniser(train_convolutions=False, mask_share=0)
    held.loss(batch, 0).total.backward()
    waiting = [name for name, p in held.named_parameters() if p.grad is None]
    assert waiting
    assert all(name.startswith(("encoder.trunk.feature_extractor.", "mask_vector")) for name in waiting)


def test_a_recogniser_is_saved_and_loaded_with_its_characters(tmp_path: Path) -> None:
    system, batch, tokenizer = recogniser()
    processor = Processor(tokenizer=tokenizer, context_length=20, audio=AudioSpec(max_seconds=2))
    save(Model(system.eval(), processor, system.config, "test"), tmp_path / "m")
    loaded = load(tmp_path / "m", precision="fp32")
    assert loaded.processor.tokenizer.to_json() == tokenizer.to_json()
    assert batch.audio is not None
    assert isinstance(loaded.system, Wav2Vec2Ctc)
    with torch.no_grad():
        assert torch.equal(loaded.system.log_shares(batch.audio)[0], system.log_shares(batch.audio)[0])


def test_a_text_that_no_path_fits_does_not_spoil_the_batch() -> None:
    system, batch, _ = recogniser()
    long = TextBatch(torch.full((4, 300), 3), torch.tensor([300, 2, 1, 2]))
    loss = system.loss(replace(batch, text=long), 0).total
    assert loss.isfinite()


def test_vocabulary_and_settings() -> None:
    config = Wav2Vec2CtcConfig().with_vocabulary(50)
    assert config.text_limits == (50, 256)
    assert config.hears
    assert config.picture_side is None
    with pytest.raises(ValueError, match="blank 32 must be one of the 32 ids"):
        Wav2Vec2CtcConfig(blank=32)
