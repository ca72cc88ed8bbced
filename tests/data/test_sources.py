"""Own data in one line: folders, tables, shards, Hugging Face folders, and what is said when it is not that."""

import os
import pickle
import re

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from mm.data.config import DataConfig
from mm.data.files import read_file
from mm.data.sources import Concat, FieldView, Subset, open_source, open_training_source, revision
from mm.data.table import read_rows
from mm.errors import BadSample, DataError, UserError


def save_picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def pictures(tmp_path):
    for i in range(6):
        save_picture(tmp_path / f"{i}.jpg", i)
    return tmp_path


def samples(source):
    return [source.read(i) for i in range(len(source))]


def test_class_folders(tmp_path):
    for name in ("cats/a.jpg", "cats/deep/b.PNG", "guinea_pigs/c.webp", ".hidden/d.jpg", "cats/.e.jpg", "__MACOSX/f.jpg"):
        save_picture(tmp_path / name)
    (tmp_path / "cats" / "notes.pdf").write_text("x")
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["cats/a.jpg", "cats/deep/b.PNG", "guinea_pigs/c.webp"]
    assert [sample.fields for sample in samples(source)] == [{"cls": "cats"}, {"cls": "cats"}, {"cls": "guinea_pigs"}]
    assert [sample.texts for sample in samples(source)] == [("cats",), ("cats",), ("guinea pigs",)]
    assert source.read(0).media["image"] == (tmp_path / "cats/a.jpg").read_bytes()


def test_pictures_with_text_files(pictures):
    (pictures / "1.txt").write_text("\ufeffa cat\n\n  a small cat \n", "utf-8")
    (pictures / "2.txt").write_bytes(b"\xff\xfe\xff")
    source = open_source(str(pictures))
    assert source.read(1).texts == ("a cat", "a small cat")
    assert source.read(0).texts == ()
    assert source.fields(0) == {}
    with pytest.raises(BadSample, match="bad text"):
        source.read(2)


def test_one_folder_in_a_folder_is_not_a_class(tmp_path):
    save_picture(tmp_path / "images" / "a.jpg")
    assert open_source(str(tmp_path)).fields(0) == {}


def test_folders_that_are_splits_must_be_chosen(tmp_path):
    save_picture(tmp_path / "train" / "cat" / "a.jpg")
    save_picture(tmp_path / "val" / "cat" / "a.jpg")
    with pytest.raises(UserError, match=r"holds the splits train, val; choose one, such as .*train"):
        open_source(str(tmp_path))


def test_links_in_a_circle_are_followed_once(tmp_path):
    save_picture(tmp_path / "a" / "x.jpg")
    save_picture(tmp_path / "b" / "y.jpg")
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    assert len(open_source(str(tmp_path))) == 2


def test_a_file_that_goes_away_is_a_bad_sample(pictures):
    source = open_source(str(pictures))
    (pictures / "3.jpg").unlink()
    with pytest.raises(BadSample) as error:
        source.read(3)
    assert error.value.cause == "missing file"


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "pipe.jpg", tmp_path, "/dev/zero", "a\0b"):
        with pytest.raises(BadSample, match="unreadable"):
            read_file(path)
    (tmp_path / "large.jpg").write_bytes(b"12345")
    with pytest.raises(BadSample, match="too many bytes"):
        read_file(tmp_path / "large.jpg", max_bytes=4)


CSV = """\ufefffilename;Caption;breed;label
0.jpg;"a ""small"" cat; asleep";tabby;cat

1.jpg;a dog;;dog
0.jpg;the cat;x;cat
 ;;;
gone.jpg;"two
lines";;cat
"""


def test_csv_with_every_habit_of_spreadsheets(pictures):
    (pictures / "table.csv").write_text(CSV, "utf-8")
    source = open_source(str(pictures / "table.csv"))
    assert [source.key(i) for i in range(len(source))] == ["0.jpg", "1.jpg", "gone.jpg"]
    first = source.read(0)
    assert first.texts == ('a "small" cat; asleep', "the cat")
    assert first.fields["breed"] == "tabby"
    assert first.fields["cls"] == "cat"
    assert "breed" not in source.fields(1)
    with pytest.raises(BadSample) as error:
        source.read(2)
    assert error.value.cause == "missing file"
    assert len(open_source(str(pictures))) == 3  # the folder with one table means the table


