"""The log-mel encoder: the spectrogram is Whisper's, nothing depends on the batch, masks hide what they say."""

from dataclasses import replace

import pytest
import torch
import torchaudio

from mm.config import validate
from mm.draws import Draws
from mm.encoders.audio import LogMel, LogMelEncoder, LogMelEncoderConfig, build_log_mel_encoder, normalise_bands
from mm.errors import ConfigError
from mm.types import AudioBatch, Encoded

SMALL = {"mels": 16, "width": 16, "layers": 2, "heads": 2}


def encoder(**options: object) -> LogMelEncoder:
    torch.manual_seed(0)
    return build_log_mel_encoder(validate(LogMelEncoderConfig, SMALL | options, "test"))


def sounds(*lengths: int, padding: float = 0.0) -> AudioBatch:
    waves = torch.full((len(lengths), max(lengths)), padding)
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length, generator=torch.Generator().manual_seed(row)) * 0.1
    return AudioBatch(waves, torch.tensor(lengths))


def test_the_spectrogram_is_that_of_whisper() -> None:
    """transformers' feature extractor on a recording of its full 30 seconds, where nothing is filled up."""
    from transformers import WhisperFeatureExtractor

    wave = torch.randn(480_000, generator=torch.Generator().manual_seed(0)) * 0.1
    theirs = WhisperFeatureExtractor(feature_size=80)(wave.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    ours, there = LogMel(16_000, 80)(AudioBatch(wave[None], torch.tensor([len(wave)])))
    assert there.all()
    inner = slice(2, 2998)  # theirs reflects the recording at its ends
    torch.testing.assert_close(ours[:, :, inner], theirs[:, :, inner], atol=2e-3, rtol=0)


def test_power_per_band_is_torchaudios() -> None:
    wave = sounds(8_000)
    layer = LogMel(16_000, 32)
    theirs = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=400, hop_length=160, n_mels=32, pad_mode="constant", norm="slaney", mel_scale="slaney"
    )(wave.waves)
    levels = theirs.clamp(min=1e-10).log10()
    levels = (levels.clamp(min=float(levels.max()) - 8) + 4) / 4
    torch.testing.assert_close(layer(wave)[0], levels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"stride": 4, "pooling": "attention"}, {"normalise": True}])
@pytest.mark.parametrize("padding", [0.0, 0.7])
def test_features_do_not_depend_on_the_batch(options: dict[str, object], padding: float) -> None:
    network = encoder(**options).eval()
    lengths = (6_000, 160, 9_999, 1)
    together = network(sounds(*lengths, padding=padding))
    for row, length in enumerate(lengths):
        whole = sounds(*lengths)
        alone: Encoded = network(AudioBatch(whole.waves[row : row + 1, :length], torch.tensor([length])))
        count = int(together.mask[row].sum())
        assert alone.tokens.shape[1] == count
        torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(together.tokens[row, :count], alone.tokens[0], atol=5e-6, rtol=1e-4)


def testnormalise_bands_bands_forget_loudness_and_how_bands_are_weighed() -> None:
    network = encoder(normalise=True).eval()
    plain, there = network.spectrogram(sounds(16_000, 8_000))
    plain *= 10  # noise differs by less than speech, which the floor would show
    levels = normalise_bands(plain + there[:, None] * torch.linspace(-1, 1, 16)[:, None], there)
    torch.testing.assert_close(levels, normalise_bands(plain, there), atol=1e-4, rtol=0)
    for row, frames in enumerate(there.sum(1).tolist()):
        torch.testing.assert_close(levels[row, :, :frames].mean(1), torch.zeros(16), atol=1e-5, rtol=0)
        assert (levels[row, :, :frames].std(1) - 1).abs().max() < 0.02
        assert not levels[row, :, frames:].any()
    audio = sounds(9_000)
    louder = AudioBatch(3 * audio.waves, audio.lengths)
    torch.testing.assert_close(network(louder).pooled, network(audio).pooled, atol=1e-4, rtol=0)
    assert (encoder().eval()(louder).pooled - encoder().eval()(audio).pooled).abs().max() > 1e-3


@pytest.mark.parametrize("stride", [2, 4])
def test_a_token_stands_for_so_many_frames(stride: int) -> None:
    found = encoder(stride=stride)(sounds(16_000))
    assert found.tokens.shape[1] == -(-101 // stride)
    assert found.pooled.shape == (1, 16)


def test_gradients_reach_every_parameter_and_the_sound() -> None:
    network = encoder(pooling="attention", mask_time=0.1, mask_bands=0.2)
    audio = sounds(6_000, 4_000)
    audio.waves.requires_grad_()
    network.train()(audio).pooled.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    assert audio.waves.grad is not None
    assert audio.waves.grad[0].any()


def test_masks_hide_no_more_than_asked_and_only_in_training() -> None:
    network = encoder(mask_time=0.1, mask_bands=0.25)
    plain, there = network.spectrogram(sounds(16_000, 8_000))
    changed = torch.zeros(16, 101, dtype=torch.bool)
    for seed in range(20):
        torch.manual_seed(seed)
        masked = network._masked(plain, there.sum(1), Draws(None, 2, plain.device))
        hidden = (masked != plain)[1]
        columns, rows = hidden.float().mean(0) > 0.9, hidden.float().mean(1) > 0.9
        assert columns[:51].sum() <= 20
        assert rows.sum() <= 8
        changed |= hidden
    assert changed[:, :51].float().mean() > 0.5
    network.eval()
    assert torch.equal(network(sounds(4_000)).pooled, network(sounds(4_000)).pooled)


def test_what_is_masked_belongs_to_a_recording() -> None:
    """Whatever its batch and its padding; another seed hides something else."""
    network, audio = encoder(mask_time=0.1, mask_bands=0.25).train(), sounds(16_000, 8_000, 12_000)
    seeded = replace(audio, seeds=torch.tensor([3, 4, 5]))
    torch.manual_seed(0)
    together = network(seeded).pooled
    torch.manual_seed(1)
    torch.testing.assert_close(network(seeded[1:]).pooled, together[1:])
    others = network(replace(audio, seeds=torch.tensor([6, 7, 8]))).pooled
    assert not any(torch.allclose(a, b) for a, b in zip(others, together, strict=True))


def test_one_recording_always_gives_one_vector_also_on_two_threads() -> None:
    network, audio = encoder(stride=4).eval(), sounds(20_000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = network(audio).pooled
        assert all(torch.equal(network(audio).pooled, first) for _ in range(99))
        torch.set_num_threads(2)
        torch.testing.assert_close(network(audio).pooled, first, atol=1e-5, rtol=0)
    finally:
        torch.set_num_threads(before)


def test_an_impossible_width_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 2 x heads"):
        encoder(width=15, heads=3)
