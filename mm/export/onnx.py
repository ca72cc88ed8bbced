"""ONNX: each tower as a file for onnxruntime and other runtimes, any number of rows."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.errors import UserError
from mm.export.programs import compare
from mm.export.tokenizer import write_preparation
from mm.export.towers import Towers, describe, dynamic_shapes, trace, write_manifest

OPSET = 18
"""Version of ONNX's operators: what torch writes without conversion, and runtimes since 2023 read."""

OUTPUT = "vector"


def write(towers: Towers, folder: Path) -> None:
    """Write image.onnx and text.onnx and compare what onnxruntime computes. Raises `UserError` if it differs."""
    try:
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise UserError(f'export to onnx needs {error.name}; install it with: pip install "mm-suite[export]"') from None
    shapes = dynamic_shapes(towers)
    for name, program in trace(towers).items():
        with _quiet():
            graph = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, output_names=[OUTPUT], dynamic_shapes=shapes[name], verbose=False
            )
            if graph is None:
                raise UserError(f"export to onnx: torch wrote no graph of the {name} tower")
            graph.save(folder / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        for name in ("image", "text")
    }

    def run(name: str, **inputs: Tensor) -> Tensor:
        outputs: Any = sessions[name].run([OUTPUT], {key: value.numpy() for key, value in inputs.items()})
        return torch.from_numpy(outputs[0])

    agreement = compare(
        towers, lambda pixels: run("image", pixels=pixels), lambda ids, lengths: run("text", ids=ids, lengths=lengths)
    )
    write_preparation(towers, folder)
    files = {name: {"file": f"{name}.onnx", **values} for name, values in describe(towers).items()}
    contents = {"opset": OPSET, "onnxscript": onnxscript.__version__, **files, "agreement": agreement}
    write_manifest(towers, folder, "onnx", contents)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of its own deprecated calls, and onnxscript's remarks about what it leaves as it is."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
