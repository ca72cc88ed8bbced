"""Decoding pictures from untrusted bytes, within stated bounds.

The format is decided by magic bytes and the header's size is checked before any pixel is decoded. JPEG and plain PNG take
torchvision's decoders, the rest Pillow restricted to the one format that the magic bytes name. EXIF rotation is applied.
"""

import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from mm.config import StrictConfig
from mm.errors import BadSample, UserError
from mm.media.geometry import ImageSpec, composite, fit_image
from mm.media.headers import ImageFormat, image_format, jpeg_frame, stored_size

__all__ = ["DEFAULT_LIMITS", "ImageLimits", "ImageSpec", "composite", "decode_image", "fit_image", "image_size", "open_image"]

RawImage = str | Path | bytes | np.ndarray | Tensor | Image.Image


class ImageLimits(StrictConfig):
    """What a picture may ask for before it is refused: encoded bytes, decoded pixels, and pixels on one side."""

    max_bytes: int = Field(default=64 << 20, ge=1)
    max_pixels: int = Field(default=50_000_000, ge=1)
    max_side: int = Field(default=50_000, ge=1)


DEFAULT_LIMITS = ImageLimits()


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels as stored, from the header only. Raises `BadSample` when the header cannot be read."""
    return _checked_header(data, where="")[1]


def decode_image(data: bytes, limits: ImageLimits = DEFAULT_LIMITS, where: str = "") -> UInt8[Tensor, "c h w"]:
    """Decode a JPEG, PNG, WebP, GIF (first frame) or BMP file held in memory.

    Args:
        data: The file's bytes.
        limits: Bounds on bytes and pixels.
        where: Name of the sample, for the error.

    Returns:
        uint8 in 0..255: ``(3, H, W)`` RGB, or ``(4, H, W)`` RGBA (straight alpha) where a pixel is not opaque. Grey, palette,
        CMYK and 16-bit pictures are converted to 8-bit RGB.

    Raises:
        BadSample: Cause ``empty``, ``too many bytes``, ``unknown format``, ``too many pixels``, ``truncated`` or
        ``undecodable``.
    """
    if len(data) > limits.max_bytes:
        raise BadSample("too many bytes", where)
    kind, size = _checked_header(data, where)
    _check_pixels(size, limits, where)
    try:
        image = _decode_fast(data, kind)
        if image is None:
            image = _decode_pillow(data, kind, limits, where)
    except BadSample:
        raise
    except Exception as error:  # decoders of untrusted bytes raise nearly anything; all of it means the same to the caller
        raise BadSample(_cause(error), where) from error
    return image[:3] if image.shape[0] == 4 and bool((image[3] == 255).all()) else image


def open_image(raw: RawImage, limits: ImageLimits = DEFAULT_LIMITS) -> UInt8[Tensor, "c h w"]:
    """Take a picture in any form a user may have it.

    Args:
        raw: A path; the bytes of a file; a Pillow picture; an array ``(H, W)``, ``(H, W, 1|3|4)``; or a tensor ``(1|3|4, H,
            W)``. Arrays and tensors are uint8 in 0..255 or floating in 0..1.
        limits: Bounds for paths and bytes.

    Returns:
        uint8 ``(3, H, W)`` or ``(4, H, W)``.

    Raises:
        UserError: The picture cannot be used; the message names the file.
    """
    if isinstance(raw, str | Path):
        return _open_path(raw, limits)
    if isinstance(raw, bytes | bytearray | memoryview):
        return _decode_for_user(bytes(raw), limits, "image bytes")
    if isinstance(raw, np.ndarray):
        if raw.dtype != np.uint8 and raw.dtype.kind != "f":
            raise UserError(f"a picture as numbers is uint8 (0 to 255) or floating point (0 to 1), not {raw.dtype}")
        # torch wants a writable array in this machine's byte order
        copied = np.array(raw, dtype=np.uint8 if raw.dtype == np.uint8 else np.float32)
        return _from_array(torch.from_numpy(copied), channels_last=True)
    if isinstance(raw, Tensor):
        return _from_array(raw.detach().cpu(), channels_last=False)
    if isinstance(raw, Image.Image):
        return _from_pillow(ImageOps.exif_transpose(raw))
    raise UserError(f"a picture is a path, bytes, a Pillow picture, an array or a tensor, not {type(raw).__name__}")


def _checked_header(data: bytes, where: str) -> tuple[ImageFormat, tuple[int, int]]:
    if not data:
        raise BadSample("empty", where)
    kind = image_format(data)
    if kind is None:
        raise BadSample("unknown format", where)
    size = stored_size(data, kind)
    if size is None:
        raise BadSample("truncated" if len(data) < 64 else "undecodable", where)
    if kind == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BadSample("truncated", where)
    return kind, size


def _check_pixels(size: tuple[int, int], limits: ImageLimits, where: str) -> None:
    if size[0] * size[1] > limits.max_pixels or max(size) > limits.max_side:
        raise BadSample("too many pixels", where)


def _decode_fast(data: bytes, kind: ImageFormat) -> Tensor | None:
    """torchvision's decoders where they agree with Pillow: JPEG but CMYK, and 8-bit PNG in grey, RGB or RGBA."""
    from torchvision.io import ImageReadMode, decode_jpeg, decode_png

    if kind == "JPEG" and jpeg_frame(data)[2] in (1, 3):
        decoded = decode_jpeg(_as_tensor(data), mode=ImageReadMode.RGB, apply_exif_orientation=True)
        assert isinstance(decoded, Tensor), "one picture in, one out"
        return decoded
    if kind == "PNG":
        depth, colour, interlaced = data[24], data[25], data[28]
        if depth == 8 and not interlaced and b"tRNS" not in data[: data.find(b"IDAT")]:
            if colour in (0, 2):
                return decode_png(_as_tensor(data), mode=ImageReadMode.RGB, apply_exif_orientation=True)
            if colour == 6:
                return decode_png(_as_tensor(data), mode=ImageReadMode.RGB_ALPHA, apply_exif_orientation=True)
    return None


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _decode_pillow(data: bytes, kind: ImageFormat, limits: ImageLimits, where: str) -> Tensor:
    with Image.open(io.BytesIO(data), formats=[kind]) as picture:
        _check_pixels((picture.height, picture.width), limits, where)  # a GIF frame may be larger than the GIF's screen
        picture.load()
        return _from_pillow(ImageOps.exif_transpose(picture))


