"""What training does to recordings: each effect, from its own seed, whatever the batch and the number of workers."""

import itertools

import numpy as np
import pytest
import torch
from audio_files import encoded, tone
from torch import Tensor

from mm.data.augment import AugmentConfig
from mm.data.augment_audio import AudioAugmentConfig, augment_audio
from mm.data.captions import Captioner, CaptionTemplate
from mm.data.loader import Loader
from mm.media.audio import AudioSpec
from mm.processor import Processor
from mm.run.preparation import EvalPreparation, TrainPreparation
from mm.types import Sample

RATE = 16_000
WAVE = torch.from_numpy(tone(1_000, RATE, 0.5))
ALL = AudioAugmentConfig(gain=6, speed=0.1, noise=1, silence=0.2, hidden=0.3)


def changed(seed: int, **settings: object) -> Tensor:
    return augment_audio(WAVE, seed, AudioAugmentConfig.model_validate(settings), RATE)


def decibels(ratio: Tensor | float) -> float:
    return 20 * float(torch.as_tensor(ratio).log10())


def test_nothing_is_the_default() -> None:
    assert torch.equal(changed(1), WAVE)


def test_gain_is_normal_in_decibels_and_changes_nothing_else() -> None:
    gains = []
    for seed in range(300):
        made = changed(seed, gain=6)
        scale = made[1] / WAVE[1]
        assert torch.allclose(made, WAVE * scale, atol=1e-6)
        gains.append(decibels(scale))
    assert np.mean(gains) == pytest.approx(0, abs=1.1)
    assert np.std(gains) == pytest.approx(6, rel=0.15)


def test_speed_changes_length_and_pitch_together() -> None:
    lengths = set()
    for seed in range(40):
        made = changed(seed, speed=0.2)
        faster = len(WAVE) / len(made)
        assert 0.79 < faster < 1.21
        spectrum = torch.fft.rfft(made[500:-500] * torch.hann_window(len(made) - 1_000), n=1 << 18).abs()
        assert float(spectrum.argmax()) * RATE / (1 << 18) == pytest.approx(1_000 * faster, rel=2e-3)
        lengths.add(len(made))
    assert len(lengths) > 15


def test_noise_has_the_ratio_that_was_drawn() -> None:
    for seed in range(40):
        noise = changed(seed, noise=1, noise_decibels=(10.0, 20.0)) - WAVE
        ratio = decibels(WAVE.square().mean().sqrt() / noise.square().mean().sqrt())
        assert 9.99 < ratio < 20.01
    exact = changed(3, noise=1, noise_decibels=(15.0, 15.0)) - WAVE
    assert decibels(WAVE.square().mean().sqrt() / exact.square().mean().sqrt()) == pytest.approx(15, abs=0.01)
    untouched = sum(torch.equal(changed(seed, noise=0.5), WAVE) for seed in range(200))
    assert 70 < untouched < 130
    assert torch.equal(augment_audio(torch.zeros(100), 0, AudioAugmentConfig(noise=1), RATE), torch.zeros(100))


def test_silence_is_put_before() -> None:
    for seed in range(20):
        made = changed(seed, silence=0.3)
        before = len(made) - len(WAVE)
        assert 0 <= before <= 0.3 * RATE
        assert torch.equal(made[before:], WAVE)
        assert not made[:before].any()


def test_one_piece_is_hidden() -> None:
    shares = []
    for seed in range(60):
        made = changed(seed, hidden=0.5)
        assert len(made) == len(WAVE)
        places = (made != WAVE).nonzero().flatten()
        if len(places):
            first, last = int(places[0]), int(places[-1])
            assert not made[first : last + 1].any()
            shares.append((last - first) / len(WAVE))
    assert max(shares) <= 0.5
    assert max(shares) > 0.35


