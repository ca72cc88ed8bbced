"""Tiny copies of evaluation sets in exactly the layouts that they are distributed in."""

import csv
import json
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mm.data.benchmarks.names import published, vocabulary

SIDE = 12


def picture(path: Path, seed: int) -> None:
    """A random picture in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE + 2, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG" if path.suffix == ".JPEG" else None)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def class_folders(root: Path, folders: Sequence[str], suffix: str = ".jpg", each: int = 1) -> list[int]:
    """``each`` pictures a folder; returns their classes in order."""
    for number, folder in enumerate(folders):
        for copy in range(each):
            picture(root / folder / f"{folder}_{copy:03d}{suffix}", number * each + copy)
    return [number for number in range(len(folders)) for _ in range(each)]


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def imagenet(folder: Path) -> list[int]:
    class_folders(folder / "val", published("imagenet")["wnids"][655:660], ".JPEG", each=2)
    return [655, 655, 656, 656, 657, 657, 658, 658, 659, 659]


def imagenet_v2(folder: Path) -> list[int]:
    root = folder / "imagenetv2-matched-frequency-format-val"
    class_folders(root, ["0", "10", "2", "999"], ".jpeg")
    return [0, 10, 2, 999]


def imagenet_a(folder: Path) -> list[int]:
    return class_folders(folder / "imagenet-a", published("imagenet-a")["wnids"])


def imagenet_r(folder: Path) -> list[int]:
    return class_folders(folder / "imagenet-r", published("imagenet-r")["wnids"])


def imagenet_sketch(folder: Path) -> list[int]:
    return class_folders(folder / "sketch", published("imagenet")["wnids"][:7], ".JPEG")


def objectnet(folder: Path) -> list[int]:
    names = {"air_freshener": "Air freshener", "banana": "Banana", "chair": "Chair", "tv": "TV"}
    class_folders(folder / "objectnet-1.0" / "images", list(names), ".png", each=2)
    mappings = folder / "objectnet-1.0" / "mappings"
    text(mappings / "folder_to_objectnet_label.json", json.dumps(names))
    shared = {"Banana": "banana", "Chair": "folding chair; rocking chair, rocker", "TV": "television, television system"}
    text(mappings / "objectnet_to_imagenet_1k.json", json.dumps(shared))
    return [0, 0, 1, 1, 2, 2]


def cifar10_binary(folder: Path) -> list[int]:
    labels = [3, 9, 0, 0]
    rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels(4, 3072)], axis=1)
    (folder / "cifar-10-batches-bin").mkdir()
    (folder / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(rows.tobytes())
    return labels


def cifar100_binary(folder: Path) -> list[int]:
    labels = [99, 1, 50]
    rows = np.concatenate([np.array([[7, fine] for fine in labels], np.uint8), pixels(3, 3072)], axis=1)
    (folder / "cifar-100-binary").mkdir()
    (folder / "cifar-100-binary" / "test.bin").write_bytes(rows.tobytes())
    return labels


def python2_batch(data: np.ndarray, key: str, labels: Sequence[int]) -> bytes:
    """What the authors' Python 2 wrote: protocol 2, text and bytes alike as BINSTRING, the array as reconstruct and state."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value if len(value) > 255 else b"U" + bytes([len(value)]) + value

    number = lambda value: b"M" + value.to_bytes(2, "little")  # noqa: E731
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01"
    array += number(data.shape[0]) + number(data.shape[1]) + b"\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\x09"
    array += b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + string(data.tobytes()) + b"tb"
    items = string(b"batch_label") + b"q\x01" + string(b"testing batch 1 of 1") + string(key.encode())
    items += b"]q\x02(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e" + string(b"data") + array
    return b"\x80\x02}q\x00(" + items + b"u."


def cifar10(folder: Path) -> list[int]:
    base, labels = folder / "cifar-10-batches-py", [8, 8, 1, 5, 2]
    base.mkdir()
    (base / "test_batch").write_bytes(python2_batch(pixels(5, 3072), "labels", labels))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(vocabulary("cifar10").classes)}, 2))
    return labels


def cifar100(folder: Path) -> list[int]:
    base, labels = folder / "cifar-100-python", [49, 33, 99]
    base.mkdir()
    batch = {"data": pixels(3, 3072), "fine_labels": labels, "coarse_labels": [0, 1, 2], "filenames": ["a", "b", "c"]}
    (base / "test").write_bytes(pickle.dumps(batch, 4))
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": list(vocabulary("cifar100").classes)}, 2))
    return labels


