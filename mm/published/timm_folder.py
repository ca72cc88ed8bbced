"""Folders and repositories of timm: ``config.json`` with an architecture and its preparation, ``model.safetensors``."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mm.config import read_json
from mm.encoders.image import ImageEncoderConfig, reserved_options
from mm.errors import CheckpointError
from mm.media.image import ImageSpec
from mm.processor import Processor
from mm.published.imported import Imported, one_line, pinned, put, read_safetensors, triple, widened
from mm.systems.image_tower import ImageTowerConfig, build

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FITS: Mapping[str, Literal["crop", "squash"]] = {"center": "crop", "squash": "squash"}
"""What timm calls the way of bringing a picture to a square."""

INTERPOLATIONS = ("bicubic", "bilinear")


def import_timm(folder: Path) -> Imported | None:
    """The encoder of a timm folder without its classifier, or None for any other folder.

    Raises:
        CheckpointError: It is damaged, or prepared in a way that cannot be honoured exactly.
    """
    path = folder / CONFIG_FILE
    values = read_json(path) if path.is_file() else {}
    if "architecture" not in values or "pretrained_cfg" not in values:
        return None
    with one_line(path):
        return _imported(folder, values, values["pretrained_cfg"])


def _imported(folder: Path, values: Mapping[str, Any], prepared: Mapping[str, Any]) -> Imported:
    channels, height, width = prepared["input_size"]
    interpolation, mode = prepared.get("interpolation", "bicubic"), prepared.get("crop_mode", "center")
    if channels != 3 or height != width:
        raise CheckpointError(
            f"{folder}: takes {channels} x {height} x {width} values; only square colour pictures are supported"
        )
    if interpolation not in INTERPOLATIONS or mode not in FITS:
        raise CheckpointError(
            f"{folder}: prepared with interpolation '{interpolation}' and crop mode '{mode}', which cannot be honoured exactly"
        )
    arguments = values.get("model_args", {})
    config = ImageTowerConfig(
        image=ImageEncoderConfig(
            backbone=values["architecture"],
            image_size=height,
            pool=values.get("global_pool") or None,
            patch_size=arguments.get("patch_size"),
            options={key: value for key, value in arguments.items() if key not in reserved_options()},
            mean=triple(prepared["mean"]),
            std=triple(prepared["std"]),
        )
    )
    expected = build(config).state_dict().keys()
    weights = put(widened(read_safetensors(folder / WEIGHTS_FILE)), "encoder.trunk.")
    larger = math.floor(height / prepared.get("crop_pct", 1.0))
    spec = ImageSpec(size=height, fit=FITS[mode], interpolation=interpolation, resize_to=larger, background=(0, 0, 0))
    return Imported(
        config=config,
        state={name: tensor for name, tensor in weights.items() if name in expected},
        processor=Processor(image=spec),
        card={"source": str(folder), "format": "timm", "left_out": sorted(weights.keys() - expected), **pinned(folder)},
    )