def test_tsv_and_jsonl_give_the_same(pictures):
    (pictures / "a.tsv").write_text("image\ttext\n1.jpg\ta, b\n1.jpg\tc\n")
    (pictures / "b.jsonl").write_text('{"image": "1.jpg", "text": ["a, b", "c"], "extra": {"k": [1]}}\n\n')
    tsv, jsonl = open_source(str(pictures / "a.tsv")).read(0), open_source(str(pictures / "b.jsonl")).read(0)
    assert tsv.texts == jsonl.texts == ("a, b", "c")
    assert tsv.media == jsonl.media
    assert jsonl.fields["extra"] == {"k": [1]}


def test_columns_by_name_by_content_and_wrong(pictures):
    (pictures / "t.csv").write_text("scan,words,kind\n1.jpg,hello,x\n")
    found = open_source(str(pictures / "t.csv"))
    assert found.columns.image == "scan"
    assert found.read(0).texts == ()
    named = open_source(str(pictures / "t.csv"), text_field="words", label_field="kind")
    assert named.read(0).texts == ("hello",)
    assert named.fields(0)["cls"] == "x"
    with pytest.raises(UserError, match="no column 'wrods'; did you mean 'words'"):
        open_source(str(pictures / "t.csv"), text_field="wrods")


def test_pictures_in_the_one_folder_beside_the_table(tmp_path):
    save_picture(tmp_path / "photos" / "1.jpg")
    (tmp_path / "other").mkdir()
    (tmp_path / "t.csv").write_text("file,text\n1.jpg,hello\n")
    assert open_source(str(tmp_path / "t.csv")).read(0).media["image"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "no rows"),
        ("t.csv", "image,text\n", "no rows"),
        (
            "t.csv",
            "image,text\na.jpg,b,c\n",
            r"t\.csv:2: 3 values for 2 columns; write texts that contain ',' in double quotes",
        ),
        ("t.csv", 'image,text\na.jpg,"b\n', r"t\.csv:2: not valid CSV"),
        ("t.csv", "a.jpg,b\n", "the first line must name the columns"),
        ("t.csv", "image,text,text\na.jpg,b,c\n", "two columns are called 'text'"),
        (
            "t.csv",
            "name,text\nrex,b\n",
            r"no column of picture files or recordings among name, text; name it with data\.image_field",
        ),
        ("t.csv", "url,text\nhttp://x/a.jpg,b\n", "web addresses"),
        ("t.jsonl", '{"image": "a.jpg"}\n{"image": \n', r"t\.jsonl:2: not valid JSON"),
        ("t.jsonl", '["a.jpg"]\n', r"t\.jsonl:1: each line must be an object"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / name))


def test_a_table_that_is_not_utf8(tmp_path):
    (tmp_path / "t.csv").write_bytes("image,text\na.jpg,é\n".encode("latin-1"))
    with pytest.raises(DataError, match="save the table as UTF-8"):
        open_source(str(tmp_path / "t.csv"))


