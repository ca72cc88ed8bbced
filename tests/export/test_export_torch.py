"""torch.export files equal the model; an export that fails says why in one line and leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_dual_towers import PYRAMID, TEXTS, VISION, pictures, tiny
from tokenizers import Tokenizer

from mm.errors import UserError
from mm.export import export
from mm.export.tokenizer import plain_tokenizer
from mm.export.towers import Towers
from mm.tokenizers.text import TextTokenizer


def test_torch_programs_load_and_equal_the_model(tmp_path: Path) -> None:
    model = tiny(VISION, {"causal": False, "pooling": "mean"}, text_projection="affine")
    folder = export(model, tmp_path / "out", to="torch")
    programs = {name: torch.export.load(folder / f"{name}.pt2") for name in ("image", "text")}
    assert not any("text" in name for name in programs["image"].state_dict), "a file holds the other tower's weights"
    pixels, batch = pictures(model, 3), model.processor.text(TEXTS)
    torch.testing.assert_close(programs["image"].module()(pixels), model.embed_pixels(pixels))
    torch.testing.assert_close(programs["text"].module()(batch.ids, batch.lengths), model.embed_texts(TEXTS))


EXPERTS = {"count": 3, "top_k": 2, "every": 1}


@pytest.mark.parametrize("text", [{"experts": EXPERTS}, {"experts": {"count": 3, "routing": "hash"}, "causal": False}])
def test_experts_are_exported_with_all_of_them(text: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(VISION | {"experts": EXPERTS}, text)
    folder = export(model, tmp_path / "out", to="torch")
    programs = {name: torch.export.load(folder / f"{name}.pt2") for name in ("image", "text")}
    pixels, batch = pictures(model, 5), model.processor.text(TEXTS)
    torch.testing.assert_close(programs["image"].module()(pixels), model.embed_pixels(pixels))
    torch.testing.assert_close(programs["text"].module()(batch.ids, batch.lengths), model.embed_texts(TEXTS))


@pytest.mark.parametrize("to", ["open_clip", "huggingface"])
@pytest.mark.parametrize(("image", "text"), [(VISION, {"experts": EXPERTS}), (VISION | {"experts": EXPERTS}, {})])
def test_experts_have_no_place_in_formats_of_weights(image: Any, text: Any, to: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no place for experts; export it to onnx or torch"):
        export(tiny(image, text), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


def test_a_wrong_result_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = Towers.embed
    noise = torch.randn(24, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Towers, "embed", lambda self, name, value: embed(self, name, value) + 0.01 * noise)
    with pytest.raises(UserError, match="image tower: computes something else") as error:
        export(tiny(PYRAMID, {}), tmp_path / "out", to="torch")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_it_cannot_do_before_any_work(tmp_path: Path) -> None:
    model = tiny(PYRAMID, {})
    with pytest.raises(UserError, match="there are onnx, torch, open_clip, huggingface"):
        export(model, tmp_path / "out", to="tensorflow")  # pyright: ignore[reportArgumentType]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UserError, match="is not an empty folder"):
        export(model, tmp_path / "full", to="onnx")
    model.system.cast_(torch.bfloat16)
    with pytest.raises(UserError, match="precision='fp32'"):
        export(model, tmp_path / "out", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_export_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = tiny(PYRAMID, {})
    before = model.fingerprint
    export(model, tmp_path / "out", to="torch")
    assert model.fingerprint == before
    assert all(parameter.requires_grad for parameter in model.system.towers.projections.parameters())  # pyright: ignore


def test_plain_tokenizer_has_clips_ids(tmp_path: Path) -> None:
    ours = TextTokenizer.clip_bpe()
    path = tmp_path / "tokenizer.json"
    plain_tokenizer(ours, 12).save(str(path))
    texts = [*TEXTS, "It's 2026: naïve café, ÜBER 漢字 <end_of_text>!", "word " * 40, ""]
    batch, rows = ours(texts, 12), Tokenizer.from_file(str(path)).encode_batch(texts)
    assert [row.ids for row in rows] == batch.ids.tolist()
    assert [sum(row.attention_mask) for row in rows] == batch.lengths.tolist()