def _from_pillow(picture: Image.Image) -> Tensor:
    if picture.mode.startswith("I"):  # 16-bit grey: convert() would clip to 255 instead of scaling
        grey = (np.asarray(picture).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        return torch.from_numpy(grey).expand(3, -1, -1).contiguous()
    transparent = picture.has_transparency_data
    array = np.array(picture.convert("RGBA" if transparent else "RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)


def _cause(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels"
    cut_off = ("truncated", "incomplete", "premature", "out of bound")
    return "truncated" if any(word in str(error).lower() for word in cut_off) else "undecodable"


def _open_path(raw: str | Path, limits: ImageLimits) -> Tensor:
    path = Path(raw)
    if "://" in str(raw):
        raise UserError(f"{raw}: addresses are not fetched; download the picture and give its path")
    try:
        if path.stat().st_size > limits.max_bytes:
            raise UserError(f"{path}: larger than {limits.max_bytes >> 20} MiB; resize it first")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return _decode_for_user(data, limits, str(path))


def _decode_for_user(data: bytes, limits: ImageLimits, where: str) -> Tensor:
    try:
        return decode_image(data, limits, where)
    except BadSample as error:
        raise UserError(f"{where}: not a usable picture: {error.cause}; give a JPEG, PNG, WebP, GIF or BMP file") from error


def _from_array(values: Tensor, channels_last: bool) -> Tensor:
    if values.ndim == 2:
        values = values.unsqueeze(-1 if channels_last else 0)
    if values.ndim == 3 and channels_last:
        values = values.permute(2, 0, 1)
    if values.ndim != 3 or values.shape[0] not in (1, 3, 4) or 0 in values.shape:
        layout = "(H, W), (H, W, 1|3|4)" if channels_last else "(H, W), (1|3|4, H, W)"
        raise UserError(f"a picture as numbers has the shape {layout}, this one after reordering {tuple(values.shape)}")
    if values.is_floating_point():
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise UserError("a floating-point picture has values from 0 to 1; divide by 255, or convert it to uint8")
        values = (values * 255).round().to(torch.uint8)
    if values.dtype != torch.uint8:
        raise UserError(f"a picture as numbers is uint8 (0 to 255) or floating point (0 to 1), not {values.dtype}")
    return values.expand(3, -1, -1) if values.shape[0] == 1 else values
