"""The spoken emoji: voices and concepts are kept apart, ids are stable, and what is seen is what is said.

Pairs are checked without any recording; a few words, where espeak-ng is there, stand in for building all.
"""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm import cli
from mm.data import speech
from mm.data.emoji import SPLITS, concepts
from mm.data.speech import (
    MANNERS,
    TEST_VOICE,
    TRAIN_VOICES,
    VALIDATION_VOICE,
    VOICES,
    Utterance,
    _paired,
    open_speech,
    utterances,
)
from mm.errors import UserError
from mm.media.audio import measure_audio

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")


def by_concept(split: str) -> dict[str, list[int]]:
    """Rows as of two pictures of every concept that the split shows."""
    keys = [key for key, concept in concepts().items() if split != "train" or concept["split"] == "seen"]
    return {key: [2 * number, 2 * number + 1] for number, key in enumerate(keys)}


def test_voices_of_splits_never_meet() -> None:
    assert {*TRAIN_VOICES}.isdisjoint({VALIDATION_VOICE, TEST_VOICE})
    assert VALIDATION_VOICE != TEST_VOICE
    for split, voices in VOICES.items():
        assert {utterance.voice for utterance in utterances(split)} == {*voices}
    assert all(utterance.speaker == "" for split in ("validation", "test") for utterance in utterances(split))
    assert len({utterance.speaker for utterance in utterances("train")}) > 10


def test_names_of_held_out_concepts_are_never_heard_in_training() -> None:
    held_out = {concept["name"].lower() for concept in concepts().values() if concept["split"] != "seen"}
    heard = {utterance.words.lower() for utterance, _ in _paired("train", by_concept("train"))}
    assert heard
    assert not heard & held_out


@pytest.mark.parametrize("split", VOICES)
def test_recordings_have_names_of_their_own(split: str) -> None:
    counts = Counter((utterance.voice, utterance.key) for utterance in utterances(split))
    assert counts.most_common(1)[0][1] == 1


def test_names_of_recordings_are_stable() -> None:
    assert Utterance("Grinning Face!", "en-us", "", 160, 50).key == "grinning-face_" + "4e84de41"
    first = next(utterance for utterance in utterances("test") if utterance.words == "red heart")
    assert (first.voice, first.speed, first.pitch) == (TEST_VOICE, 160, 50)


def test_a_picture_shows_what_is_said() -> None:
    rows = by_concept("train")
    concept_of = {row: concepts()[key] for key, both in rows.items() for row in both}
    names = Counter()
    for utterance, row in _paired("train", rows):
        concept = concept_of[row]
        assert utterance.words == concept["name"] or utterance.words in concept["keywords"]
        names[concept["key"]] += utterance.words == concept["name"]
    assert {*names.values()} == {MANNERS * len(TRAIN_VOICES)}


def test_another_manner_is_another_speaker_speed_and_pitch() -> None:
    spoken = {(u.words, u.voice, u.manner): u for u in utterances("train")}
    assert {manner for _, _, manner in spoken} == set(range(MANNERS))
    for (words, voice, manner), other in spoken.items():
        if manner:
            first = spoken[words, voice, 0]
            assert (first.speaker, first.speed, first.pitch) != (other.speaker, other.speed, other.pitch)
            assert first.speaker != other.speaker


@pytest.mark.parametrize("split", ["validation", "test"])
def test_evaluation_has_every_picture_once_with_its_name(split: str) -> None:
    rows = by_concept(split)
    concept_of = {row: concepts()[key] for key, both in rows.items() for row in both}
    paired = list(_paired(split, rows))
    assert sorted(row for _, row in paired) == sorted(concept_of)
    assert all(utterance.words == concept_of[row]["name"] for utterance, row in paired)


