"""Encoders published in timm's own layout give timm's features of the same raw picture, and do what needs no text."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

import mm
from mm.errors import CheckpointError, UserError

TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "resnet18": {"channels": [8, 8, 16, 16]},
    "vit_tiny_patch16_224": {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 2},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    "mobilenetv3_small_050": {},
}


def folder_of(tmp_path: Path, name: str, **data: Any) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **CASES[name]).eval()
    side = CASES[name].get("img_size", 64)
    config = {"input_size": (3, side, side), "crop_pct": 0.8, **data}
    save_for_hf(model, str(tmp_path / name), model_args=CASES[name], safe_serialization=True, data_config=config)
    return tmp_path / name, model


def picture(path: Path) -> Path:
    grid = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(grid).resize((160, 120), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_are_timms(tmp_path: Path, name: str) -> None:
    folder, reference = folder_of(tmp_path, name)
    file = picture(tmp_path / "picture.png")
    model = mm.load(folder)
    prepared = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    settings = resolve_model_data_config(reference, pretrained_cfg=prepared)
    mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    theirs = create_transform(**settings, is_training=False)(Image.open(file).convert("RGB"))
    ours = model.processor.image(file)
    assert (255 * (theirs * std + mean) - ours).abs().max() < 1.01, "resized and cut alike, up to rounding to whole numbers"
    pooled = reference.forward_head(reference.forward_features((ours[None] / 255 - mean) / std), pre_logits=True)
    expected = torch.nn.functional.normalize(pooled, dim=1)
    assert (model.embed_images([file]) - expected).abs().max() < TOLERANCE
    assert len(model.card["left_out"]) >= 1, "the classifier"


def test_what_needs_no_text_works_and_what_does_is_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "resnet18")
    pictures = tmp_path / "pictures"
    for number in range(8):
        kind = pictures / ("dark" if number % 2 else "light")
        kind.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (200 - 150 * (number % 2) + number,) * 3).save(kind / f"{number}.png")
    found = mm.search(str(folder), pictures, image=str(pictures / "dark" / "1.png"), k=3)
    assert found.hits[0].path.name == "1.png"
    with pytest.raises(UserError, match=r"no text"):
        mm.classify(str(folder), [pictures / "dark" / "1.png"], ["dark", "light"])
    model = mm.load(folder)
    mm.save(model, tmp_path / "saved")
    files = sorted(pictures.rglob("*.png"))
    assert torch.equal(mm.load(tmp_path / "saved").embed_images(files), model.embed_images(files))


def test_other_preparations_are_refused(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "resnet18")
    file = folder / "config.json"
    values = json.loads(file.read_text())
    for key, value in {"interpolation": "lanczos", "crop_mode": "border", "input_size": [1, 64, 64], "mean": "x"}.items():
        file.write_text(json.dumps(values | {"pretrained_cfg": values["pretrained_cfg"] | {key: value}}))
        with pytest.raises(CheckpointError):
            mm.load(folder)
