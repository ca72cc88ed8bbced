"""What the first bytes of a picture file say: its format and its size in pixels, without decoding anything.

Layouts: PNG (RFC 2083), JPEG (ITU-T T.81 annex B), GIF89a, WebP (RFC 9649), BMP (BITMAPINFOHEADER and BITMAPCOREHEADER).
"""

import struct
from typing import Literal

ImageFormat = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP"]

_JPEG_STANDALONE = frozenset({0x01, *range(0xD0, 0xD8)})
_JPEG_NOT_FRAMES = frozenset({0xC4, 0xC8, 0xCC})


def image_format(data: bytes) -> ImageFormat | None:
    """The format that the magic bytes announce, or None when it is not one that mm reads. File names are never believed."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def stored_size(data: bytes, kind: ImageFormat) -> tuple[int, int] | None:
    """(height, width) in pixels as stored, before any EXIF rotation; None when the header is cut off or makes no sense."""
    try:
        height, width = _READERS[kind](data)
    except (struct.error, IndexError):
        return None
    return (height, width) if height > 0 and width > 0 else None


def _png(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return (height, width) if data[12:16] == b"IHDR" else (0, 0)


def jpeg_frame(data: bytes) -> tuple[int, int, int]:
    """(height, width, components) of the first frame header; zeros when there is none."""
    position = 2
    while position < len(data):
        if data[position] != 0xFF:
            return 0, 0, 0
        marker = data[position + 1]
        if marker == 0xFF:
            position += 1
        elif marker in _JPEG_STANDALONE:
            position += 2
        elif 0xC0 <= marker <= 0xCF and marker not in _JPEG_NOT_FRAMES:
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            return height, width, components
        elif marker in (0xD9, 0xDA):
            return 0, 0, 0
        else:
            position += 2 + max(2, struct.unpack_from(">H", data, position + 2)[0])
    return 0, 0, 0


def _jpeg(data: bytes) -> tuple[int, int]:
    return jpeg_frame(data)[:2]


def _gif(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return height, width


def _webp(data: bytes) -> tuple[int, int]:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        return (height, width) if len(data) >= 30 else (0, 0)
    if chunk == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    return 0, 0


def _bmp(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return abs(height), abs(width)


_READERS = {"JPEG": _jpeg, "PNG": _png, "WEBP": _webp, "GIF": _gif, "BMP": _bmp}
