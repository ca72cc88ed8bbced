"""Damaged, odd and hostile recordings: each is decoded or a `BadSample`, counted by the loader, and memory stays bounded."""

import io
import itertools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import soundfile
import torch
from audio_files import FORMATS, encoded, tone
from hypothesis import given, settings
from PIL import Image

from mm.data.check import check
from mm.data.loader import Loader
from mm.data.sources import open_source
from mm.errors import BadSample
from mm.media.audio import AudioLimits, AudioSpec, decode_audio, measure_audio
from mm.processor import Processor
from mm.run.preparation import EvalPreparation

RATE = 16_000
GOOD = {kind: encoded(tone(440, RATE, 0.3), RATE, kind) for kind in FORMATS}


def cause(data: bytes) -> str | None:
    """Why a recording cannot be used; None where it can."""
    try:
        wave = decode_audio(data, RATE, max_seconds=1.0)
    except BadSample as error:
        return error.cause
    assert wave.dtype == torch.float32
    assert 0 < len(wave) <= RATE
    assert bool(wave.isfinite().all())
    return None


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def claiming(data: bytes, place: bytes, size: int) -> bytes:
    """A WAV file whose header says another size behind ``place``."""
    at = data.index(place) + 4
    return data[:at] + struct.pack("<I", size) + data[at + 4 :]


