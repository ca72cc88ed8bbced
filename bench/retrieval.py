"""Recall at K of 5,000 pictures and 25,000 captions in both directions, against CLIP_benchmark's function.

Both get the same unit vectors and start from them: score matrix, positives, recalls. The peer is timed whole, nothing is
extrapolated; it takes from half a minute to minutes a run, so it runs once per case, and ours before, between and after.
Every recall must be equal.

    pip install clip-benchmark --no-deps           (else its published algorithm, restated here, is timed)
    python bench/retrieval.py --json FILE
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Case, arguments_parser, report, seconds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

from mm.evaluation.retrieval import ranks, retrieval

PEER_BATCH = 64
"""Rows per call of the peer's function: its command line's default batch size."""

PEER_DEFAULT_KS = (5,)
USUAL_KS = (1, 5, 10)


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
) -> dict[str, float]:
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


def our_recalls(images: Tensor, texts: Tensor, owner: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """The same figures without intervals, which the peer does not have."""
    found = ranks(images, texts, owner)
    both = {"text_to_image": found.text_to_image, "image_to_text": found.image_to_text}
    return {f"{name}_r{k}": (places < k).double().mean().item() for k in ks for name, places in both.items()}


def interval_recalls(images: Tensor, texts: Tensor, owner: Tensor) -> dict[str, float]:
    """The figures as `mm eval retrieval` makes them, with median ranks and bootstrap intervals."""
    return {name: interval.value for name, interval in retrieval(images, texts, owner, ks=USUAL_KS).metrics.items()}


class Recalls:
    """A side of the comparison: remembers what it found, so that timing and checking share the calls."""

    def __init__(self, work: Callable[[], dict[str, float]]) -> None:
        self.work, self.found, self.times = work, {}, []

    def run(self) -> None:
        self.times.append(seconds(self._keep))

    def _keep(self) -> None:
        self.found = self.work()

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def main() -> None:
    parser = arguments_parser(__doc__ or "")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=5, help="captions a picture")
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()

    vectors = make_vectors(options.images, options.captions, options.width)
    recall_at_k, peer_name = load_peer()
    ours = Recalls(lambda: our_recalls(*vectors, USUAL_KS))
    whole = Recalls(lambda: interval_recalls(*vectors))
    peers = {ks: Recalls(lambda ks=ks: peer_recalls(recall_at_k, *vectors, ks)) for ks in (PEER_DEFAULT_KS, USUAL_KS)}
    product: list[float] = []
    our_recalls(*vectors, USUAL_KS)
    for peer in (*peers.values(), None):
        for _ in range(options.repeats):
            ours.run()
            whole.run()
            product.append(seconds(lambda: vectors[1] @ vectors[0].T))
        if peer is not None:
            peer.run()
    for peer in peers.values():
        for side in (ours, whole):
            assert all(side.found[name] == value for name, value in peer.found.items()), (side.found, peer.found)
    size = f"{options.images} x {options.images * options.captions}, d = {options.width}"
    cases = [
        Case(
            f"{label} both ways at K = 1, 5, 10; peer at K = {', '.join(map(str, ks))}; {size}",
            peer_name,
            side.median,
            peer.median,
            "s",
        )
        for label, side in (("recall", ours), ("recall and 95 % intervals", whole))
        for ks, peer in peers.items()
    ]
    report(cases, options.json)
    floor = statistics.median(product)
    print(f"matrix of all scores alone: {floor:.2f} s, the floor of any method that computes each of them in fp32")
    print(f"recalls equal: {ours.found}; seconds of ours: {', '.join(f'{time:.2f}' for time in ours.times)}")


if __name__ == "__main__":
    main()
