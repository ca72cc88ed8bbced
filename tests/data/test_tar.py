"""The tar reader: the same members as the standard library in every format, and never a member lost in silence."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm.data.tar import BLOCK, Listing, Member, TarError, list_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=60)
PATHS = st.lists(NAMES.filter(lambda part: part not in {".", ".."}), min_size=1, max_size=5).map("/".join)
FILES = st.lists(st.tuples(PATHS, st.binary(max_size=1300)), max_size=6, unique_by=lambda file: file[0])


def archive(files: list[tuple[str, bytes]], kind: str = "pax") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[kind]) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def members(data: bytes, listing: Listing | None = None, skip_damage: bool = False) -> list[Member]:
    def read_at(offset: int, count: int) -> bytes:
        assert offset >= 0
        assert 0 <= count <= max(len(data), 1 << 20)
        return data[offset : offset + count]

    return list(list_members(read_at, len(data), listing or Listing(), skip_damage))


def content(data: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, data[member.offset : member.offset + member.size]) for member in members(data)]


@settings(max_examples=150, deadline=None)
@given(files=FILES, kind=st.sampled_from(sorted(FORMATS)))
def test_round_trip_with_the_standard_library(files: list[tuple[str, bytes]], kind: str) -> None:
    try:
        data = archive(files, kind)
    except ValueError:  # ustar cannot hold every long name
        assert kind == "ustar"
        return
    assert content(data) == files
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(member.offset_data, member.size) for member in tar] == [(m.offset, m.size) for m in members(data)]


LONG = "folder/" * 30 + "ein sehr langer Name – 絵文字.png"
SAMPLES = [("a.jpg", b"j" * 700), ("a.txt", b"a caption"), (LONG, b"p" * 100), ("b/c.json", b"{}"), ("b/d.png", b"")]


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(["pax", "gnu"]), position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_loses_no_member_in_silence(kind: str, position: float, flip: int) -> None:
    data = bytearray(archive(SAMPLES, kind))
    data[int(position * len(data))] ^= flip
    listing = Listing()
    try:
        found = len(members(bytes(data), listing)) + listing.other
    except TarError as error:
        assert 0 <= error.offset < len(data)  # noqa: PT017 - only where it was refused
        return
    assert found == len(SAMPLES)


@pytest.mark.fault(6)
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_flip_in_every_header_is_refused_at_its_offset(kind: str) -> None:
    files = [("a.jpg", b"j" * 700), ("a.txt", b"a caption"), ("b.jpg", b"k" * 5)]
    clean = archive(files, kind)
    for member in members(clean):
        header = member.offset - BLOCK
        for position in range(header, header + BLOCK):
            data = bytearray(clean)
            data[position] ^= 0xFF
            if 148 <= position - header < 156 and content(clean) == _content_or_none(bytes(data)):
                continue  # the padding of the checksum's own field
            with pytest.raises(TarError) as caught:
                members(bytes(data))
            assert caught.value.offset == header


def _content_or_none(data: bytes) -> list[tuple[str, bytes]] | None:
    try:
        return content(data)
    except TarError:
        return None


@pytest.mark.fault(6)
@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_cut_is_refused_or_loses_nothing(kind: str) -> None:
    files = [("a.jpg", b"j" * 700), ("a.txt", b"a caption"), ("b.jpg", b"k" * 5)]
    clean = archive(files, kind)
    end = max(member.offset + member.size for member in members(clean))
    for length in range(0, len(clean), 7):
        found = _content_or_none(clean[:length])
        assert found in (None, files)
        if length < end:
            assert found is None, "a cut before the end of the data must be seen"
    boundary = members(clean)[1].offset - BLOCK  # between two members: nothing but the missing end mark tells
    with pytest.raises(TarError, match=f"no end-of-archive mark at byte {boundary}"):
        members(clean[:boundary])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000))
def test_arbitrary_bytes_are_refused_or_empty(data: bytes) -> None:
    listing = Listing()
    found = _content_or_none(data)
    assert found in (None, [])
    assert members(data, listing, skip_damage=True) == []


def test_skipping_goes_on_behind_the_damage() -> None:
    files = [(f"{name}.jpg", bytes([index]) * 600) for index, name in enumerate("abcde")]
    clean = archive(files)
    data = bytearray(clean)
    broken = members(clean)[2].offset - BLOCK
    data[broken + 3] ^= 1
    listing = Listing()
    found = members(bytes(data), listing, skip_damage=True)
    assert [member.name for member in found] == ["a.jpg", "b.jpg", "d.jpg", "e.jpg"]
    assert [damage.offset for damage in listing.damage] == [broken]


def test_links_folders_and_devices_are_counted_never_followed() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in [
            ("etc", tarfile.DIRTYPE),
            ("passwd.txt", tarfile.SYMTYPE),
            ("shadow.txt", tarfile.LNKTYPE),
            ("null.jpg", tarfile.CHRTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("a.txt"))
    listing = Listing()
    assert [member.name for member in members(buffer.getvalue(), listing)] == ["a.txt"]
    assert listing.other == 5


def test_a_second_archive_behind_the_first_is_refused() -> None:
    first = archive([("a.txt", b"1")])
    with pytest.raises(TarError, match="more data behind the end-of-archive mark") as caught:
        members(first + archive([("b.txt", b"2")]))
    assert caught.value.offset == len(first)


def with_header(block: bytearray) -> bytes:
    """A header with a right checksum, whatever it holds."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def header_of(name: str = "a.txt", **fields: bytes) -> bytearray:
    block = bytearray(archive([(name, b"")], "ustar")[:BLOCK])
    places = {"size": 124, "kind": 156, "name": 0}
    for field, value in fields.items():
        block[places[field] : places[field] + len(value)] = value
    return block


