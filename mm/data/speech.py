"""The embedded data's third modality: names of emoji spoken by espeak-ng, beside pictures of what they name.

The speech is synthetic, made once into FLAC shards in the cache folder. Voices are split like artists: the accents of
`TRAIN_VOICES` are learned from, one more chooses (validation), one more tests. Names of held-out concepts are never spoken in
training, not even where they are keywords of seen ones; single words of them may be, within names and keywords of seen ones.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Any

from mm.data.emoji import SPLITS, EmojiSource, built_once, concepts, open_emoji
from mm.data.labels import LabelTask
from mm.data.shards import ShardSource
from mm.data.write import Progress, write_shards
from mm.errors import BadSample, DataError, UserError
from mm.media.audio import decode_audio
from mm.types import Sample

RATE = 16_000
"""Samples a second of the recordings."""

TRAIN_VOICES = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-029", "en-us-nyc")
VALIDATION_VOICE = "en-gb-x-gbcwmd"
TEST_VOICE = "en-gb-scotland"
VOICES = {"train": TRAIN_VOICES, "validation": (VALIDATION_VOICE,), "test": (TEST_VOICE,)}

MANNERS = 2
"""Ways in which each train voice speaks each name of a seen concept; each keyword it speaks in one."""

SPEAKERS = ("", "+f1", "+f2", "+f3", "+f4", "+f5", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7")
"""Timbres of espeak-ng that a train voice may have; held-out voices have their own alone."""

_LAYOUT = 1  # raise when the recordings change

INSTALL = "install it by apt-get install espeak-ng (Debian, Ubuntu), dnf install espeak-ng (Fedora) or brew install espeak-ng"


class NoSpeakerError(UserError):
    """espeak-ng is needed and not there. The command line exits with ``exit_code``."""

    exit_code = 1


@dataclass(frozen=True)
class Utterance:
    """Words spoken by a voice, at words a minute and a pitch of 0 to 99; a ``manner`` is one of several ways."""

    words: str
    voice: str
    speaker: str
    speed: int
    pitch: int
    manner: int = 0

    @property
    def key(self) -> str:
        """Name of its recording within the voice's shards."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.words.lower()).strip("-")[:40]
        return f"{slug}_{hashlib.sha256(self.words.encode()).hexdigest()[:8]}" + (f"_{self.manner}" if self.manner else "")


