"""A bounded tar reader that never extracts: it lists where the regular members of an archive lie, or says where it is damaged.

Understands ustar, pax (path and size records) and GNU long names. Every header's checksum is verified, every step is bounded
by the file's length, and nothing is skipped in silence: a reader that stops at the first unreadable header loses all samples
behind it. Layout: POSIX.1-2001 pax(1), and the GNU tar manual's "Basic Tar Format".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

MAX_EXTENDED_BYTES = 1 << 20
"""Largest pax or long-name header, in bytes."""

MAX_NAME_CHARACTERS = 4096

ATTRIBUTE_PREFIX = b"MM."
"""Of the keywords in global headers that are kept; all others say nothing about samples."""

_REGULAR = frozenset((b"0", b"\0", b"7"))
_WITHOUT_DATA = frozenset((b"1", b"2", b"3", b"4", b"5", b"6"))
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}

ReadAt = Callable[[int, int], bytes]
"""``read_at(offset, count)`` returns the bytes there, fewer at the end of the file."""


class TarError(Exception):
    """The archive cannot be followed beyond ``offset``."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.offset = offset
        self.reason = reason


@dataclass(frozen=True)
class Member:
    """A regular file in an archive: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass
class Listing:
    """What `list_members` met besides regular members.

    Args:
        other: Entries that are not regular files: folders, links, devices. They are never followed.
        attributes: What global headers say under keywords that begin with ``MM.``.
        damage: The places that had to be skipped; empty unless skipping was asked for.
    """

    other: int = 0
    attributes: dict[str, str] = field(default_factory=dict)
    damage: list[TarError] = field(default_factory=list)


@dataclass
class _Pending:
    """What extended headers say about the member that follows them."""

    name: str | None = None
    size: int | None = None


def list_members(read_at: ReadAt, length: int, listing: Listing, skip_damage: bool = False) -> Iterator[Member]:
    """Yield the regular members of a tar archive in their order.

    Args:
        read_at: Access to the archive's bytes.
        length: The archive's length in bytes.
        listing: Filled with what was met besides members.
        skip_damage: Go on at the next block that holds a valid header instead of raising.

    Raises:
        TarError: A header fails its checksum or makes no sense, a member is cut off, or the end-of-archive mark is missing
            (so the file was cut between two members) or followed by more data.
    """
    position, pending = 0, _Pending()
    while position is not None:
        try:
            member, following = _step(read_at, length, position, pending, listing)
        except TarError as damage:
            if not skip_damage:
                raise
            listing.damage.append(damage)
            member, following, pending = None, _next_header(read_at, length, position + BLOCK), _Pending()
        if member is not None:
            pending = _Pending()
            yield member
        position = following


def _step(read_at: ReadAt, length: int, position: int, pending: _Pending, listing: Listing) -> tuple[Member | None, int | None]:
    """Read the header at ``position``: the member there, if it is one, and where the next header is (None at the end)."""
    block = read_at(position, BLOCK)
    if len(block) < BLOCK:
        raise TarError(position, _explain_short(read_at, position))
    if block == ZERO_BLOCK:
        if pending.name is not None or pending.size is not None:
            raise TarError(position, "extended header without its member")
        _check_tail(read_at, length, position + BLOCK)
        return None, None
    if not _checksum_matches(block):
        raise TarError(position, _explain_header(block, position))
    kind = block[156:157]
    size = _number(block[124:136], position)
    if kind in (b"x", b"X", b"g", b"L", b"K"):
        following = _end_of(position, size, length)
        if size > MAX_EXTENDED_BYTES:
            raise TarError(position, f"extended header of {size} bytes")
        _read_extended(kind, read_at(position + BLOCK, size), position, pending, listing)
        return None, following
    if kind in (b"S", b"M"):
        raise TarError(position, "sparse or multi-volume member, which is not supported,")
    name = pending.name if pending.name is not None else _name(block)
    size = pending.size if pending.size is not None else size
    if len(name) > MAX_NAME_CHARACTERS:
        raise TarError(position, f"name of {len(name)} characters")
    if kind in _REGULAR and not name.endswith("/"):
        return Member(name, position + BLOCK, size), _end_of(position, size, length)
    listing.other += 1
    pending.name = pending.size = None
    return None, position + BLOCK if kind in _WITHOUT_DATA else _end_of(position, size, length)


def _end_of(position: int, size: int, length: int) -> int:
    """Where the header after a member of ``size`` bytes starts. The last member's padding may be missing, its data may not."""
    if position + BLOCK + size > length:
        raise TarError(position, f"member of {size} bytes, cut off by the end of the file,")
    return position + BLOCK + -(-size // BLOCK) * BLOCK


def _checksum_matches(block: bytes) -> bool:
    """The header's sum with its own field read as spaces; some old writers summed signed bytes."""
    try:
        stated = int(block[148:156].strip(b" \0").decode("ascii"), 8)
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * 0x20
    if stated == unsigned:
        return True
    high = sum(byte > 127 for byte in block[:148]) + sum(byte > 127 for byte in block[156:])
    return stated == unsigned - 256 * high


def _number(raw: bytes, position: int) -> int:
    """An octal field, or GNU's base-256 for what octal cannot hold."""
    if raw[0] & 0x80:
        value = int.from_bytes(raw, "big") & ((1 << (8 * len(raw) - 1)) - 1)
        if raw[0] != 0x80:
            raise TarError(position, "member of negative or absurd size")
        return value
    text = raw.split(b"\0", 1)[0].strip(b" ")
    if text and not (text.isdigit() and b"8" not in text and b"9" not in text):
        raise TarError(position, "size that is not a number")
    return int(text or b"0", 8)


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _text(name)


def _text(raw: bytes) -> str:
    """Names as UTF-8; other bytes are written out as escapes, so that any name can be printed and stays unique."""
    return raw.decode("utf-8", errors="backslashreplace")


def _read_extended(kind: bytes, data: bytes, position: int, pending: _Pending, listing: Listing) -> None:
    if kind == b"L":
        pending.name = _text(data.split(b"\0", 1)[0])
    if kind in (b"K", b"L"):
        return
    for keyword, value in _pax_records(data, position):
        if keyword.startswith(b"GNU.sparse.") or (kind == b"g" and keyword in (b"path", b"size")):
            raise TarError(position, "sparse member or global path, which is not supported,")
        if kind == b"g" and keyword.startswith(ATTRIBUTE_PREFIX):
            listing.attributes[_text(keyword)] = _text(value)
            if sum(len(name) + len(text) for name, text in listing.attributes.items()) > MAX_EXTENDED_BYTES:
                raise TarError(position, "more attributes in global headers than one may hold")
        if keyword == b"path":
            pending.name = _text(value)
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 20:
                raise TarError(position, "pax size that is not a number")
            pending.size = int(value)


def _pax_records(data: bytes, position: int) -> Iterator[tuple[bytes, bytes]]:
    """Split ``"LENGTH KEYWORD=VALUE\\n"`` records, whose length counts the whole record."""
    start = 0
    while start < len(data):
        space = data.find(b" ", start, start + 20)
        digits = data[start:space] if space > start else b""
        end = start + int(digits) if digits.isdigit() else 0
        keyword, equals, value = data[space + 1 : end - 1].partition(b"=")
        if end <= space or end > len(data) or data[end - 1 : end] != b"\n" or not equals or not keyword:
            raise TarError(position, "broken pax header")
        yield keyword, value
        start = end


def _check_tail(read_at: ReadAt, length: int, position: int) -> None:
    """Behind the end mark there may be zeros only: anything else is a second archive, or a mark that damage has made."""
    while position < length:
        chunk = read_at(position, 1 << 20)
        if not chunk:
            return
        if chunk.strip(b"\0"):
            offset = position + next(index for index, byte in enumerate(chunk) if byte)
            raise TarError(offset - offset % BLOCK, "more data behind the end-of-archive mark")
        position += len(chunk)


def _next_header(read_at: ReadAt, length: int, position: int) -> int | None:
    """The next block with a valid header, or None when there is none."""
    while position + BLOCK <= length:
        block = read_at(position, BLOCK)
        if block[257:262] == b"ustar" and len(block) == BLOCK and _checksum_matches(block):
            return position
        position += BLOCK
    return None


def _explain_short(read_at: ReadAt, position: int) -> str:
    return "cut off: no end-of-archive mark" if position or read_at(0, 1) else "empty file: no header"


def _explain_header(block: bytes, position: int) -> str:
    if position == 0:
        for magic, name in _COMPRESSED.items():
            if block.startswith(magic):
                return f"not a plain tar file but {name} (unpack it to .tar first, so that samples can be found by position),"
        if block[257:262] != b"ustar":
            return "not a tar file: no header"
    return "damaged header (checksum does not match)"