TAIL = bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (header_of(size=b"77777777777\0"), "cut off by the end"),
        (header_of(size=b"\x80" + b"\xff" * 11), "cut off by the end"),
        (header_of(size=b"\xff" * 12), "negative or absurd"),
        (header_of(size=b"0000000009x\0"), "not a number"),
        (header_of(size=b"00000000008\0"), "not a number"),
        (header_of(kind=b"L", size=b"00000007777\0"), "cut off by the end"),
        (header_of(kind=b"L", size=b"00000000007\0"), "extended header without its member"),
        (header_of(kind=b"S"), "sparse"),
        (header_of(kind=b"M"), "multi-volume"),
    ],
)
def test_hostile_headers_with_right_checksums_are_refused(block: bytearray, reason: str) -> None:
    with pytest.raises(TarError, match=reason):
        members(with_header(block) + TAIL)


@pytest.mark.parametrize(
    "records",
    [
        b"12 path=a.txt",
        b"999 path=a.txt\n",
        b"0 path=a.txt\n",
        b"5 a\n\n",
        b"path=a.txt\n",
        b"11 size=-5\n",
        b"31 size=999999999999999999999\n",
        b"22 GNU.sparse.major=1\n",
    ],
)
def test_broken_pax_records_are_refused(records: bytes) -> None:
    block = header_of(kind=b"x", size=b"%011o\0" % len(records))
    data = with_header(block) + records.ljust(BLOCK, b"\0") + with_header(header_of()) + TAIL
    with pytest.raises(TarError):
        members(data)


def test_an_extended_header_of_many_megabytes_is_refused() -> None:
    size = 2 << 20
    data = with_header(header_of(kind=b"x", size=b"%011o\0" % size)) + bytes(size) + TAIL
    with pytest.raises(TarError, match="extended header of 2097152 bytes"):
        members(data)


@pytest.mark.parametrize(("magic", "name"), [(b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\0", "xz"), (b"BZh9", "bzip2")])
def test_compressed_archives_are_named(magic: bytes, name: str) -> None:
    with pytest.raises(TarError, match=f"not a plain tar file but {name}"):
        members(magic + bytes(3000))


def test_large_sizes_in_base_256_and_pax() -> None:
    """A member beyond 8 GiB, whose bytes are never read: only headers are."""
    size = 9 << 30
    head = with_header(header_of(size=b"\x80" + size.to_bytes(11, "big")))
    length = BLOCK + size + 2 * BLOCK

    def read_at(offset: int, count: int) -> bytes:
        return (head[offset : offset + count] if offset < BLOCK else b"").ljust(min(count, length - offset), b"\0")

    assert list(list_members(read_at, length, Listing())) == [Member("a.txt", BLOCK, size)]