cells = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=4))
def test_quoted_csv_survives(tmp_path, rows):
    import csv

    path = tmp_path / "t.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("image", "text"), *rows])
    expected = [tuple(cell.strip() for cell in row) for row in rows]
    assert [(row["image"], row["text"]) for row in read_rows(path)] == [row for row in expected if any(row)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/picz", "not found; did you mean 'pics'"),
        ("{}/pics/0.jpg", "cannot read a '.jpg' file"),
        ("{}/nowhere/x", "its folder does not exist"),
        ("ssh://host/x.tar", "shards are read from"),
        ("pipe:cat x", "data.stream"),
        ("emoji", "choose emoji:train"),
        ("{}/empty", "no pictures"),
    ],
)
def test_what_is_not_a_source(tmp_path, spec, message):
    save_picture(tmp_path / "pics" / "0.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_source(spec.format(tmp_path))


def test_fingerprint_names_the_samples_and_revision_their_content(pictures, tmp_path):
    before = open_source(str(pictures))
    fingerprint, content = before.fingerprint, revision(before)
    assert open_source(str(pictures)).fingerprint == fingerprint
    save_picture(pictures / "0.jpg", 99)
    os.utime(pictures / "0.jpg", ns=(1, 1))
    changed = open_source(str(pictures))
    assert changed.fingerprint == fingerprint
    assert revision(changed) != content
    assert revision(Subset(changed, [0])) != revision(Subset(changed, [1]))
    save_picture(pictures / "6.jpg")
    assert open_source(str(pictures)).fingerprint != fingerprint


def test_subset_concat_and_views(pictures):
    (pictures / "t.csv").write_text("image,text,n\n" + "".join(f"{i}.jpg,text {i},{i % 2}\n" for i in range(6)))
    source = open_source(str(pictures / "t.csv"))
    odd = Subset(source, lambda fields: fields["n"] == "1")
    assert [sample.id for sample in samples(odd)] == ["1.jpg", "3.jpg", "5.jpg"]
    both = Concat([source, odd], weights=[1, 2])
    assert both.shares == [(6, 1), (3, 2)]
    assert [both.key(i) for i in (0, 5, 6, 8)] == ["0/0.jpg", "0/5.jpg", "1/1.jpg", "1/5.jpg"]
    assert both.read(7).texts == ("text 3",)
    assert both.read(7).id == both.key(7)
    view = FieldView(odd, text_field="n", label_field="text")
    assert view.read(0).texts == ("1",)
    assert view.fields(0)["cls"] == "text 1"
    with pytest.raises(UserError, match="no field 'txt'; did you mean 'text'"):
        FieldView(odd, text_field="txt")
    assert len({source.fingerprint, odd.fingerprint, both.fingerprint, view.fingerprint}) == 4
    assert pickle.loads(pickle.dumps(both)).read(7) == both.read(7)  # noqa: S301 - our own object


def test_mixture_of_a_configuration(pictures, tmp_path):
    parts = [{"source": str(pictures), "weight": 3}, {"source": str(pictures)}]
    source = open_training_source(DataConfig.model_validate({"mixture": parts}))
    assert source.shares == [(6, 3.0), (6, 1.0)]
    for wrong in ({}, {"train": "x", "mixture": parts}):
        with pytest.raises(ValueError, match="exactly one of 'train'"):
            DataConfig.model_validate(wrong)


def test_hugging_face_folders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    data = [save_picture(tmp_path / "p" / f"{i}.png", i).read_bytes() for i in range(4)]
    rows = datasets.Dataset.from_dict(
        {
            "photo": [{"bytes": item, "path": None} for item in data],
            "caption": [["a", "b"], ["c"], [], None],
            "kind": [0, 1, -1, 1],
        }
    )
    rows = rows.cast_column("photo", datasets.Image()).cast_column("kind", datasets.ClassLabel(names=["cat", "dog"]))
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "parquet" / "data" / "train-00000-of-00001.parquet")
    saved = open_source(str(tmp_path / "saved"))
    assert [sample.texts for sample in samples(saved)] == [("a", "b"), ("c",), (), ()]
    assert [sample.media["image"] for sample in samples(saved)] == data
    assert [saved.fields(i).get("cls") for i in range(4)] == ["cat", "dog", None, "dog"]
    for spec in (tmp_path / "splits" / "train", tmp_path / "parquet", tmp_path / "parquet/data/train-*.parquet"):
        other = open_source(str(spec))
        assert samples(other) == samples(saved)
        assert other.fingerprint == saved.fingerprint
    with pytest.raises(UserError, match="holds the splits train, test; choose one"):
        open_source(str(tmp_path / "splits"))
    with pytest.raises(UserError, match="no column 'captoin'"):
        open_source(str(tmp_path / "saved"), text_field="captoin")


def test_without_the_datasets_library_its_install_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape('pip install "mm-suite[hub]"')):
        open_source(str(tmp_path))


def test_captions_from_a_field_below_a_field(pictures):
    (pictures / "t.jsonl").write_text('{"image": "0.jpg", "text": "cat", "names": {"de": "Katze"}}\n{"image": "1.jpg"}\n')
    view = FieldView(open_source(str(pictures / "t.jsonl")), text_field="names.de")
    assert view.read(0).texts == ("Katze",)
    with pytest.raises(BadSample, match="missing text"):
        view.read(1)


def test_a_picture_column_makes_no_sense_for_a_folder(pictures):
    with pytest.raises(UserError, match="image_field 'x' is for tables"):
        open_source(str(pictures), image_field="x")
