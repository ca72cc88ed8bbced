"""What the tabs answer, without a page: right inputs beside the library's own answers, wrong ones in kind words."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import soundfile
import torch
from gradio import processing_utils
from gradio.data_classes import FileData, ImageData
from PIL import Image
from torch import Tensor
from ui import compare, create, describe, parts, search
from ui.classify import classify
from ui.offer import EXAMPLES, SHIPPED, Offer, abilities, can, make_offer, shares

import mm
from mm.errors import UserError
from mm.media.image import open_image
from mm.types import OnPicture

PICTURE_FIELD, SOUND_FIELD = gr.Image(), gr.Audio()


@pytest.fixture(scope="module")
def offer() -> Offer:
    return make_offer()


@pytest.fixture(scope="module")
def tiger(offer: Offer) -> Tensor:
    return open_image(offer.example("tiger face"))


@pytest.mark.parametrize("name", mm.shipped())
def test_what_is_told_of_shipped_models_is_so(offer: Offer, name: str) -> None:
    assert SHIPPED[name] == abilities(offer.model(name))


def test_models_and_folders_are_known_by_id_alone(offer: Offer, tmp_path: Path) -> None:
    assert set(EXAMPLES) <= {path.stem for path in offer.folder("emoji").iterdir()}
    for name in ("", None, 3, "../models/emoji-clip", str(tmp_path), "ViT-B-32/openai", ["emoji-clip"]):
        with pytest.raises(UserError, match="no such model here"):
            offer.model(name)
        with pytest.raises(UserError, match="no such folder here"):
            offer.folder(name)
    assert offer.models(can("paints")) == ["emoji-dalle", "emoji-flow", "emoji-muse"]
    assert offer.models(shares("image", "text")) == ["emoji-albef", "emoji-audio", "emoji-clip", "emoji-judge"]
    assert offer.models(shares("image", "smell")) == []


def test_further_models_and_folders_are_called_by_their_names(tmp_path: Path) -> None:
    for name in ("one/own", "two/own", "three/pictures"):
        (tmp_path / name).mkdir(parents=True)
    run = str(mm.save(mm.load("emoji-vq"), tmp_path / "one" / "tokens"))
    offer = make_offer([run, "emoji-clip"], [tmp_path / "three" / "pictures"])
    assert offer.models(can("tokenizes")) == ["emoji-vq", "tokens"]
    assert offer.folders == ["emoji", "pictures"]
    with pytest.raises(UserError, match="called 'own'"):
        make_offer([], [tmp_path / "one" / "own", tmp_path / "two" / "own"])


def test_classify_is_the_librarys(offer: Offer, tiger: Tensor) -> None:
    answer = classify(offer, "emoji-clip", tiger, " tiger face, pear,balloon ,, pear\nrocket")
    expected = mm.classify("emoji-clip", [tiger], ["tiger face", "pear", "balloon", "rocket"])[0]
    assert answer == dict(zip(expected.labels, expected.probabilities, strict=True))
    assert next(iter(answer)) == "tiger face"


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("", "write something"),
        (None, "write something"),
        ("one", "two different"),
        ("a,a", "two different"),
        (",,", "0 were given"),
        (",".join(map(str, range(51))), "51 were given"),
        ("a" * 400 + ",b", "400 letters"),
        ("a" * 10_000_000, "too many"),
    ],
)
def test_wrong_labels_are_told(offer: Offer, tiger: Tensor, labels: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        classify(offer, "emoji-clip", tiger, labels)


def test_a_missing_picture_or_model_is_told(offer: Offer, tiger: Tensor) -> None:
    with pytest.raises(UserError, match="give a picture"):
        classify(offer, "emoji-clip", None, "a,b")
    with pytest.raises(UserError, match="no shared embedding space"):
        classify(offer, "emoji-vq", tiger, "a,b")


def test_search_is_the_librarys_and_shows_copies(offer: Offer, tiger: Tensor) -> None:
    folder = offer.folder("emoji")
    for query, given in zip(search.QUERIES[:2], ("tiger face", tiger), strict=True):
        shown, said = search.search(offer, query, "emoji-clip", "emoji", 7, given)
        expected = mm.search("emoji-clip", folder, k=7, **{query.kind: given})
        assert [name for _, name in shown] == [f"{hit.path.stem}  {hit.score:.2f}" for hit in expected.hits]
        assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture, _ in shown), "no paths go out"
        assert f"7 of {expected.searched}" in said
    for count in (0, 49, float("nan"), None, "7", True):
        with pytest.raises(UserError, match="from 1 to 48"):
            search.search(offer, search.QUERIES[0], "emoji-clip", "emoji", count, "tiger")  # type: ignore[arg-type]


def test_captions_answers_and_heat(offer: Offer, tiger: Tensor) -> None:
    assert describe.describe(offer, "emoji-captioner", "en", tiger) == "tiger face"
    chinese = describe.describe(offer, "emoji-captioner", "zh", tiger)
    assert chinese == mm.caption("emoji-captioner", [tiger], language="zh")[0].text != "tiger face"
    assert describe.describe(offer, "emoji-captioner", "no such language", tiger) == "tiger face"
    answers = describe.ask(offer, "emoji-vqa", tiger, "what is in the picture?")
    assert next(iter(answers)) == "tiger face"
    assert len(answers) == describe.ANSWERS
    shown, said = describe.locate(offer, "emoji-albef", tiger, "tiger face")
    assert [name.split()[0] for _, name in shown] == ["tiger", "face"]
    assert np.ptp(np.asarray(shown[0][0]), axis=2).max() > 100, "heat is coloured, the picture beneath is grey"
    assert said.startswith("The text fits the picture with")
    assert "tells little" not in said
    assert "tells little" in describe.locate(offer, "emoji-albef", tiger, "pear")[1]
    with pytest.raises(UserError, match="up to 8"):
        describe.locate(offer, "emoji-albef", tiger, "a b c d e f g h i j")


def test_the_comparison_is_the_librarys(offer: Offer, tiger: Tensor) -> None:
    models = ("emoji-clip", "emoji-dalle", "emoji-albef")
    bars = compare.compare(offer, tiger, "tiger face", "pear, tiger face, balloon", *models)
    assert len(bars) == 6
    for name, shown, said in zip(models, bars[::2], bars[1::2], strict=True):
        found = mm.weigh(name, tiger, ["tiger face", "pear", "balloon"])
        assert shown == {fit.text: fit.probability for fit in found.fits}
        assert compare.MEASURES[found.measure].format(found.fits[0].score) in said
    assert compare.compare(offer, tiger, "tiger", "", "emoji-clip")[0] == {"tiger": 1.0}


def test_the_last_pictures_are_the_librarys(offer: Offer) -> None:
    *states, last = create.create(offer, ["emoji-flow", "emoji-muse"], "red heart", 3, 2.0, 2)
    assert states[0] == (None, None, None)
    assert last[0] is None, "a painter that was not chosen"
    for name, shown in zip(("emoji-flow", "emoji-muse"), last[1:], strict=True):
        sampling = mm.types.Sampling(guidance=2.0)  # type: ignore[attr-defined]
        made = mm.generate(name, ["red heart"], seed=3, sampling=sampling, best_of=2, ranker="emoji-clip")[0]
        assert shown is not None
        assert torch.equal(torch.from_numpy(np.array(shown)).permute(2, 0, 1), made.pixels)
    assert any(state[1] is not None and state[1].width == 2 * last[1].width for state in states), (
        "both candidates, in the making"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"painters": []}, "at least one"),
        ({"painters": ["emoji-flow", "emoji-clip"]}, "at least one"),
        ({"prompt": " "}, "write something"),
        ({"seed": -1}, "Seed"),
        ({"seed": 2**40}, "Seed"),
        ({"guidance": 1000}, "Guidance"),
        ({"best_of": 64}, "Best of"),
    ],
)
def test_wrong_wishes_are_told_before_anything_is_painted(offer: Offer, change: dict[str, Any], said: str) -> None:
    wishes = {"painters": ["emoji-flow"], "prompt": "pear", "seed": 0, "guidance": 3, "best_of": 1} | change
    with pytest.raises(UserError, match=said):
        next(create.create(offer, **wishes))


def test_a_painter_stops_when_nobody_looks() -> None:
    shown = threading.Event()
    ended: list[str] = []

    def paint(on_picture: OnPicture) -> Tensor:
        try:
            while True:
                on_picture(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 0.0)
                shown.set()
                time.sleep(0.01)
        except create.Stopped:
            ended.append("stopped")
            raise

    states = create.in_the_making(paint)
    assert next(states).size == (2, 2)
    states.close()  # type: ignore[attr-defined]
    assert ended == ["stopped"]


def test_an_error_of_a_painter_arrives() -> None:
    def paint(_: OnPicture) -> Tensor:
        raise UserError("no paint")

    with pytest.raises(UserError, match="no paint"):
        list(create.in_the_making(paint))


def _raising(error: Exception) -> Callable[[], Any]:
    def handler() -> Any:
        raise error

    return handler


def _raising_late(error: Exception) -> Callable[[], Iterator[int]]:
    def handler() -> Iterator[int]:
        yield 1
        raise error

    return handler


@pytest.mark.parametrize("make", [_raising, _raising_late])
def test_errors_are_kind_and_tell_no_paths(
    make: Callable[[Exception], Callable[[], Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    def said(error: Exception) -> str:
        handler = parts.kindly(partial(make(error)))
        with pytest.raises(gr.Error) as raised:
            list(handler() or ())
        assert not raised.value.print_exception
        return raised.value.message

    assert said(UserError("/home/ann/secret/run.1/cat.png: not a picture; see /etc/x/y")) == "cat.png: not a picture; see y"
    assert said(RuntimeError("/home/ann/secret")) == "This did not work, and it is our fault; the server's log says why."
    log = capfd.readouterr().err
    assert "RuntimeError: /home/ann/secret" in log
    assert "not a picture" not in log


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.jpg", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown format"),
        ("a.jpg", b"<!doctype html><script>alert(1)</script>", "unknown format"),
        ("a.png", b"", "empty"),
        ("a.svg", b"<svg/>", "unknown format"),
        ("a.webp", b"%!PS-Adobe-3.0 EPSF-3.0", "unknown format"),
    ],
)
def test_what_is_no_picture_is_refused_in_words(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(gr.Error, match=f"cannot be used: {said}"):
        parts._decoded(PICTURE_FIELD, ImageData(path=str(tmp_path / name), orig_name=name))


def test_a_picture_field_is_empty_or_holds_pixels(offer: Offer) -> None:
    path = offer.example("pear")
    assert parts._decoded(PICTURE_FIELD, None) is None
    assert parts._decoded(PICTURE_FIELD, ImageData(url="data:image/png;base64,AAAA")) is None
    decoded = parts._decoded(PICTURE_FIELD, ImageData(path=str(path)))
    assert decoded is not None
    assert torch.equal(decoded, open_image(path))


def test_a_spoken_word_is_searched_as_the_library_does(offer: Offer) -> None:
    folder, (query,) = offer.folder("emoji"), [one for one in search.QUERIES if one.kind == "audio"]
    assert offer.models(shares("image", "audio")) == ["emoji-audio"]
    heard = None
    for words in search.SAID:
        heard = parts._heard(SOUND_FIELD, FileData(path=str(search.SPOKEN / f"{words}.mp3")))
        shown, _ = search.search(offer, query, "emoji-audio", "emoji", 3, heard)
        expected = mm.search("emoji-audio", folder, audio=heard, k=3)
        assert [name for _, name in shown] == [f"{hit.path.stem}  {hit.score:.2f}" for hit in expected.hits]
        assert shown[0][1].startswith(words)
    with pytest.raises(UserError, match="please record a word"):
        search.search(offer, query, "emoji-audio", "emoji", 3, None)
    with pytest.raises(UserError, match="no recordings"):
        search.search(offer, query, "emoji-clip", "emoji", 3, heard)


def _wav(seconds: float, *, rate: int = 16_000, channels: int = 1, kind: str = "WAV") -> bytes:
    """A tone."""
    file = io.BytesIO()
    wave = 0.3 * np.sin(np.arange(round(seconds * rate)) * 0.1)
    soundfile.write(file, np.stack([wave] * channels, 1), rate, format=kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.wav", lambda: _wav(61), "too long"),
        ("a.flac", lambda: _wav(61, kind="FLAC"), "too long"),
        ("a.wav", lambda: _wav(1)[:-9_000], "truncated"),
        ("a.flac", lambda: _wav(1, kind="FLAC")[:200], "undecodable|truncated"),
        ("a.wav", lambda: b"<!doctype html><script>alert(1)</script>", "unknown format"),
        ("a.mp3", lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown format"),
        ("a.wav", lambda: b"\x1aE\xdf\xa3webm", "unknown format"),
        ("a.wav", lambda: b"", "empty"),
        ("a.wav", lambda: _wav(1, channels=17), "too many channels"),
    ],
)
def test_what_is_no_recording_is_refused_in_words(tmp_path: Path, name: str, data: Callable[[], bytes], said: str) -> None:
    (tmp_path / name).write_bytes(data())
    with pytest.raises(gr.Error, match=f"This recording cannot be used: ({said})") as told:
        parts._heard(SOUND_FIELD, FileData(path=str(tmp_path / name)))
    assert "at most 60 seconds" in told.value.message


def test_a_sound_field_is_empty_or_holds_what_is_heard(tmp_path: Path) -> None:
    assert parts._heard(SOUND_FIELD, None) is None
    silence = np.zeros(2 * 48_000)
    tone = 0.3 * np.sin(np.arange(48_000) * 0.05)
    soundfile.write(tmp_path / "a.wav", np.concatenate([silence, tone, silence]), 48_000)
    heard = parts._heard(SOUND_FIELD, FileData(path=str(tmp_path / "a.wav")))
    assert heard is not None
    assert heard[0] == 16_000
    assert 1.0 <= len(heard[1]) / 16_000 <= 1.3
    soundfile.write(tmp_path / "silence.wav", silence, 48_000)
    with pytest.raises(UserError, match="nothing is to be heard"):
        parts.sound_of(parts._heard(SOUND_FIELD, FileData(path=str(tmp_path / "silence.wav"))))


def test_equal_pictures_do_not_disturb_each_other_on_their_way(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    path = Path(processing_utils.save_pil_to_cache(picture, str(tmp_path), format="png"))
    with path.open("rb") as on_its_way:
        assert processing_utils.save_pil_to_cache(picture, str(tmp_path), format="png") == str(path)
        assert os.fstat(on_its_way.fileno()).st_ino != path.stat().st_ino, "another file took its place"
        assert on_its_way.read() == path.read_bytes()
    assert processing_utils.save_pil_to_cache(picture, str(tmp_path), name="b", format="webp").endswith("/b.webp")
    assert len([file for file in tmp_path.rglob("*") if file.is_file()]) == 2, "nothing else is left"
