"""Shards: what is written is read back, indexes are never trusted when stale, damage is named and never hidden."""

import io
import json
import os
import pickle
import signal
import tarfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mm.data import index as index_module
from mm.data.check import check
from mm.data.index import index_shard, sidecar_path
from mm.data.shards import ShardSource
from mm.data.sources import open_source
from mm.data.write import pack, write_shards
from mm.errors import BadSample, DataError
from mm.types import Sample


def png(colour: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def samples(count: int = 10) -> list[Sample]:
    return [
        Sample(
            id=f"folder/{i:03d}",
            media={"image": png(size=(8 + i, 6))},
            texts=tuple(f"caption {j} – 絵 of {i}" for j in range(i % 3)),
            fields={"n": i, "nested": {"tags": ["a", None, 1.5]}} if i % 2 else {},
        )
        for i in range(count)
    ]


def tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def read_all(source: ShardSource) -> list[Sample]:
    return [source.read(i) for i in range(len(source))]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written = samples()
    shards = write_shards(written, tmp_path, samples_per_shard=4)
    assert [path.name for path in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    source = ShardSource(tmp_path)
    assert read_all(source) == written
    assert [source.key(i) for i in range(10)] == [sample.id for sample in written]
    assert [source.fields(i) for i in range(10)] == [sample.fields for sample in written]
    assert source.read_media(3, "image") == written[3].media["image"]
    assert source.read_media(3, "audio") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
CLEAN_TEXT = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
KEYS = st.text("abcXYZ0123_-é絵", min_size=1, max_size=12)
SAMPLES = st.lists(
    st.builds(
        Sample,
        id=st.lists(KEYS, min_size=1, max_size=3).map("/".join),
        media=st.fixed_dictionaries({}, optional={"image": st.just(png()), "audio": st.just(b"fLaC\0sound")}),
        texts=st.lists(CLEAN_TEXT, max_size=3).map(tuple),
        fields=st.dictionaries(st.text().filter(lambda k: k not in {"texts", "text", "caption", "captions"}), JSON, max_size=3),
    ),
    max_size=5,
    unique_by=lambda sample: sample.id,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(written=SAMPLES)
def test_any_sample_survives_the_round_trip(written: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(written, folder)
    found = read_all(ShardSource(folder)) if written else []
    assert found == written


def test_equal_samples_give_equal_files(tmp_path: Path) -> None:
    first = write_shards(samples(), tmp_path / "a")
    second = write_shards(samples(), tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert ShardSource(tmp_path / "a").fingerprint == ShardSource(tmp_path / "b").fingerprint
    write_shards(samples(9), tmp_path / "c")
    assert ShardSource(tmp_path / "c").fingerprint != ShardSource(tmp_path / "a").fingerprint


def test_a_failed_write_leaves_no_half_shard(tmp_path: Path) -> None:
    def failing():
        yield from samples(5)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_shards(failing(), tmp_path, samples_per_shard=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.tar", "000000.tar.idx.json"]


def test_writing_refuses_what_it_could_not_read_back(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'texts'"):
        write_shards([Sample("a", {}, fields={"texts": 1})], tmp_path / "a")
    with pytest.raises(DataError, match="JSON"):
        write_shards([Sample("a", {}, fields={"x": float("nan")})], tmp_path / "b")
    with pytest.raises(DataError, match="not 'video'"):
        write_shards([Sample("a", {"video": b"x"})], tmp_path / "c")
    with pytest.raises(DataError, match="file name"):
        write_shards([Sample("a/", {})], tmp_path / "d")
    write_shards(samples(1), tmp_path / "e")
    with pytest.raises(DataError, match="holds tar files already"):
        write_shards(samples(1), tmp_path / "e")


def test_shards_of_img2dataset(tmp_path: Path) -> None:
    """Captions in .txt and in .json, null captions, an unknown member, a class file."""
    files = [
        ("000000001.jpg", png()),
        ("000000001.json", json.dumps({"caption": "from json", "url": "x", "width": 8}).encode()),
        ("000000001.txt", b"from txt\n"),
        ("000000002.jpg", png()),
        ("000000002.json", json.dumps({"caption": "from json"}).encode()),
        ("000000003.jpg", png()),
        ("000000003.json", json.dumps({"caption": None}).encode()),
        ("000000003.npy", b"ignored"),
        ("000000004.png", png()),
        ("000000004.cls", b"17\n"),
        ("000000005.PNG", png()),
        ("000000005.cls", b"cat"),
        ("._000000005.png", b"resource fork"),
    ]
    source = ShardSource(tar(tmp_path / "00000.tar", files))
    found = read_all(source)
    assert [sample.texts for sample in found] == [("from txt",), ("from json",), (), (), ()]
    assert found[0].fields["width"] == 8
    assert (found[3].fields, found[4].fields) == ({"cls": 17}, {"cls": "cat"})
    assert all(sample.media["image"] == png() for sample in found)
    assert source.shards[0].ignored == 2


def test_patterns(tmp_path: Path) -> None:
    for i in range(12):
        tar(tmp_path / f"a-{i:03d}.tar", [(f"{i:03d}.txt", b"x")])
    everything = [f"{i:03d}" for i in range(12)]

    def keys(pattern: object) -> list[str]:
        source = ShardSource(pattern)  # type: ignore[arg-type]
        return [source.key(i) for i in range(len(source))]

    assert keys(tmp_path) == keys(str(tmp_path / "a-{000..011}.tar")) == keys(tmp_path / "*.tar") == everything
    assert keys(str(tmp_path / "a-00{8..9}.tar")) == everything[8:10]
    assert keys([tmp_path / "a-003.tar", tmp_path / "a-001.tar"]) == ["003", "001"]
    with pytest.raises(DataError, match="no such shard"):
        ShardSource(str(tmp_path / "a-{010..014}.tar"))
    with pytest.raises(DataError, match="no tar shards there"):
        ShardSource(tmp_path / "b-*.tar")
    with pytest.raises(DataError, match="empty or too long"):
        ShardSource(str(tmp_path / "a-{9..1}.tar"))


@pytest.mark.fault(6)
def test_repeated_keys_get_new_ids(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", [("a.txt", b"1"), ("b.txt", b"2"), ("a.txt", b"3"), ("a#2.txt", b"4")])
    tar(tmp_path / "1.tar", [("a.txt", b"5"), ("a.txt", b"6")])
    source = ShardSource(tmp_path)
    ids = [source.key(i) for i in range(len(source))]
    assert ids == ["a", "b", "a#3", "a#2", "a#4", "a#5"]
    assert [source.read(i).id for i in range(6)] == ids
    assert source.duplicates == 3


def test_a_stale_sidecar_is_rebuilt(tmp_path: Path) -> None:
    shard = tar(tmp_path / "0.tar", [("a.txt", b"old")])
    assert ShardSource(shard).read(0).texts == ("old",)
    tar(shard, [("a.txt", b"new")])
    os.utime(shard, ns=(1, 1))
    assert ShardSource(shard).read(0).texts == ("new",)


@pytest.mark.parametrize("change", ["garbage", "columns", "header", "cut", "empty"])
def test_a_damaged_sidecar_is_rebuilt(tmp_path: Path, change: str) -> None:
    shard = tar(tmp_path / "0.tar", [("a.txt", b"text"), ("b.txt", b"more")])
    before = index_shard(shard)
    sidecar = sidecar_path(shard)
    content = sidecar.read_bytes()
    sidecar.write_bytes(
        {
            "garbage": b"\xff\xfe not json",
            "columns": content.replace(b'"b"', b'"z"'),
            "header": content.replace(b'"version": 1', b'"version": 9'),
            "cut": content[:-9],
            "empty": b"",
        }[change]
    )
    assert tuple(index_shard(shard).keys) == tuple(before.keys) == ("a", "b")
    assert sidecar.read_bytes() == content


def test_a_forged_sidecar_cannot_point_outside_the_shard(tmp_path: Path) -> None:
    shard = tar(tmp_path / "0.tar", [("a.txt", b"text")])
    index_shard(shard)
    header, line = sidecar_path(shard).read_bytes().split(b"\n")
    body = json.loads(line)
    body["columns"]["txt"][0] = [10**9]
    forged = json.dumps(body, separators=(",", ":")).encode()
    head = json.loads(header)
    head["sha256"] = index_module.hashlib.sha256(forged).hexdigest()
    sidecar_path(shard).write_bytes(json.dumps(head).encode() + b"\n" + forged)
    assert ShardSource(shard).read(0).texts == ("text",)


def test_the_sidecar_saves_reading_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shards(samples(3), tmp_path)[0]

    def refuse(*_: object) -> None:
        raise AssertionError("the shard was scanned again")

    monkeypatch.setattr(index_module, "_scan", refuse)
    assert len(index_shard(shard)) == 3


def test_a_read_only_folder_works_without_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = tar(tmp_path / "0.tar", [("a.txt", b"text")])

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(index_module.tempfile, "NamedTemporaryFile", refuse)
    assert ShardSource(shard).read(0).texts == ("text",)
    assert not sidecar_path(shard).exists()


def test_pickles_threads_and_many_open_files(tmp_path: Path) -> None:
    for i in range(80):
        tar(tmp_path / f"{i:02d}.tar", [(f"{i:02d}.txt", f"text {i}".encode())])
    source = ShardSource(tmp_path)
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own object
    assert copy.fingerprint == source.fingerprint
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(80) if copy.read(i).texts != (f"text {i}",))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(os.listdir("/proc/self/fd")) < 300 if os.path.isdir("/proc/self/fd") else True


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of what is tested here
def test_a_fork_does_not_inherit_a_held_lock(tmp_path: Path) -> None:
    source = ShardSource(write_shards(samples(2), tmp_path))
    expected = source.read(1)
    with source._files._lock:  # as another thread would hold it at the moment of the fork
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if source.read(1) == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_negative_positions_are_refused(tmp_path: Path) -> None:
    source = ShardSource(write_shards(samples(2), tmp_path))
    for index in (-1, 2):
        with pytest.raises(IndexError):
            source.read(index)


def test_check_counts_everything(tmp_path: Path) -> None:
    files = [
        ("a.png", png()),
        ("a.txt", b"a caption"),
        ("b.png", png()),  # the same picture, no caption
        ("c.png", png(size=(300, 400))[:-60]),
        ("c.txt", b"cut"),
        ("d.png", b"<html>"),
        ("e.json", b"{broken"),
        ("f.txt", b"no picture"),
        ("a.png", png(size=(100, 90))),
        ("g.exe", b"MZ"),
    ]
    seen: list[tuple[int, int | None]] = []
    report = check(ShardSource(tar(tmp_path / "0.tar", files)), progress=lambda done, total: seen.append((done, total)))
    assert report.samples == 7 == report.good + sum(report.bad.values())
    assert report.bad == {"truncated": 1, "unknown format": 1, "bad json": 1}
    assert "byte" in report.examples["bad json"][0]
    assert (report.without_text, report.without_media) == (2, 1)
    assert (report.repeated_ids, report.repeated_pictures) == (1, 1)
    assert report.shorter_side == {"<=32": 2, "<=128": 1}
    assert report.largest == (90, 100)
    assert report.shards["ignored_members"] == 1
    assert seen == [(i, 7) for i in range(1, 8)]
    assert not report.ok
    assert json.loads(json.dumps(report.to_json()))["bad"]["truncated"] == 1


def test_pack_leaves_out_and_counts_what_cannot_be_read(tmp_path: Path) -> None:
    files = [("a.png", png()), ("a.txt", b"one"), ("b.json", b"{broken"), ("c.d/e.png", png()), ("c.d/e.txt", b"two")]
    source = ShardSource(tar(tmp_path / "0.tar", files))
    packed = pack(source, tmp_path / "packed")
    assert (packed.samples, packed.bad) == (2, {"bad json": 1})
    again = ShardSource(packed.shards)
    assert read_all(again) == [source.read(0), source.read(2)]


def test_limits_on_text_members(tmp_path: Path) -> None:
    source = ShardSource(tar(tmp_path / "0.tar", [("a.txt", b"x" * ((1 << 20) + 1)), ("b.txt", b"\xff\xfe")]))
    for index, cause in enumerate(["too many bytes", "bad text"]):
        with pytest.raises(BadSample) as caught:
            source.read(index)
        assert caught.value.cause == cause


def test_no_packed_name_leads_out_of_a_folder(tmp_path: Path) -> None:
    write_shards([Sample("../../a", {"image": png()}), Sample("/somewhere/b", {"image": png("blue")})], tmp_path)
    with tarfile.open(tmp_path / "000000.tar") as archive:
        assert archive.getnames() == ["_/_/a.png", "somewhere/b.png"]


def test_only_pictures_are_packed_as_pictures(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("not a picture")
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "rows.csv").write_text("file,caption\nsecret.txt,x\na.png,y\n")
    packed = pack(open_source(str(tmp_path / "rows.csv")), tmp_path / "shards")
    assert (packed.samples, packed.bad) == (1, {"unknown format": 1})
