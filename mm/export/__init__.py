"""Models as files that other software runs: dual towers as ONNX, for torch.export, open_clip and transformers, latent diffusion
for diffusers.

Every export is loaded again by the software that it is for and compared with the model before it appears under its name.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from mm.errors import UserError
from mm.export.towers import Towers, towers_of
from mm.hub import Model, load
from mm.nn.experts import Experts

Format = Literal["onnx", "torch", "open_clip", "huggingface", "diffusers"]
GRAPHS: tuple[Format, ...] = ("onnx", "torch")
"""Formats that hold the computation itself, whatever it consists of."""


def export(model: str | Path | Model, folder: str | Path, to: Format) -> Path:
    """Write a dual tower, or a latent diffusion, for other software.

    Args:
        model: A model with an image and a text tower, for ``diffusers`` a latent diffusion; weights in fp32, or a MODEL
            reference, loaded when the rest is checked.
        folder: Where to; it must not exist yet, or be empty.
        to: ``onnx`` (image.onnx, text.onnx), ``torch`` (image.pt2, text.pt2 of `torch.export`), ``open_clip`` (a folder for
            ``open_clip.create_model("local-dir:FOLDER")``), ``huggingface`` (a folder for ``CLIPModel.from_pretrained``) or
            ``diffusers`` (a folder for ``StableDiffusionPipeline.from_pretrained``).

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
            loaded = model if isinstance(model, Model) else load(model, device="cpu", precision="fp32")
            if loaded.tune is not None and to not in GRAPHS:
                raise UserError(
                    f"{loaded.name}: {to} has no place for the parts of 'tune: {loaded.tune.method}'; export it to "
                    f"{' or '.join(GRAPHS)}, or tune with 'lora', which is folded into the weights"
                )
            if to not in GRAPHS and any(isinstance(part, Experts) for part in loaded.system.modules()):
                raise UserError(f"{loaded.name}: {to} has no place for experts; export it to {' or '.join(GRAPHS)}")
            staging = Path(place) / "export"
            staging.mkdir()
            _write(loaded, staging, to)
            staging.replace(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose another folder") from error
    return folder


def _write(model: Model, folder: Path, to: Format) -> None:
    if to == "diffusers":
        from mm.export import diffusers

        diffusers.write(model, folder)
    else:
        _writers()[to](towers_of(model), folder)


def _writers() -> Mapping[str, Callable[[Towers, Path], None]]:
    from mm.export import huggingface, onnx, open_clip, programs

    return {
        "onnx": onnx.write,
        "torch": programs.write,
        "open_clip": open_clip.write,
        "huggingface": huggingface.write,
    }
