"""Evaluation sets hold what CLIP_benchmark and torchvision read from the same copy, and give the same figures."""

import io
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import benchmark_copies as copies
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.datasets import builder as peer
from PIL import Image
from torch import Tensor, nn

from mm.data.benchmarks import open_benchmark
from mm.data.benchmarks.names import ASSETS, published, vocabulary
from mm.evaluation.compositional import pair_scores, sugarcrepe, winoground
from mm.evaluation.retrieval import retrieval
from mm.evaluation.zero_shot import class_vectors, zero_shot


@pytest.fixture(autouse=True)
def copies_need_not_be_the_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision checks the digests of some files, those of the training half too; a tiny copy has others."""
    for module in ("cifar", "mnist", "stl10", "svhn", "flowers102"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


def peer_set(name: str, root: Path, split: str = "test", task: str = "zeroshot_classification") -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="split argument ignored", category=UserWarning)
        return peer.build_dataset(name, root=str(root), split=split, download=False, task=task)


def content(picture: Image.Image) -> bytes:
    return np.asarray(picture.convert("RGB")).tobytes()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


NAMES = {
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "mnist": "mnist",
    "stl10": "stl10",
    "food101": "food101",
    "pets": "pets",
    "flowers": "flowers",
    "cars": "cars",
    "aircraft": "fgvc_aircraft",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "caltech101": "caltech101",
    "country211": "country211",
    "rendered-sst2": "renderedsst2",
    "gtsrb": "gtsrb",
    "sun397": "sun397",
    "fer2013": "fer2013",
    "imagenet": "imagenet1k-unverified",
    "imagenet-a": "imagenet-a",
    "imagenet-r": "imagenet-r",
    "imagenet-sketch": "imagenet_sketch",
    "imagenet-v2": "imagenetv2",
    "objectnet": "objectnet",
}
"""Our names of the sets that CLIP_benchmark reads from disk, and its own."""


def whole_imagenet(folder: Path) -> None:
    copies.class_folders(folder, published("imagenet")["wnids"], ".JPEG")


def fer_folders(folder: Path) -> None:
    copies.class_folders(folder / "test", vocabulary("fer2013").folders or ())


def v2_where_the_peer_looks(folder: Path) -> None:
    copies.imagenet_v2(folder)
    (folder / "imagenetv2-matched-frequency-format-val").rename(folder / "ImageNetV2-matched-frequency")


def objectnet_with_the_peers_files(folder: Path) -> None:
    copies.objectnet(folder)
    for path in (folder / "objectnet-1.0" / "mappings").iterdir():
        path.rename(folder / path.name)
    names = ["banana", "folding chair", "rocking chair, rocker", "television, television system"]
    copies.text(folder / "imagenet_to_label_2012_v2", "\n".join(names))
    copies.text(folder / "pytorch_to_imagenet_2012_id.json", json.dumps({str(number): number for number in range(4)}))


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "imagenet": lambda folder: whole_imagenet(folder / "val"),
    "imagenet-sketch": whole_imagenet,
    "imagenet-v2": v2_where_the_peer_looks,
    "objectnet": objectnet_with_the_peers_files,
    "fer2013": fer_folders,
}
"""Copies that hold every class, or that lie where the peer looks for them."""


@pytest.mark.parametrize("name", NAMES)
def test_classes_prompts_labels_and_pictures(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer.imagenetv2, "V2_DATASET_SIZE", 4)
    SPECIAL.get(name, copies.LABELLED.get(name, lambda folder: None))(tmp_path)
    theirs = peer_set(NAMES[name], tmp_path / name if name in ("imagenet-a", "imagenet-r") else tmp_path)
    ours = open_benchmark(f"{name}:{tmp_path}")
    assert ours.task is not None
    assert list(ours.task.classes) == list(theirs.classes)
    assert list(ours.templates) == [template.replace("{c}", "{}") for template in theirs.templates]
    index = ours.task.index()
    in_ours = [(content(opened(ours.read(i).media["image"])), index[ours.fields(i)["cls"]]) for i in range(len(ours))]
    in_theirs = [(content(picture), int(label)) for picture, label in (theirs[i] for i in range(len(theirs)))]
    assert Counter(in_ours) == Counter(in_theirs)
    if name not in ("sun397", "imagenet-v2"):  # the peer takes their files in the order of the disk
        assert in_ours == in_theirs


def test_svhn_equals_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets import SVHN

    copies.svhn(tmp_path)
    theirs, ours = SVHN(str(tmp_path), split="test"), open_benchmark(f"svhn:{tmp_path}")
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        picture, label = theirs[i]
        assert content(opened(ours.read(i).media["image"])) == content(picture)
        assert ours.fields(i)["cls"] == vocabulary("svhn").classes[label]


def test_data_files_equal_the_installed_lists() -> None:
    from open_clip import zero_shot_metadata

    folder = Path(peer.__file__).parent
    names = json.loads((folder / "en_classnames.json").read_text())
    prompts = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    imagenet = published("imagenet")
    assert imagenet["classes"] == list(zero_shot_metadata.IMAGENET_CLASSNAMES)
    for key, lambdas in (("templates", "OPENAI_IMAGENET_TEMPLATES"), ("simple_templates", "SIMPLE_IMAGENET_TEMPLATES")):
        assert imagenet[key] == [template("{}") for template in getattr(zero_shot_metadata, lambdas)]
    assert [len(imagenet["templates"]), len(imagenet["simple_templates"])] == [80, 7]
    assert imagenet["wnids"] == list(peer.all_imagenet_wordnet_ids)
    theirs = {"aircraft": "fgvc_aircraft", "rendered-sst2": "renderedsst2", "imagenet": "imagenet1k"}
    compared = 0
    for path in sorted(ASSETS.glob("*.json")):
        data, key = published(path.stem), theirs.get(path.stem, path.stem)
        if key in prompts:
            assert data["templates"] == [template.replace("{c}", "{}") for template in prompts[key]], path.stem
            compared += 1
        if key in names:
            assert data["classes"] == names[key], path.stem
    assert compared == 20


class Fake(nn.Module):
    """An image and a text encoder of one random projection each."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.image = torch.randn(3 * 16 * 16, 24, generator=random)
        self.text = torch.randn(256, 24, generator=random)

    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.image

    def encode_text(self, counts: Tensor) -> Tensor:
        return counts @ self.text


