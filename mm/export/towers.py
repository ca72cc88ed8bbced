"""The two towers of a model as plain modules of tensors, with random input to trace and to compare them.

Shapes: B batch, S side of the picture in pixels, T text positions, D width of the shared space.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import mm
from mm.encoders.image import ImageEncoderConfig
from mm.encoders.text import TextEncoder
from mm.errors import UserError
from mm.fusion.dual_tower import DualTower
from mm.hub import Model
from mm.media.geometry import ImageSpec
from mm.processor import Processor
from mm.systems.clip import Clip, ClipConfig
from mm.types import TextBatch

MANIFEST_FILE = "export.json"
MANIFEST_FORMAT = "mm-export-1"

SHORTEST = 2
"""Fewest text positions of a traced tower: start and end."""

REPAIR = "ftfy.fix_text, then html.unescape twice, for texts that may hold wrong decodings or HTML escapes"
"""What tokenizer.json leaves to the caller where the model was trained with CLIP's cleaning."""

MIN_COSINE = 0.9999
"""Below this, a tower that another program computes is not the same tower."""


class ImageTower(nn.Module):
    """uint8 pixels ``(B, 3, S, S)`` to unit vectors ``(B, D)``, fp32."""

    def __init__(self, both: DualTower) -> None:
        super().__init__()
        self.tower = _alone(both, "image")

    def forward(self, pixels: Tensor) -> Tensor:
        return self.tower.embed("image", pixels)


class TextTower(nn.Module):
    """Ids ``(B, T)`` and lengths ``(B,)``, both int64, to unit vectors ``(B, D)``, fp32."""

    def __init__(self, both: DualTower) -> None:
        super().__init__()
        self.tower = _alone(both, "text")

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.tower.embed("text", TextBatch(ids, lengths))


def _alone(both: DualTower, name: str) -> DualTower:
    """One tower with the same weights, so that its file holds no others."""
    return DualTower({name: (both.encoders[name], both.projections[name])}).eval()


@dataclass(frozen=True)
class Towers:
    """What an exporter works with: the towers in fp32 on the CPU, in evaluation mode, and what belongs to them."""

    name: str
    config: ClipConfig
    processor: Processor
    both: DualTower

    @property
    def image_size(self) -> int:
        """S."""
        return self.config.image.image_size

    @property
    def context_length(self) -> int:
        """Longest T."""
        return self.config.text.context_length

    @property
    def seen_padding(self) -> int | None:
        """Id of the padding that every text is filled up with where it takes part in the result; else None."""
        encoder: Any = self.both.encoders["text"]
        if isinstance(encoder, TextEncoder):
            return encoder.pad_id
        return encoder.pad_id if encoder.attend_padding else None

    @property
    def fixed_length(self) -> bool:
        """Whether the text tower computes the whole context for every text: where padding is seen, and library towers."""
        return self.seen_padding is not None or not isinstance(self.both.encoders["text"], TextEncoder)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each colour channel, of values in 0..1."""
        return self.config.image.mean, self.config.image.std

    def pixels(self, rows: int) -> Tensor:
        """Random pictures, the same ones at each call."""
        generator = torch.Generator().manual_seed(rows)
        coarse = torch.rand(rows, 3, 4, 4, generator=generator)
        fine = torch.rand(rows, 3, self.image_size, self.image_size, generator=generator)
        return ((F.interpolate(coarse, self.image_size) + fine) * 127.5).to(torch.uint8)

    def text(self, rows: int, length: int) -> TextBatch:
        """Random texts of 2 to ``length`` tokens, one of them of full length, the same ones at each call."""
        generator = torch.Generator().manual_seed(rows)
        tokenizer = self.processor.tokenizer
        special = torch.tensor([i for i in (tokenizer.start, tokenizer.end, tokenizer.pad) if i is not None])
        ids = torch.randint(tokenizer.vocab_size, (rows, length), generator=generator)
        ordinary = torch.arange(tokenizer.vocab_size)[~torch.isin(torch.arange(tokenizer.vocab_size), special)]
        ids = ordinary[ids % len(ordinary)]
        lengths = torch.randint(SHORTEST, length + 1, (rows,), generator=generator)
        lengths[0] = length
        if tokenizer.start is not None:
            ids[:, 0] = tokenizer.start
        if tokenizer.end is not None:
            ids[torch.arange(rows), lengths - 1] = tokenizer.end
        return TextBatch(ids.where(torch.arange(length) < lengths[:, None], tokenizer.pad), lengths)

    @torch.no_grad()
    def embed(self, name: str, value: Any) -> Tensor:
        """The model's own unit vectors, to compare with."""
        return self.both.embed(name, value)