def test_one_setting_does_not_change_what_another_draws() -> None:
    quiet = changed(5, silence=0.3)
    both = changed(5, silence=0.3, gain=6)
    assert len(quiet) == len(both)
    assert torch.allclose(both / both[-2] * quiet[-2], quiet, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 7])
def test_very_short_waves_survive_everything(length: int) -> None:
    for seed in range(20):
        made = augment_audio(torch.full((length,), 0.1), seed, ALL, RATE)
        assert len(made) >= 1
        assert bool(made.isfinite().all())


class Noises:
    """Recordings of different lengths, in memory, a `mm.types.Source`."""

    name = fingerprint = "noises"

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        waves = [rng.normal(0, 0.1, 2_000 + 700 * number).astype(np.float32) for number in range(10)]
        self._files = [encoded(wave, 8_000, "flac") for wave in waves]

    def __len__(self) -> int:
        return len(self._files)

    def key(self, index: int) -> str:
        return f"n{index}"

    def fields(self, index: int) -> dict[str, object]:
        return {}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), {"audio": self._files[index]})


PROCESSOR = Processor(audio=AudioSpec(rate=RATE, max_seconds=0.5))


def preparation(seed: int = 0, augment: AudioAugmentConfig = ALL) -> TrainPreparation:
    captioner = Captioner([CaptionTemplate(template="{text}")])
    return TrainPreparation(PROCESSOR, captioner, AugmentConfig(), "none", seed, augment_audio=augment)


def heard(workers: int, batch_size: int, *, training: bool, seed: int = 0, epoch: int = 0) -> dict[str, Tensor]:
    """Waves of one epoch by id, without what fills them up."""
    prepare = preparation(seed) if training else EvalPreparation(PROCESSOR)
    loader = Loader(
        Noises(), prepare, prepare.collate, batch_size=batch_size, seed=0, workers=workers, tail="short", shuffle=training
    )
    found = {}
    for batch in itertools.islice(loader.one_epoch(epoch), 100):
        assert batch.audio is not None
        assert not batch.audio.waves[~batch.audio.valid()].any()
        for row, name in enumerate(batch.ids):
            found[name] = batch.audio.waves[row, : int(batch.audio.lengths[row])]
    assert loader.accounting.balanced
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("training", [False, True])
def test_waves_do_not_depend_on_workers_or_batch(training: bool) -> None:
    alone = heard(0, 1, training=training)
    assert equal(heard(0, 4, training=training), alone)
    assert equal(heard(1, 4, training=training), alone)
    assert equal(heard(2, 3, training=training), alone)


def test_training_depends_on_seed_and_visit_and_evaluation_on_neither() -> None:
    first = heard(0, 4, training=True)
    assert not equal(heard(0, 4, training=True, seed=1), first)
    assert not equal(heard(0, 4, training=True, epoch=1), first)
    assert equal(heard(0, 4, training=False, epoch=1), heard(0, 4, training=False))


def test_evaluation_hears_what_a_users_raw_input_becomes() -> None:
    source, evaluated = Noises(), heard(0, 4, training=False)
    for index in range(len(source)):
        raw = source.read(index).media["audio"]
        assert torch.equal(evaluated[f"n{index}"], PROCESSOR.audio(raw))
        assert len(evaluated[f"n{index}"]) == min(RATE // 2, 2 * (2_000 + 700 * index))


def test_training_takes_a_part_of_a_longer_recording_at_random() -> None:
    ramp = encoded(np.linspace(-0.5, 0.5, 10 * RATE, dtype=np.float32), RATE, "float")
    prepare = preparation(augment=AudioAugmentConfig())
    begins = []
    for visit in range(30):
        wave = prepare(Sample("x", {"audio": ramp}), visit).audio
        assert wave is not None
        assert len(wave) == RATE // 2
        begins.append(float(wave[0]))
    assert len(set(begins)) == 30
    assert min(begins) < -0.3
    assert max(begins) > 0.25
    assert float(PROCESSOR.audio(ramp)[0]) == -0.5
