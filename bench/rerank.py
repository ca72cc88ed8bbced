"""Two-stage retrieval of 5,000 pictures and 25,000 captions, k = 128, with a tiny ALBEF: streamed against all at once.

Both read the same candidate pairs; all at once keeps the tokens of all pictures. Seconds include the search for the candidates.
Peak memory is that of a fresh process each. Every rank must be equal.

    python bench/rerank.py --json FILE
    python bench/rerank.py --images 100 --top-k 8        # seconds, to see that it runs; says nothing about memory
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import MIB, Case, arguments_parser, in_fresh_process, peak_memory, report, seconds
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a fresh clone, not yet installed

from mm.evaluation.reranking import BothWays, candidates, reranked
from mm.evaluation.retrieval import Ranks, ranks
from mm.run.reranking import PICTURES_AT_ONCE, pair_scores
from mm.systems.albef import Albef, AlbefConfig, build
from mm.types import TextBatch

SIDE, LENGTH, VOCABULARY = 16, 8, 200
CAPTIONS = 5


def tiny() -> Albef:
    """A network of random weights, 16 picture tokens of width 64."""
    image = {"backbone": "vit_tiny_patch16_224", "image_size": SIDE, "patch_size": 4, "pool": "avg"}
    image |= {"options": {"embed_dim": 64, "depth": 1, "num_heads": 2, "class_token": False}}
    sizes = {"width": 32, "heads": 2, "text_layers": 1, "fusion_layers": 1, "mlp_ratio": 2, "embed_dim": 16}
    values = {"image": image, **sizes, "vocab_size": VOCABULARY, "context_length": LENGTH}
    values |= {"momentum": 0, "queue_size": 0, "distillation": 0}
    torch.manual_seed(0)
    return build(AlbefConfig.model_validate(values)).eval()


def make_set(num_images: int) -> tuple[Tensor, TextBatch, Tensor, tuple[Tensor, Tensor]]:
    """Pictures, captions, each caption's picture, and vectors of both (captions are noisy copies of their pictures)."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 3, SIDE, SIDE), dtype=torch.uint8, generator=random)
    owner = torch.arange(num_images).repeat_interleave(CAPTIONS)
    lengths = torch.randint(4, LENGTH + 1, (len(owner),), generator=random)
    text = TextBatch(torch.randint(3, VOCABULARY, (len(owner), LENGTH), generator=random), lengths)
    images = F.normalize(torch.randn(num_images, 16, generator=random), dim=1)
    noise = F.normalize(torch.randn(len(owner), 16, generator=random), dim=1)
    return pixels, text, owner, (images, F.normalize(images[owner] + noise, dim=1))


class TwoStages:
    """One evaluation; remembers what it found."""

    def __init__(self, num_images: int, top_k: int, pictures_at_once: int) -> None:
        self.model, self.set = tiny(), make_set(num_images)
        self.top_k, self.pictures_at_once = top_k, pictures_at_once
        self.scores = BothWays(torch.empty(0), torch.empty(0))
        self.ranks: Ranks | None = None

    def __call__(self) -> None:
        pixels, text, owner, vectors = self.set
        found = candidates(*vectors, self.top_k)
        chunks = pixels.split(self.pictures_at_once)
        self.scores = pair_scores(self.model, chunks, text, found, device=torch.device("cpu"))
        self.ranks = reranked(ranks(*vectors, owner), found, self.scores, owner)


def compared(ours: TwoStages, theirs: TwoStages) -> tuple[float, float]:
    """Seconds of both, whose ranks must be equal."""
    times = seconds(ours), seconds(theirs)
    assert ours.ranks is not None
    assert theirs.ranks is not None
    for way in ("image_to_text", "text_to_image"):
        assert torch.equal(getattr(ours.ranks, way), getattr(theirs.ranks, way)), way
    apart = max(float((a - b).abs().max()) for a, b in zip(ours.scores, theirs.scores, strict=True))
    print(f"ranks equal; scores at most {apart:.1e} apart")
    return times


def main() -> None:
    parser = arguments_parser(__doc__ or "")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--top-k", type=int, default=128)
    parser.add_argument("--memory-of", type=int, metavar="N", help="print the peak memory with N pictures at once, and end")
    options = parser.parse_args()
    make: Callable[[int], TwoStages] = lambda pictures: TwoStages(options.images, options.top_k, pictures)  # noqa: E731
    if options.memory_of:
        TwoStages(8, 2, 8)()  # what libraries allocate once
        print(peak_memory(make(options.memory_of)))
        return
    size = ["--images", str(options.images), "--top-k", str(options.top_k)]
    ways = (PICTURES_AT_ONCE, options.images)
    times = compared(*map(make, ways))
    peaks = [in_fresh_process(Path(__file__), *size, "--memory-of", str(pictures)) / MIB for pictures in ways]
    name = f"re-ranking {options.images} x {options.images * CAPTIONS}, k = {options.top_k}"
    report(
        [Case(name, "all pictures at once", *times, "s"), Case(f"{name}, memory", "all pictures at once", *peaks, "MiB")],
        options.json,
    )


if __name__ == "__main__":
    main()