class SpeechSource:
    """Spoken names with pictures of what they name, a `mm.types.Source`.

    Ids are ``voice/recording/artist/key~variant``, media ``audio`` (FLAC, 16 kHz, mono) and ``image`` (RGBA PNG), the only text
    what is said; fields are those of the picture with ``voice`` and ``spoken``.
    """

    def __init__(self, name: str, pictures: EmojiSource, pairs: Sequence[tuple[int, Utterance]], root: Path) -> None:
        self.name = name
        self._pictures = pictures
        self._pairs = pairs
        self._shards = {voice: ShardSource([root / voice], name=name) for voice in sorted({u.voice for _, u in pairs})}
        self._rows = {voice: {shards.key(row): row for row in range(len(shards))} for voice, shards in self._shards.items()}
        ids = "\n".join(self.key(index) for index in range(len(pairs)))
        self.fingerprint = hashlib.sha256(f"emoji-speech {_LAYOUT} {pictures.size}\n{ids}".encode()).hexdigest()

    @property
    def revision(self) -> str:
        """Hex digest that changes with the recordings, too: another espeak-ng speaks in another way."""
        parts = [self.fingerprint, *(shards.fingerprint for shards in self._shards.values())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    @property
    def task(self) -> LabelTask:
        """Tell the full name among all core names."""
        return LabelTask(label="name", classes=self._pictures.task.classes, subsets="split")

    def __len__(self) -> int:
        return len(self._pairs)

    def key(self, index: int) -> str:
        row, utterance = self._pairs[index]
        return f"{utterance.voice}/{utterance.key}/{self._pictures.key(row)}"

    def fields(self, index: int) -> Mapping[str, Any]:
        row, utterance = self._pairs[index]
        return {**self._pictures.fields(row), "voice": utterance.voice, "spoken": utterance.words}

    def read(self, index: int) -> Sample:
        row, utterance = self._pairs[index]
        sound = self._shards[utterance.voice].read_media(self._rows[utterance.voice][utterance.key], "audio")
        assert sound is not None, "every utterance was recorded"
        media = {"audio": sound, "image": self._pictures.read(row).media["image"]}
        return Sample(self.key(index), media, (utterance.words,), self.fields(index))


def open_speech(spec: str, size: int = 64, progress: Progress | None = None) -> SpeechSource:
    """Open spoken emoji names, recording them first if these voices are not in the cache.

    Args:
        spec: As for `mm.data.emoji.open_emoji`, but beginning with ``emoji-speech:``; there is no ``all``, and ``train`` has
            seen concepts only: every name by every train voice in two manners, every keyword in one, each with one picture.
            The others have every picture once, with its name in the held-out voice.
        size: Side of the pictures in pixels.
        progress: Called with (recordings made, in all) while recording.

    Raises:
        UserError: An unknown selection, or espeak-ng is needed and not installed.
    """
    scheme, _, rest = spec.partition(":")
    split = rest.partition("/")[0]
    if scheme != "emoji-speech" or split not in VOICES:
        raise UserError(f"'{spec}': write emoji-speech:train, emoji-speech:validation or emoji-speech:test")
    pictures = open_emoji(f"emoji:{rest}", size)
    by_concept: dict[str, list[int]] = {}
    for row in range(len(pictures)):
        by_concept.setdefault(pictures.fields(row)["key"], []).append(row)
    if split == "train" and any(concepts()[key]["split"] != "seen" for key in by_concept):
        raise UserError(f"'{spec}': names of held-out concepts are not spoken in training; take emoji-speech:train")
    pairs = [(row, utterance) for utterance, row in _paired(split, by_concept)]
    try:
        return SpeechSource(spec, pictures, pairs, record(split, progress=progress))
    except DataError:  # only a disk or a hand can have damaged what was renamed into place when complete
        return SpeechSource(spec, pictures, pairs, record(split, progress=progress, rebuild=True))


def record(split: str, cache: str | Path | None = None, progress: Progress | None = None, *, rebuild: bool = False) -> Path:
    """Speak all that a split needs, a folder of shards a voice, and return their common folder.

    Done once, as `mm.data.emoji.build`: later calls return at once, and a folder appears only when complete.

    Args:
        split: One of `VOICES`.
        cache: Folder for caches; default: `mm.paths.cache_folder`.
        progress: Called with (recordings made, in all).
        rebuild: Speak again even if the folder is there.

    Raises:
        UserError: espeak-ng is not installed or fails, or the cache folder cannot be written.
    """
    wanted: dict[str, list[Utterance]] = {}
    for utterance in utterances(split):
        wanted.setdefault(utterance.voice, []).append(utterance)

    def write(folder: Path) -> None:
        _require_speaker()
        done, total = 0, sum(map(len, wanted.values()))
        pool = ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1)))

        def samples(spoken: Sequence[Utterance]) -> Iterator[Sample]:
            nonlocal done
            for utterance, sound in zip(spoken, pool.map(_speak, spoken), strict=True):
                yield Sample(utterance.key, {"audio": sound}, (utterance.words,))
                done += 1
                if progress is not None:
                    progress(done, total)

        try:
            for voice, spoken in wanted.items():
                write_shards(samples(spoken), folder / voice)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure thousands would still be waiting

    return built_once(f"emoji-speech-{split}-{_digest(split)}", write, cache, rebuild=rebuild)


def read_splits(written: str) -> tuple[str, ...]:
    """Splits from ``train,test``. Raises `UserError` where one is unknown."""
    splits = tuple(split.strip() for split in written.split(","))
    for split in splits:
        if split not in VOICES:
            raise UserError(f"'{split}': no such split of speech; there are {', '.join(VOICES)}")
    return splits