def mnist(folder: Path) -> list[int]:
    raw, labels = folder / "MNIST" / "raw", [7, 2, 1, 0]
    raw.mkdir(parents=True)
    for part in ("t10k", "train"):
        header = b"".join(size.to_bytes(4, "big") for size in (0x803, 4, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels(4, 28, 28).tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes((0x801).to_bytes(4, "big") + (4).to_bytes(4, "big") + bytes(labels))
    return labels


def stl10(folder: Path) -> list[int]:
    base, labels = folder / "stl10_binary", [0, 9, 4]
    base.mkdir()
    (base / "test_X.bin").write_bytes(pixels(3, 3, 96, 96).tobytes())
    (base / "test_y.bin").write_bytes(bytes(label + 1 for label in labels))
    text(base / "class_names.txt", "\n".join(vocabulary("stl10").classes) + "\n")
    return labels


def svhn(folder: Path) -> list[int]:
    from scipy.io import savemat

    labels = [1, 0, 9]
    savemat(folder / "test_32x32.mat", {"X": pixels(3, 32, 32, 3).transpose(1, 2, 3, 0), "y": np.array([[1], [10], [9]])})
    return labels


def fer2013(folder: Path) -> list[int]:
    rows = [(3, "PublicTest"), (0, "Training"), (4, "PrivateTest"), (5, "PrivateTest"), (6, "PublicTest"), (1, "PrivateTest")]
    with (folder / "fer2013.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["emotion", "pixels", "Usage"])
        for number, (emotion, usage) in enumerate(rows):
            writer.writerow([emotion, " ".join(map(str, pixels(1, 48 * 48, seed=number)[0])), usage])
    return [3, 5, 6, 4, 1]


def food101(folder: Path) -> list[int]:
    classes = ["waffles", "apple_pie", "hot_and_sour_soup", "tacos", "ramen"]
    lists = {name: [f"{name}/{number}" for number in (3, 1)] for name in classes}
    text(folder / "food-101" / "meta" / "test.json", json.dumps(lists))
    for number, path in enumerate(path for paths in lists.values() for path in paths):
        picture(folder / "food-101" / "images" / f"{path}.jpg", number)
    return [4, 4, 0, 0, 1, 1, 3, 3, 2, 2]


def pets(folder: Path) -> list[int]:
    base = folder / "oxford-iiit-pet"
    raw = [name.replace(" ", "_") for name in vocabulary("pets").classes]
    text(base / "annotations" / "test.txt", "".join(f"{name}_7 {label} 1 1\n" for label, name in enumerate(raw, start=1)))
    for label, name in enumerate(raw):
        picture(base / "images" / f"{name}_7.jpg", label)
    return list(range(37))


def flowers(folder: Path) -> list[int]:
    from scipy.io import savemat

    base = folder / "flowers-102"
    for number in range(1, 6):
        picture(base / "jpg" / f"image_{number:05d}.jpg", number)
    savemat(base / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 5, 6]], np.uint8)})
    savemat(base / "setid.mat", {"trnid": np.array([[1]]), "valid": np.array([[2, 5]]), "tstid": np.array([[4, 3]])})
    return [4, 101]


def cars(folder: Path) -> list[int]:
    from scipy.io import savemat

    base = folder / "stanford_cars"
    names = ["AM General Hummer SUV 2000", "Audi V8 Sedan 1994", "BMW X3 SUV 2012", "Fisker Karma", "smart fortwo"]
    (base / "devkit").mkdir(parents=True)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": np.array(names, dtype=object)[None]})
    types = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
    rows = np.array([[(1, 2, 3, 4, 2, "00001.jpg"), (1, 2, 3, 4, 1, "00002.jpg"), (1, 2, 3, 4, 3, "00003.jpg")]], dtype=types)
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for number in (1, 2, 3):
        picture(base / "cars_test" / f"{number:05d}.jpg", number)
    return [1, 0, 2]


