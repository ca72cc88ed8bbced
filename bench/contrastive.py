"""Contrastive losses forward and backward against open_clip's: time and peak memory, fp32, one run.

    python bench/contrastive.py --json contrastive.json

Time: medians of calls in turn. Memory: each side in a fresh process, the high-water mark of its resident set minus the resident
set just before the loss (features exist, libraries are warm), so that it counts logits, gradients and everything between.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import MIB, Case, arguments_parser, in_fresh_process, interleaved, peak_memory, report
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

from mm.losses.contrastive import info_nce, siglip

WIDTH = 512
INITIAL_SCALE, TRAINED_SCALE = 1 / 0.07, 100.0
SIGLIP_SCALE, SIGLIP_BIAS = 10.0, -10.0
NOISE = 2.0
"""Length of the noise of a pair relative to what it shares: cosines of pairs are near 0.2, as early in training."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def features(count: int) -> tuple[Tensor, Tensor]:
    """Two sets of unit vectors whose corresponding rows resemble each other."""
    generator = torch.Generator().manual_seed(0)
    shared = F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    noises = (F.normalize(torch.randn(count, WIDTH, generator=generator), dim=1) * NOISE for _ in range(2))
    a, b = (F.normalize(shared + noise, dim=1).requires_grad_() for noise in noises)
    return a, b


def losses(kind: str) -> tuple[Loss, Loss]:
    """Our loss and open_clip's."""
    from open_clip.loss import ClipLoss, SigLipLoss

    if kind == "siglip":
        bias = torch.tensor(SIGLIP_BIAS)
        theirs = SigLipLoss()
        return lambda a, b, scale: siglip(a, b, scale, bias), lambda a, b, scale: theirs(a, b, scale, bias)
    return info_nce, ClipLoss()


def gradients(loss: Loss, a: Tensor, b: Tensor, scale: float) -> list[Tensor]:
    """The loss and its gradients for both features and the scale."""
    logit_scale = torch.tensor(scale, requires_grad=True)
    value = loss(a, b, logit_scale)
    return [value.detach(), *torch.autograd.grad(value, [a, b, logit_scale])]


def compare(kind: str, count: int, scale: float, repeats: int) -> Case:
    """Time both sides and make sure that they compute the same."""
    a, b = features(count)
    ours, theirs = losses(kind)
    results: dict[str, list[Tensor]] = {}
    times = interleaved(
        lambda: results.update(ours=gradients(ours, a, b, scale)),
        lambda: results.update(theirs=gradients(theirs, a, b, scale)),
        repeats,
    )
    for mine, other in zip(results["ours"], results["theirs"], strict=True):
        error = (mine - other).abs().max() / other.abs().max()
        assert error < 1e-4, f"{kind}: the two sides differ by {error:.1e} of the largest entry"
    return Case(f"{kind} N={count} d={WIDTH} scale={scale:.4g}, forward + backward", "open_clip", *times, "s")


def peak(kind: str, side: str, count: int, scale: float) -> int:
    """Peak bytes of one side in this process."""
    loss = losses(kind)[side == "theirs"]
    gradients(loss, *features(64), scale)
    a, b = features(count)
    return peak_memory(lambda: gradients(loss, a, b, scale))


def main() -> None:
    parser = arguments_parser(__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=16384, help="pairs in the batch (N)")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(*options.peak, options.count, INITIAL_SCALE))
        return
    count, smaller = options.count, options.count // 4
    script = Path(__file__)
    memory = {
        side: in_fresh_process(script, "--count", str(count), "--peak", "infonce", side) / MIB for side in ("ours", "theirs")
    }
    cases = [
        compare("infonce", count, INITIAL_SCALE, options.repeats),
        Case(f"infonce N={count} d={WIDTH}, peak memory", "open_clip", memory["ours"], memory["theirs"], "MiB"),
        compare("infonce", smaller, TRAINED_SCALE, options.repeats),
        compare("siglip", smaller, SIGLIP_SCALE, options.repeats),
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, fp32")
    report(cases, options.json)


if __name__ == "__main__":
    main()