class FewPictures:
    """A few emoji, as `mm.data.emoji.EmojiSource` has them but without pictures."""

    size = 32

    def __init__(self, keys: list[str]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        return f"artist/{self.keys[index]}~0"

    def fields(self, index: int) -> dict[str, object]:
        return dict(concepts()[self.keys[index]])

    def read(self, index: int) -> object:
        return speech.Sample(self.key(index), {"image": self.keys[index].encode()})


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Speech of three concepts only, in a cache of its own."""
    keys = [key for key, concept in concepts().items() if concept["split"] == "seen" and not concept["keywords"][4:]][:3]
    known = {key: concepts()[key] for key in keys}
    monkeypatch.setattr(speech, "concepts", lambda: known)
    monkeypatch.setattr(speech, "open_emoji", lambda spec, size: FewPictures(keys))
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    for memory in (speech.utterances, speech._digest):
        memory.cache_clear()
    yield keys
    for memory in (speech.utterances, speech._digest):
        memory.cache_clear()


@needs_espeak
def test_building_is_done_once_and_reading_gives_sound_and_picture(few: list[str], tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    source = open_speech("emoji-speech:test", 32, lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    again = open_speech("emoji-speech:test", 32, lambda done, total: told.append((done, total)))
    assert len(told) == 3
    assert again.fingerprint == source.fingerprint
    assert again.revision == source.revision
    ids = [source.key(index) for index in range(len(source))]
    assert len({*ids}) == len(few)
    sample = source.read(0)
    assert sample.id == ids[0]
    assert sample.media["image"] == few[0].encode()
    assert sample.texts == (concepts()[few[0]]["name"],) == (sample.fields["spoken"],)
    facts = measure_audio(sample.media["audio"])
    assert (facts.rate, facts.channels) == (16_000, 1)
    assert 0.2 < facts.seconds < 5
    train = open_speech("emoji-speech:train", 32)
    assert {train.fields(i)["voice"] for i in range(len(train))} == {*TRAIN_VOICES}
    shard = next((tmp_path / "cache").glob("emoji-speech-test-*/*/*.tar"))
    content = shard.read_bytes()
    shard.write_bytes(content[:1_000])  # a disk has damaged the cache: it is made again
    assert open_speech("emoji-speech:test", 32).read(0) == sample
    assert shard.read_bytes() == content


def test_without_espeak_one_line_says_how_to_get_it(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["mm", "data", "build", "emoji", "--speech", "--splits", "test"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    message = capsys.readouterr().err.strip()
    assert message.startswith("mm: error: espeak-ng, which speaks the names, is not installed; install it by apt-get")
    assert "\n" not in message
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_speaker_that_fails_midway_leaves_nothing_half_written(
    few: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"espeak-ng cannot speak .* as en-gb-scotland"):
        speech.record("test")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@needs_espeak
def test_the_command_line_builds_what_is_asked_for(few: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["data", "build", "emoji", "--speech", "--splits", "test, validation"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name.split("-")[2] for path in (tmp_path / "cache").iterdir() if path.is_dir()) == ["test", "validation"]
    wrong = CliRunner().invoke(cli.app, ["data", "build", "emoji", "--speech", "--splits", "tset"])
    assert isinstance(wrong.exception, UserError)
    assert str(wrong.exception) == "'tset': no such split of speech; there are train, validation, test"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("emoji-speech:all", "write emoji-speech:train"),
        ("emoji-speech:trian", "write emoji-speech:train"),
    ],
)
def test_unknown_selections(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_speech(spec)


def test_held_out_concepts_cannot_be_asked_for_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    novel = next(key for key, concept in concepts().items() if concept["split"] == "novel")
    monkeypatch.setattr(speech, "open_emoji", lambda spec, size: FewPictures([novel]))
    with pytest.raises(UserError, match="names of held-out concepts are not spoken in training"):
        open_speech("emoji-speech:train/all-concepts")


def test_splits_of_speech_are_splits_of_pictures() -> None:
    assert {*VOICES} <= {*SPLITS}
