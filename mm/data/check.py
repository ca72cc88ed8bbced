"""Looking through a whole source: what can be read, what cannot and why, what is there twice, how large and long things are."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mm.data.write import Progress
from mm.errors import BadSample
from mm.media.audio import measure_audio
from mm.media.image import decode_image, image_size
from mm.types import Sample, Source

SIZE_BUCKETS = (32, 64, 128, 224, 336, 512, 1024, 2048, 4096)
"""Upper bounds, in pixels of the shorter side, of the histogram."""

MAX_EXAMPLES = 5


@dataclass
class Report:
    """What `check` found.

    Args:
        name: The source.
        fingerprint: Its digest.
        samples: Samples in all; ``good`` plus the sum of ``bad`` equals it.
        good: Samples that can be read, and whose picture and recording can be decoded.
        bad: Samples that cannot, by cause.
        examples: The first few of each cause, with their place.
        without_text: Good samples without a caption.
        without_media: Good samples without picture or sound.
        repeated_ids: Samples whose id occurred before.
        repeated_pictures: Good samples whose picture's bytes occurred before.
        repeated_recordings: The same of recordings, which spoken captions share on purpose.
        shorter_side: Pictures by shorter side in pixels: ``"<=224"`` and so on.
        largest: Largest picture as (height, width).
        rates: Recordings by samples a second and channels: ``"44100 Hz x 2"`` and so on.
        seconds: Length of all recordings; of each, no more than a model could be given.
        longest: The longest one's.
        media_bytes: Bytes of all media.
        shards: For tar shards: what the index left aside (ignored members, other entries, damage).
    """

    name: str
    fingerprint: str
    samples: int = 0
    good: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    without_text: int = 0
    without_media: int = 0
    repeated_ids: int = 0
    repeated_pictures: int = 0
    repeated_recordings: int = 0
    shorter_side: Counter[str] = field(default_factory=Counter)
    largest: tuple[int, int] = (0, 0)
    rates: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    longest: float = 0.0
    media_bytes: int = 0
    shards: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when every sample is good, ids are unique and no shard is damaged."""
        return not self.bad and not self.repeated_ids and not self.shards.get("damage")

    def to_json(self) -> dict[str, Any]:
        """All counts as JSON values."""
        counters = {name: dict(getattr(self, name)) for name in ("bad", "shorter_side", "rates")}
        return {**vars(self), **counters, "largest": list(self.largest), "ok": self.ok}


def check(source: Source, decode: bool = True, progress: Progress | None = None) -> Report:
    """Read every sample of a source once.

    Args:
        source: Any source.
        decode: Decode pictures and recordings; without it only headers of pictures are read.
        progress: Called with (samples read, samples in all).
    """
    report = Report(name=source.name, fingerprint=source.fingerprint, samples=len(source), shards=_shard_notes(source))
    ids: set[str] = set()
    known: set[tuple[str, bytes]] = set()
    for index in range(len(source)):
        key = source.key(index)
        report.repeated_ids += key in ids
        ids.add(key)
        try:
            _note(source.read(index), report, known, decode)
        except BadSample as error:
            report.bad[error.cause] += 1
            examples = report.examples.setdefault(error.cause, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{key} ({error.where})" if error.where and error.where != key else key)
        if progress is not None:
            progress(index + 1, len(source))
    report.repeated_ids += getattr(source, "duplicates", 0)
    return report


def _note(sample: Sample, report: Report, known: set[tuple[str, bytes]], decode: bool) -> None:
    picture, sound = sample.media.get("image"), sample.media.get("audio")
    size = None if picture is None else image_size(picture)
    if picture is not None and decode:
        decode_image(picture, where=sample.id)
    facts = measure_audio(sound, where=sample.id) if sound is not None and decode else None
    # From here on the sample is good.
    if size is not None:
        report.shorter_side[_bucket(min(size))] += 1
        report.largest = max(report.largest, size, key=lambda side: side[0] * side[1])
    if facts is not None:
        report.rates[f"{facts.rate} Hz x {facts.channels}"] += 1
        report.seconds += facts.seconds
        report.longest = max(report.longest, facts.seconds)
    report.repeated_pictures += _again("image", picture, known)
    report.repeated_recordings += _again("audio", sound, known)
    report.good += 1
    report.without_text += not sample.texts
    report.without_media += not sample.media
    report.media_bytes += sum(map(len, sample.media.values()))


def _again(modality: str, data: bytes | None, known: set[tuple[str, bytes]]) -> bool:
    """Whether the same bytes were there before."""
    if data is None:
        return False
    digest = (modality, hashlib.blake2b(data, digest_size=16).digest())
    repeated = digest in known
    known.add(digest)
    return repeated


def _bucket(side: int) -> str:
    return next((f"<={bound}" for bound in SIZE_BUCKETS if side <= bound), f">{SIZE_BUCKETS[-1]}")


def _shard_notes(source: Source) -> dict[str, Any]:
    """What the indexes of tar shards left aside, summed."""
    shards = getattr(source, "shards", ())
    if not shards:
        return {}
    return {
        "count": len(shards),
        "ignored_members": sum(shard.ignored for shard in shards),
        "other_entries": sum(shard.other for shard in shards),
        "damage": [f"{shard.path}: {damage}" for shard in shards for damage in shard.damage],
    }
