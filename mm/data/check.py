"""Looking through a whole source: what can be read, what cannot and why, what is there twice, how large the pictures are."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from mm.data.write import Progress
from mm.errors import BadSample
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
        good: Samples that can be read, and whose picture can be decoded.
        bad: Samples that cannot, by cause.
        examples: The first few of each cause, with their place.
        without_text: Good samples without a caption.
        without_media: Good samples without picture or sound.
        repeated_ids: Samples whose id occurred before.
        repeated_pictures: Good samples whose picture's bytes occurred before.
        shorter_side: Pictures by shorter side in pixels: ``"<=224"`` and so on.
        largest: Largest picture as (height, width).
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
    shorter_side: Counter[str] = field(default_factory=Counter)
    largest: tuple[int, int] = (0, 0)
    media_bytes: int = 0
    shards: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True when every sample is good, ids are unique and no shard is damaged."""
        return not self.bad and not self.repeated_ids and not self.shards.get("damage")

    def to_json(self) -> dict[str, Any]:
        """All counts as JSON values."""
        counters = {"bad": dict(self.bad), "shorter_side": dict(self.shorter_side), "largest": list(self.largest)}
        return {**vars(self), **counters, "ok": self.ok}


def check(source: Source, decode: bool = True, progress: Progress | None = None) -> Report:
    """Read every sample of a source once.

    Args:
        source: Any source.
        decode: Decode the pictures too; without it only their headers are read.
        progress: Called with (samples read, samples in all).
    """
    report = Report(name=source.name, fingerprint=source.fingerprint, samples=len(source), shards=_shard_notes(source))
    ids: set[str] = set()
    pictures: set[bytes] = set()
    for index in range(len(source)):
        key = source.key(index)
        report.repeated_ids += key in ids
        ids.add(key)
        try:
            _note(source.read(index), report, pictures, decode)
        except BadSample as error:
            report.bad[error.cause] += 1
            examples = report.examples.setdefault(error.cause, [])
            if len(examples) < MAX_EXAMPLES:
                examples.append(f"{key} ({error.where})" if error.where and error.where != key else key)
        if progress is not None:
            progress(index + 1, len(source))
    report.repeated_ids += getattr(source, "duplicates", 0)
    return report


def _note(sample: Sample, report: Report, pictures: set[bytes], decode: bool) -> None:
    data = sample.media.get("image")
    if data is not None:
        size = image_size(data)
        if decode:
            decode_image(data, where=sample.id)
        report.shorter_side[_bucket(min(size))] += 1
        report.largest = max(report.largest, size, key=lambda side: side[0] * side[1])
        digest = hashlib.blake2b(data, digest_size=16).digest()
        report.repeated_pictures += digest in pictures
        pictures.add(digest)
    report.good += 1
    report.without_text += not sample.texts
    report.without_media += not sample.media
    report.media_bytes += sum(map(len, sample.media.values()))


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