@memoize
def utterances(split: str) -> tuple[Utterance, ...]:
    """All that the voices of a split say: each once."""
    if split == "train":
        seen = [concept for concept in concepts().values() if concept["split"] == "seen"]
        names = dict.fromkeys(concept["name"] for concept in seen)
        keywords = dict.fromkeys(word for concept in seen for word in concept["keywords"] if word not in names)
        return tuple(
            _varied(words, voice, manner)
            for spoken, manners in ((names, MANNERS), (keywords, 1))
            for words in spoken
            for voice in TRAIN_VOICES
            for manner in range(manners)
        )
    [voice] = VOICES[split]
    return tuple(_plain(name, voice) for name in dict.fromkeys(concept["name"] for concept in concepts().values()))


def _paired(split: str, by_concept: Mapping[str, Sequence[int]]) -> Iterator[tuple[Utterance, int]]:
    """Utterances, each with the row of a picture of what is said."""
    spoken: dict[str, list[Utterance]] = {}
    for utterance in utterances(split):
        spoken.setdefault(utterance.words, []).append(utterance)
    known = {key: concepts()[key] for key in by_concept}
    if split != "train":
        for key, rows in by_concept.items():
            yield from ((utterance, row) for utterance in spoken[known[key]["name"]] for row in rows)
        return
    meaning: dict[str, list[str]] = {}
    for key, concept in known.items():
        for utterance in spoken[concept["name"]]:
            yield utterance, _chosen(by_concept[key], key, utterance.key, utterance.voice)
        for word in concept["keywords"]:
            meaning.setdefault(word, []).append(key)
    names = {concept["name"] for concept in known.values()}
    held_out = {concept["name"] for concept in concepts().values() if concept["split"] != "seen"}
    for word, keys in meaning.items():
        if word not in names and word not in held_out:
            for utterance in spoken[word]:
                key = _chosen(keys, word, utterance.voice)
                yield utterance, _chosen(by_concept[key], key, word, utterance.voice)


def _plain(words: str, voice: str) -> Utterance:
    return Utterance(words, voice, "", 160, 50)


def _varied(words: str, voice: str, manner: int) -> Utterance:
    """The same for the same arguments; another manner is another speaker, speed and pitch."""
    speaker, speed, pitch = (_number(words, voice, what) for what in ("speaker", "speed", "pitch"))
    return Utterance(
        words,
        voice,
        SPEAKERS[(speaker + 5 * manner) % len(SPEAKERS)],
        130 + (speed + 37 * manner) % 70,
        30 + (pitch + 23 * manner) % 45,
        manner,
    )


def _chosen(values: Sequence[Any], *parts: str) -> Any:
    return values[_number(*parts) % len(values)]


def _number(*parts: str) -> int:
    """The same number for the same words, everywhere."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6], "big")


@memoize
def _digest(split: str) -> str:
    digest = hashlib.sha256(f"{_LAYOUT} {RATE}".encode())
    for utterance in utterances(split):
        digest.update(json.dumps([*vars(utterance).values()]).encode())
    return digest.hexdigest()[:12]


def speak(words: str, voice: str = TEST_VOICE) -> bytes:
    """A FLAC file, 16 kHz and mono, of words spoken by a voice of espeak-ng; the held-out one if none is given.

    Raises:
        UserError: espeak-ng is not installed, or does not know the voice.
    """
    _require_speaker()
    return _speak(_plain(words, voice))


def _require_speaker() -> None:
    if shutil.which("espeak-ng") is None:
        raise NoSpeakerError(f"espeak-ng, which speaks the names, is not installed; {INSTALL}")


def _speak(utterance: Utterance) -> bytes:
    """A FLAC file of what is said, 16 bits a sample."""
    import soundfile

    command = ["espeak-ng", "-v", utterance.voice + utterance.speaker, "-s", str(utterance.speed), "-p", str(utterance.pitch)]
    try:
        spoken = subprocess.run(  # noqa: S603 - a fixed program; the words come by standard input
            [*command, "--stdin", "--stdout"], input=utterance.words.encode(), capture_output=True, check=True, timeout=60
        ).stdout
        wave = decode_audio(spoken, RATE, where=utterance.words)
    except (OSError, subprocess.SubprocessError, BadSample) as error:
        raise NoSpeakerError(f"espeak-ng cannot speak '{utterance.words}' as {utterance.voice}: {error}; {INSTALL}") from None
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


assert set(VOICES) <= set(SPLITS), "splits of speech are splits of pictures"
