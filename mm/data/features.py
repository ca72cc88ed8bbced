"""What frozen parts of a network computed of samples, as it lies in shards: latents of pictures, features of captions.

Each sample has one member ``KEY.features.safetensors``: ``latents`` ``(V, C, h, w)``, the picture's and where there are two its
mirror image's; with texts also ``words`` ``(W, D)`` of all captions one after the other, ``lengths`` ``(N,)`` of these, and
``vectors`` ``(N, E)``. What computed it stands in the global header of the shard, `Encoding`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mm.config import StrictConfig
from mm.errors import BadSample, DataError
from mm.media.geometry import ImageSpec
from mm.types import Sample, Source

ATTRIBUTE = "MM.encoding"
"""Keyword in the global header of a shard."""

MEDIA = "features"
"""Name of the member among the media of a sample."""

DTYPES: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
DtypeName = Literal["fp16", "bf16"]


class TextEncoding(StrictConfig):
    """How captions became features.

    Args:
        model: What the user called the model.
        fingerprint: Of its network, vocabulary and longest text.
        words_width: D.
        vector_width: E.
    """

    model: str
    fingerprint: str
    words_width: int = Field(ge=1)
    vector_width: int = Field(ge=1)


class Encoding(StrictConfig):
    """How pictures, and captions where they were asked for, became features; stored in each shard.

    Args:
        model: What the user called the model that made the latents.
        fingerprint: Of its network.
        shape: C, h and w of the latents.
        image: How pictures were prepared.
        mirrored: Whether the latents of the mirror image lie beside those of the picture.
        dtype: Of all numbers.
        text: The same of captions; None where their features are not stored.
    """

    model: str
    fingerprint: str
    shape: tuple[int, int, int]
    image: ImageSpec
    mirrored: bool = False
    dtype: DtypeName = "fp16"
    text: TextEncoding | None = None

    @property
    def attributes(self) -> dict[str, str]:
        """What the header of a shard says."""
        return {ATTRIBUTE: self.model_dump_json()}


@dataclass(frozen=True)
class TextFeatures:
    """Features of one caption: words ``(T, D)`` and vector ``(E,)``."""

    words: Tensor
    vector: Tensor


@dataclass(frozen=True)
class Features:
    """Features of one sample: latents ``(V, C, h, w)``, and of each caption where they are stored."""

    latents: Tensor
    texts: tuple[TextFeatures, ...] = ()


def encoding_of(source: Source) -> Encoding | None:
    """What the samples of a source were encoded by; None where they are raw.

    Raises:
        DataError: The header of its shards cannot be understood.
    """
    header = getattr(source, "attributes", {}).get(ATTRIBUTE)
    if header is None:
        return None
    try:
        return Encoding.model_validate_json(header)
    except ValueError:
        raise DataError(
            f"{source.name}: the header of its shards is damaged, or of another version; make them again with `mm data encode`"
        ) from None


def common_attributes(parts: Sequence[Mapping[str, str]], name: str) -> Mapping[str, str]:
    """The attributes that all parts of a source share. Raises `DataError` where they differ."""
    if any(part != parts[0] for part in parts):
        raise DataError(f"{name}: its shards were not all encoded by the same models; give those of one `mm data encode`")
    return parts[0] if parts else {}


def to_bytes(features: Features, dtype: DtypeName) -> bytes:
    """The member that holds them; equal features give equal bytes."""
    kind = DTYPES[dtype]
    tensors = {"latents": features.latents.to(kind).contiguous()}
    if features.texts:
        tensors["words"] = torch.cat([text.words for text in features.texts]).to(kind).contiguous()
        tensors["lengths"] = torch.tensor([len(text.words) for text in features.texts])
        tensors["vectors"] = torch.stack([text.vector for text in features.texts]).to(kind).contiguous()
    return save(tensors)


def read_features(sample: Sample, encoding: Encoding) -> Features:
    """The features of a sample, in the type that they are stored in.

    Nothing is allocated beyond the bytes of the member, whose size the shard's reader has bounded.

    Raises:
        BadSample: Cause ``no features``, or ``bad features`` where they are not what the header of the shard says.
    """
    data = sample.media.get(MEDIA)
    if data is None:
        raise BadSample("no features", sample.id)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise BadSample("bad features", f"{sample.id}: {error}") from None
    if not _as_promised(tensors, encoding, len(sample.texts)):
        raise BadSample("bad features", f"{sample.id}: not what the header of its shard says")
    if "words" not in tensors:
        return Features(tensors["latents"])
    words = tensors["words"].split(tensors["lengths"].tolist())
    return Features(tensors["latents"], tuple(map(TextFeatures, words, tensors["vectors"])))


def _as_promised(tensors: Mapping[str, Tensor], encoding: Encoding, num_texts: int) -> bool:
    shapes = {"latents": (1 + encoding.mirrored, *encoding.shape)}
    text = encoding.text
    if text is not None and num_texts:
        lengths = tensors.get("lengths")
        if lengths is None or lengths.dtype != torch.int64 or lengths.shape != (num_texts,) or int(lengths.min()) < 1:
            return False
        shapes |= {"words": (sum(lengths.tolist()), text.words_width), "vectors": (num_texts, text.vector_width)}
    found = {name: tensor for name, tensor in tensors.items() if name != "lengths" or "words" not in shapes}
    return {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes and all(
        tensor.dtype == DTYPES[encoding.dtype] and bool(tensor.isfinite().all()) for tensor in found.values()
    )
