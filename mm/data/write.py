"""Writing samples as tar shards with their indexes: the same samples always give the same bytes."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mm.data.features import MEDIA
from mm.data.index import index_shard
from mm.errors import BadSample, DataError, UserError
from mm.media.audio import audio_format
from mm.media.headers import image_format
from mm.types import Sample, Source

Progress = Callable[[int, int | None], None]
"""Called with the number of things done and their total, None where it is not known."""

DEFAULT_SAMPLES_PER_SHARD = 10_000


@dataclass
class Packed:
    """What `pack` did: the shards, how many samples went in, and how many could not be read, by cause."""

    shards: list[Path]
    samples: int
    bad: Counter[str] = field(default_factory=Counter)


def write_shards(
    samples: Iterable[Sample],
    folder: str | Path,
    *,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    attributes: Mapping[str, str] | None = None,
    total: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write samples as ``000000.tar``, ``000001.tar`` ... with their sidecar indexes.

    Each sample becomes its media, then ``.txt`` when it has one text, then ``.json`` with its fields (and ``texts`` when it has
    several). Dates and owners are left out, so equal samples give equal files. A shard appears under its name only when
    complete.

    Args:
        samples: In the order to be kept.
        folder: Made if absent; must not hold shards already.
        samples_per_shard: Samples a file.
        attributes: What each shard says of all its samples, in its header.
        total: How many samples there will be, for ``progress``.
        progress: Called after each sample.

    Returns:
        The shards' paths.

    Raises:
        DataError: The folder holds shards, or a sample's id, media or fields cannot be written.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is at least 1, not {samples_per_shard}")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if any(target.glob("*.tar")):
        raise DataError(f"{target}: holds tar files already; give an empty folder")
    shards: list[Path] = []
    done = 0
    iterator = iter(samples)
    first = next(iterator, None)
    while first is not None:
        shard = target / f"{len(shards):06d}.tar"
        part = target / f".{shard.name}.{os.getpid()}.part"
        try:
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT, pax_headers=attributes) as archive:
                for sample in _up_to(samples_per_shard, first, iterator):
                    _add(archive, sample)
                    done += 1
                    if progress is not None:
                        progress(done, total)
            os.replace(part, shard)
        finally:
            part.unlink(missing_ok=True)
        index_shard(shard, rebuild=True)
        shards.append(shard)
        first = next(iterator, None)
    return shards


def pack(
    source: Source,
    folder: str | Path,
    *,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    progress: Progress | None = None,
) -> Packed:
    """Write any source as tar shards. Samples that cannot be read are left out, counted by cause. Raises as `write_shards`."""
    packed = Packed(shards=[], samples=0)

    def readable() -> Iterator[Sample]:
        for index in range(len(source)):
            try:
                sample = source.read(index)
            except BadSample as error:
                packed.bad[error.cause] += 1
                continue
            if not all(_known(modality, data) for modality, data in sample.media.items()):  # a table can name any file
                packed.bad["unknown format"] += 1
                continue
            packed.samples += 1
            yield sample

    packed.shards = write_shards(
        readable(),
        folder,
        samples_per_shard=samples_per_shard,
        attributes=getattr(source, "attributes", None),
        total=len(source),
        progress=progress,
    )
    return packed


def _known(modality: str, data: bytes) -> bool:
    """False for pictures and recordings in no format that mm reads."""
    return (modality != "image" or image_format(data) is not None) and (modality != "audio" or audio_format(data) is not None)


def _up_to(count: int, first: Sample, rest: Iterator[Sample]) -> Iterator[Sample]:
    yield first
    for _ in range(count - 1):
        sample = next(rest, None)
        if sample is None:
            return
        yield sample


def _add(archive: tarfile.TarFile, sample: Sample) -> None:
    folder, slash, base = sample.id.rpartition("/")
    key = folder + slash + base.replace(".", "_")  # a dot would end the key when it is read back
    key = "/".join("_" if part == ".." else part for part in key.strip("/").split("/"))  # no name leads out of a folder
    if not base or "\0" in sample.id:
        raise DataError(f"sample id '{sample.id}' cannot be a file name in a shard")
    for modality, data in sample.media.items():
        _add_member(archive, f"{key}.{_extension(sample.id, modality, data)}", data)
    fields = dict(sample.fields)
    if "texts" in fields:
        raise DataError(f"sample '{sample.id}': a field cannot be called 'texts', which holds the captions")
    if len(sample.texts) == 1:
        _add_member(archive, f"{key}.txt", sample.texts[0].encode())
    elif sample.texts:
        fields["texts"] = list(sample.texts)
    if fields or not (sample.media or sample.texts):
        try:
            encoded = json.dumps(fields, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"sample '{sample.id}': its fields cannot be written as JSON: {error}") from None
        _add_member(archive, f"{key}.json", encoded)


def _add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _extension(sample_id: str, modality: str, data: bytes) -> str:
    """File extension by content, so that a mislabelled file is packed under its true one."""
    if modality == "image":
        return {"JPEG": "jpg", None: "jpg"}.get(kind := image_format(data)) or str(kind).lower()
    if modality == "audio":
        return (audio_format(data) or "WAV").lower()
    if modality == MEDIA:
        return f"{MEDIA}.safetensors"
    raise DataError(f"sample '{sample_id}': shards hold image, audio and features, not '{modality}'")
