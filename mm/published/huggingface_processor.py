"""How a checkpoint in transformers' layout prepares pictures and texts, taken over exactly or refused.

Source: https://github.com/huggingface/transformers (formats of its processors and tokenizers).
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mm.config import read_json
from mm.encoders.library_towers import quiet_transformers
from mm.errors import CheckpointError
from mm.media.geometry import ImageSpec
from mm.processor import TOKENIZER_FILE
from mm.published.imported import one_line, reason, token_id, triple
from mm.tokenizers.text import CLIP_VOCAB_SIZE, MAX_FILE_BYTES, Cleaning, TextTokenizer

PROCESSORS = ("CLIP", "ChineseCLIP", "Siglip", "Blip", "EfficientNet")
"""Kinds of picture preparation that are known to the last step; others may do things that no setting shows."""

FILTERS: Mapping[int, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}
"""Pillow's codes of the resampling filters that can be honoured."""

UNCHANGED = Cleaning(repair=False, whitespace=False, lowercase=False, nfc=False)
"""Everything that is done to a text is in the checkpoint's ``tokenizer.json``."""

VOCABULARIES = ("vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""Where older checkpoints, which have no ``tokenizer.json``, keep their vocabulary."""

UNLIMITED = 1 << 20
"""transformers writes an absurdly large ``model_max_length`` where there is none."""


@dataclass(frozen=True)
class Pixels:
    """Preparation of pictures: geometry, then ``(value - mean) / std`` of values in 0..1."""

    spec: ImageSpec
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def read_pixels(folder: Path, image_size: int) -> Pixels:
    """The picture preparation of a folder, for a tower that takes ``image_size`` pixels. Raises `CheckpointError`."""
    with one_line(f"{folder}: its picture preparation"):
        processor = _image_processor(folder)
        return Pixels(_spec(processor, image_size, folder), *_normalisation(processor))


def _image_processor(folder: Path) -> Any:
    """transformers' own object, because it fills in what the file leaves out."""
    path = folder / "preprocessor_config.json"
    whole = folder / "processor_config.json"
    if path.is_file():
        values = read_json(path)
    elif whole.is_file() and isinstance(nested := read_json(whole).get("image_processor"), dict):
        path, values = whole, nested
    else:
        raise CheckpointError(f"{folder}: no preprocessor_config.json; it says how pictures are prepared, download it too")
    named = str(values.pop("image_processor_type", None) or values.pop("feature_extractor_type", "CLIPImageProcessor"))
    kind = next((kind for kind in PROCESSORS if named.startswith((f"{kind}ImageProcessor", f"{kind}FeatureExtractor"))), None)
    if kind is None:
        raise CheckpointError(f"{path}: prepares pictures by {named}; only those of {', '.join(PROCESSORS)} are supported")
    import transformers

    try:
        with quiet_transformers():
            return getattr(transformers, f"{kind}ImageProcessor")(**values)
    except Exception as error:  # validation errors of several libraries
        raise CheckpointError(f"{path}: cannot be read as a {kind}ImageProcessor: {reason(error)}") from None


def _spec(processor: Any, image_size: int, folder: Path) -> ImageSpec:
    """The geometry, if it ends at a square that the tower takes and has steps that can be honoured."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{folder}: its picture preparation {what}; that cannot be honoured exactly")

    if not processor.do_resize:
        raise refuse("does not resize")
    if getattr(processor, "do_pad", None):
        raise refuse("pads")
    if processor.resample not in FILTERS:
        raise refuse(f"resamples by filter {processor.resample}, not by bilinear (2) or bicubic (3)")
    size, crop = processor.size, processor.crop_size if getattr(processor, "do_center_crop", None) else None
    if size.shortest_edge and not size.longest_edge:
        fit, side = "crop", size.shortest_edge
    elif size.height and size.height == size.width:
        fit, side = "squash", size.height
    else:
        raise refuse(f"resizes to {size}")
    if fit == "crop" and crop is None:
        raise refuse("keeps the aspect ratio and cuts no square")
    ends = (side, side) if crop is None else (crop.height, crop.width)
    if ends != (image_size, image_size) or side < image_size:
        raise refuse(f"makes {ends[0]} x {ends[1]} px of {side} px for a tower of {image_size} px")
    return ImageSpec(
        size=image_size,
        fit=fit,
        interpolation=FILTERS[processor.resample],
        background=(0, 0, 0),
        resize_to=None if side == image_size else side,
        centre="down",
    )


def _normalisation(processor: Any) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of values in 0..1 that equal rescaling, shifting and normalising one after the other."""
    factor = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean = triple(processor.image_mean if processor.do_normalize else 0.0)
    std = triple(processor.image_std if processor.do_normalize else 1.0)
    again = triple(processor.image_std if getattr(processor, "include_top", False) else 1.0)  # EfficientNet divides twice
    first, second, third = ((m + offset) / factor for m in mean)
    return (first, second, third), triple([s * a / factor for s, a in zip(std, again, strict=True)])


def read_tokenizer(folder: Path, *, siglip: bool) -> tuple[TextTokenizer, int]:
    """The tokenizer of a folder, and the longest text that its publisher states (`UNLIMITED` if none).

    CLIP's own vocabulary comes with the cleaning that CLIP was trained with; other texts go through ``tokenizer.json`` alone,
    after SigLIP's lower case (and, for its first version, removal of punctuation), which is not part of that file.
    """
    settings = tokenizer_settings(folder)
    with one_line(f"{folder}: the model_max_length of its tokenizer"):
        limit = min(int(settings.get("model_max_length") or UNLIMITED), UNLIMITED)
    if _is_clips(folder):
        return TextTokenizer.clip_bpe(), limit
    path = folder / TOKENIZER_FILE
    if path.is_file():
        return _from_file(path, settings, siglip), limit
    with tempfile.TemporaryDirectory() as place:
        converted = Path(place) / TOKENIZER_FILE
        write_tokenizer(folder, converted)
        return _from_file(converted, settings, siglip), limit


def _from_file(path: Path, settings: Mapping[str, Any], siglip: bool) -> TextTokenizer:
    cleaning = UNCHANGED
    if siglip:
        first_version = str(settings.get("tokenizer_class", "")).startswith(("SiglipTokenizer", "T5Tokenizer"))
        cleaning = Cleaning(repair=False, nfc=False, whitespace=first_version, punctuation=not first_version)
    return TextTokenizer.from_file(path, pad=_pad_id(path, settings), cleaning=cleaning)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, with the names of special tokens that older checkpoints keep beside it."""
    result: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            result |= read_json(folder / name, MAX_FILE_BYTES)
    return result


def _pad_id(path: Path, settings: Mapping[str, Any]) -> int:
    named = settings.get("pad_token") or settings.get("eos_token")
    found = token_id(path, named)
    if found is None:
        raise CheckpointError(f"{path}: has no padding token {named!r}; its tokenizer_config.json must name one as pad_token")
    return found


def _is_clips(folder: Path) -> bool:
    """Whether the vocabulary is that of OpenAI's CLIP; only the spelling of its two special tokens varies."""
    tokenizer, vocabulary = folder / TOKENIZER_FILE, folder / "vocab.json"
    if tokenizer.is_file():
        model = read_json(tokenizer, MAX_FILE_BYTES).get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
    else:
        found = read_json(vocabulary, MAX_FILE_BYTES) if vocabulary.is_file() else None
    if not isinstance(found, dict) or len(found) != CLIP_VOCAB_SIZE:
        return False
    own = json.loads(TextTokenizer.clip_bpe().to_json())["tokenizer"]["model"]["vocab"]
    return {token for token, i in own.items() if found.get(token) != i} == {"<start_of_text>", "<end_of_text>"}


def write_tokenizer(folder: Path, path: Path) -> None:
    """Write what transformers makes of a folder's vocabulary as a ``tokenizer.json``, which older checkpoints lack.

    Raises:
        CheckpointError: There is no vocabulary, or none that can be read.
    """
    if not any(
        (folder / name).is_file() for name in (TOKENIZER_FILE, *VOCABULARIES)
    ):  # transformers would make up an empty one
        raise CheckpointError(f"{folder}: no {TOKENIZER_FILE}; its texts cannot be split without it, download it too")
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.backend_tokenizer.save(str(path))
    except Exception as error:  # each of its tokenizers raises its own
        raise CheckpointError(
            f"{folder}: no tokenizer.json that can be read, and none can be made from its other files: {reason(error)}"
        ) from None
