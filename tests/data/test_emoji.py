"""The embedded data: selections as agreed, drawn once, whatever is killed or started twice.

A small archive with a few concepts of each kind stands in for the art.
"""

import io
import json
import pickle
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from mm.data import emoji, raster
from mm.data.emoji import ARTISTS, TRAIN_ARTISTS, build, concepts, open_emoji
from mm.data.shards import ShardSource
from mm.errors import UserError
from mm.media.image import decode_image

ASSETS = Path(emoji.__file__).parents[1] / "assets" / "emoji"
ARCHIVES = ("emoji-svg.tar.xz", "emoji-svg-openmoji-by-sa.tar.xz")


@pytest.fixture(scope="module")
def small_assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few concepts of each split, by all artists, and the four pictures that are not square."""
    folder = tmp_path_factory.mktemp("assets")
    known = concepts()
    chosen = set()
    for split in emoji.CONCEPT_SPLITS:
        chosen |= set([key for key, concept in known.items() if concept["split"] == split][:3])
    chosen |= {"1f349", "0035-20e3", "1f9a2", "1f44e"} | {next(k for k, concept in known.items() if not concept["core"])}
    for name in ARCHIVES:
        with tarfile.open(ASSETS / name) as whole, tarfile.open(folder / name, "w:xz") as part:
            for member in whole:
                if member.name.partition("/")[2].partition("~")[0] in chosen:
                    part.addfile(member, whole.extractfile(member))
    (folder / "concepts.jsonl").write_bytes((ASSETS / "concepts.jsonl").read_bytes())
    return folder


def with_cache(assets: Path, cache: Path) -> Iterator[Path]:
    emoji._digest.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "_ASSETS", assets)
        patch.setenv("MM_CACHE", str(cache))
        yield cache
    emoji._digest.cache_clear()


@pytest.fixture(scope="module")
def drawn_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


@pytest.fixture
def drawn(small_assets: Path, drawn_cache: Path) -> Iterator[Path]:
    """The small archive, drawn once for all tests that only read it."""
    yield from with_cache(small_assets, drawn_cache)


@pytest.fixture
def small(small_assets: Path, tmp_path: Path) -> Iterator[Path]:
    """The small archive, and a cache where nothing is drawn yet."""
    yield from with_cache(small_assets, tmp_path / "cache")


def program(assets: Path, statement: str) -> list[str]:
    """A process of its own that builds from the small archive, and is a plain script without a main guard."""
    lines = ["from pathlib import Path", "from mm.data import emoji", f"emoji._ASSETS = Path({str(assets)!r})", statement]
    return [sys.executable, "-c", "\n".join(lines)]


def test_the_whole_archive_agrees_with_the_concepts() -> None:
    names = [name for archive in ARCHIVES for name in raster.svg_names(ASSETS / archive)]
    assert Counter(name.partition("/")[0] for name in names) == {
        "noto": 1644,
        "twemoji": 1636,
        "fluent-flat": 1558,
        "openmoji": 1644,
        "fxemoji": 819,
        "emojione": 1105,
    }
    known = concepts()
    assert len(known) == 1644
    assert Counter(concept["split"] for concept in known.values()) == {"seen": 1435, "compositional": 120, "novel": 89}
    assert sum(concept["core"] for concept in known.values()) == 1451
    assert {name.partition("/")[2].partition("~")[0] for name in names} <= set(known)


def test_selections(drawn: Path) -> None:
    def ids(spec: str) -> set[str]:
        source = open_emoji(spec, 32)
        return {source.key(i) for i in range(len(source))}

    def fields(spec: str, name: str) -> set[str]:
        source = open_emoji(spec, 32)
        return {source.fields(i)[name] for i in range(len(source))}

    assert fields("emoji:train", "artist") == set(TRAIN_ARTISTS)
    assert fields("emoji:train", "split") == {"seen"}
    assert fields("emoji:train/all-concepts", "split") == {"seen", "compositional", "novel"}
    assert fields("emoji:validation", "artist") == {"fxemoji"}
    assert fields("emoji:test", "artist") == {"emojione"}
    assert fields("emoji:test", "split") == {"seen", "compositional", "novel"}
    assert fields("emoji:all", "artist") == set(ARTISTS)
    assert fields("emoji:train/core", "core") == {True} != fields("emoji:train", "core")
    assert fields("emoji:test/novel/compositional", "split") == {"novel", "compositional"}
    assert fields("emoji:all/noto/emojione", "artist") == {"noto", "emojione"}
    assert ids("emoji:train/all-concepts") | ids("emoji:validation") | ids("emoji:test") == ids("emoji:all")
    assert not ids("emoji:train/all-concepts") & (ids("emoji:validation") | ids("emoji:test"))


def test_samples(drawn: Path) -> None:
    source = open_emoji("emoji:all", 40)
    position = next(i for i in range(len(source)) if source.key(i) == "noto/1f349~0")
    sample = source.read(position)
    assert sample.texts == ("watermelon",)
    assert sample.fields == source.fields(position)
    assert (sample.fields["artist"], sample.fields["variant"], sample.fields["emoji"]) == ("noto", 0, "🍉")
    assert sample.fields["names"]["de"] == "Wassermelone"
    for i in range(len(source)):
        image = decode_image(source.read(i).media["image"])
        assert image.shape in {(4, 40, 40), (3, 40, 40)}, source.key(i)
    json.dumps([dict(source.fields(i)) for i in range(len(source))])


def test_the_shards_explain_themselves_to_other_readers(drawn: Path) -> None:
    source = open_emoji("emoji:test", 32)
    plain = ShardSource(build(32) / "emojione")
    assert [plain.read(i) for i in range(len(plain))] == [source.read(i) for i in range(len(source))]


def test_a_picture_that_is_not_square_is_centred_undistorted(drawn: Path) -> None:
    source = open_emoji("emoji:train/twemoji", 40)
    data = next(source.read(i).media["image"] for i in range(len(source)) if source.key(i) == "twemoji/1f349~0")
    rows = (decode_image(data)[3] > 0).any(1).nonzero().flatten()
    above, below = int(rows[0]), 39 - int(rows[-1])
    assert abs(above - below) <= 1
    assert abs((40 - above - below) - 40 * 25.22 / 36) <= 2


@pytest.mark.parametrize("size", [32, 224])
def test_sizes(small: Path, size: int) -> None:
    source = open_emoji("emoji:test", size)
    assert decode_image(source.read(0).media["image"]).shape[1:] == (size, size)


def test_fingerprints_name_the_selection_and_the_size(drawn: Path) -> None:
    fingerprints = {open_emoji(spec, size).fingerprint for spec in ("emoji:test", "emoji:train") for size in (32, 40)}
    assert len(fingerprints) == 4
    source = open_emoji("emoji:test", 32)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own object
    assert again.fingerprint == source.fingerprint == open_emoji("emoji:test", 32).fingerprint
    assert again.read(0) == source.read(0)


def test_a_second_build_draws_nothing_and_progress_is_told(small: Path) -> None:
    told: list[tuple[int, int | None]] = []
    root = build(32, progress=lambda done, total: told.append((done, total)))
    total = sum(len(ShardSource(root / artist)) for artist in ARTISTS)
    assert told == [(done, total) for done in range(1, total + 1)]
    build(32, progress=lambda *_: pytest.fail("drawn again"))
    assert sorted(path.name for path in root.iterdir()) == sorted(ARTISTS)


def test_two_processes_at_once(small: Path, small_assets: Path) -> None:
    statement = "print(emoji.build(32)); print(emoji.open_emoji('emoji:all', 32).fingerprint)"
    running = [subprocess.Popen(program(small_assets, statement), stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert said[0] == said[1]
    assert [path.name for path in small.iterdir() if not path.name.startswith(".")] == [build(32).name]


def test_killed_midway_and_started_again(small: Path, small_assets: Path) -> None:
    statement = (
        "import time; emoji.build(32, progress=lambda done, total: done > 9 and (print('half', flush=True), time.sleep(300)))"
    )
    process = subprocess.Popen(program(small_assets, statement), stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not [path for path in small.iterdir() if not path.name.startswith(".")]
    root = build(32)
    assert len(open_emoji("emoji:all", 32)) == sum(len(ShardSource(root / artist)) for artist in ARTISTS) > 30
    assert not list(small.glob("*part*"))
    assert not list(small.glob(".*part*"))


def test_killed_while_writing_leaves_nothing_that_is_taken_for_whole(small: Path, small_assets: Path) -> None:
    """The folder of a killed builder is cleared away by the next one, even with shards already in it."""
    target = build(32)
    leftover = target.with_name(f".{target.name}.part-1")
    target.rename(leftover)
    (leftover / "noto" / "000000.tar").write_bytes(b"half")
    assert len(open_emoji("emoji:train/noto", 32)) > 3
    assert not leftover.exists()


def test_a_damaged_cache_is_drawn_again(small: Path) -> None:
    before = open_emoji("emoji:test", 32)
    shard = build(32) / "emojione" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:1000])
    after = open_emoji("emoji:test", 32)
    assert [after.read(i) for i in range(len(after))] == [before.read(i) for i in range(len(before))]


def test_drawing_does_not_depend_on_the_number_of_processes(small_assets: Path) -> None:
    one, three = (list(raster.rasterize(small_assets / ARCHIVES[0], 32, processes)) for processes in (1, 3))
    assert one == three
    assert len(one) == len(raster.svg_names(small_assets / ARCHIVES[0]))


def test_a_failing_helper_is_reported(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as archive:
        info = tarfile.TarInfo("noto/1f600~0.svg")
        info.size = 7
        archive.addfile(info, io.BytesIO(b"not svg"))
    with pytest.raises(RuntimeError, match="drawing the pictures failed"):
        list(raster.rasterize(tmp_path / "bad.tar.xz", 32, 1))


@pytest.mark.parametrize(
    ("spec", "size", "message"),
    [
        ("emoji:trian", 64, "emoji:train, emoji:validation"),
        ("emoji:test/cores", 64, "unknown modifier 'cores'"),
        ("emoji:test/noto", 64, "noto is not among the artists of 'test'"),
        ("emoji:test", 31, "32 to 224"),
        ("emoji:test", 225, "32 to 224"),
    ],
)
def test_wrong_selections_are_named(drawn: Path, spec: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_emoji(spec, size)


def test_a_cache_that_cannot_be_written_is_named(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="set MM_CACHE"):
        build(32, cache=tmp_path / "file")