def letters(texts: list[str]) -> Tensor:
    """A text as the share that each pair of neighbouring letters has of it, in 256 bins."""
    rows = torch.zeros(len(texts), 256)
    for row, text in zip(rows, texts, strict=True):
        for first, second in pairwise(text):
            row[(31 * ord(first) + ord(second)) % 256] += 1 / len(text)
    return rows


def pixels(picture: Image.Image) -> Tensor:
    small = np.array(picture.convert("RGB").resize((16, 16)))
    return torch.from_numpy(small).permute(2, 0, 1).float() / 128 - 1


MODEL = Fake()


def image_vectors(source: Any) -> Tensor:
    images = torch.stack([pixels(opened(source.read(i).media["image"])) for i in range(len(source))])
    return F.normalize(MODEL.encode_image(images), dim=1)


def text_vectors(texts: list[str]) -> Tensor:
    return F.normalize(MODEL.encode_text(letters(texts)), dim=1)


def test_zero_shot_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clip_benchmark.metrics import zeroshot_classification

    # the peer calls float() on an array of one number, which newer versions of NumPy refuse
    monkeypatch.setattr(zeroshot_classification, "float", lambda array: array.item(), raising=False)
    copies.class_folders(tmp_path / "eurosat" / "2750", vocabulary("eurosat").folders or (), each=12)
    theirs = peer_set("eurosat", tmp_path)
    theirs.transform = pixels
    loader = torch.utils.data.DataLoader(theirs, batch_size=32)
    figures = zeroshot_classification.evaluate(MODEL, loader, letters, theirs.classes, theirs.templates, "cpu", amp=False)
    source = open_benchmark(f"eurosat:{tmp_path}")
    assert source.task is not None
    index = source.task.index()
    labels = torch.tensor([index[source.fields(i)["cls"]] for i in range(len(source))])
    classes = class_vectors(text_vectors, source.task.classes, source.templates)
    ours = zero_shot(image_vectors(source), classes, labels, resamples=5).metrics
    assert 0 < ours["top1"].value < ours["top5"].value < 1
    for name, key in (("top1", "acc1"), ("top5", "acc5"), ("mean_per_class", "mean_per_class_recall")):
        assert ours[name].value == pytest.approx(figures[key], abs=1e-7)