def aircraft(folder: Path) -> list[int]:
    base = folder / "fgvc-aircraft-2013b" / "data"
    text(base / "variants.txt", "707-320\nA340-600\nDC-10\nF-A-18\nModel B200\nYak-42\n")
    text(base / "images_variant_test.txt", "0000001 Yak-42\n1514522 707-320\n0747566 Model B200\n")
    for number, name in enumerate(("0000001", "1514522", "0747566")):
        picture(base / "images" / f"{name}.jpg", number)
    return [5, 0, 4]


def dtd(folder: Path) -> list[int]:
    names = vocabulary("dtd").classes
    text(folder / "dtd" / "dtd" / "labels" / "test1.txt", "".join(f"{name}/{name}_0007.jpg\n" for name in reversed(names)))
    for number, name in enumerate(names):
        picture(folder / "dtd" / "dtd" / "images" / name / f"{name}_0007.jpg", number)
    return list(reversed(range(47)))


def named_folders(name: str, place: str, suffix: str = ".jpg") -> Callable[[Path], list[int]]:
    return lambda folder: class_folders(folder / place, vocabulary(name).folders or (), suffix)


def caltech101(folder: Path) -> list[int]:
    folders = vocabulary("caltech101").folders or ()
    for number, name in enumerate(folders):
        picture(folder / "caltech101" / "101_ObjectCategories" / name / "image_0001.jpg", number)
    return list(range(len(folders)))


