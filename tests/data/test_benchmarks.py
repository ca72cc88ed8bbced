"""Published evaluation sets are read from copies in exactly their layouts, and what is missing from one is said in a line."""

import gzip
import json
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import benchmark_copies as copies
import numpy as np
import pytest

from mm.data.benchmarks import BENCHMARKS, BenchmarkSource, is_benchmark, open_benchmark
from mm.data.benchmarks.layout import Copy
from mm.data.benchmarks.names import ASSETS, published, vocabulary
from mm.data.benchmarks.plain_pickle import read_plain_pickle
from mm.data.benchmarks.source import Files
from mm.data.labels import label_of, label_task
from mm.data.questions import questions_of
from mm.data.sources import revision
from mm.errors import BadSample, DataError, UserError
from mm.media.image import decode_image


def classes_of(source) -> list[int]:
    index = source.task.index()
    return [index[label_of(source.fields(i), source.task.label)] for i in range(len(source))]


@pytest.mark.parametrize("name", copies.LABELLED)
def test_every_labelled_set(name: str, tmp_path: Path) -> None:
    expected = copies.LABELLED[name](tmp_path)
    source = open_benchmark(f"{name}:{tmp_path}")
    assert classes_of(source) == expected
    assert source.evaluation == "zero-shot"
    assert source.templates
    assert all(template.count("{}") == 1 for template in source.templates)
    assert len({source.key(i) for i in range(len(source))}) == len(source)
    there_and_back = pickle.loads(pickle.dumps(source))  # noqa: S301
    for index in {0, len(source) - 1}:
        sample = source.read(index)
        assert sample == there_and_back.read(index)
        assert sample.texts == (source.task.classes[expected[index]],)
        assert sample.fields == source.fields(index)
        if name == "esc50":
            assert sample.media["audio"] == source.key(index).encode()
        else:
            assert decode_image(sample.media["image"]).shape[0] == 3


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_empty_folder_is_told_what_it_should_hold(name: str, tmp_path: Path) -> None:
    for split in BENCHMARKS[name].splits:
        with pytest.raises(UserError) as error:
            open_benchmark(f"{name}/{split}:{tmp_path}")
        assert "\n" not in str(error.value)
        assert BENCHMARKS[name].layout in str(error.value)
        assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imagnet:/data", "did you mean 'imagenet'"),
        ("coco", "name the folder of your copy, such as coco:/data/coco"),
        ("coco:", "name the folder"),
        ("coco/valid:.", "no split 'valid'; did you mean 'val'"),
        ("cifar10:/nowhere/at/all", "no folder /nowhere/at/all; give the one that holds cifar-10"),
    ],
)
def test_specifications_that_are_refused(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_benchmark(spec)


def test_what_is_a_benchmark_and_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("imagenet:/data", "cifar10/train:C:\\data", "coco", "flickr30k:"):
        assert is_benchmark(spec), spec
    others = (
        "emoji:test",
        "C:\\pets",
        "c:pets",
        "s3://pets",
        "/data/imagenet",
        "pets/train",
        "shards/{0..9}.tar",
        "pipe:cat x",
        "",
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets" / "train").mkdir(parents=True)
    assert not [spec for spec in (*others, "pets") if is_benchmark(spec)]


def test_names_that_repeat_stay_two_classes(tmp_path: Path) -> None:
    copies.imagenet(tmp_path)
    source = open_benchmark(f"imagenet:{tmp_path}")
    task = label_task(source)
    assert len(task.classes) == len(task.index()) == 1000
    assert len(set(task.classes)) == 998
    assert [place for place, name in enumerate(task.classes) if name == "missile"] == [657, 744]
    assert source.fields(4) == {"cls": "n03773504"}
    other = label_task(source, classes=[f"name {place % 7}" for place in range(1000)])
    assert (other.index(), other.classes[9]) == (task.index(), "name 2")
    with pytest.raises(UserError, match="999 class names for 1000 classes"):
        label_task(source, classes=["x"] * 999)


def test_imagenet_as_it_comes_from_kaggle(tmp_path: Path) -> None:
    expected = copies.imagenet(tmp_path)
    ordered = open_benchmark(f"imagenet:{tmp_path}")
    flat, lines = tmp_path / "flat" / "ILSVRC" / "Data" / "CLS-LOC" / "val", ["ImageId,PredictionString"]
    flat.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "val").glob("*/*"))):
        shutil.copy(path, flat / f"ILSVRC2012_val_{number:08d}.JPEG")
        lines.append(f"ILSVRC2012_val_{number:08d},{path.parent.name} 1 2 3 4 ")
    with pytest.raises(UserError, match="no class folders"):
        open_benchmark(f"imagenet:{tmp_path / 'flat'}")
    copies.text(tmp_path / "flat" / "LOC_val_solution.csv", "\n".join(lines) + "\n")
    source = open_benchmark(f"imagenet:{tmp_path / 'flat'}")
    assert classes_of(source) == expected
    assert source.read(3).media == ordered.read(3).media
    copies.text(tmp_path / "flat" / "LOC_val_solution.csv", "\n".join(lines[:-1]) + "\n")
    with pytest.raises(UserError, match=r"has no class for ILSVRC2012_val_00000009\.JPEG"):
        open_benchmark(f"imagenet:{tmp_path / 'flat'}")


