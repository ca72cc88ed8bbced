"""Damage to shards and pictures: counted or refused with shard and offset, and nothing is lost without a word."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm.data.check import check
from mm.data.index import index_shard, sidecar_path
from mm.data.shards import ShardSource
from mm.data.write import write_shards
from mm.errors import BadSample, DataError
from mm.media.image import decode_image
from mm.types import Sample

COUNT = 100


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((64, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


def make(folder: Path, media: list[bytes]) -> list[Path]:
    made = (Sample(f"{i:03d}", {"image": data}, (f"picture {i}",)) for i, data in enumerate(media))
    return write_shards(made, folder, samples_per_shard=25)


def header_offsets(shard: Path) -> list[int]:
    with tarfile.open(shard) as archive:
        return [member.offset for member in archive]


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


@pytest.mark.fault(5)
def test_five_per_cent_damaged_pictures_are_counted_exactly(tmp_path: Path) -> None:
    media = [jpeg(i) for i in range(COUNT)]
    media[7] = media[7][:-200]
    media[31] = b"<html><body>404</body></html>"
    media[52] = b""
    media[68] = media[68][:4] + bytes(300)
    media[99] = media[99][: len(media[99]) // 2]
    source = ShardSource(make(tmp_path, media))
    report = check(source)
    assert report.bad == {"truncated": 2, "unknown format": 1, "empty": 1, "undecodable": 1}
    assert report.good + sum(report.bad.values()) == report.samples == len(source) == COUNT


@pytest.mark.fault(6)
def test_a_flipped_header_byte_is_refused_with_shard_and_offset(tmp_path: Path) -> None:
    shards = make(tmp_path, [jpeg(i) for i in range(COUNT)])
    offset = header_offsets(shards[2])[20]
    flip(shards[2], offset + 5)
    os.utime(shards[2], ns=(1, 1))
    with pytest.raises(DataError, match=rf"000002\.tar: damaged header \(checksum does not match\) at byte {offset};"):
        ShardSource(tmp_path)
    source = ShardSource(tmp_path, damaged="skip")
    assert len(source) == COUNT  # a sample that lost one of its members is still a sample
    assert source.shards[2].damage == (f"damaged header (checksum does not match) at byte {offset}",)
    report = check(source)
    assert report.good == COUNT
    assert report.without_media + report.without_text == 1
    assert not report.ok
    with pytest.raises(DataError, match="at byte"):
        index_shard(shards[2])  # what was skipped once is not accepted later by default


def test_bit_rot_behind_an_unchanged_index_is_a_checksum_error(tmp_path: Path) -> None:
    """Same size, same time: only the crc can tell. Every byte of every member is covered."""
    (shard,) = make(tmp_path, [jpeg(i) for i in range(3)])
    stat = shard.stat()
    source = ShardSource(shard)
    column = source.shards[0].columns["jpg"]
    for offset in (int(column.offset[1]), int(column.offset[1] + column.size[1]) - 1):
        flip(shard, offset)
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        reopened = ShardSource(shard)
        assert reopened.read(0).texts == ("picture 0",)
        with pytest.raises(BadSample) as caught:
            reopened.read(1)
        assert caught.value.cause == "checksum"
        assert f"at byte {column.offset[1]}" in caught.value.where
        flip(shard, offset)


@pytest.mark.fault(6)
@pytest.mark.parametrize("place", ["in a header", "between members", "between jpg and txt", "in the data"])
def test_every_cut_is_refused(tmp_path: Path, place: str) -> None:
    (shard,) = make(tmp_path, [jpeg(i) for i in range(10)])
    headers = header_offsets(shard)
    length = {
        "in a header": headers[6] + 100,
        "between members": headers[6],
        "between jpg and txt": headers[7],
        "in the data": headers[6] + 512 + 200,
    }[place]
    os.truncate(shard, length)
    with pytest.raises(DataError, match=r"000000\.tar: .*cut off.* at byte \d+"):
        ShardSource(shard)
    kept = ShardSource(shard, damaged="skip")
    assert 3 <= len(kept) <= 4
    assert [kept.key(i) for i in range(3)] == ["000", "001", "002"]


def test_a_shard_cut_while_it_is_open(tmp_path: Path) -> None:
    (shard,) = make(tmp_path, [jpeg(i) for i in range(10)])
    source = ShardSource(shard)
    first = source.read(0)
    os.truncate(shard, header_offsets(shard)[4])
    assert source.read(0) == first
    with pytest.raises(BadSample, match="truncated"):
        source.read(5)


def test_a_shard_removed_while_it_is_open(tmp_path: Path) -> None:
    (shard,) = make(tmp_path, [jpeg(0)])
    source = ShardSource(shard)
    shard.unlink()
    with pytest.raises(BadSample, match="unreadable"):
        source.read(0)


@pytest.mark.fault(6)
@pytest.mark.parametrize("content", [b"", b"plain text, not a tar", b"\x1f\x8b\x08\x00 gzip"])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    shard = tmp_path / "0.tar"
    shard.write_bytes(content.ljust(600 if content else 0, b"."))
    with pytest.raises(DataError, match=r"0\.tar: "):
        ShardSource(shard)
    assert not sidecar_path(shard).exists()


@pytest.mark.fault(6)
def test_an_empty_archive_has_no_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w"):
        pass
    assert len(ShardSource(tmp_path)) == 0


@pytest.mark.fault(6)
def test_a_missing_modality_is_visible(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in [("a.jpg", jpeg(0)), ("b.txt", b"only text")]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    first, second = (ShardSource(tmp_path).read(i) for i in range(2))
    assert first.texts == ()
    assert decode_image(first.media["image"]).shape == (3, 48, 64)
    assert (second.media, second.texts) == ({}, ("only text",))
