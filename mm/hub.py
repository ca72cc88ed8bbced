"""Load and save models: a shipped name, a run folder or a model folder goes in, weights and preparation come out together.

A model folder holds ``config.yaml`` (of which ``system:`` builds the network), ``model.safetensors``, ``processor.json``,
``tokenizer.json`` and, where it was measured, ``card.json``.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm.config import read_json, read_yaml, validate
from mm.errors import CheckpointError, UserError
from mm.processor import Processor
from mm.systems import SystemConfig, build
from mm.training.checkpoint import find_checkpoint
from mm.training.devices import choose_device
from mm.types import Embeds, System, capabilities

ASSETS = Path(__file__).parent / "assets"
CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
CARD_FILE = "card.json"

Progress = Callable[[int, int], None]


@dataclass
class Model:
    """A system with its preparation: raw pictures and texts in, vectors and answers out.

    Args:
        system: The network, in evaluation mode.
        processor: How raw input becomes tensors for this network.
        config: The configuration that built the network.
        name: What the user called it.
        card: Data, command, figures and limits, as far as they were recorded.
        device: Where the network lives.
    """

    system: System
    processor: Processor
    config: SystemConfig
    name: str
    card: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def capabilities(self) -> frozenset[str]:
        """Names of what this model can do, see `mm.types.CAPABILITIES`."""
        return capabilities(self.system)

    @property
    def fingerprint(self) -> str:
        """Digest of weights and preparation: equal fingerprints give equal vectors."""
        digest = hashlib.sha256(repr(self.processor.stamp()).encode() + self.processor.tokenizer.to_json().encode())
        for name, tensor in sorted(self.system.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Prepared pictures, uint8 ``(B, 3, S, S)``, to unit vectors ``(B, D)`` in fp32 on the CPU."""
        with torch.inference_mode():
            return self._embedding_system().embed_image(pixels.to(self.device)).float().cpu()

    def embed_images(self, images: Sequence[Any], *, batch_size: int = 64, progress: Progress | None = None) -> Tensor:
        """Raw pictures (paths, bytes, PIL images, arrays) to unit vectors ``(N, D)``, fp32."""
        parts = []
        for start in range(0, len(images), batch_size):
            parts.append(self.embed_pixels(self.processor.images(images[start : start + batch_size])))
            if progress:
                progress(min(start + batch_size, len(images)), len(images))
        return torch.cat(parts) if parts else torch.empty(0, self.config.embed_dim)

    def embed_texts(self, texts: Sequence[str], *, batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """Texts to unit vectors ``(N, D)``, fp32. Texts of like length share a batch, so that little padding is computed."""
        system = self._embedding_system()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = self.processor.text([texts[i] for i in order[start : start + batch_size]])
                vectors.append(system.embed_text(batch.to(self.device)).float().cpu())
                if progress:
                    progress(min(start + batch_size, len(texts)), len(texts))
        if not vectors:
            return torch.empty(0, self.config.embed_dim)
        joined = torch.cat(vectors)
        result = torch.empty_like(joined)
        result[torch.tensor(order)] = joined
        return result

    def scores(self, queries: Tensor, items: Tensor) -> Tensor:
        """Logits ``(Q, M)`` with the model's own scale, fp32."""
        with torch.inference_mode():
            return self._embedding_system().scores(queries.to(self.device), items.to(self.device)).float().cpu()

    def parameters(self) -> dict[str, int]:
        """Parameter counts of the top-level parts, and ``total``."""
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in self.system.named_children()}
        return counts | {"total": sum(p.numel() for p in self.system.parameters())}

    def _embedding_system(self) -> Embeds:
        if not isinstance(self.system, Embeds):
            able = ", ".join(sorted(self.capabilities)) or "nothing yet"
            raise UserError(f"{self.name} has no shared embedding space (it can: {able}); take a dual-tower model")
        return self.system


def shipped() -> list[str]:
    """Names of the models that come with the package."""
    folder = ASSETS / "models"
    return sorted(path.name for path in folder.iterdir() if (path / WEIGHTS_FILE).is_file()) if folder.is_dir() else []


def load(model: str | Path, *, device: str = "auto") -> Model:
    """Load a model with its preparation.

    Args:
        model: A shipped name (`shipped`), a run folder (its newest complete checkpoint, EMA weights) or a model folder.
        device: ``auto`` (CUDA, then MPS, then CPU) or any torch device.

    Raises:
        CheckpointError: When there is no such model, or a file of it is missing, damaged or of another shape.
    """
    folder, weights = _locate(str(model))
    config_path = folder / CONFIG_FILE
    values = read_yaml(config_path)
    if "system" not in values:
        raise CheckpointError(f"{config_path}: has no 'system' section; is this a model folder written by mm?")
    config = validate(SystemConfig, values["system"], f"{config_path} (system)")
    system = build(config)
    _load_weights(system, weights)
    card = folder / CARD_FILE
    place = choose_device(device)
    return Model(
        system=system.eval().to(place),
        processor=Processor.load(folder),
        config=config,
        name=str(model),
        card=read_json(card) if card.is_file() else {},
        device=place,
    )


def save(
    model: Model, folder: str | Path, *, dtype: torch.dtype = torch.float32, card: Mapping[str, Any] | None = None
) -> Path:
    """Write a model folder that `load` reads. Refuses a folder that already holds a model."""
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).exists():
        raise UserError(f"{folder}: already holds a model; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().cpu().contiguous().clone()
        for name, tensor in model.system.state_dict().items()
    }
    write_config(model.config, folder)
    model.processor.save(folder)
    contents = dict(model.card if card is None else card)
    if contents:
        (folder / CARD_FILE).write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary = folder / (WEIGHTS_FILE + ".tmp")
    save_file(state, temporary)
    temporary.replace(folder / WEIGHTS_FILE)
    return folder


def write_config(config: SystemConfig, folder: Path) -> None:
    """Write the resolved configuration of a network that is not part of a run."""
    values = {"system": config.model_dump(mode="json")}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _locate(model: str) -> tuple[Path, Path]:
    """The folder with configuration and preparation, and the weight file."""
    if model in shipped():
        folder = ASSETS / "models" / model
        return folder, folder / WEIGHTS_FILE
    folder = Path(model)
    if not folder.is_dir():
        near = difflib.get_close_matches(model, shipped(), n=1)
        hint = (
            f"did you mean '{near[0]}'?" if near else f"shipped models: {', '.join(shipped()) or 'none'}; or give a run folder"
        )
        raise CheckpointError(f"no model '{model}'; {hint}")
    if (folder / WEIGHTS_FILE).is_file() and not (folder / "manifest.json").is_file():
        return folder, folder / WEIGHTS_FILE
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder}: holds neither a model nor a complete checkpoint of a run")
    ema = checkpoint / EMA_FILE
    return checkpoint, ema if ema.is_file() else checkpoint / WEIGHTS_FILE


def _load_weights(system: System, path: Path) -> None:
    """Load strictly; bf16 files are computed with in fp32."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from None
    expected = system.state_dict()
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(f"{path}: does not fit its configuration; missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: '{name}' is {tuple(tensor.shape)}, its configuration says {tuple(expected[name].shape)}"
            )
    system.load_state_dict(state)
