"""Recall at K of 5,000 pictures and 25,000 captions in both directions, against CLIP_benchmark's function.

Both get the same unit vectors and start from them: score matrix, positives, recalls. The peer is timed whole, nothing is
extrapolated. Runs alternate, so that a busy machine slows both. Every recall must be equal.

    python bench/retrieval.py --json FILE          (pip install clip-benchmark --no-deps; else its published algorithm is timed)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mm.evaluation.retrieval import ranks, retrieval

PEER_BATCH = 64
"""Rows per call of the peer's function: its command line's default batch size."""

PEER_DEFAULT_KS = (5,)
USUAL_KS = (1, 5, 10)

Recalls = dict[str, float]


def stand_in(scores: Tensor, positive: Tensor, k: int) -> Tensor:
    """CLIP_benchmark's algorithm in our words: one-hot vectors of the K best, masked by the positives and counted."""
    best = F.one_hot(scores.topk(k, dim=1).indices, scores.shape[1])
    return (best * positive[:, None, :]).sum(dim=(1, 2)) / positive.sum(dim=1)


def load_peer() -> tuple[Callable[..., Tensor], str]:
    """The peer's recall function and the name to print."""
    try:
        from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k
    except ImportError:
        return stand_in, "CLIP_benchmark (its algorithm restated; the package is not installed)"
    return recall_at_k, "CLIP_benchmark"


def make_vectors(num_images: int, captions: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, captions that are noisy copies of them (recalls between 10 and 90 %), and each caption's picture."""
    random = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(num_images, width, generator=random), dim=1)
    owner = torch.arange(num_images).repeat_interleave(captions)
    noise = F.normalize(torch.randn(len(owner), width, generator=random), dim=1)
    return images, F.normalize(images[owner] + 7 * noise, dim=1), owner


def peer_recalls(
    recall_at_k: Callable[..., Tensor], images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int]
) -> Recalls:
    """Everything that CLIP_benchmark does after embedding, in its batches."""
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True
    recalls = {}
    for k in ks:
        for name, side, right in (("text_to_image", scores, positive), ("image_to_text", scores.T, positive.T)):
            batches = zip(side.split(PEER_BATCH), right.split(PEER_BATCH), strict=True)
            found = torch.cat([recall_at_k(rows, marks, k=k) for rows, marks in batches])
            recalls[f"{name}_r{k}"] = (found > 0).double().mean().item()
    return recalls


def our_recalls(images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int]) -> Recalls:
    """The same figures without intervals, which the peer does not have."""
    found = ranks(images, texts, owner)
    both = {"text_to_image": found.text_to_image, "image_to_text": found.image_to_text}
    return {f"{name}_r{k}": (places < k).double().mean().item() for k in ks for name, places in both.items()}


def timed(work: Callable[[], object], seconds: list[float]) -> object:
    start = time.perf_counter()
    result = work()
    seconds.append(time.perf_counter() - start)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the cases to this file")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="captions a picture")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--runs", type=int, default=6, help="runs of ours; half before and half after the peer's")
    options = parser.parse_args()

    vectors = make_vectors(options.images, options.captions, options.width)
    recall_at_k, peer = load_peer()
    size = f"{options.images} x {options.images * options.captions}, width {options.width}"
    print(f"{size}, {torch.get_num_threads()} threads, peer: {peer}")
    our_recalls(*vectors, USUAL_KS)
    ours: list[float] = []
    with_intervals: list[float] = []
    cases = []
    for ks in (PEER_DEFAULT_KS, USUAL_KS):
        theirs: list[float] = []
        for part in range(options.runs // 2):
            found = timed(lambda: our_recalls(*vectors, USUAL_KS), ours)
            timed(lambda: retrieval(*vectors, ks=USUAL_KS), with_intervals)
            if part == 0:
                expected = timed(lambda ks=ks: peer_recalls(recall_at_k, *vectors, ks), theirs)
                assert isinstance(expected, dict)
        assert isinstance(found, dict)
        for name, value in expected.items():
            assert found[name] == value, f"{name}: ours {found[name]}, theirs {value}"
            print(f"  {name}: {value:.4f}, equal")
        for label, seconds in (("recall", ours), ("recall and 95 % intervals", with_intervals)):
            cases.append(
                {
                    "name": f"{label}, both ways, K = 1, 5, 10; peer K = {', '.join(map(str, ks))}; {size}",
                    "peer": peer,
                    "ours": statistics.median(seconds),
                    "theirs": statistics.median(theirs),
                    "ratio": statistics.median(theirs) / statistics.median(seconds),
                    "unit": "s",
                }
            )
    for case in cases:
        print(f"{case['name']}: ours {case['ours']:.2f} s, theirs {case['theirs']:.1f} s, ratio {case['ratio']:.1f}")
    if options.json:
        options.json.write_text(json.dumps({"cases": cases}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