def towers_of(model: Model) -> Towers:
    """The towers of a model. Raises `UserError` where it has none, or its weights are not all there."""
    system = model.system
    if not isinstance(system, Clip) or not isinstance(model.config, ClipConfig):
        raise UserError(f"{model.name}: only dual-tower models (system: clip) can be exported")
    if any(p.dtype != torch.float32 for p in system.parameters()):
        raise UserError(f"{model.name}: its weights were cast for speed; load it with precision='fp32' to export it")
    both = copy.deepcopy(system.towers).cpu().eval()
    if isinstance(model.config.image, ImageEncoderConfig) and model.config.image.gradient_checkpointing:
        both.encoders["image"].trunk.set_grad_checkpointing(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    return Towers(name=model.name, config=model.config, processor=model.processor, both=both)


def dynamic_shapes(towers: Towers) -> dict[str, Any]:
    """For each tower, which dimensions of its inputs may have any size: rows, and text positions where padding is not seen."""
    rows = {0: Dim("batch")}
    positions = {} if towers.fixed_length else {1: Dim("length", min=SHORTEST, max=towers.context_length)}
    return {"image": {"pixels": rows}, "text": {"ids": rows | positions, "lengths": rows}}


def trace(towers: Towers) -> dict[str, ExportedProgram]:
    """Both towers as graphs, see `dynamic_shapes`."""
    shapes = dynamic_shapes(towers)
    text = towers.text(2, towers.context_length)
    with torch.no_grad():
        return {
            "image": torch.export.export(ImageTower(towers.both), (towers.pixels(2),), dynamic_shapes=shapes["image"]),
            "text": torch.export.export(TextTower(towers.both), (text.ids, text.lengths), dynamic_shapes=shapes["text"]),
        }


def lengths_to_try(towers: Towers) -> tuple[int, ...]:
    """Text lengths that a traced tower is compared at: all it knows, or its shortest and longest and one between."""
    longest = towers.context_length
    return (longest,) if towers.fixed_length else (SHORTEST, max(SHORTEST, longest // 3), longest)


def picture_deviations(spec: ImageSpec, centre: str) -> list[str]:
    """Where another library's preparation of pictures differs from the model's, though only on some pictures.

    Args:
        spec: The model's.
        centre: How that library rounds the centre, see `ImageSpec`.
    """
    found = ["the colours under transparent pixels are shown as they are, not the background"]
    cuts = spec.fit == "crop" or spec.resize_to is not None
    if cuts and spec.centre != centre:
        found.append("where an odd number of pixels is cut off, the centre is one pixel away")
    return found


def require_equal(ours: Tensor, theirs: Tensor, what: str, tolerance: float | None = None) -> dict[str, float]:
    """How far two sets of unit vectors ``(B, D)`` are apart. Raises `UserError` when they are not the same.

    Args:
        ours: Of the model.
        theirs: Of what was exported.
        what: Name for the message.
        tolerance: Largest difference of a component; None asks for a cosine of `MIN_COSINE` only.
    """
    if ours.shape != theirs.shape:
        raise UserError(f"{what}: gives vectors of shape {tuple(theirs.shape)} where the model gives {tuple(ours.shape)}")
    cosine = float(F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min())
    difference = float((ours - theirs).abs().max())
    if not cosine >= MIN_COSINE or not (tolerance is None or difference <= tolerance):
        raise UserError(
            f"{what}: computes something else than the model (smallest cosine {cosine:.6f}, largest difference "
            f"{difference:.1e}); nothing was written"
        )
    return {"cosine": cosine, "largest_difference": difference}


def write_manifest(towers: Towers, folder: Path, to: str, contents: Mapping[str, Any]) -> None:
    """Write ``export.json``: what the files are, the scale of the scores, and a checksum of each file."""
    bias = towers.both.logit_bias
    values = {
        "format": MANIFEST_FORMAT,
        "to": to,
        "model": towers.name,
        "embed_dim": towers.config.embed_dim,
        "logit_scale": float(towers.both.scale().detach()),
        "logit_bias": None if bias is None else float(bias.detach()),
        **contents,
        "versions": {"mm": mm.__version__, "torch": torch.__version__},
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }
    (folder / MANIFEST_FILE).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(towers: Towers) -> dict[str, Any]:
    """Inputs and outputs of the traced towers, for the manifest."""
    mean, std = towers.normalisation
    length = towers.context_length if towers.fixed_length else "length"
    vector = {"vector": {"dtype": "float32", "shape": ["batch", towers.config.embed_dim], "norm": 1.0}}
    size = towers.image_size
    return {
        "image": {
            "inputs": {"pixels": {"dtype": "uint8", "shape": ["batch", 3, size, size], "channels": "RGB", "range": [0, 255]}},
            "outputs": vector,
            "inside": {"mean": list(mean), "std": list(std)},
        },
        "text": {
            "inputs": {
                "ids": {"dtype": "int64", "shape": ["batch", length]},
                "lengths": {"dtype": "int64", "shape": ["batch"], "range": [SHORTEST, towers.context_length]},
            },
            "outputs": vector,
            "before_tokenizer": REPAIR if towers.processor.tokenizer.cleaning.repair else None,
            "length": towers.context_length if towers.fixed_length else [SHORTEST, towers.context_length],
        },
    }


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
