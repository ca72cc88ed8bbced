"""ONNX files give the model's vectors to onnxruntime and the tokenizers library alone, for any number and length of inputs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tiny_dual_towers import PYRAMID, SIGLIP_TEXT, SIGLIP_VISION, TEXTS, VISION, pictures, run_onnx, tiny, tokenized

from mm.export import export
from mm.hub import Model


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    """A model whose texts may have any length, and its export."""
    model = tiny(PYRAMID, {}, loss="siglip")
    return model, export(model, tmp_path_factory.mktemp("onnx") / "out", to="onnx")


def assert_same_vectors(model: Model, folder: Path) -> None:
    for rows in (1, 5):
        pixels = pictures(model, rows)
        vectors = run_onnx(folder / "image.onnx", pixels=pixels.numpy())
        np.testing.assert_allclose(vectors, model.embed_pixels(pixels).numpy(), atol=1e-5)
    for texts in (TEXTS[:1], TEXTS):
        vectors = run_onnx(folder / "text.onnx", **tokenized(folder, texts))
        np.testing.assert_allclose(vectors, model.embed_texts(texts).numpy(), atol=1e-5)


def test_texts_of_any_length(causal: tuple[Model, Path]) -> None:
    model, folder = causal
    assert_same_vectors(model, folder)
    longest = [model.processor.text([text]).ids.shape[1] for text in TEXTS]
    assert tokenized(folder, TEXTS)["ids"].shape[1] == max(longest) < model.processor.context_length


def test_experts_are_in_the_graph(tmp_path: Path) -> None:
    experts = {"count": 2, "every": 1}
    model = tiny(VISION | {"experts": experts}, {"experts": experts})
    assert_same_vectors(model, export(model, tmp_path / "out", to="onnx"))


def test_texts_filled_up_to_the_context(tmp_path: Path) -> None:
    model = tiny(SIGLIP_VISION, SIGLIP_TEXT, image_projection="none")
    folder = export(model, tmp_path / "out", to="onnx")
    assert tokenized(folder, TEXTS[:1])["ids"].shape == (1, model.processor.context_length)
    assert_same_vectors(model, folder)


def test_manifest_says_what_goes_in_and_lists_every_file(causal: tuple[Model, Path]) -> None:
    model, folder = causal
    manifest = json.loads((folder / "export.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*manifest["sha256"], "export.json"])
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    session = onnxruntime.InferenceSession(folder / manifest["text"]["file"], providers=["CPUExecutionProvider"])
    assert {node.name: node.shape for node in session.get_inputs()} == {
        name: values["shape"] for name, values in manifest["text"]["inputs"].items()
    }
    image, text = model.embed_pixels(pictures(model, 2)), model.embed_texts(TEXTS)
    logits = manifest["logit_scale"] * image @ text.T + manifest["logit_bias"]
    torch.testing.assert_close(logits, model.scores(image, text))
