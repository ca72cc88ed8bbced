"""The model that comes with the package exports, and gives the same vectors outside of it."""

from pathlib import Path

import numpy as np
from tiny_dual_towers import pictures, run_onnx, tokenized

import mm.hub
from mm.export import export


def test_the_shipped_model_exports(tmp_path: Path) -> None:
    model = mm.hub.load("emoji-clip", device="cpu", precision="fp32")
    pixels, texts = pictures(model, 4), ["red heart", "Katze mit Hut", "笑顔"]
    folder = export(model, tmp_path / "onnx", to="onnx")
    vectors = run_onnx(folder / "image.onnx", pixels=pixels.numpy())
    np.testing.assert_allclose(vectors, model.embed_pixels(pixels).numpy(), atol=1e-5)
    vectors = run_onnx(folder / "text.onnx", **tokenized(folder, texts))
    np.testing.assert_allclose(vectors, model.embed_texts(texts).numpy(), atol=1e-5)
    export(model, tmp_path / "torch", to="torch")
