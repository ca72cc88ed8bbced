"""Decoding sound: what was recorded comes back, at another rate, always the same, from any form a user may have it in."""

import os
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torchaudio
from audio_files import FORMATS, encoded, tone

from mm.errors import BadSample, UserError
from mm.media.audio import (
    FRAME_SECONDS,
    FRAMES_KEPT,
    AudioLimits,
    AudioSpec,
    audio_format,
    decode_audio,
    fit_audio,
    measure_audio,
    open_audio,
    resample,
    without_silence,
)


def loudest(wave: torch.Tensor, rate: int) -> tuple[float, float]:
    """Frequency and amplitude of the loudest tone, from the middle of a wave."""
    middle = wave[len(wave) // 4 : 3 * len(wave) // 4].double()
    window = torch.hann_window(len(middle), periodic=False, dtype=torch.float64)
    spectrum = torch.fft.rfft(middle * window, n=1 << 20).abs()
    best = int(spectrum.argmax())
    return best * rate / (1 << 20), float(spectrum[best] * 2 / window.sum())


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_back_what_was_recorded(kind: str) -> None:
    wave = decode_audio(encoded(tone(440, 48_000), 48_000, kind), 16_000)
    assert wave.dtype == torch.float32
    assert abs(len(wave) - 16_000) <= 1
    hertz, amplitude = loudest(wave, 16_000)
    assert hertz == pytest.approx(440, abs=0.2)
    assert amplitude == pytest.approx(0.5, rel=0.02)


def test_one_channel_is_the_mean_of_all() -> None:
    parts = np.stack([tone(100 * (k + 1), 16_000, 0.1) for k in range(8)], axis=1)
    assert torch.equal(decode_audio(encoded(parts, 16_000, "float"), 16_000), torch.from_numpy(parts.mean(1)))


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_usual_rates_are_resampled_as_by_torchaudio_and_keep_the_tone(rate: int) -> None:
    wave = torch.from_numpy(tone(1_000, rate))
    made = resample(wave, rate, 16_000)
    assert torch.equal(made, torchaudio.functional.resample(wave.double(), rate, 16_000).float())
    assert torch.allclose(made, torchaudio.functional.resample(wave, rate, 16_000), rtol=0, atol=2e-5)
    hertz, amplitude = loudest(made, 16_000)
    assert hertz == pytest.approx(1_000, abs=0.1)
    assert amplitude == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize("hertz", [10_000, 15_000, 40_000, 90_000])
def test_what_a_lower_rate_cannot_hold_is_gone_and_not_folded(hertz: int) -> None:
    made = resample(torch.from_numpy(tone(hertz, 192_000, 0.5)), 192_000, 16_000)
    assert float(made[100:-100].square().mean().sqrt()) < 0.005 * 0.5


@pytest.mark.parametrize(("rate", "wanted"), [(16_001, 16_000), (44_101, 16_000), (191_999, 16_000), (8_009, 48_000)])
def test_rates_without_a_common_divisor_cost_no_more_than_others(rate: int, wanted: int) -> None:
    wave = torch.from_numpy(tone(1_000, rate))
    begin = time.process_time()
    made = resample(wave, rate, wanted)
    assert time.process_time() - begin < 5  # 45 s and 2.5 GB by the exact ratio
    assert loudest(made, wanted)[0] == pytest.approx(1_000, rel=5e-4)
    assert len(made) / wanted == pytest.approx(1, rel=5e-4)


def test_ratios_of_usual_rates_are_exact() -> None:
    rates = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 88_200, 96_000, 192_000)
    for rate in rates:
        for wanted in (16_000, 32_000, 44_100, 48_000):
            length = len(resample(torch.zeros(2 * rate), rate, wanted))
            assert length == -(-2 * rate * Fraction(wanted, rate) // 1)


def test_a_recording_always_gives_the_same_wave() -> None:
    data = encoded(np.random.default_rng(0).normal(0, 0.1, 44_100).astype(np.float32), 44_100, "flac")
    before = torch.get_num_threads()
    waves = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            waves += [decode_audio(data, 16_000, max_seconds=0.5) for _ in range(50)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(wave, waves[0]) for wave in waves)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_parts_of_a_longer_recording(kind: str) -> None:
    ramp = np.linspace(-0.5, 0.5, 16_000, dtype=np.float32)
    data = encoded(ramp, 16_000, kind)
    whole = decode_audio(data, 16_000)
    assert len(whole) == 16_000
    for begin in (0.0, 0.25, 0.9, 1.0):
        part = decode_audio(data, 16_000, max_seconds=0.1, begin=begin)
        first = int(begin * 14_400)
        assert torch.equal(part, whole[first : first + 1_600])
    assert torch.equal(decode_audio(data, 16_000, max_seconds=5, begin=0.7), whole)


def test_measuring_keeps_nothing_and_stops_at_the_limit() -> None:
    data = encoded(np.zeros((4_000, 2), np.float32), 8_000)
    facts = measure_audio(data)
    assert (facts.seconds, facts.rate, facts.channels) == (0.5, 8_000, 2)
    assert measure_audio(data, AudioLimits(max_seconds=0.1)).seconds == 0.1


def test_limits() -> None:
    data = encoded(np.zeros(4_000, np.float32), 8_000)
    for limits, cause in (
        (AudioLimits(max_seconds=0.1), "too long"),
        (AudioLimits(max_samples=3_999), "too long"),
        (AudioLimits(max_bytes=100), "too many bytes"),
        (AudioLimits(max_rate=4_000), "impossible rate"),
    ):
        with pytest.raises(BadSample) as error:
            decode_audio(data, 8_000, limits=limits, where="x")
        assert (error.value.cause, error.value.where) == (cause, "x")
    assert len(decode_audio(data, 8_000, max_seconds=9, limits=AudioLimits(max_samples=1_000))) == 1_000


def test_any_form_that_a_user_has(tmp_path: Path) -> None:
    wave = tone(440, 16_000, 0.2)
    (tmp_path / "a.mp3").write_bytes(encoded(wave, 16_000, "float"))  # the content decides, not the name
    forms = [
        tmp_path / "a.mp3",
        str(tmp_path / "a.mp3"),
        encoded(wave, 16_000, "float"),
        bytearray(encoded(wave, 16_000, "float")),
        wave,
        wave.astype(">f8"),
        torch.from_numpy(wave),
        torch.from_numpy(wave).double().requires_grad_(),
    ]
    for form in forms:
        assert torch.equal(open_audio(form, 16_000), torch.from_numpy(wave))
    sixteen = (wave * 32_768).astype(np.int16)
    assert torch.equal(open_audio(sixteen, 16_000), torch.from_numpy(sixteen).float() / 32_768)
    assert len(open_audio(wave, 16_000, max_seconds=0.1)) == 1_600


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{}/absent.wav", "no such recording"),
        ("{}", "a folder or a device"),
        ("{}/pipe.wav", "a folder or a device"),
        ("/dev/zero", "a folder or a device"),
        ("{}/a\0b.wav", "cannot be read"),
        ("https://example.org/a.wav", "addresses are not fetched"),
        ("{}/page.wav", "not a usable recording: unknown format; wav, flac"),
        (b"", "bytes of a recording: not a usable recording: empty"),
        (np.zeros((2, 5), np.float32), r"not \(2, 5\) float32"),
        (np.zeros(0, np.float32), "has one dimension"),
        (np.zeros(5, np.int32), "int32"),
        (np.array(["a"]), "has one dimension"),
        (torch.full((5,), torch.nan), "not finite"),
        (np.array([0.0, -12_000.0]), "divide 16-bit samples by 32768"),
        ([0.0, 0.1], "not list"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, raw: object, message: str) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "page.wav").write_text("<html>404 Not Found</html>")
    given = raw.format(tmp_path) if isinstance(raw, str) else raw
    with pytest.raises(UserError, match=message) as error:
        open_audio(given, 16_000)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)


