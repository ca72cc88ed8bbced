"""Dual towers as files that other software runs: ONNX, torch.export, and the formats of open_clip and transformers.

Every export is loaded again by the software that it is for and compared with the model before it appears under its name.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from mm.errors import UserError
from mm.export.towers import Towers, towers_of
from mm.hub import Model, load

Format = Literal["onnx", "torch", "open_clip", "huggingface"]


def export(model: str | Path | Model, folder: str | Path, to: Format) -> Path:
    """Write a dual tower for other software.

    Args:
        model: A model with an image and a text tower, weights in fp32, or a MODEL reference, loaded when the rest is checked.
        folder: Where to; it must not exist yet, or be empty.
        to: ``onnx`` (image.onnx, text.onnx), ``torch`` (image.pt2, text.pt2 of `torch.export`), ``open_clip`` (a folder for
            ``open_clip.create_model("local-dir:FOLDER")``) or ``huggingface`` (a folder for ``CLIPModel.from_pretrained``).

    Returns:
        The folder. It holds ``export.json`` beside the files of the format: what goes in and out, scale, checksums, and how
        far the result was found from the model's own. Nothing is left behind when the export fails.

    Raises:
        UserError: No such format, nothing can be written there, the format cannot express the model, or the written files do
            not compute what the model does.
    """
    folder = Path(folder).expanduser()
    if to not in get_args(Format):
        raise UserError(f"export to '{to}': there are {', '.join(get_args(Format))}")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not an empty folder; choose another name for the export")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
            towers = towers_of(model if isinstance(model, Model) else load(model, device="cpu", precision="fp32"))
            staging = Path(place) / "export"
            staging.mkdir()
            _writers()[to](towers, staging)
            staging.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
    return folder


def _writers() -> Mapping[str, Callable[[Towers, Path], None]]:
    from mm.export import huggingface, onnx, open_clip, programs

    return {
        "onnx": onnx.write,
        "torch": programs.write,
        "open_clip": open_clip.write,
        "huggingface": huggingface.write,
    }
