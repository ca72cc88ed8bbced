"""The demos do what the README says: scripts run as shown, pages answer and serve nothing else, errors are one line."""

import importlib.util
import io
import json
import re
import runpy
import shlex
import struct
import subprocess
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

import mm
from mm.data.emoji import open_emoji
from mm.media.image import open_image

ROOT = Path(__file__).parents[2]
DEMOS = ROOT / "demos"
SCRIPTS = ("zero_shot_imagefolder", "retrieval_eval", "train_your_own")
PAGES = {"zero_shot": "classify", "captioning": "caption", "text_to_image": "paint"}
MOST_LINES = 60
CONCEPTS = ("1f436", "1f431", "1f355", "1f697", "2764", "1f34e", "1f40d", "1f451", "1f480", "26bd", "1f33b", "1f3b8")

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition(" #")[0].strip() for line in README.splitlines() if line.startswith("python demos/")]


def command_of(name: str) -> list[str]:
    """The first command of the README with a demo, for this interpreter."""
    _, _, *arguments = shlex.split(next(one for one in COMMANDS if one.startswith(f"python demos/{name}.py")))
    return [sys.executable, str(DEMOS / f"{name}.py"), *arguments]


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMOS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Pictures of twelve concepts by the validation artist and by one of training, by name and artist."""
    found = {}
    for spec in ("emoji:validation/core", "emoji:train/core/noto"):
        source = open_emoji(spec)
        for row in range(len(source)):
            fields = source.fields(row)
            if fields["key"] in CONCEPTS:
                found[f"{fields['name'].replace(' ', '_')}/{fields['artist']}"] = source.read(row).media["image"]
    return found


@pytest.fixture
def folder(tmp_path: Path, pictures: dict[str, bytes]) -> Path:
    """An ImageFolder."""
    for name, data in pictures.items():
        file = tmp_path / "photos" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return tmp_path / "photos"


# What the README shows.


def test_the_readme_shows_every_demo_and_no_other() -> None:
    shown = {match for line in COMMANDS for match in re.findall(r"demos/(\w+)\.py", line)}
    assert shown >= {*SCRIPTS, *PAGES}
    assert all((DEMOS / f"{name}.py").is_file() for name in shown)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_short_enough_to_copy(name: str) -> None:
    assert len((DEMOS / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= MOST_LINES


@pytest.mark.parametrize(
    ("name", "more", "made", "said"),
    [
        ("zero_shot_imagefolder", (), ("confusion.png",), ("top1", "smileys-emotion")),
        ("retrieval_eval", (), tuple(f"{a}-{b}.png" for a in ("best", "worst") for b in ("texts", "pictures")), ("_r10",)),
        ("train_your_own", ("--steps", "2"), ("run", "held-back.csv"), ("text_to_image_r1", "among all pictures")),
    ],
)
def test_a_script_runs_on_the_embedded_data(
    name: str, more: tuple[str, ...], made: tuple[str, ...], said: tuple[str, ...], tmp_path: Path
) -> None:
    done = subprocess.run([*command_of(name), *more], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in tmp_path.rglob("*")}
    assert set(made) <= files
    assert all(words in done.stdout for words in said)


# What is wrong ends in one line.


def ends(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that a demo ends with; anything but a clean end fails."""
    monkeypatch.setattr(sys, "argv", [str(DEMOS / f"{name}.py"), *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(DEMOS / f"{name}.py"), run_name="__main__")
    line = str(left.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("zero_shot_imagefolder", ("nowhere",), "nowhere: not found"),
        ("zero_shot_imagefolder", ("flat",), "no class labels"),
        ("zero_shot_imagefolder", ("emoji:test/core/novel", "--by", "colour"), "there are .*group"),
        ("zero_shot_imagefolder", ("--out", "table.txt"), "ends in .png"),
        ("zero_shot_imagefolder", ("flat", "--labels", "dog"), "at least two"),
        ("retrieval_eval", ("nowhere.csv",), "nowhere.csv: not found"),
        ("retrieval_eval", ("flat",), "no sample has a caption"),
        ("retrieval_eval", ("--queries", "0"), "1 or more"),
        ("retrieval_eval", ("--model", "emoji-vq"), "shared embedding space"),
        ("retrieval_eval", ("--model", "emoji-albef"), "by more than vectors"),
        ("train_your_own", ("nowhere",), "no such folder"),
        ("train_your_own", ("flat",), "0 different captions"),
        ("zero_shot", ("nowhere",), "nowhere"),
        ("captioning", ("nowhere",), "nowhere"),
        ("text_to_image", ("nowhere",), "nowhere"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_bad_input_is_answered_by_one_line(
    name: str, arguments: tuple[str, ...], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "one.png").write_bytes(next(folder.rglob("*.png")).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert re.search(words, ends(name, *arguments, monkeypatch=monkeypatch))


def test_the_line_goes_to_standard_error_with_a_status(tmp_path: Path) -> None:
    command = [sys.executable, str(DEMOS / "train_your_own.py"), "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


# The scripts' own figures.


def test_classes_are_counted_as_the_evaluation_counts_them(folder: Path) -> None:
    seen: list[Any] = []
    result = mm.evaluate("zero-shot", "emoji-clip", str(folder), on_classified=seen.extend)
    counts, taken = module("zero_shot_imagefolder").tables(seen, None)
    assert "cat face" in counts
    assert sum(count["pictures"] for count in counts.values()) == len(list(folder.rglob("*.png"))) == sum(taken.values())
    right = sum(count["top1"] for count in counts.values())
    assert right == sum(taken[name, name] for name in counts)
    assert right / len(seen) == pytest.approx(result.metrics["top1"].value)
    assert sum(count["top5"] for count in counts.values()) / len(seen) == pytest.approx(result.metrics["top5"].value)


def test_the_confusion_picture_is_darkest_where_most_pictures_are() -> None:
    demo = module("zero_shot_imagefolder")
    sheet = demo.confusion(["cat", "dog"], {("cat", "cat"): 9, ("cat", "dog"): 1, ("dog", "dog"): 10, ("dog", "cat"): 0})

    def corner(row: int, column: int) -> int:
        return sum(sheet.getpixel((demo.MARGIN + column * demo.CELL + 1, demo.MARGIN + row * demo.CELL + 1)))

    assert corner(1, 1) < corner(0, 0) < corner(0, 1) < corner(1, 0) == 3 * 255


def test_pictures_of_any_folder_are_told_a_label(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", str(folder / "pizza"), "--labels", "pizza, automobile"])
    runpy.run_path(str(DEMOS / "zero_shot_imagefolder.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list((folder / "pizza").iterdir()))
    assert all(" pizza " in line for line in lines)


def test_ranks_of_queries_are_those_of_the_evaluation() -> None:
    encoded: list[Any] = []
    result = mm.evaluate("retrieval", "emoji-clip", "emoji:test/core/novel/compositional", on_encoded=encoded.append)
    (pairs,) = encoded
    demo, owners = module("retrieval_eval"), torch.arange(len(pairs.images))
    for name, found in (
        ("text_to_image", demo.answer(pairs.texts, pairs.images, pairs.image_of, owners)),
        ("image_to_text", demo.answer(pairs.images, pairs.texts, owners, pairs.image_of)),
    ):
        for k in (1, 5):
            assert (found.rank < k).float().mean().item() == pytest.approx(result.metrics[f"{name}_r{k}"].value)
        best, worst = found.extremes(3)
        assert found.rank[best].max() <= found.rank.median() <= found.rank[worst].min()
        assert ((found.lead > 0) == (found.rank == 0)).all()


def test_any_caption_of_a_picture_is_right_and_captions_of_others_are_not() -> None:
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2, 1]]
    image_of = torch.tensor([0, 0, 1, 2])
    found = module("retrieval_eval").answer(images, texts, torch.arange(3), image_of)
    assert found.rank.tolist() == [0, 3, 3]  # of equals, what is wrong stands first


def test_what_is_held_back_is_not_trained_on(folder: Path) -> None:
    demo = module("train_your_own")
    pairs = demo.read_pairs(folder)
    training, held = demo.hold_back(pairs)
    assert sorted(training + held) == sorted(pairs)
    captions = [texts[0] for _, texts in held]
    assert len(captions) == len(set(captions)) >= demo.FEWEST // 2
    assert "cat face" in {texts[0] for _, texts in pairs}


# The pages.


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PAGES)
def test_a_page_answers_its_function_called_directly(name: str, pictures: dict[str, bytes]) -> None:
    page = module(name)
    if name == "text_to_image":
        model, ranker = mm.load("emoji-flow"), mm.load("emoji-clip")
        first, second = page.paint(model, ranker, "red heart", 2, 3)
        assert first.shape == (64, 64, 3)
        assert (page.paint(model, ranker, "red heart", 1, 3)[0] == first).all()
        assert (first != second).any()
        for prompt in (" ", "x" * 501):
            with pytest.raises(page.gr.Error) as told:
                page.paint(model, ranker, prompt, 1, 0)
            assert "\n" not in told.value.message
        return
    picture = open_image(pictures["pizza/noto"])
    if name == "zero_shot":
        model = mm.load("emoji-clip")
        found = page.classify(model, picture, "pizza, dog face,, pizza")
        assert set(found) == {"pizza", "dog face"}
        assert found["pizza"] > 0.9
        wrong = [(picture, "pizza"), (picture, "a," * 4000), (None, "a, b")]
        ask: Callable[..., Any] = page.classify
    else:
        model = mm.load("emoji-captioner")
        assert page.caption(model, picture, None) == "pizza"
        wrong, ask = [(picture, "Klingon"), (None, None)], page.caption
    for given in wrong:
        with pytest.raises(mm.UserError) as said:
            ask(model, *given)
        assert "\n" not in str(said.value)


@pytest.fixture(scope="module", params=PAGES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """A demo's name, the address of its page, started as the README shows, and the folder it was started in."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "canary.txt").write_text("not for anyone")
    command = [*command_of(request.param)]
    process = subprocess.Popen(
        [command[0], "-u", *command[1:]], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if address := re.search(r"http://127\.0\.0\.1:\d+", line):
            yield request.param, address.group(), folder
            break
    else:
        pytest.fail("".join(lines))
    process.terminate()
    process.communicate(timeout=30)


def ask(url: str, name: str, *arguments: Any) -> Any:
    """What a page answers to `gradio_client`, or the error it names."""
    command = [sys.executable, str(Path(__file__).with_name("ask_page.py")), url, f"/{name}", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def post(url: str, data: Any) -> str:
    """The events that follow a request to the API as anyone may write it."""
    address, name = url.rsplit("/", 1)
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(f"{address}/gradio_api/call/{name}", body, {"content-type": "application/json"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            event = json.load(answer)["event_id"]
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()
    return get(f"{address}/gradio_api/call/{name}/{event}")[1]


def png_of(side: int) -> bytes:
    """A picture whose header promises more than it holds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_page_answers_and_refuses(served: tuple[str, str, Path], pictures: dict[str, bytes], tmp_path: Path) -> None:
    name, url, folder = served
    api = PAGES[name]
    status, html = get(url)
    assert status == 200
    assert "fonts.googleapis.com" not in html
    assert '"max_file_size": 10485760' in html or '"max_file_size":10485760' in html
    for secret in (folder / "canary.txt", DEMOS / f"{name}.py", Path("/etc/hostname")):
        status, text = get(f"{url}/gradio_api/file={secret}")
        assert status in (403, 404)
        assert "not for anyone" not in text
    if name == "text_to_image":
        assert len(ask(url, api, "red heart", 1, 0)) == 1
        assert "write what to paint" in ask(url, api, "", 1, 0)
        assert "greater than maximum" in ask(url, api, "red heart", 1000, 0)
        return
    second: Any = "pizza, dog face" if name == "zero_shot" else None
    good, bomb, page = (tmp_path / file for file in ("good.png", "bomb.png", "page.jpg"))
    good.write_bytes(pictures["pizza/noto"])
    bomb.write_bytes(png_of(50_000))
    page.write_text("<html><script>alert(1)</script></html>")
    answer = ask(url, api, {"file": str(good)}, second)
    assert (answer["label"] if name == "zero_shot" else answer) == "pizza"
    assert "too many pixels" in ask(url, api, {"file": str(bomb)}, second)
    assert "unknown format" in ask(url, api, {"file": str(page)}, second)
    meta = {"_type": "gradio.FileData"}
    local = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(local)
    assert "please give a picture" in post(f"{url}/{api}", [None, second])
    assert "not uploaded here" in post(f"{url}/{api}", [{"path": str(local)}, second])
    assert "not uploaded here" in post(f"{url}/{api}", [{"path": str(local), "meta": meta}, second])
    assert "addresses are not fetched" in post(f"{url}/{api}", [{"path": "http://127.0.0.1:9/x.png", "meta": meta}, second])
    assert upload_refused(url, b"0" * (11 << 20))
    assert (ask(url, api, {"file": str(good)}, second)["label"] if name == "zero_shot" else "pizza") == "pizza"


def upload_refused(url: str, data: bytes) -> bool:
    body = io.BytesIO()
    body.write(b'--part\r\nContent-Disposition: form-data; name="files"; filename="x.png"\r\n\r\n' + data + b"\r\n--part--\r\n")
    headers = {"content-type": "multipart/form-data; boundary=part"}
    request = urllib.request.Request(f"{url}/gradio_api/upload", body.getvalue(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=60):  # noqa: S310
            return False
    except urllib.error.HTTPError as error:
        with error:
            return error.code == 413
    except urllib.error.URLError as error:  # the page hung up while it was still being sent to
        return isinstance(error.reason, BrokenPipeError | ConnectionResetError)