def gtsrb(folder: Path) -> list[int]:
    images = folder / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    labels = [16, 1, 42]
    rows = "".join(f"{number:05d}.ppm;53;54;6;5;48;49;{label}\n" for number, label in enumerate(labels))
    text(folder / "gtsrb" / "GT-final_test.csv", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n" + rows)
    for number in range(3):
        picture(images / f"{number:05d}.ppm", number)
    return labels


def sun397(folder: Path) -> list[int]:
    classes = ["a/abbey", "a/apartment_building/outdoor", "y/youth_hostel", "z/zen_garden", "z/zoo"]
    text(folder / "SUN397" / "ClassName.txt", "".join(f"/{name}\n" for name in classes))
    for number, name in enumerate(classes):
        picture(folder / "SUN397" / name / f"sun_{number}.jpg", number)
    return list(range(5))


def esc50(folder: Path) -> list[int]:
    rows = [("1-100032-A-0.wav", 1, 0, "dog"), ("5-9032-A-49.wav", 5, 49, "hand_saw"), ("2-1-B-11.wav", 2, 11, "sea_waves")]
    lines = [f"{name},{fold},{target},{category},False,1,A\n" for name, fold, target, category in rows]
    text(folder / "meta" / "esc50.csv", "filename,fold,target,category,esc10,src_file,take\n" + "".join(lines))
    for name, *_ in rows:
        text(folder / "audio" / name, name)
    return [0, 49, 11]


LABELLED: dict[str, Callable[[Path], list[int]]] = {
    "imagenet": imagenet,
    "imagenet-v2": imagenet_v2,
    "imagenet-a": imagenet_a,
    "imagenet-r": imagenet_r,
    "imagenet-sketch": imagenet_sketch,
    "objectnet": objectnet,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "mnist": mnist,
    "stl10": stl10,
    "svhn": svhn,
    "fer2013": fer2013,
    "food101": food101,
    "pets": pets,
    "flowers": flowers,
    "cars": cars,
    "aircraft": aircraft,
    "dtd": dtd,
    "eurosat": named_folders("eurosat", "eurosat/2750"),
    "caltech101": caltech101,
    "country211": named_folders("country211", "country211/test"),
    "rendered-sst2": named_folders("rendered-sst2", "rendered-sst2/test", ".png"),
    "gtsrb": gtsrb,
    "sun397": sun397,
    "esc50": esc50,
}
"""Writes a copy of each set into a folder and returns the class of each sample, in the set's own order."""

CAPTIONS = [
    ["A man rides a horse, fast.", "Two  words", "a third", "four", "five", "a sixth caption"],
    ["A cat on a mat.", "A mat under a cat.", "cat", "mat", "a grey cat"],
    ["A red bus", "a bus", "bus, red", "the bus", "one bus in the street"],
]
"""Captions of the test pictures of the caption sets; the first has six, as some of COCO's have."""


def coco(folder: Path) -> None:
    entries = []
    for number, captions in enumerate([*CAPTIONS, ["of another split"]]):
        name = f"COCO_val2014_{number + 40:012d}.jpg"
        picture(folder / "val2014" / name, number)
        sentences = [{"raw": caption, "tokens": caption.split(), "sentid": i} for i, caption in enumerate(captions)]
        split = "test" if number < len(CAPTIONS) else "restval"
        entries.append({"filepath": "val2014", "filename": name, "cocoid": number + 40, "split": split, "sentences": sentences})
    text(folder / "dataset_coco.json", json.dumps({"dataset": "coco", "images": entries}))


def coco_peer(folder: Path) -> None:
    """The annotation file of CLIP_benchmark for the copy that `coco` writes."""
    images = [{"id": n + 40, "file_name": f"COCO_val2014_{n + 40:012d}.jpg"} for n in range(len(CAPTIONS))]
    pairs = [(n + 40, caption) for n, captions in enumerate(CAPTIONS) for caption in captions]
    annotations = [{"id": i, "image_id": image, "caption": caption} for i, (image, caption) in enumerate(pairs)]
    text(folder / "coco_test_karpathy.json", json.dumps({"images": images, "annotations": annotations}))


def flickr30k(folder: Path, captions_of: Sequence[Sequence[str]] = CAPTIONS, place: str = "flickr30k-images") -> None:
    entries = []
    for number, captions in enumerate(captions_of):
        picture(folder / place / f"{number}07.jpg", number)
        entries.append(
            {"filename": f"{number}07.jpg", "split": "test", "sentences": [{"raw": caption} for caption in captions]}
        )
    text(folder / "dataset_flickr30k.json", json.dumps({"dataset": "flickr30k", "images": entries}))


def flickr30k_peer(folder: Path, captions_of: Sequence[Sequence[str]] = CAPTIONS) -> None:
    """The annotation file of CLIP_benchmark, whose pictures lie beside it."""
    lines = [f"{n}07.jpg,{caption}\n" for n, captions in enumerate(captions_of) for caption in captions]
    text(folder / "flickr30k_test_karpathy.txt", "image,caption\n" + "".join(lines))


def vqav2(folder: Path) -> list[tuple[str, list[str]]]:
    """Two questions about one picture and one about another; returns them with their ten answers."""
    asked = [("What is it?", ["dog"] * 8 + ["a dog", "cat"]), ("How many?", ["2"] * 10), ("Is it red?", ["no"] * 9 + ["yes"])]
    for number in (40, 41):
        picture(folder / "val2014" / f"COCO_val2014_{number:012d}.jpg", number)
    ids = [(4000, 40), (4001, 40), (4100, 41)]
    pairs = list(zip(asked, ids, ("other", "number", "yes/no"), strict=True))
    questions = [{"image_id": image, "question": words, "question_id": id} for (words, _), (id, image), _ in pairs]
    annotations = [
        {
            "question_type": words.partition(" ")[0].lower(),
            "multiple_choice_answer": answers[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)],
            "image_id": image,
            "answer_type": kind,
            "question_id": id,
        }
        for (words, answers), (id, image), kind in reversed(pairs)
    ]
    text(folder / "v2_OpenEnded_mscoco_val2014_questions.json", json.dumps({"info": {}, "questions": questions}))
    text(folder / "v2_mscoco_val2014_annotations.json", json.dumps({"annotations": annotations}))
    return asked


PAIRS = [("a cat on a dog", "a dog on a cat"), ("old young", "young old")]


def winoground(folder: Path, pairs: Sequence[tuple[str, str]] = PAIRS) -> None:
    rows = []
    for number, (first, second) in enumerate(pairs):
        images = {f"image_{side}": f"ex_{number}_img_{side}" for side in (0, 1)}
        rows.append({"id": number, **images, "caption_0": first, "caption_1": second, "collapsed_tag": "Object", "tag": "Noun"})
        for side in (0, 1):
            picture(folder / "data" / "images" / f"ex_{number}_img_{side}.png", 2 * number + side)
    text(folder / "data" / "examples.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def sugarcrepe(folder: Path, categories: Sequence[str], numbers: Sequence[int] = (0, 5)) -> None:
    for number, category in enumerate(categories):
        entries = {}
        for index in numbers:
            name = f"{number * 10 + index:012d}.jpg"
            picture(folder / "val2017" / name, number * 10 + index)
            entries[str(index)] = {"filename": name, "caption": f"right {index}", "negative_caption": f"wrong {category}"}
        text(folder / f"{category}.json", json.dumps(entries))
