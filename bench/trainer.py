"""Training CLIP by mm against open_clip's own trainer (`open_clip_train.train.train_one_epoch`), on one device, in one run.

    python bench/trainer.py --json trainer.json                       (ViT-B/16, batch 256, on the accelerator)
    python bench/trainer.py --small --device cpu --steps 2            (ViT-S/16 at 96 px, batch 64: a few minutes on two cores)

Both sides start from the same random weights, get the same batches, which lie in memory, and take whole steps: batch to the
device, forward, loss, backward, AdamW, all in bf16 by autocast. Rounds of steps alternate; medians of rounds count. The losses
of the first steps must agree. On CUDA the peak memory of a contrastive loss over 32,768 pairs is measured as well.
"""

import itertools
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from clip import SMALL_CLIP, checkpoint, prompts
from harness import MIB, Case, arguments_parser, interleaved, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

import mm
from mm.losses.contrastive import info_nce
from mm.training.config import TrainConfig
from mm.training.hardware import recognise
from mm.training.meter import Meter
from mm.training.parallel import World
from mm.training.step import Stepper, compile_parts
from mm.types import Batch

SETTINGS: Mapping[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.2}
MAX_LOSS_DIFFERENCE = 3e-2
"""Of the first two losses: sums in bf16 in another order."""
PAIRS, WIDTH = 32_768, 512


class Loader:
    """Batches as open_clip's trainer takes them: an epoch of steps over one batch in memory."""

    def __init__(self, images: Tensor, texts: Tensor, steps: int) -> None:
        self.batch, self.num_batches, self.num_samples = (images, texts), steps, steps * len(images)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.repeat(self.batch, self.num_batches)

    def __len__(self) -> int:
        return self.num_batches


def open_clip_rounds(
    folder: Path, pixels: Tensor, captions: list[str], device: torch.device, steps: int, compiled: bool
) -> Any:
    """A function that takes ``steps`` steps of open_clip's trainer, and one that gives the loss of a single one."""
    import open_clip
    from open_clip_train.train import train_one_epoch

    model = open_clip.create_model(f"local-dir:{folder}", device=device, output_dict=True)
    optimizer = torch.optim.AdamW(model.parameters(), **SETTINGS, fused=True)
    trained = torch.compile(model) if compiled else model
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    images, texts = (pixels / 255 - mean) / std, open_clip.get_tokenizer("ViT-B-16")(captions)
    if device.type == "cuda":
        images, texts = images.pin_memory(), texts.pin_memory()
    told: dict[str, float] = {}
    writer = SimpleNamespace(add_scalar=lambda name, value, _: told.__setitem__(name, value))
    arguments = Namespace(
        device=str(device),
        precision="amp_bf16",
        distill=False,
        skip_scheduler=True,
        accum_freq=1,
        grad_clip_norm=None,
        horovod=False,
        log_every_n_steps=100,
        world_size=1,
        rank=0,
        local_rank=0,
        batch_size=len(pixels),
        wandb=False,
    )

    def run(count: int) -> float:
        loader = SimpleNamespace(dataloader=Loader(images, texts, count), set_epoch=lambda _: None)
        train_one_epoch(trained, {"train": loader}, open_clip.ClipLoss(), 0, optimizer, None, None, None, arguments, writer)
        return told["train/loss"]

    return lambda: run(steps), lambda: run(1)


def our_rounds(folder: Path, pixels: Tensor, captions: list[str], device: torch.device, steps: int) -> Any:
    """The same of mm; and the FLOPs of a step."""
    model = mm.load(folder, device=str(device), precision="fp32")
    config = TrainConfig(**SETTINGS, precision="bf16", clip_norm=0, ema_decay=0, schedule="constant", warmup_steps=0)
    stepper = Stepper(model.system.train(), config, World(0, 1, device))
    pixels = pixels.pin_memory() if device.type == "cuda" else pixels
    batch = Batch(tuple(map(str, range(len(pixels)))), pixels, model.processor.text(captions))
    numbers = itertools.count()

    def run(count: int) -> float:
        return [stepper.step(batch.to(device), next(numbers)).loss for _ in range(count)][-1]

    with Meter(model.system) as meter:
        first = run(1)
    compile_parts(model.system)
    return lambda: run(steps), lambda: run(1), first, meter.cost.flops("forward", "backward")


def training(config: Mapping[str, Any], name: str, batch: int, steps: int, repeats: int, device: torch.device) -> list[Case]:
    """Rates of both sides."""
    side = config["vision_cfg"]["image_size"]
    pixels = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = prompts(batch)[: 80 * batch : 80]
    cases = []
    with checkpoint(config) as folder:
        own, one, first, flops = our_rounds(folder, pixels, captions, device, steps)
        losses = [first, one()]
        for compiled in (False, True):
            how = f"open_clip's trainer{', compiled' if compiled else ''}"
            theirs, their_one = open_clip_rounds(folder, pixels, captions, device, steps, compiled)
            expected = [their_one(), their_one()]
            difference = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
            assert difference <= MAX_LOSS_DIFFERENCE, f"losses of the first steps: ours {losses}, theirs {expected}"
            warm = own(), theirs()
            print(f"{how}: loss {warm[1]:.3f}, ours {warm[0]:.3f}", flush=True)
            ours, peer = (batch * steps / seconds for seconds in interleaved(own, theirs, repeats))
            cases.append(Case(f"training {name}, batch {batch}, bf16", how, ours, peer, "samples/s", True))
    hardware = recognise(device)
    if hardware is not None:
        for case in cases:
            used = case.ours * flops / batch / hardware.peak(torch.bfloat16)
            print(f"{case.name}: {case.ours:.1f} samples/s are {used:.1%} of the peak of {hardware.name}")
    return cases


def loss_memory() -> Case:
    """Peak memory of forward and backward pass over `PAIRS` pairs on CUDA, features not counted."""
    import open_clip

    a, b = (F.normalize(torch.randn(PAIRS, WIDTH, device="cuda"), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(50.0, device="cuda")

    def peak(loss: Callable[[], Tensor]) -> float:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss().backward()
        torch.cuda.synchronize()
        a.grad = b.grad = None
        return (torch.cuda.max_memory_allocated() - before) / MIB

    ours = peak(lambda: info_nce(a, b, scale))
    theirs = peak(lambda: open_clip.ClipLoss()(a, b, scale))
    return Case(f"contrastive loss of {PAIRS} pairs, fp32, peak memory", "open_clip's ClipLoss", ours, theirs, "MiB")


def main() -> None:
    """Run all that the device allows."""
    parser = arguments_parser(str(__doc__).splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="ViT-S/16 at 96 px in place of ViT-B/16")
    parser.add_argument("--batch", type=int, default=None, help="pairs of a step; default 256, with --small 64")
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # for both, as open_clip sets it
    import open_clip

    config = SMALL_CLIP if arguments.small else dict(open_clip.get_model_config("ViT-B-16") or {})
    name = "ViT-S/16 at 96 px" if arguments.small else "ViT-B/16"
    batch = arguments.batch or (64 if arguments.small else 256)
    cases = training(config, name, batch, arguments.steps, arguments.repeats, device)
    if device.type == "cuda":
        cases.append(loss_memory())
    else:
        print("the memory of the loss is measured on CUDA alone; bench/contrastive.py measures it on the CPU")
    report(cases, arguments.json)


if __name__ == "__main__":
    main()
