"""Evaluations that would mislead are refused, and so is what cannot be computed or written, in one line each."""

from pathlib import Path

import benchmark_copies as copies
import pytest
import torch

import mm
from mm.data.sources import Subset, open_source
from mm.errors import DataError, UserError
from mm.export import export
from mm.hub import Model, check_folder
from mm.run.adaptation import evaluate_probe
from mm.run.conversion import convert
from mm.run.evaluation import encode, evaluate_compositional, evaluate_retrieval, evaluate_zero_shot
from mm.training.devices import choose_device
from mm.training.parallel import World

PICTURES = 12


@pytest.fixture(scope="module")
def model() -> Model:
    return mm.load("emoji-clip", device="cpu")


def own_pictures(folder: Path, broken: int) -> Path:
    """A user's own folder, the first pictures of which cannot be read."""
    for number in range(PICTURES):
        copies.picture(folder / f"{number:02d}.png", number)
        copies.text(folder / f"{number:02d}.txt", f"picture {number}")
    for number in range(broken):
        (folder / f"{number:02d}.png").write_bytes(b"broken")
    return folder


@pytest.mark.parametrize("cache", [True, False])
def test_a_published_set_with_a_picture_missing_has_no_figures(model: Model, tmp_path: Path, cache: bool) -> None:
    """A smaller gallery makes retrieval easier: 11 of 12 pictures would pass as a share, not as the published set."""
    copies.flickr30k(tmp_path, [[f"caption {number}"] for number in range(PICTURES)])
    spec = f"flickr30k:{tmp_path}"
    whole = evaluate_retrieval(model, spec, cache=cache)
    assert whole.protocol["samples"] == "12 delivered, 0 skipped, 0 tail of 12"
    gone = tmp_path / "flickr30k-images" / "307.jpg"
    gone.unlink()
    for data in (spec, Subset(open_source(spec), range(8))):
        for _ in range(2):  # the second time, nothing is remembered of the first
            with pytest.raises(DataError, match=r"1 skipped \(missing file 1\).*complete the copy") as error:
                evaluate_retrieval(model, data, cache=cache)
            assert str(gone) in str(error.value)
            assert "\n" not in str(error.value)


def test_every_kind_of_published_set_must_be_whole(model: Model, tmp_path: Path) -> None:
    copies.winoground(tmp_path / "w", [(f"a {n}", f"{n} a") for n in range(6)])
    (tmp_path / "w" / "data" / "images" / "ex_3_img_1.png").unlink()
    with pytest.raises(DataError, match="complete the copy"):
        evaluate_compositional(model, f"winoground:{tmp_path / 'w'}")
    copies.imagenet(tmp_path / "i")
    next((tmp_path / "i" / "val").glob("*/*_001.JPEG")).write_bytes(b"broken")
    with pytest.raises(DataError, match=r"1 skipped.*complete the copy"):
        evaluate_zero_shot(model, f"imagenet:{tmp_path / 'i'}")


def test_own_pictures_may_be_missing_up_to_a_fifth(model: Model, tmp_path: Path) -> None:
    few = evaluate_retrieval(model, str(own_pictures(tmp_path / "few", 2)))
    assert few.protocol["samples"].startswith("10 delivered, 2 skipped")
    with pytest.raises(DataError, match=r"9 delivered, 3 skipped.*run `mm data check` on it"):
        evaluate_retrieval(model, str(own_pictures(tmp_path / "many", 3)))