def flac_of(frames: int) -> bytes:
    """A FLAC file whose header claims so many samples."""
    data = bytearray(GOOD["flac"])
    data[21] = data[21] & 0xF0 | frames >> 32
    data[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(data)


def not_finite(value: float) -> bytes:
    wave = np.zeros((100, 2), np.float32)
    wave[50] = value
    return encoded(wave, RATE, "float")


TEN_HOURS = 36_000 * RATE
STRANGE = {
    "empty file": (b"", "empty"),
    "magic alone": (b"RIFF\0\0\0\0WAVE", "undecodable"),
    "header alone": (encoded(np.zeros(0, np.float32), RATE), "empty"),
    "no samples": (claiming(GOOD["wav"], b"data", 0), "empty"),
    "half a file": (GOOD["wav"][: len(GOOD["wav"]) // 2], "truncated"),
    "half an ogg file": (GOOD["ogg"][: len(GOOD["ogg"]) // 2], "truncated"),
    "half a flac file": (GOOD["flac"][: len(GOOD["flac"]) // 2], "undecodable"),
    "ten hours claimed": (claiming(GOOD["wav"], b"RIFF", 2 * TEN_HOURS), "truncated"),
    "ten hours claimed in the data": (claiming(GOOD["wav"], b"data", 2 * TEN_HOURS), None),
    "ten hours claimed by a flac": (flac_of(TEN_HOURS), "undecodable"),
    "a stream's header": (claiming(claiming(GOOD["wav"], b"RIFF", 0x7FFFFFFF), b"data", 0x7FFFFFFF), None),
    "192 kHz": (encoded(tone(440, 192_000, 0.1), 192_000), None),
    "8 channels": (encoded(np.zeros((100, 8), np.float32), RATE), None),
    "100 channels": (encoded(np.zeros((10, 100), np.float32), RATE), "too many channels"),
    "655 kHz": (encoded(np.zeros(100, np.float32), 655_350), "impossible rate"),
    "no rate": (encoded(np.zeros(100, np.float32), 10), "impossible rate"),
    "a picture": (picture(), "unknown format"),
    "a page": (b"<html>404 Not Found</html>", "unknown format"),
    "not numbers": (not_finite(np.nan), "not finite"),
    "infinite": (not_finite(np.inf), "not finite"),
    "numbers for integers": (not_finite(20_000.0), "out of range"),
    "silence": (encoded(np.zeros(500, np.float32), RATE), None),
    "one sample": (encoded(np.zeros(1, np.float32), 192_000), None),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_recordings(name: str) -> None:
    data, expected = STRANGE[name]
    assert cause(data) == expected


def test_too_many_bytes() -> None:
    with pytest.raises(BadSample, match="too many bytes"):
        measure_audio(GOOD["wav"], AudioLimits(max_bytes=100))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_ends_early_is_never_half_a_recording(kind: str) -> None:
    """Nearly never: an MP3 file may lose its last frame or two unnoticed."""
    whole = len(decode_audio(GOOD[kind], RATE))
    for part in range(1, 20):
        data = GOOD[kind][: len(GOOD[kind]) * part // 20]
        if kind != "mp3":
            assert cause(data) in {"truncated", "undecodable", "unknown format", "empty"}
        elif cause(data) is None:
            assert len(decode_audio(data, RATE)) > whole - 5_000


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(sorted(FORMATS)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=6),
    begin=st.sampled_from([0.0, 0.5]),
    keep=st.floats(0, 1) | st.just(1.0),
)
def test_damage_anywhere_gives_a_wave_or_a_bad_sample(
    kind: str, flips: list[tuple[float, int]], begin: float, keep: float
) -> None:
    data = bytearray(GOOD[kind])
    for place, bits in flips:
        near = place**3 if bits % 2 else place  # headers, where the damage is worst, are at the beginning
        data[int(near * len(data))] ^= bits
    damaged = bytes(data[: int(keep * len(data))])
    try:
        wave = decode_audio(damaged, RATE, max_seconds=0.1, begin=begin)
    except BadSample:
        return
    assert 0 < len(wave) <= 1_601
    assert bool(wave.isfinite().all())


MEMORY = """
import io, json, resource, sys
import numpy as np, soundfile, torch
from mm.errors import BadSample
from mm.media.audio import decode_audio, measure_audio
from test_bad_recordings import STRANGE, long_flac

torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
files = {"really ten hours": long_flac()} | {name: data for name, (data, _) in STRANGE.items()}
decode_audio(STRANGE["192 kHz"][0], 16_000)
before, grown = peak(), {}
for name, data in files.items():
    for begin in (0.0, 0.7):
        try:
            decode_audio(data, 16_000, max_seconds=10.0, begin=begin)
        except BadSample:
            pass
    grown[name] = peak() - before
print(json.dumps({"grown": grown, "bytes": len(files["really ten hours"])}))
"""


def long_flac() -> bytes:
    """Ten hours of silence, in less than a megabyte."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 1_000, 1, format="FLAC", subtype="PCM_16") as out:
        for _ in range(36):
            out.write(np.zeros(1_000_000, np.int16))
    return file.getvalue()


def test_memory_is_bounded_by_what_is_kept() -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", MEMORY], env=environment, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["bytes"] < 1 << 20
    assert max(measured["grown"].values()) < 64, measured  # MB, where ten hours would be 2,300


def test_a_long_recording_is_too_long_only_where_all_of_it_is_wanted() -> None:
    data = long_flac()
    with pytest.raises(BadSample, match="too long"):
        decode_audio(data, RATE)
    assert len(decode_audio(data, RATE, max_seconds=2.0)) == 2 * RATE
    assert measure_audio(data).seconds == 1_800


@pytest.fixture(scope="module")
def strange_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every strange recording and every good one, called .wav whatever they are, and a folder of such a name."""
    folder = tmp_path_factory.mktemp("strange")
    for name, data in [(name, data) for name, (data, _) in STRANGE.items()] + list(GOOD.items()):
        (folder / f"{name}.wav").write_bytes(data)
    (folder / "folder.wav").mkdir()
    lines = [f"{path.name},said" for path in sorted(folder.iterdir())]
    (folder / "table.csv").write_text("\n".join(["recording,text", *lines, "gone.wav,said"]))
    return str(folder / "table.csv")


def expected_causes() -> dict[str, int]:
    causes = {"unreadable": 1, "missing file": 1}
    for _, why in STRANGE.values():
        if why is not None:
            causes[why] = causes.get(why, 0) + 1
    return causes


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_accounts_for_each(strange_folder: str, workers: int) -> None:
    preparation = EvalPreparation(Processor(audio=AudioSpec(max_seconds=1.0)))
    loader = Loader(
        open_source(strange_folder),
        preparation,
        preparation.collate,
        batch_size=4,
        seed=0,
        workers=workers,
        tail="short",
        shuffle=False,
        substitute=False,
        max_bad_fraction=1.0,
    )
    ids = list(itertools.chain.from_iterable(batch.ids for batch in loader.one_epoch()))
    counts = loader.accounting
    assert counts.causes == expected_causes()
    assert counts.balanced
    assert counts.delivered == len(ids) == len(GOOD) + sum(why is None for _, why in STRANGE.values())
    assert set(ids) == {f"{name}.wav" for name in GOOD} | {f"{name}.wav" for name, (_, why) in STRANGE.items() if why is None}


def test_the_check_finds_the_same(strange_folder: str) -> None:
    report = check(open_source(strange_folder))
    assert dict(report.bad) == expected_causes()
    assert report.good + sum(report.bad.values()) == report.samples
    assert report.rates["192000 Hz x 1"] == 2
    assert report.rates["16000 Hz x 8"] == 1
    assert report.longest == pytest.approx(0.3, abs=0.1)
    assert json.loads(json.dumps(report.to_json()))["rates"] == dict(report.rates)
