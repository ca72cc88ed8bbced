"""Recordings in every kind of source, alone and beside pictures, and through packing and the command line."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from audio_files import FORMATS, encoded, tone
from PIL import Image
from typer.testing import CliRunner

from mm.cli import app
from mm.data.sources import open_source
from mm.data.write import pack
from mm.errors import BadSample, UserError
from mm.types import Sample, Source


def sound(number: int, kind: str = "wav") -> bytes:
    return encoded(tone(200 + 10 * number, 16_000, 0.05), 16_000, kind)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 5), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def samples(source: Source) -> list[Sample]:
    return [source.read(i) for i in range(len(source))]


def test_a_folder_of_recordings(tmp_path: Path) -> None:
    files = {f"dog/{kind}.{FORMATS[kind][0].lower()}": sound(0, kind) for kind in ("wav", "flac", "ogg", "mp3")}
    put(tmp_path, files | {"big_cat/a.OPUS": sound(1, "opus"), "big_cat/a.txt": b"a roar\na growl"})
    source = open_source(str(tmp_path))
    found = samples(source)
    assert [sample.id for sample in found] == ["big_cat/a.OPUS", "dog/flac.flac", "dog/mp3.mp3", "dog/ogg.ogg", "dog/wav.wav"]
    assert [sample.texts for sample in found] == [("a roar", "a growl"), *[("dog",)] * 4]
    assert all(sample.media == {"audio": files[sample.id]} for sample in found[1:])
    assert source.fields(0) == {"cls": "big_cat"}


def test_files_that_differ_in_their_endings_are_one_sample(tmp_path: Path) -> None:
    put(tmp_path, {"a.png": picture(0), "a.wav": sound(0), "a.flac": sound(1, "flac"), "b.png": picture(1), "c.wav": sound(2)})
    put(tmp_path, {"a.txt": b"spoken", "x/a.wav": sound(3)})
    source = open_source(str(tmp_path))
    assert {sample.id: set(sample.media) for sample in samples(source)} == {
        "a.png": {"image", "audio"},
        "a.wav": {"audio"},  # one recording for a picture: the first; others stay samples of their own
        "b.png": {"image"},
        "c.wav": {"audio"},
        "x/a.wav": {"audio"},
    }
    assert source.read(0).media["audio"] == sound(1, "flac")
    assert source.read(0).texts == ("spoken",)
    before, content = source.fingerprint, source.revision  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "a.flac").write_bytes(sound(4, "flac") + b"longer")
    changed = open_source(str(tmp_path))
    assert changed.fingerprint == before
    assert changed.revision != content  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "a.flac").unlink()
    assert open_source(str(tmp_path)).fingerprint != before


def test_tables_of_recordings(tmp_path: Path) -> None:
    put(tmp_path, {"clips/a.wav": sound(0), "clips/b.mp3": sound(1, "mp3")})
    (tmp_path / "common_voice.tsv").write_text("client\tpath\tsentence\nx\ta.wav\thello\nx\ta.wav\thi\ny\tb.mp3\tyes\n")
    (tmp_path / "nemo.jsonl").write_text('{"audio_filepath": "clips/a.wav", "text": "hello", "duration": 1.5}\n')
    voice = open_source(str(tmp_path / "common_voice.tsv"))
    assert [sample.texts for sample in samples(voice)] == [("hello", "hi"), ("yes",)]
    assert voice.read(1).media == {"audio": sound(1, "mp3")}
    nemo = open_source(str(tmp_path / "nemo.jsonl")).read(0)
    assert (nemo.id, nemo.texts, nemo.fields["duration"]) == ("clips/a.wav", ("hello",), 1.5)


def test_a_table_of_pictures_and_recordings(tmp_path: Path) -> None:
    put(tmp_path, {"p/0.png": picture(0), "s/0.wav": sound(0), "s/1.wav": sound(1)})
    (tmp_path / "t.csv").write_text("image,wav,text\n0.png,0.wav,a\n0.png,1.wav,b\n0.png,1.wav,c\n0.png,,d\n,1.wav,e\n,,f\n")
    source = open_source(str(tmp_path / "t.csv"))
    found = [source.read(i) for i in range(4)]
    assert [(sample.id, set(sample.media), sample.texts) for sample in found] == [
        ("0.png+0.wav", {"image", "audio"}, ("a",)),
        ("0.png+1.wav", {"image", "audio"}, ("b", "c")),
        ("0.png", {"image"}, ("d",)),
        ("1.wav", {"audio"}, ("e",)),
    ]
    with pytest.raises(BadSample, match="missing file"):
        source.read(4)


@pytest.mark.parametrize(
    ("header", "row", "image", "audio"),
    [
        ("image,sound", "a.png,woof", "image", None),  # what an animal says is no file
        ("file,sound", "a.png,woof", "file", None),
        ("sound,text", "0001,woof", None, "sound"),
        ("file_name,text", "a.wav,woof", None, "file_name"),
        ("file,take", "a.png,a.wav", "file", "take"),
        ("path,audio_path", "meta.json,a.flac", None, "audio_path"),
        ("scan,take", "a.png,a.wav", "scan", "take"),
        ("file,text", "photo1,a", "file", None),
    ],
)
def test_columns_by_name_and_content(tmp_path: Path, header: str, row: str, image: str | None, audio: str | None) -> None:
    (tmp_path / "t.csv").write_text(f"{header}\n{row}\n")
    columns = open_source(str(tmp_path / "t.csv")).columns  # pyright: ignore[reportAttributeAccessIssue]
    assert (columns.image, columns.audio) == (image, audio)


def test_columns_that_are_asked_for(tmp_path: Path) -> None:
    put(tmp_path, {"a": sound(0)})
    (tmp_path / "t.csv").write_text("thing,file,text\na,x,hello\n")
    assert open_source(str(tmp_path / "t.csv"), audio_field="thing").read(0).media["audio"] == sound(0)
    with pytest.raises(UserError, match="no column 'thin'; did you mean 'thing'"):
        open_source(str(tmp_path / "t.csv"), audio_field="thin")
    (tmp_path / "u.csv").write_text("audio,text\nhttps://example.org/a.wav,hello\n")
    with pytest.raises(UserError, match="column 'audio' holds web addresses"):
        open_source(str(tmp_path / "u.csv"))
    put(tmp_path / "folder", {"a.wav": sound(0)})
    with pytest.raises(UserError, match="audio_field 'x' is for tables"):
        open_source(str(tmp_path / "folder"), audio_field="x")


def same(found: Sequence[Sample], expected: Sequence[Sample]) -> None:
    assert [(s.media, s.texts, s.fields) for s in found] == [(s.media, s.texts, s.fields) for s in expected]


def test_packing_keeps_sound_and_tells_its_format_by_content(tmp_path: Path) -> None:
    kinds = ["wav", "flac", "ogg", "opus", "mp3"]
    put(tmp_path, {f"in/{k}.{('wav', 'flac')[k % 2]}": sound(k, kind) for k, kind in enumerate(kinds)})
    put(tmp_path, {"in/0.png": picture(0), "in/0.txt": b"one", "in/9.wav": b"<html>", "in/8.wav": b""})
    source = open_source(str(tmp_path / "in"))
    packed = pack(source, tmp_path / "out")
    assert dict(packed.bad) == {"unknown format": 2}
    shards = open_source(str(tmp_path / "out"))
    same(samples(shards), [source.read(i) for i in range(5)])
    with tarfile.open(packed.shards[0]) as archive:
        names = {name for name in archive.getnames() if not name.endswith((".json", ".txt"))}
    assert names == {"0_png.png", "0_png.wav", "1_flac.flac", "2_wav.ogg", "3_flac.ogg", "4_wav.mp3"}
    result = CliRunner().invoke(app, ["data", "index", str(tmp_path / "out")])
    assert "1 shards, 5 samples indexed" in result.output


def test_shards_of_others_with_opus_members(tmp_path: Path) -> None:
    opus = sound(0, "opus")  # numbered at random, so never twice the same
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in {"x.OPUS": opus, "x.txt": b"hi", "y.mp3": sound(1, "mp3"), "y.m4a": b"?"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"))
    assert [sample.media for sample in samples(source)] == [{"audio": opus}, {"audio": sound(1, "mp3")}]


def test_hugging_face_recordings_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    put(tmp_path, {"b.flac": sound(1, "flac")})
    rows = {
        "file": ["a.wav", "b.flac", "c.wav", "d.wav"],
        "speech": [
            {"bytes": sound(0), "path": "a.wav"},
            {"bytes": None, "path": str(tmp_path / "b.flac")},
            {"bytes": b"?", "path": None},
            None,
        ],
        "text": ["a", "b", "c", "d"],
    }
    whole = datasets.Dataset.from_dict(rows).cast_column("speech", datasets.Audio())
    whole.save_to_disk(tmp_path / "saved")
    source = open_source(str(tmp_path / "saved"))
    found = [source.read(i) for i in range(3)]
    assert [sample.media["audio"] for sample in found] == [sound(0), sound(1, "flac"), b"?"]
    assert [sample.texts for sample in found] == [("a",), ("b",), ("c",)]
    assert all(set(sample.media) == {"audio"} for sample in found)
    with pytest.raises(BadSample, match="missing file"):
        source.read(3)


def test_the_check_from_the_command_line(tmp_path: Path) -> None:
    put(tmp_path, {"a.wav": sound(0), "b.wav": sound(0), "c.wav": sound(0)[:500], "page.wav": b"<html>"})
    (tmp_path / "odd.csv").write_text("take,words\n" + "".join(f"{name}.wav,x\n" for name in ("a", "b", "c", "page")))
    report = tmp_path / "report.json"
    arguments = ["--audio-field", "take", "--text-field", "words", "--json", str(report)]
    result = CliRunner().invoke(app, ["data", "check", str(tmp_path / "odd.csv"), *arguments])
    assert result.exit_code == 1
    assert "recordings of 16000 Hz x 1" in result.output
    values = json.loads(report.read_text())
    assert values["bad"] == {"truncated": 1, "unknown format": 1}
    assert (values["good"], values["repeated_recordings"], values["rates"]) == (2, 1, {"16000 Hz x 1": 2})
    assert values["seconds"] == pytest.approx(0.1)
    shards = str(tmp_path / "shards")
    packed = CliRunner().invoke(app, ["data", "pack", str(tmp_path / "odd.csv"), "-o", shards, "--audio-field", "take"])
    assert packed.exit_code == 0
    assert [sample.media["audio"] for sample in samples(open_source(shards))][:2] == [sound(0)] * 2