def test_what_is_remembered_is_judged_too(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_pictures(tmp_path / "few", 2)
    encode(model, open_source(str(folder)))
    monkeypatch.setattr("mm.run.evaluation.MAX_BAD_SHARE", 0.1)
    with pytest.raises(DataError, match="2 skipped"):
        encode(model, open_source(str(folder)))


def test_retrieval_refuses_sets_of_another_task_and_names_the_command(model: Model, tmp_path: Path) -> None:
    copies.mnist(tmp_path)
    copies.winoground(tmp_path)
    copies.text(tmp_path / "LibriSpeech" / "test-clean" / "1" / "2" / "1-2.trans.txt", "1-2-0000 A WORD\n")
    for spec, message in (
        (f"mnist:{tmp_path}", "a zero-shot set, .*measure it with `mm eval zero-shot`"),
        (f"winoground:{tmp_path}", "a winoground set, .*measure it with `mm eval compositional`"),
        (f"librispeech:{tmp_path}", "a transcription set, .*give a set such as coco:FOLDER"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_retrieval(model, spec)


def test_prompts_are_stamped_where_they_were_used(model: Model, tmp_path: Path) -> None:
    assert "templates" not in evaluate_retrieval(model, str(own_pictures(tmp_path, 0))).protocol
    found = evaluate_zero_shot(model, "emoji:validation/novel", templates=["a {}"], baseline="none")
    assert found.protocol["templates"] == ["a {}"]


@pytest.mark.parametrize("cache", [True, False])
def test_the_weights_are_digested_once_an_evaluation(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: bool
) -> None:
    digest, count = model.fingerprint, 0

    def counted(_: Model) -> str:
        nonlocal count
        count += 1
        return digest

    copies.winoground(tmp_path)
    monkeypatch.setattr(Model, "fingerprint", property(counted))
    novel = "emoji:validation/novel"
    for measure in (
        lambda: evaluate_zero_shot(model, novel, baseline="none", cache=cache),
        lambda: evaluate_retrieval(model, novel, cache=cache),
        lambda: evaluate_compositional(model, f"winoground:{tmp_path}", cache=cache),
        lambda: evaluate_probe(model, novel, novel, method="knn", cache=cache),
    ):
        count = 0
        assert measure().protocol["model_fingerprint"] == digest[:16]
        assert count == 1


@pytest.mark.parametrize("name", ["foo", "", "gpu", "xpu", "cuda:x"])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(UserError, match=rf"device '{name}': there are auto, cpu, cuda and mps"):
        choose_device(name)


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="this machine has a GPU")
def test_a_missing_device_is_called_as_the_user_called_it() -> None:
    for name in ("cuda", "cuda:1"):
        with pytest.raises(UserError, match=f"^device '{name}': no {name} device on this machine; use auto or cpu"):
            choose_device(name)


def unwritable(folder: Path) -> list[Path]:
    """Where nothing can be written, not even by root."""
    (folder / "file").write_text("")
    return [folder / "file", folder / "file" / "below", *([Path("/proc/i1")] if Path("/proc").is_dir() else [])]


def test_a_model_is_not_saved_where_nothing_can_be_written(model: Model, tmp_path: Path) -> None:
    for folder in unwritable(tmp_path):
        for write in (lambda folder=folder: check_folder(folder), lambda folder=folder: mm.save(model, folder)):
            with pytest.raises(UserError, match=f"{folder}: no model can be written there .*choose another folder") as error:
                write()
            assert "\n" not in str(error.value)


def test_a_full_disk_is_said_in_one_line(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm.hub.save_file", full)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "new" / "model", tmp_path / "empty"):
        with pytest.raises(UserError, match=r"No space left on device.*make room"):
            mm.save(model, folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"], "nothing is left behind"


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "weights.pth")
    for file in (tmp_path / "weights.pth", tmp_path / "none.safetensors"):
        with pytest.raises(UserError):
            convert(file, tmp_path / "new" / "model")
    assert [path.name for path in tmp_path.rglob("*")] == ["weights.pth"]


def test_an_export_is_checked_before_its_model_is_loaded(tmp_path: Path) -> None:
    for folder in unwritable(tmp_path):
        with pytest.raises(UserError, match=f"^{folder}: (cannot be written|is not an empty folder)") as error:
            export("no such model", folder, "torch")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="there are onnx, torch, open_clip, huggingface"):
        export("no such model", tmp_path / "new", "tflite")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="no model 'no such model'"):
        export("no such model", tmp_path / "new", "torch")
    assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_text_vectors_are_computed_once_and_made_again_when_the_cache_is_damaged(tmp_path: Path, monkeypatch) -> None:
    from mm.run.evaluation import text_vectors

    monkeypatch.setenv("MM_CACHE", str(tmp_path))
    alone, calls = World(0, 1, torch.device("cpu")), []

    def compute() -> torch.Tensor:
        calls.append(1)
        return torch.arange(6.0).view(2, 3)

    for _ in range(2):
        assert torch.equal(text_vectors(compute, ["model", ("a", "b")], alone), torch.arange(6.0).view(2, 3))
    assert len(calls) == 1
    text_vectors(compute, ["other model", ("a", "b")], alone)
    text_vectors(compute, None, alone)
    assert len(calls) == 3
    for file in (tmp_path / "vectors").iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(text_vectors(compute, ["model", ("a", "b")], alone), torch.arange(6.0).view(2, 3))
    assert len(calls) == 4