def test_a_folder_that_is_no_class_is_refused(tmp_path: Path) -> None:
    copies.imagenet_a(tmp_path)
    copies.picture(tmp_path / "imagenet-a" / "n01440764" / "tench.jpg", 0)
    with pytest.raises(UserError, match="n01440764 is no class of imagenet-a"):
        open_benchmark(f"imagenet-a:{tmp_path}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_of_cifar_are_equal(name: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.mkdir()
    labels = copies.LABELLED[name](python)
    source = open_benchmark(f"{name}:{python}")
    prefix = [[label] if name == "cifar10" else [0, label] for label in labels]
    rows = np.concatenate([np.array(prefix, np.uint8), copies.pixels(len(labels), 3072)], axis=1)
    base = tmp_path / ("cifar-10-batches-bin" if name == "cifar10" else "cifar-100-binary")
    base.mkdir()
    (base / ("test_batch.bin" if name == "cifar10" else "test.bin")).write_bytes(rows.tobytes())
    binary = open_benchmark(f"{name}:{tmp_path}")
    assert [binary.read(i) for i in range(len(binary))] == [source.read(i) for i in range(len(source))]
    red = decode_image(binary.read(1).media["image"])[0]
    assert red.flatten().tolist() == rows[1, -3072:-2048].tolist()


def test_the_training_half_of_cifar_has_five_files(tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-bin"
    base.mkdir()
    for number in range(1, 6):
        (base / f"data_batch_{number}.bin").write_bytes(bytes([number]) + copies.pixels(1, 3072, seed=number).tobytes())
    assert classes_of(open_benchmark(f"cifar10/train:{tmp_path}")) == [1, 2, 3, 4, 5]
    (base / "data_batch_5.bin").write_bytes(b"half a record")
    with pytest.raises(UserError, match=r"data_batch_5.bin has 13 bytes, which is no whole number"):
        open_benchmark(f"cifar10/train:{tmp_path}")


class Canary:
    """Leaves a file behind where its pickle is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for evil in (
        pickle.dumps({"data": Canary(tmp_path / "canary"), "labels": [0]}),
        pickle.dumps({"data": Canary(tmp_path / "canary"), "labels": [0]}, 2),
        b"\x80\x02cos\nsystem\nU\x06echo hi\x85R.",
    ):
        (base / "test_batch").write_bytes(evil)
        with pytest.raises(DataError, match="which no CIFAR file needs"):
            open_benchmark(f"cifar10:{tmp_path}")
    assert not (tmp_path / "canary").exists()


ARRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)


@pytest.mark.parametrize("protocol", range(1, 5))
def test_plain_pickles_of_every_binary_protocol(protocol: int) -> None:
    values = {"data": ARRAY, "labels": [1, 2], b"more": [("a", 3, None, True, 1 << 40), {}, ()], "again": "data"}
    read = read_plain_pickle(pickle.dumps(values, protocol))
    assert np.array_equal(read.pop("data"), ARRAY)
    assert read == {"labels": [1, 2], "more": values[b"more"], "again": "data"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": ARRAY.astype(np.float32)}, 2),
        pickle.dumps({"data": np.array([{}, "x"], dtype=object)}, 2),
        pickle.dumps({"data": np.asfortranarray(ARRAY)}, 2),
        pickle.dumps({1: 2}),
        b"\x80\x02e.",
        b"\x80\x02K\x01K\x02b.",
        b"\x80\x02}r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    ],
)
def test_other_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        read_plain_pickle(data)


def test_a_batch_cut_anywhere_is_refused() -> None:
    whole = copies.python2_batch(copies.pixels(2, 16), "labels", [1, 2])
    assert read_plain_pickle(whole)["labels"] == [1, 2]
    for length in range(len(whole) - 1):
        with pytest.raises(ValueError):
            read_plain_pickle(whole[:length])


def test_mnist_compressed_train_and_damaged(tmp_path: Path) -> None:
    labels = copies.mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    plain = open_benchmark(f"mnist:{tmp_path}")
    for path in list(raw.glob("t10k*")):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = open_benchmark(f"mnist:{raw}")
    assert [packed.read(i) for i in range(4)] == [plain.read(i) for i in range(4)]
    assert classes_of(open_benchmark(f"mnist/train:{tmp_path}")) == labels
    for damaged in (b"no gzip", gzip.compress(bytes(99))[:-9], gzip.compress(bytes(99))[:10] + b"\xff" * 20):
        (raw / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be unpacked"):
            open_benchmark(f"mnist:{tmp_path}")
    (raw / "train-labels-idx1-ubyte").write_bytes((0x801).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes(4))
    with pytest.raises(UserError, match="train-labels-idx1-ubyte is no array of 1 dimensions"):
        open_benchmark(f"mnist/train:{tmp_path}")


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    copies.mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + bytes([10]))
    with pytest.raises(UserError, match="labels go from 1 to 10, and there are 10 classes"):
        open_benchmark(f"mnist:{tmp_path}")


def test_other_splits_and_layouts(tmp_path: Path) -> None:
    copies.class_folders(tmp_path / "rendered-sst2" / "valid", ["negative", "positive"], ".png")
    assert classes_of(open_benchmark(f"rendered-sst2/val:{tmp_path}")) == [0, 1]
    copies.class_folders(tmp_path / "GTSRB" / "Training", ["00000", "00042"], ".ppm")
    assert classes_of(open_benchmark(f"gtsrb/train:{tmp_path}")) == [0, 42]
    copies.class_folders(tmp_path / "faces" / "test", vocabulary("fer2013").folders or ())
    assert classes_of(open_benchmark(f"fer2013:{tmp_path / 'faces'}")) == list(range(7))
    copies.flowers(tmp_path)
    assert classes_of(open_benchmark(f"flowers/val:{tmp_path / 'flowers-102'}")) == [0, 5]


def test_a_damaged_ppm_is_a_bad_sample(tmp_path: Path) -> None:
    copies.gtsrb(tmp_path)
    images = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    (images / "00000.ppm").write_bytes(b"P6 8 8 255\nshort")
    (images / "00001.ppm").write_bytes(b"P6 60000 60000 255\n")
    (images / "00002.ppm").unlink()
    source = open_benchmark(f"gtsrb:{tmp_path}")
    for index, cause in enumerate(("undecodable", "too many pixels|undecodable", "missing file")):
        with pytest.raises(BadSample, match=cause):
            source.read(index)


def test_pcam_takes_h5py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"x": copies.pixels(3, 96, 96, 3), "y": np.array([1, 0, 1]).reshape(3, 1, 1, 1)}
    for kind in "xy":
        copies.text(tmp_path / "pcam" / f"camelyonpatch_level_2_split_test_{kind}.h5", "")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match="takes h5py; pip install h5py"):
        open_benchmark(f"pcam:{tmp_path}")

    class File(dict):
        def __init__(self, path: Path, mode: str) -> None:
            assert mode == "r"
            super().__init__({path.stem[-1]: arrays[path.stem[-1]]})

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    source = open_benchmark(f"pcam:{tmp_path}")
    assert classes_of(source) == [1, 0, 1]
    assert np.array_equal(decode_image(source.read(2).media["image"]).permute(1, 2, 0).numpy(), arrays["x"][2])


def test_matlab_files_take_scipy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies.svhn(tmp_path)
    copies.text(tmp_path / "train_32x32.mat", "not a matlab file")
    with pytest.raises(DataError, match=r"train_32x32.mat is no MATLAB file"):
        open_benchmark(f"svhn/train:{tmp_path}")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="takes scipy; pip install scipy"):
        open_benchmark(f"svhn:{tmp_path}")


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_all_captions_of_the_karpathy_split(name: str, tmp_path: Path) -> None:
    getattr(copies, name)(tmp_path)
    source = open_benchmark(f"{name}:{tmp_path}")
    assert source.task is None
    assert source.templates == ()
    assert source.evaluation == "retrieval"
    assert [list(source.read(i).texts) for i in range(len(source))] == copies.CAPTIONS
    assert decode_image(source.read(0).media["image"]).shape == (3, copies.SIDE, copies.SIDE + 2)
    shutil.rmtree(tmp_path / ("val2014" if name == "coco" else "flickr30k-images"))
    with pytest.raises(UserError, match="none of its pictures is there"):
        open_benchmark(f"{name}:{tmp_path}")


@pytest.mark.parametrize("name", ["coco", "flickr30k"])
def test_the_peers_annotation_files_give_the_same(name: str, tmp_path: Path) -> None:
    getattr(copies, name)(tmp_path)
    ours = open_benchmark(f"{name}:{tmp_path}")
    before = [ours.read(i) for i in range(len(ours))]
    (tmp_path / f"dataset_{name}.json").unlink()
    getattr(copies, f"{name}_peer")(tmp_path)
    theirs = open_benchmark(f"{name}:{tmp_path}")
    assert [theirs.read(i) for i in range(len(theirs))] == before


def test_annotations_that_are_something_else(tmp_path: Path) -> None:
    for content, message in (
        ("{", "not valid JSON"),
        ('{"images": [{}]}', "is not Karpathy's file"),
        ("[1]", "not Karpathy's"),
    ):
        copies.text(tmp_path / "dataset_coco.json", content)
        with pytest.raises(UserError, match=message):
            open_benchmark(f"coco:{tmp_path}")


def test_lists_that_are_something_else(tmp_path: Path) -> None:
    for content in ("[]", "{}", '{"waffles": 3}'):
        copies.text(tmp_path / "food-101" / "meta" / "test.json", content)
        with pytest.raises(UserError, match=r"no meta/test\.json with lists"):
            open_benchmark(f"food101:{tmp_path}")
    copies.dtd(tmp_path)
    copies.text(tmp_path / "dtd" / "dtd" / "labels" / "test1.txt", "wooden/wooden_1.jpg\n")
    with pytest.raises(UserError, match="names the class 'wooden'"):
        open_benchmark(f"dtd:{tmp_path}")
    copies.pets(tmp_path)
    copies.text(tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt", "Beagle_7\n")
    with pytest.raises(UserError, match="a line without a class number: 'Beagle_7'"):
        open_benchmark(f"pets:{tmp_path}")
    copies.aircraft(tmp_path)
    copies.text(tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt", "0000001 Concorde\n")
    with pytest.raises(UserError, match="names the variant 'Concorde'"):
        open_benchmark(f"aircraft:{tmp_path}")


def matlab(path: Path, **values: object) -> None:
    from scipy.io import savemat

    savemat(path, values)


def annotations(path: Path, caption: object) -> None:
    content = json.loads(path.read_text())
    content["images"][0]["sentences"][0]["raw"] = caption
    path.write_text(json.dumps(content))


def emotions(path: Path, emotion: str) -> None:
    path.write_text(path.read_text().replace("\n3,", f"\n{emotion},"))


def no_pixels(raw: Path) -> None:
    for kind, sizes in (("images-idx3", (0x803, 4, 0, 0)), ("labels-idx1", (0x801, 4))):
        header = b"".join(size.to_bytes(4, "big") for size in sizes)
        (raw / f"t10k-{kind}-ubyte").write_bytes(header + (bytes(4) if kind == "labels-idx1" else b""))


def cars_with(path: Path, label: object) -> None:
    rows = np.array([[(label, "00001.jpg"), (1, "00002.jpg")]], dtype=[("class", "O"), ("fname", "O")])
    matlab(path, annotations=rows)


PICTURES = copies.pixels(2, 32, 32, 3).transpose(1, 2, 3, 0)


@pytest.mark.parametrize(
    ("name", "file", "damage", "message"),
    [
        ("coco", "dataset_coco.json", lambda path: annotations(path, 7), r"a caption of val2014/.*40\.jpg is no text"),
        ("coco", "dataset_coco.json", lambda path: annotations(path, None), "is no text"),
        ("coco", "dataset_coco.json", lambda path: annotations(path, ["a"]), "is no text"),
        ("flowers", "flowers-102/imagelabels.mat", lambda path: matlab(path, labels=["a", "b"]), "whole numbers 'labels'"),
        ("flowers", "flowers-102/imagelabels.mat", lambda path: matlab(path, labels=[0.5, 1]), "whole numbers 'labels'"),
        ("flowers", "flowers-102/setid.mat", lambda path: matlab(path, tstid=[np.nan, 1]), "whole numbers 'tstid'"),
        ("flowers", "flowers-102/setid.mat", lambda path: matlab(path, trnid=[1]), "whole numbers 'tstid'"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat", lambda path: cars_with(path, "two"), "numbers 'class'"),
        ("cars", "stanford_cars/cars_test_annos_withlabels.mat", lambda path: cars_with(path, [1, 2]), "numbers 'class'"),
        ("svhn", "test_32x32.mat", lambda path: matlab(path, X=PICTURES, y=["a", "b"]), "whole numbers 'y'"),
        ("svhn", "test_32x32.mat", lambda path: matlab(path, X="pictures", y=[1, 2]), "lacks the pictures X"),
        ("svhn", "test_32x32.mat", lambda path: matlab(path, y=[1, 2]), "lacks the pictures X"),
        (
            "aircraft",
            "fgvc-aircraft-2013b/data/images_variant_test.txt",
            lambda path: path.write_text("DC-10\n"),
            "names the variant ''",
        ),
        (
            "objectnet",
            "objectnet-1.0/mappings/folder_to_objectnet_label.json",
            lambda path: path.write_text('{"chair": ["Chair"]}'),
            "are not the published ones",
        ),
        (
            "cifar100",
            "cifar-100-python/test",
            lambda path: path.write_bytes(pickle.dumps({"data": copies.pixels(2, 3072), "fine_labels": [[1], [2]]}, 4)),
            "not a CIFAR batch",
        ),
        ("mnist", "MNIST/raw", no_pixels, "pictures of 0 x 0 pixels, not 28 x 28"),
        ("fer2013", "fer2013.csv", lambda path: emotions(path, "-7"), r"not the published table: KeyError\(-7\)"),
        ("fer2013", "fer2013.csv", lambda path: emotions(path, "7"), "not the published table"),
    ],
)
def test_damaged_copies(name: str, file: str, damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    getattr(copies, name)(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=message) as error:
        open_benchmark(f"{name}:{tmp_path}")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_that_matlab_wrote_as_fractions(tmp_path: Path) -> None:
    expected = copies.flowers(tmp_path)
    matlab(tmp_path / "flowers-102" / "imagelabels.mat", labels=[77.0, 1.0, 102.0, 5.0, 6.0])
    assert classes_of(open_benchmark(f"flowers:{tmp_path}")) == expected


def test_labels_in_two_dimensions_are_refused(tmp_path: Path) -> None:
    media = Files(tmp_path, ["a.jpg", "b.jpg"])
    copy = Copy("mnist:x", "mnist", "test", tmp_path, "a layout", "zero-shot")
    for labels in (np.array([[1], [2]]), np.array([0.5, 1.0]), np.array(["1", "2"])):
        with pytest.raises(UserError, match="labels are no list of whole numbers; the layout is"):
            BenchmarkSource(copy, media, vocabulary=vocabulary("mnist"), labels=labels)


@pytest.mark.parametrize("caption", [None, 3])
def test_pairs_of_captions_that_are_no_texts(caption: object, tmp_path: Path) -> None:
    copies.winoground(tmp_path)
    path = tmp_path / "data" / "examples.jsonl"
    path.write_text(path.read_text().replace('"old young"', json.dumps(caption)))
    with pytest.raises(UserError, match=r"a caption of ex_1_img_0\.png is no text"):
        open_benchmark(f"winoground:{tmp_path}")
    for key in ("caption", "negative_caption"):
        entry = {"filename": "a.jpg", "caption": "right", "negative_caption": "wrong", key: caption}
        copies.text(tmp_path / "swap_att.json", json.dumps({"0": entry}))
        (tmp_path / "val2017").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is no text"):
            open_benchmark(f"sugarcrepe/swap_att:{tmp_path}")


@pytest.mark.parametrize("outside", ["/etc/passwd", "../secret.jpg", "val2014/../../secret.jpg"])
def test_lists_cannot_name_files_outside_of_the_copy(outside: str, tmp_path: Path) -> None:
    folder = tmp_path / "coco"
    copies.coco(folder)
    path = folder / "dataset_coco.json"
    content = json.loads(path.read_text())
    content["images"][0] |= {"filepath": "", "filename": outside}
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="which is not below it"):
        open_benchmark(f"coco:{folder}")
    content["images"][0]["filename"] = "val2014/two..dots.jpg"
    path.write_text(json.dumps(content))
    assert open_benchmark(f"coco:{folder}").key(0) == "val2014/two..dots.jpg"


def test_winoground(tmp_path: Path) -> None:
    copies.winoground(tmp_path)
    source = open_benchmark(f"winoground:{tmp_path}")
    samples = [source.read(i) for i in range(len(source))]
    assert [sample.texts for sample in samples] == [("a cat on a dog",), ("a dog on a cat",), ("old young",), ("young old",)]
    assert [(sample.fields["example"], sample.fields["side"]) for sample in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert source.evaluation == "winoground"
    shutil.rmtree(tmp_path / "data" / "images")
    with pytest.raises(UserError, match=r"unpack images\.zip"):
        open_benchmark(f"winoground:{tmp_path}")


def test_sugarcrepe(tmp_path: Path) -> None:
    categories = BENCHMARKS["sugarcrepe"].splits[1:]
    copies.sugarcrepe(tmp_path, categories)
    source = open_benchmark(f"sugarcrepe:{tmp_path}")
    assert len(source) == 14
    assert source.key(1) == "add_att/5"
    sample = source.read(13)
    assert sample.texts == ("right 5",)
    assert sample.fields == {"category": "swap_obj", "negative": "wrong swap_obj"}
    one = open_benchmark(f"sugarcrepe/swap_att:{tmp_path}")
    assert {one.fields(i)["category"] for i in range(len(one))} == {"swap_att"}


def test_audio_captions(tmp_path: Path) -> None:
    rows = ["1,aaa,30,A dog, barking", "2,aaa,30,Barks", "3,-bb,5,Rain", "4,ccc,9,Wind"]
    lines = [",".join((*row.split(",", 3)[:3], f'"{row.split(",", 3)[3]}"')) for row in rows]
    copies.text(tmp_path / "test.csv", "\n".join(["audiocap_id,youtube_id,start_time,caption", *lines]))
    copies.text(tmp_path / "audio" / "test" / "aaa_30.wav", "dog")
    copies.text(tmp_path / "audio" / "test" / "Y-bb.flac", "rain")
    source = open_benchmark(f"audiocaps:{tmp_path}")
    assert [source.key(i) for i in range(len(source))] == ["aaa_30", "-bb_5", "ccc_9"]
    assert source.read(0).texts == ("A dog, barking", "Barks")
    assert source.read(1).media == {"audio": b"rain"}
    with pytest.raises(BadSample, match="missing file"):
        source.read(2)


def test_clotho(tmp_path: Path) -> None:
    names = [f"caption_{number}" for number in range(1, 6)]
    header, row = ",".join(["file_name", *names]), ",".join(["a b.wav", *(f"says {name}" for name in names)])
    copies.text(tmp_path / "clotho_captions_evaluation.csv", f"{header}\n{row}\n")
    copies.text(tmp_path / "evaluation" / "a b.wav", "sound")
    sample = open_benchmark(f"clotho:{tmp_path}").read(0)
    assert sample.texts == tuple(f"says {name}" for name in names)
    assert sample.media == {"audio": b"sound"}
    copies.text(tmp_path / "clotho_captions_evaluation.csv", "file_name,caption_1\na b.wav,x\n")
    with pytest.raises(UserError, match="lacks the column 'caption_2'"):
        open_benchmark(f"clotho:{tmp_path}")


def test_librispeech(tmp_path: Path) -> None:
    chapter = tmp_path / "LibriSpeech" / "test-other" / "1688" / "142285"
    copies.text(chapter / "1688-142285.trans.txt", "1688-142285-0000 THERE'S IRON\n1688-142285-0001 A WORD\n")
    for number in (0, 1):
        copies.text(chapter / f"1688-142285-{number:04d}.flac", str(number))
    source = open_benchmark(f"librispeech/test-other:{tmp_path}")
    assert [source.read(i).texts for i in range(2)] == [("THERE'S IRON",), ("A WORD",)]
    assert source.read(1).media == {"audio": b"1"}
    assert source.fields(0) == {"speaker": "1688", "chapter": "142285"}
    assert source.evaluation == "transcription"


def test_fingerprint_names_the_samples_and_revision_their_content(tmp_path: Path) -> None:
    copies.coco(tmp_path)
    first = open_benchmark(f"coco:{tmp_path}")
    path = tmp_path / "dataset_coco.json"
    path.write_text(path.read_text().replace("A red bus", "A blue bus"))
    second = open_benchmark(f"coco:{tmp_path}")
    assert first.fingerprint == second.fingerprint
    assert revision(first) != revision(second)
    before = revision(second)
    copies.picture(tmp_path / second.key(0), 9)
    assert revision(second) != before


def test_data_files_name_their_source_and_fit() -> None:
    for path in ASSETS.glob("*.json"):
        data = published(path.stem)
        assert path.stem in BENCHMARKS
        assert "https://" in data["source"]
        assert len(data.get("folders", data.get("classes", ()))) == len(data.get("classes", ()))
    full = published("imagenet")
    assert len(full["wnids"]) == len(full["classes"]) == 1000
    for name in ("imagenet-a", "imagenet-r"):
        wnids = published(name)["wnids"]
        assert len(wnids) == 200
        assert wnids == [wnid for wnid in full["wnids"] if wnid in wnids]


def test_vqa_v2_questions_with_ten_answers(tmp_path: Path) -> None:
    asked = copies.vqav2(tmp_path)
    source = open_benchmark(f"vqav2:{tmp_path}")
    assert source.evaluation == "vqa"
    assert [(q.text, list(q.answers)) for q in questions_of(source)] == asked
    assert [source.key(i) for i in range(3)] == ["4000", "4001", "4100"]
    assert [source.fields(i)["kind"] for i in range(3)] == ["other", "number", "yes/no"]
    assert len({source.fields(i)["picture"] for i in range(3)}) == 2
    sample = source.read(2)
    assert sample.texts == ("Is it red?",)
    assert decode_image(sample.media["image"]).shape[0] == 3


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": 3}', "lacks the list 'questions'"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", '{"questions": [{"question": "x"}]}', "'question_id'"),
        ("v2_OpenEnded_mscoco_val2014_questions.json", "{", "not valid JSON"),
        ("v2_mscoco_val2014_annotations.json", '{"annotations": []}', "a question lacks KeyError"),
        ("v2_mscoco_val2014_annotations.json", '{"annotations": [3]}', "lacks the list 'annotations'"),
    ],
)
def test_damaged_vqa_v2_files_are_told(tmp_path: Path, name: str, damage: str, message: str) -> None:
    copies.vqav2(tmp_path)
    (tmp_path / name).write_text(damage)
    with pytest.raises(UserError, match=message) as error:
        open_benchmark(f"vqav2:{tmp_path}")
    assert "\n" not in str(error.value)


def test_vqa_v2_without_its_pictures_is_told(tmp_path: Path) -> None:
    copies.vqav2(tmp_path)
    shutil.rmtree(tmp_path / "val2014")
    with pytest.raises(UserError, match="none of its pictures is there"):
        open_benchmark(f"vqav2:{tmp_path}")