def test_fitting() -> None:
    wave = torch.arange(1.0, 5.0)
    spec = AudioSpec(rate=1_000, max_seconds=0.01)
    assert torch.equal(fit_audio(torch.arange(30.0), spec), torch.arange(10.0))
    assert torch.equal(fit_audio(wave, spec), wave)
    repeated = fit_audio(wave, spec.model_copy(update={"repeat": True}))
    assert repeated.tolist() == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]
    normal = fit_audio(wave, spec.model_copy(update={"normalise": True}))
    assert float(normal.mean()) == pytest.approx(0, abs=1e-6)
    assert float(normal.var(correction=0)) == pytest.approx(1, abs=1e-5)
    assert torch.equal(fit_audio(torch.zeros(5), spec.model_copy(update={"normalise": True})), torch.zeros(5))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100])
def test_silence_is_cut_off_at_both_ends_and_nowhere_else(rate: int) -> None:
    word = torch.from_numpy(tone(440, rate, 0.5)).float()
    gap, hiss = torch.zeros(rate), 1e-4 * torch.randn(rate, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([hiss, word, gap, word, hiss, hiss])
    kept = without_silence(whole, rate)
    margin = (FRAMES_KEPT + 1) * FRAME_SECONDS * rate
    assert 2 * len(word) + rate <= len(kept) <= 2 * len(word) + rate + 2 * margin
    begin = int(kept.storage_offset())
    assert rate - margin <= begin <= rate
    assert torch.equal(kept, whole[begin : begin + len(kept)])
    assert torch.equal(without_silence(word, rate), word)
    assert torch.equal(without_silence(0.01 * whole, rate), 0.01 * kept)
    assert len(without_silence(gap, rate)) == 0


def test_formats_are_told_by_content() -> None:
    kinds = {kind: audio_format(encoded(tone(440, 16_000, 0.1), 16_000, kind)) for kind in FORMATS}
    assert kinds == {"wav": "WAV", "float": "WAV", "flac": "FLAC", "ogg": "OGG", "opus": "OGG", "mp3": "MP3"}
    for other in (b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff\xe0", b"\xff\xfea\0", b"a", b""):
        assert audio_format(other) is None
