"""What was added to frozen weights is part of exported graphs; formats that list weights refuse it in one line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_dual_towers import TEXTS, VISION, pictures, run_onnx, tiny, tokenized

from mm.errors import UserError
from mm.export import export
from mm.hub import Model
from mm.nn.adapters import AdapterConfig
from mm.nn.prefixes import PrefixConfig
from mm.nn.tuning import TuneConfig, tune


def tuned(config: TuneConfig) -> Model:
    model = tiny(VISION, {})
    before = model.embed_texts(TEXTS)
    tune(model.system, config)
    for parameter in model.system.parameters():
        if parameter.requires_grad and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    assert not torch.allclose(model.embed_texts(TEXTS), before, atol=1e-2)
    return replace(model, tune=config)


def test_onnx_holds_adapters(tmp_path: Path) -> None:
    model = tuned(AdapterConfig(width=4, behind=("attention", "feed_forward")))
    folder = export(model, tmp_path / "out", to="onnx")
    vectors = run_onnx(folder / "text.onnx", **tokenized(folder, TEXTS))
    np.testing.assert_allclose(vectors, model.embed_texts(TEXTS).numpy(), atol=1e-5)
    pixels = pictures(model, 3)
    vectors = run_onnx(folder / "image.onnx", pixels=pixels.numpy())
    np.testing.assert_allclose(vectors, model.embed_pixels(pixels).numpy(), atol=1e-5)


def test_torch_programs_hold_prefixes(tmp_path: Path) -> None:
    model = tuned(PrefixConfig(length=3))
    folder = export(model, tmp_path / "out", to="torch")
    batch, program = model.processor.text(TEXTS), torch.export.load(folder / "text.pt2").module()
    torch.testing.assert_close(program(batch.ids, batch.lengths), model.embed_texts(TEXTS))


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
def test_formats_of_weights_refuse_by_name(to: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{to} has no place for the parts of 'tune: prefix'") as error:
        export(tuned(PrefixConfig()), tmp_path / "out", to=to)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