def test_retrieval_figures_with_several_captions(tmp_path: Path) -> None:
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    captions = [[f"{word * (n % 3)} picture {n} {k * n}" for k, word in enumerate("abcdefg"[: 5 + n % 3])] for n in range(40)]
    copies.flickr30k(tmp_path, captions, place="")
    copies.flickr30k_peer(tmp_path, captions)
    source = open_benchmark(f"flickr30k:{tmp_path}")
    theirs = peer_set("flickr30k", tmp_path, task="zeroshot_retrieval")
    theirs.transform = pixels
    loader = torch.utils.data.DataLoader(theirs, batch_size=16, collate_fn=peer.image_captions_collate_fn)
    figures = evaluate(MODEL, loader, letters, "cpu", amp=False, recall_k_list=[1, 5, 10])
    texts = [source.read(i).texts for i in range(len(source))]
    owner = torch.tensor([i for i, own in enumerate(texts) for _ in own])
    ours = retrieval(image_vectors(source), text_vectors([text for own in texts for text in own]), owner, resamples=5)
    for k in (1, 5, 10):
        assert ours.metrics[f"text_to_image_r{k}"].value == pytest.approx(figures[f"image_retrieval_recall@{k}"], abs=1e-7)
        assert ours.metrics[f"image_to_text_r{k}"].value == pytest.approx(figures[f"text_retrieval_recall@{k}"], abs=1e-7)
    assert 0 < ours.metrics["image_to_text_r1"].value < ours.metrics["image_to_text_r10"].value < 1


def selection_batches(source: Any, images: int) -> Iterator[tuple[Tensor, list[list[str]]]]:
    """What the peer's loader gives: examples of one or two pictures with two captions."""
    for start in range(0, len(source), images):
        samples = [source.read(i) for i in range(start, start + images)]
        pictures = torch.stack([pixels(opened(sample.media["image"])) for sample in samples])
        captions = [sample.texts[0] for sample in samples] + ([samples[0].fields["negative"]] if images == 1 else [])
        yield pictures[None], [captions]


def test_winoground_figures(tmp_path: Path) -> None:
    from clip_benchmark.metrics.image_caption_selection import evaluate

    copies.winoground(tmp_path, [(f"{n} on a {n * n}", f"{n * n} a on {n}") for n in range(60)])
    source = open_benchmark(f"winoground:{tmp_path}")
    figures = evaluate(MODEL, selection_batches(source, 2), letters, "cpu", amp=False)
    texts = text_vectors([source.read(i).texts[0] for i in range(len(source))])
    ours = winoground(pair_scores(image_vectors(source).unflatten(0, (-1, 2)), texts.unflatten(0, (-1, 2))), resamples=5)
    for name, key in (("text_score", "text_acc"), ("image_score", "image_acc"), ("group_score", "acc")):
        assert ours.metrics[name].value == pytest.approx(figures[key], abs=1e-7)
        assert 0 < ours.metrics[name].value < 1


def test_sugarcrepe_figures(tmp_path: Path) -> None:
    from clip_benchmark.metrics.image_caption_selection import evaluate

    copies.sugarcrepe(tmp_path, ["add_att", "swap_obj"], range(10))
    for category in ("add_att", "swap_obj"):
        source = open_benchmark(f"sugarcrepe/{category}:{tmp_path}")
        figures = evaluate(MODEL, selection_batches(source, 1), letters, "cpu", amp=False)
        samples = [source.read(i) for i in range(len(source))]
        texts = text_vectors([text for sample in samples for text in (sample.texts[0], sample.fields["negative"])])
        scores = pair_scores(image_vectors(source)[:, None], texts.unflatten(0, (-1, 2)))[:, 0]
        ours = sugarcrepe(scores, [sample.fields["category"] for sample in samples], resamples=5)
        assert ours.metrics[f"accuracy_{category}"].value == pytest.approx(figures["text_acc"], abs=1e-7)
        assert 0 < ours.metrics["accuracy"].value < 1
