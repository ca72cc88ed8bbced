"""CLIP inference and whole evaluations against open_clip and CLIP_benchmark, on the same random weights.

    python bench/clip.py --json clip.json                    (about 20 minutes on two cores; --only text,image,... for a part)

Both sides hold ViT-B/32 or ViT-B/16 with the same random weights, written by open_clip and loaded by mm. Every case checks that
the two sides compute the same: cosine of at least 0.9995 to the peer's fp32.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import Case, arguments_parser, interleaved, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

import mm
from mm.hub import Model
from mm.nn.freeze import folded_weights
from mm.training.config import TrainConfig
from mm.training.parallel import World
from mm.training.step import Stepper, compile_parts
from mm.types import Batch

MIN_COSINE = 0.9995
BATCH = 32
PARTS = ("text", "image", "zero-shot", "retrieval", "training")


def peer(folder: Path, precision: str = "fp32") -> Any:
    """open_clip's model in one of its precisions."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}", precision=precision).eval()


@contextmanager
def checkpoint(config: Mapping[str, Any]) -> Iterator[Path]:
    """A folder with random weights of an architecture, in open_clip's own layout."""
    import open_clip
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
        state = open_clip.CLIP(**config).state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "open_clip_model.safetensors")
        yield folder


def prompts(classes: int) -> list[str]:
    """ImageNet's prompts of some classes: 80 templates each."""
    from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES

    names = IMAGENET_CLASSNAMES[:: max(1, len(IMAGENET_CLASSNAMES) // classes)][:classes]
    return [template(name) for name in names for template in OPENAI_IMAGENET_TEMPLATES]


def agree(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Refuse to report a speed at which something else was computed."""
    cosine = float(F.cosine_similarity(ours.float(), theirs.float()).min())
    assert cosine >= MIN_COSINE, f"{what}: cosine {cosine:.5f} to the peer's fp32"
    print(f"{what}: smallest cosine to the peer's fp32 {cosine:.6f}", flush=True)


@torch.no_grad()
def in_batches(function: Callable[[Any], Tensor], items: Any) -> Tensor:
    return torch.cat([function(items[start : start + BATCH]) for start in range(0, len(items), BATCH)])


def variants(folder: Path) -> dict[str, Model]:
    """Ours as it comes, in bf16, and compiled."""
    with_bf16 = mm.load(folder, device="cpu", precision="bf16")
    return {
        "fp32": mm.load(folder, device="cpu", precision="fp32"),
        "bf16": with_bf16,
        "bf16 compiled": mm.load(folder, device="cpu", precision="bf16").compile(BATCH),
    }


def text_cases(folder: Path, architecture: str, repeats: int) -> list[Case]:
    """Text vectors of ImageNet prompts, tokenization included, as when a classifier is built."""
    import open_clip

    texts = prompts(8)
    tokenizer = open_clip.get_tokenizer(architecture)
    models = variants(folder)
    peers = {"fp32": peer(folder), "bf16": peer(folder, "bf16")}
    calls = {
        name: (lambda model=model: in_batches(lambda part: model.encode_text(tokenizer(part), normalize=True), texts))
        for name, model in peers.items()
    }
    reference = calls["fp32"]()
    cases = []
    for name, model in models.items():
        call = lambda model=model: model.embed_texts(texts, batch_size=BATCH)  # noqa: E731
        agree(call(), reference, f"{architecture} text, ours {name}")
        for other, theirs in calls.items():
            times = interleaved(call, theirs, repeats)
            rates = [len(texts) / seconds for seconds in times]
            cases.append(
                Case(f"{architecture} text, ImageNet prompts, ours {name}", f"open_clip {other}", *rates, "texts/s", True)
            )
    return cases


def with_folded_weights(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The peer gets what ours has: weights as constants of its compiled code."""

    def folded() -> Tensor:
        with folded_weights(torch.device("cpu")):
            return call()

    return folded


def image_cases(folder: Path, architecture: str, repeats: int) -> list[Case]:
    """Picture vectors of prepared pixels, batch 32."""
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    models = variants(folder)
    spec = models["fp32"].config.image
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    normalised = (pixels / 255 - mean) / std
    compiled = peer(folder, "bf16")
    compiled.visual.compile()
    calls: dict[str, Callable[[], Tensor]] = {}
    for name, model in {"fp32": peer(folder), "bf16": peer(folder, "bf16"), "bf16, compiled by hand": compiled}.items():
        inputs = normalised if name == "fp32" else normalised.bfloat16()
        calls[name] = lambda model=model, inputs=inputs: model.encode_image(inputs, normalize=True)
        calls[name] = torch.no_grad()(with_folded_weights(calls[name]) if "compiled" in name else calls[name])
    reference = calls["fp32"]()
    calls["bf16, compiled by hand"]()
    cases = []
    for name, model in models.items():
        call = lambda model=model: model.embed_pixels(pixels)  # noqa: E731
        agree(call(), reference, f"{architecture} pictures, ours {name}")
        for other, theirs in calls.items():
            times = interleaved(call, theirs, repeats)
            rates = [BATCH / seconds for seconds in times]
            cases.append(
                Case(f"{architecture} pictures, batch {BATCH}, ours {name}", f"open_clip {other}", *rates, "pictures/s", True)
            )
    return cases


def labelled_folder(root: Path, count: int, classes: int) -> list[str]:
    """JPEG pictures of 500 x 375 in class folders; returns the class names."""
    from PIL import Image

    random = np.random.default_rng(0)
    names = [f"thing {number:03d}" for number in range(classes)]
    for number in range(count):
        folder = root / names[number % classes]
        folder.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=85)
    return names


def whole_evaluations(what: str, ours: Callable[[str], float], theirs: Callable[[str], float]) -> list[Case]:
    """Seconds of a whole evaluation in each precision, ours against CLIP_benchmark."""
    peers = {"CLIP_benchmark fp32": theirs("fp32"), "CLIP_benchmark with its amp": theirs("amp")}
    own = {precision: ours(precision) for precision in ("fp32", "bf16")}
    return [
        Case(f"{what}, ours {precision}", name, seconds, other, "s")
        for precision, seconds in own.items()
        for name, other in peers.items()
    ]


def zero_shot_case(folder: Path, architecture: str, pictures: int) -> list[Case]:
    """A whole evaluation from files: build the classifier of 20 classes with 80 templates, encode all pictures, score."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_classification
    from open_clip import OPENAI_IMAGENET_TEMPLATES
    from torchvision.datasets import ImageFolder

    # its own counts through float() of an array of one number, which numpy has ceased to accept
    zeroshot_classification.accuracy = lambda output, target, topk: [
        (output.topk(k).indices == target[:, None]).any(1).float().mean().item() for k in topk
    ]
    with tempfile.TemporaryDirectory() as name:
        names = labelled_folder(Path(name), pictures, 20)
        templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]

        def theirs(precision: str) -> float:
            start = time.perf_counter()
            model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", precision=precision)
            model.eval()
            loader = torch.utils.data.DataLoader(ImageFolder(name, transform), batch_size=64, num_workers=2)
            prompted = [template.replace("{}", "{c}") for template in templates]
            tokenizer = open_clip.get_tokenizer(architecture)
            figures = zeroshot_classification.evaluate(model, loader, tokenizer, names, prompted, "cpu", amp=precision == "amp")
            return time.perf_counter() - start if figures["acc1"] >= 0 else 0.0

        def ours(precision: str) -> float:
            start = time.perf_counter()
            model = mm.load(folder, device="cpu", precision=precision)
            mm.evaluate("zero-shot", model, name, classes=names, templates=templates, baseline="none", cache=False)
            return time.perf_counter() - start

        what = f"{architecture} zero-shot, {pictures} JPEG, 20 classes x 80 templates, model loading included"
        return whole_evaluations(what, ours, theirs)


def retrieval_case(folder: Path, architecture: str, pictures: int) -> list[Case]:
    """A whole retrieval evaluation from files: five captions a picture, R@1, R@5, R@10 both ways."""
    import open_clip
    from clip_benchmark.metrics import zeroshot_retrieval
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        labelled_folder(root, pictures, 1)
        files = sorted(root.rglob("*.jpg"))
        captions = {
            file: [f"view {view} of picture {row}, which shows something" for view in range(5)]
            for row, file in enumerate(files)
        }
        lines = [json.dumps({"file": str(file), "caption": caption}) for file, texts in captions.items() for caption in texts]
        (root / "captions.jsonl").write_text("\n".join(lines))

        def theirs(precision: str) -> float:
            start = time.perf_counter()
            model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", precision=precision)
            model.eval()
            items = [(transform(Image.open(file).convert("RGB")), captions[file]) for file in files]
            batches = [items[at : at + 64] for at in range(0, len(items), 64)]
            loader = [(torch.stack([image for image, _ in part]), [texts for _, texts in part]) for part in batches]
            tokenizer = open_clip.get_tokenizer(architecture)
            zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=precision == "amp", recall_k_list=[1, 5, 10])
            return time.perf_counter() - start

        def ours(precision: str) -> float:
            start = time.perf_counter()
            model = mm.load(folder, device="cpu", precision=precision)
            mm.evaluate("retrieval", model, str(root / "captions.jsonl"), cache=False)
            return time.perf_counter() - start

        what = f"{architecture} retrieval, {pictures} JPEG with 5 captions each, model loading included"
        return whole_evaluations(what, ours, theirs)


SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 384,
    "vision_cfg": {"image_size": 96, "layers": 12, "width": 384, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 6},
}
"""ViT-S/16 at 96 px with a text tower of 6 layers."""
TRAINING_BATCH = 256
MAX_LOSS_DIFFERENCE = 2e-2
"""Of the losses of the first steps: bf16 against fp32."""


def training_cases(repeats: int) -> list[Case]:
    """A whole training step of a small CLIP, tokenization included, pictures ready: forward, loss, backward, AdamW."""
    import open_clip

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (TRAINING_BATCH, 3, 96, 96), dtype=torch.uint8, generator=generator)
    captions = prompts(TRAINING_BATCH)[:: len(prompts(TRAINING_BATCH)) // TRAINING_BATCH][:TRAINING_BATCH]
    settings = {"lr": 1e-4, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}

    def theirs(folder: Path, amp: bool) -> Callable[[], float]:
        model, tokenizer = open_clip.create_model(f"local-dir:{folder}").train(), open_clip.get_tokenizer("ViT-B-32")
        optimizer, loss = torch.optim.AdamW(model.parameters(), **settings), open_clip.ClipLoss()
        mean, std = (
            torch.tensor(value).view(3, 1, 1) for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        )
        normalised = (pixels / 255 - mean) / std

        def step() -> float:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                total = loss(*model(normalised, tokenizer(captions)))
            total.backward()
            optimizer.step()
            model.logit_scale.data.clamp_(0, 4.6052)
            return total.item()

        return step

    def ours(folder: Path, precision: str, compiled: bool) -> Callable[[], float]:
        model = mm.load(folder, device="cpu", precision="fp32")
        config = TrainConfig(**settings, precision=precision, clip_norm=0, ema_decay=0, schedule="constant", warmup_steps=0)
        stepper = Stepper(model.system.train(), config, World(0, 1, torch.device("cpu")))
        if compiled:
            compile_parts(model.system)
        ids, steps = tuple(map(str, range(TRAINING_BATCH))), itertools.count()
        return lambda: stepper.step(Batch(ids, pixels, model.processor.text(captions)), next(steps)).loss

    with checkpoint(SMALL_CLIP) as folder:
        peers = {"fp32": theirs(folder, amp=False), "amp": theirs(folder, amp=True)}
        own = {
            "fp32": ours(folder, "fp32", compiled=False),
            "bf16": ours(folder, "bf16", compiled=False),
            "bf16 compiled": ours(folder, "bf16", compiled=True),
        }
        first = {name: [step() for _ in range(2)] for name, step in (peers | {f"ours {n}": s for n, s in own.items()}).items()}
        print("losses of the first steps:", first, flush=True)
        cases = []
        for name, step in own.items():
            difference = max(abs(a - b) for a, b in zip(first[f"ours {name}"], first["fp32"], strict=True))
            assert difference <= MAX_LOSS_DIFFERENCE, f"ours {name}: losses {first}"
            for peer_name, other in peers.items():
                rates = [TRAINING_BATCH / seconds for seconds in interleaved(step, other, repeats)]
                what = f"training step of ViT-S/16 at 96 px, batch {TRAINING_BATCH}, ours {name}"
                cases.append(Case(what, f"open_clip {peer_name}", *rates, "samples/s", True))
    return cases


def main() -> None:
    parser = arguments_parser(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {', '.join(PARTS)}")
    parser.add_argument("--architectures", default="ViT-B-32,ViT-B-16")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures of the whole evaluations")
    options: argparse.Namespace = parser.parse_args()
    import open_clip

    warnings.simplefilter("ignore")
    parts = options.only.split(",")
    cases: list[Case] = []
    for number, architecture in enumerate(options.architectures.split(",")):
        with checkpoint(open_clip.get_model_config(architecture)) as folder:
            if "text" in parts and number == 0:  # the text towers of both are the same
                cases += text_cases(folder, architecture, options.repeats)
            if "image" in parts:
                cases += image_cases(folder, architecture, options.repeats)
            if "zero-shot" in parts and number == 0:
                cases += zero_shot_case(folder, architecture, options.pictures)
            if "retrieval" in parts and number == 0:
                cases += retrieval_case(folder, architecture, options.pictures // 4)
    if "training" in parts:
        cases += training_cases(options.repeats)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    report(cases, options.json)


if __name__ == "__main__":
    main()
