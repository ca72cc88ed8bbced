"""Decoding: equal to Pillow where Pillow is right, bounded where bytes are hostile, one named cause for every failure."""

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.errors import BadSample, UserError
from mm.media.image import DEFAULT_LIMITS, ImageLimits, decode_image, image_size, open_image

FORMATS = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
]


def picture(mode: str = "RGB", size: tuple[int, int] = (60, 40)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 12, 4), dtype=np.uint8)
    return Image.fromarray(values).resize(size).convert(mode)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_with_size(width: int, height: int) -> bytes:
    """A PNG whose header promises any size over one row of real data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "mode", "options"), FORMATS)
def test_decoding_equals_pillow(kind: str, mode: str, options: dict[str, object]) -> None:
    data = encoded(picture(mode), kind, **options)
    image = decode_image(data)
    reference = Image.open(io.BytesIO(data)).convert("RGBA" if image.shape[0] == 4 else "RGB")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(reference))
    assert image_size(data) == tuple(image.shape[1:]) == (40, 60)


def test_alpha_is_kept_only_where_something_is_transparent() -> None:
    opaque = picture("RGBA")
    opaque.putalpha(255)
    assert decode_image(encoded(opaque, "PNG")).shape[0] == 3
    assert decode_image(encoded(picture("RGBA"), "PNG")).shape[0] == 4


def test_colour_key_transparency_of_png() -> None:
    image = picture("RGB")
    data = encoded(image, "PNG", transparency=image.getpixel((0, 0)))
    decoded = decode_image(data)
    assert decoded.shape[0] == 4
    assert decoded[3, 0, 0] == 0
    assert decoded[3].max() == 255


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    image = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(image[0].numpy(), (ramp >> 8).astype(np.uint8))
    assert torch.equal(image[0], image[2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    upright = decode_image(encoded(picture(), kind, **options))
    image = decode_image(encoded(picture(), kind, exif=exif, **options))
    turned = {
        1: upright,
        2: upright.flip(2),
        3: upright.flip(1, 2),
        4: upright.flip(1),
        5: upright.transpose(1, 2),
        6: upright.transpose(1, 2).flip(2),
        7: upright.transpose(1, 2).flip(1, 2),
        8: upright.transpose(1, 2).flip(1),
    }[orientation]
    assert torch.equal(image, turned)


def test_gif_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (20, 10), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decode_image(data)[:, 5, 5].tolist() == [255, 0, 0]


def test_a_huge_promise_is_refused_before_decoding() -> None:
    data = png_with_size(50_000, 50_000)
    tracemalloc.start()
    with pytest.raises(BadSample) as caught:
        decode_image(data, where="shard.tar: bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.cause == "too many pixels"
    assert caught.value.where == "shard.tar: bomb"
    assert peak < 1 << 20
    assert image_size(data) == (50_000, 50_000)


def jpeg_frame_size(data: bytes, height: int, width: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


@pytest.mark.parametrize(
    "data",
    [
        jpeg_frame_size(encoded(picture(), "JPEG"), 60_000, 60_000),
        b"GIF89a" + struct.pack("<HH", 65_000, 65_000) + encoded(picture("P"), "GIF")[10:],
        b"BM" + bytes(12) + struct.pack("<Iii", 40, 40_000, -40_000) + bytes(100),
        b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\x00" * 2 + bytes(8),
    ],
    ids=["jpeg", "gif", "bmp", "webp"],
)
def test_the_pixel_limit_holds_for_every_format(data: bytes) -> None:
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(data)


def test_a_gif_frame_larger_than_its_screen_is_refused() -> None:
    data = bytearray(encoded(picture("P"), "GIF"))
    at = data.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 60, 40))
    data[at + 5 : at + 9] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(BadSample, match="too many pixels"):
        decode_image(bytes(data))


@pytest.mark.parametrize(
    ("data", "limits", "cause"),
    [
        (b"", DEFAULT_LIMITS, "empty"),
        (b"<html><body>404 Not Found</body></html>" * 9, DEFAULT_LIMITS, "unknown format"),
        (encoded(picture(), "TIFF"), DEFAULT_LIMITS, "unknown format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", DEFAULT_LIMITS, "unknown format"),
        (encoded(picture(), "PNG"), ImageLimits(max_bytes=100), "too many bytes"),
        (encoded(picture(), "PNG"), ImageLimits(max_side=59), "too many pixels"),
        (encoded(picture(), "PNG")[:18], DEFAULT_LIMITS, "truncated"),
        (b"\xff\xd8\xff\xe0" + bytes(200), DEFAULT_LIMITS, "undecodable"),
    ],
)
def test_each_failure_has_its_cause(data: bytes, limits: ImageLimits, cause: str) -> None:
    with pytest.raises(BadSample) as caught:
        decode_image(data, limits)
    assert caught.value.cause == cause


@pytest.mark.parametrize(("kind", "mode", "options"), FORMATS)
def test_half_a_file_is_truncated(kind: str, mode: str, options: dict[str, object]) -> None:
    data = encoded(picture(mode, (200, 160)), kind, **options)
    with pytest.raises(BadSample, match="truncated"):
        decode_image(data[: len(data) // 2])


@settings(max_examples=150, deadline=None)
@given(choice=st.integers(0, len(FORMATS) - 1), position=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_flipped_byte_gives_a_picture_or_a_named_cause(choice: int, position: float, flip: int) -> None:
    kind, mode, options = FORMATS[choice]
    data = bytearray(encoded(picture(mode), kind, **options))
    data[int(position * len(data))] ^= flip
    try:
        outcome = tuple(decode_image(bytes(data), ImageLimits(max_pixels=1_000_000)).shape[:1])
    except BadSample as error:
        outcome = error.cause
    assert outcome in {(3,), (4,), "unknown format", "too many pixels", "truncated", "undecodable"}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF0000WEBPVP8X", b"GIF89a", b"BM", b""]),
    st.binary(max_size=300),
)
def test_arbitrary_bytes_never_raise_anything_else(magic: bytes, rest: bytes) -> None:
    with pytest.raises(BadSample):
        decode_image(magic + rest, ImageLimits(max_pixels=1_000_000))


def test_every_form_of_the_same_picture_opens_equal(tmp_path: Path) -> None:
    image = picture("RGBA")
    path = tmp_path / "a.png"
    image.save(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [path, str(path), path.read_bytes(), image, array, tensor, array.astype(np.float32) / 255, tensor.double() / 255]
    for form in forms:
        assert torch.equal(open_image(form), tensor)
    assert torch.equal(open_image(array[..., 0]), tensor[:1].expand(3, -1, -1))
    assert torch.equal(open_image(tensor[:1]), tensor[:1].expand(3, -1, -1))


def test_user_errors_say_what_and_where(tmp_path: Path) -> None:
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture, whatever its name says")
    with pytest.raises(UserError, match=r"notes\.jpg: not a usable picture: unknown format"):
        open_image(text)
    with pytest.raises(UserError, match="no such picture"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(UserError, match="not fetched"):
        open_image("https://example.org/a.png")
    with pytest.raises(UserError, match="values from 0 to 1"):
        open_image(np.full((4, 4, 3), 200.0))
    with pytest.raises(UserError, match="shape"):
        open_image(np.zeros((4, 4, 2), np.uint8))
    with pytest.raises(UserError, match="not torch"):
        open_image(torch.zeros(3, 4, 4, dtype=torch.int64))
    with pytest.raises(UserError, match="not object"):
        open_image(np.array([["a", None]], dtype=object))
