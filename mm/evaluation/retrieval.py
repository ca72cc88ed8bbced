"""Image-text retrieval in both directions, several captions a picture, in one pass over the scores.

Protocol: Karpathy, Fei-Fei, https://arxiv.org/abs/1412.2306. Image to text: share of pictures with at least one of their
captions among the first K captions. Text to image: share of captions whose picture is among the first K pictures.

Instead of sorting, count: the rank of a right answer is the number of items that stand before it. Pictures are cut into blocks,
captions into the blocks of their pictures, so all right answers lie in the diagonal tiles of the score matrix. These come first
and give every bar; each other tile then adds to the counts of its rows and of its columns and is forgotten. Tiles are few and
large, because every call on several cores ends in waiting for the slowest of them.

Shapes: N pictures, M captions, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from mm.evaluation.metrics import RESAMPLES, Interval, Result, Statistic, bootstrap, median, selections, share, subset_sizes
from mm.evaluation.scores import BLOCK, checked, checked_index, count_ahead, exact_fp32, whole_blocks

BLOCK_IMAGES = 1920
BLOCK_TEXTS = 5760
"""Largest block of pictures and of captions (more only if one picture has more)."""

TILE = 12_000_000
"""Scores held at once off the diagonal: 46 MiB of fp32, and as much for their comparison."""

DEFAULT_KS = (1, 5, 10)

DEPTH = 10
"""Places that average precisions look at."""


@dataclass(frozen=True)
class Ranks:
    """How many items stand before the right one: 0 is the first place.

    Args:
        image_to_text: For each picture the rank of its best caption among all captions, ``(N,)`` int64 on the CPU; M where it
            has none.
        text_to_image: For each caption the rank of its picture among all pictures, ``(M,)`` int64 on the CPU.
    """

    image_to_text: Tensor
    text_to_image: Tensor


@dataclass(frozen=True)
class _Block:
    """Consecutive pictures and the indices of all their captions."""

    images: slice
    texts: Tensor


class _Tally:
    """The score that every query's right answer has, and how many items have been seen that stand before it."""

    def __init__(self, images: Tensor, texts: Tensor, owner: Tensor, largest_tile: int) -> None:
        self.texts, self.owner = texts, owner
        self.images = F.pad(images, (0, 0, 0, BLOCK))
        self.room = images.new_empty(2, largest_tile)
        self.image_index = torch.arange(len(images), device=images.device)
        self.text_bar = texts.new_zeros(len(texts))
        self.image_bar = images.new_full((len(images),), torch.inf)
        self.best_text = torch.full_like(self.image_index, len(texts))
        self.text_ahead = torch.zeros_like(owner)
        self.image_ahead = torch.zeros_like(self.image_index)

    def rows(self, block: _Block) -> Tensor:
        """Vectors of a block's captions, the last repeated up to whole blocks."""
        index = torch.arange(whole_blocks(len(block.texts)), device=block.texts.device).clamp(max=len(block.texts) - 1)
        return self.texts[block.texts[index]]

    def scores(self, rows: Tensor, block: _Block, images: slice) -> Tensor:
        """Tile of scores ``(captions of the block, pictures)``; the pictures that pad it to whole blocks are cut off again."""
        width = images.stop - images.start
        columns = self.images[images.start : images.start + whole_blocks(width)]
        tile = self.room[0, : len(rows) * len(columns)].view(len(rows), len(columns))
        return torch.mm(rows, columns.T, out=tile)[: len(block.texts), :width]

    def set_bars(self, scores: Tensor, block: _Block) -> None:
        """Read the right answers' scores from a diagonal tile: each caption's picture, each picture's best caption."""
        owner = self.owner[block.texts]
        right = scores.gather(1, (owner - block.images.start)[:, None]).squeeze(1)
        self.text_bar[block.texts] = right
        self.image_bar.scatter_reduce_(0, owner, right, "amax", include_self=False)
        best = right == self.image_bar[owner]
        self.best_text.scatter_reduce_(0, owner[best], block.texts[best], "amin")

    def count(self, scores: Tensor, texts: Tensor, images: slice) -> None:
        """Add a tile ``(captions, pictures)`` to the counts of both directions."""
        index = self.image_index[images]
        self.text_ahead[texts] += count_ahead(scores, self.text_bar[texts], index, self.owner[texts], dim=1, room=self.room[1])
        self.image_ahead[images] += count_ahead(
            scores, self.image_bar[images], texts, self.best_text[images], dim=0, room=self.room[1]
        )


def ranks(image_vectors: Float[Tensor, "n d"], text_vectors: Float[Tensor, "m d"], text_to_image: Int64[Tensor, " m"]) -> Ranks:
    """Ranks of the right answers in both directions; scores are dot products in fp32, of equal scores the lowest index wins.

    Args:
        image_vectors: Vectors of the pictures, usually of unit length.
        text_vectors: Vectors of the captions, in any order.
        text_to_image: Index of each caption's picture.

    Raises:
        UserError: shapes that do not fit, an index out of range, NaN or infinity in a vector.
    """
    images, texts = checked(image_vectors, "image vectors"), checked(text_vectors, "text vectors", image_vectors.shape[-1])
    owner = checked_index(text_to_image, len(texts), len(images), "picture of each caption").to(images.device)
    texts = texts.to(images.device)
    blocks = _blocks(owner, len(images))
    tally = _Tally(images, texts, owner, max(_room(block, len(images)) for block in blocks))
    with exact_fp32(images.device):
        for block in blocks:
            scores = tally.scores(tally.rows(block), block, block.images)
            tally.set_bars(scores, block)
            tally.count(scores, block.texts, block.images)
        for block in blocks:
            rows = tally.rows(block)
            for strip in _strips_around(block, len(images)):
                tally.count(tally.scores(rows, block, strip), block.texts, strip)
    image_to_text = torch.where(tally.image_bar.isinf(), len(texts), tally.image_ahead)
    return Ranks(image_to_text.cpu(), tally.text_ahead.cpu())


def ranks_of_scores(scores: Float[Tensor, "n m"], text_to_image: Int64[Tensor, " m"]) -> Ranks:
    """The same of given scores, for models that judge pairs; of equal scores the lowest index wins.

    Raises:
        UserError: shapes that do not fit, an index out of range, NaN or infinity.
    """
    scores = checked(scores, "scores").cpu()
    num_images, num_texts = scores.shape
    owner = checked_index(text_to_image, num_texts, num_images, "picture of each caption").cpu()
    texts, images = torch.arange(num_texts), torch.arange(num_images)
    right = scores[owner, texts]
    ahead = (scores > right) | ((scores == right) & (images[:, None] < owner))
    text_to_image_ranks = ahead.sum(0)
    own = scores.masked_fill(owner != images[:, None], -torch.inf)
    bar, best = own.max(1, keepdim=True)
    before = (scores > bar) | ((scores == bar) & (texts < best))
    image_to_text = torch.where(bar.isinf().squeeze(1), num_texts, before.sum(1))
    return Ranks(image_to_text, text_to_image_ranks)


def _blocks(owner: Tensor, num_images: int) -> list[_Block]:
    """Cut the pictures into blocks of neither too many pictures nor too many captions; those without captions fall away."""
    order = owner.argsort(stable=True)
    ends = [0, *owner.bincount(minlength=num_images).cumsum(0).tolist()]
    blocks, start = [], 0
    for image in range(1, num_images + 1):
        full = image - start == BLOCK_IMAGES or (image < num_images and ends[image + 1] - ends[start] > BLOCK_TEXTS)
        if full or image == num_images:
            if ends[image] > ends[start]:
                blocks.append(_Block(slice(start, image), order[ends[start] : ends[image]]))
            start = image
    return blocks


def _room(block: _Block, num_images: int) -> int:
    """Scores of the largest tile of a block, with its padding."""
    widths = [strip.stop - strip.start for strip in (block.images, *_strips_around(block, num_images))]
    return whole_blocks(len(block.texts)) * whole_blocks(max(widths))


def _strips_around(block: _Block, num_images: int) -> Iterator[slice]:
    """The pictures before and after a block, as wide as a tile may be."""
    width = max(1, TILE // len(block.texts))
    for start, stop in ((0, block.images.start), (block.images.stop, num_images)):
        for left in range(start, stop, width):
            yield slice(left, min(left + width, stop))


def retrieval(
    image_vectors: Float[Tensor, "n d"],
    text_vectors: Float[Tensor, "m d"],
    text_to_image: Int64[Tensor, " m"],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    subsets: Mapping[str, Tensor | np.ndarray | Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    modalities: tuple[str, str] = ("image", "text"),
    precisions: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """Recall at K and median rank in both directions, with 95 % intervals over pictures resampled with their captions.

    Args:
        image_vectors: Vectors of the pictures.
        text_vectors: Vectors of the captions, in any order.
        text_to_image: Index of each caption's picture. Pictures without a caption stay candidates and ask nothing.
        ks: Values of K; those above the number of candidates are left out.
        subsets: Masks over pictures by name. Each gives the same figures with its name as a suffix: only its pictures and their
            captions ask, and everything stays a candidate.
        protocol: Facts for the stamp that only the caller knows (split, captions, resize).
        modalities: Names of the two sides in the figures' names, e.g. ``("image", "audio")``.
        precisions: Also give the mean average precision of the first ten, as is usual for sound.
        seed: Seed of the intervals.
        resamples: Number of bootstrap resamples.

    Returns:
        ``image_to_text_r1`` ..., ``image_to_text_median_rank`` (1 is the first place), ``text_to_image_r1`` ...; and so for
        each subset.

    Raises:
        UserError: see `ranks`; an empty subset or no caption at all.
    """
    options: dict[str, Any] = {"ks": ks, "subsets": subsets, "modalities": modalities, "seed": seed, "resamples": resamples}
    facts = {**(protocol or {}), "scores": "dot product in fp32, of equal scores the lowest index wins"}
    result = recalls(ranks(image_vectors, text_vectors, text_to_image), text_to_image, protocol=facts, **options)
    return result | _precisions(image_vectors, text_vectors, text_to_image, options) if precisions else result


def average_precisions(
    queries: Float[Tensor, "q d"], items: Float[Tensor, "m d"], relevant: Callable[[Tensor, Tensor], Tensor], counts: Tensor
) -> Float[Tensor, " q"]:
    """Average precision of the first ten items of each query, in fp64; of equal scores the lowest index wins.

    The sum of the precisions at the places of relevant items is divided by their number, at most ten. (CLAP's published
    evaluation divides by five also where all five cannot be among the first ten.)

    Args:
        queries: Unit vectors.
        items: Unit vectors.
        relevant: Of rows and of item indices ``(b, k)``: which are right.
        counts: Number of relevant items of each query, ``(Q,)``.
    """
    found: list[Tensor] = []
    for rows in torch.arange(len(queries)).split(BLOCK_IMAGES):
        order = (queries[rows].float() @ items.float().T).sort(dim=1, descending=True, stable=True).indices[:, :DEPTH]
        hits = relevant(rows, order).double()
        places = torch.arange(1, hits.shape[1] + 1)
        found.append((hits * hits.cumsum(1) / places).sum(1) / counts[rows].clamp(1, DEPTH))
    return torch.cat(found)


def _precisions(images: Tensor, texts: Tensor, owner: Tensor, options: Mapping[str, Any]) -> Result:
    """``map10`` both ways, over all and over each subset."""
    images, texts, owner = images.cpu(), texts.cpu(), owner.cpu()
    counts = owner.bincount(minlength=len(images))
    forward = average_precisions(images, texts, lambda rows, found: owner[found] == rows[:, None], counts)
    back = average_precisions(texts, images, lambda rows, found: found == owner[rows][:, None], torch.ones(len(texts)))
    sides, metrics = options["modalities"], {}
    for suffix, chosen in selections(options["subsets"] or {}, len(images)).items():
        asked = chosen & (counts > 0).numpy()
        unit, of_asked = np.cumsum(asked) - 1, asked[owner.numpy()]
        total = np.bincount(unit[owner.numpy()[of_asked]], minlength=int(asked.sum()))
        sums = np.bincount(unit[owner.numpy()[of_asked]], back.numpy()[of_asked], minlength=int(asked.sum()))
        figures = {
            f"{sides[0]}_to_{sides[1]}_map10{suffix}": share(forward.numpy()[asked], np.ones(int(asked.sum()))),
            f"{sides[1]}_to_{sides[0]}_map10{suffix}": share(sums, total),
        }
        metrics |= bootstrap(figures, int(asked.sum()), seed=options["seed"], resamples=options["resamples"])
    return Result(metrics, {"map10": f"precision at each right one of the first {DEPTH}, over the number of right ones"})


def recalls(
    found: Ranks,
    text_to_image: Int64[Tensor, " m"],
    *,
    ks: Sequence[int] = DEFAULT_KS,
    subsets: Mapping[str, Tensor | np.ndarray | Sequence[bool]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    modalities: tuple[str, str] = ("image", "text"),
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Result:
    """What `retrieval` gives, of ranks that are known; ``protocol`` says what the scores are. Raises `UserError` likewise."""
    owner, num_images, num_texts = text_to_image.detach().cpu().numpy(), len(found.image_to_text), len(found.text_to_image)
    asking = np.bincount(owner, minlength=num_images) > 0
    forward, back = f"{modalities[0]}_to_{modalities[1]}", f"{modalities[1]}_to_{modalities[0]}"
    metrics: dict[str, Interval] = {}
    for suffix, chosen in selections(subsets or {}, num_images).items():
        asked = chosen & asking
        unit, texts = np.cumsum(asked) - 1, asked[owner]
        ways = {
            forward: (found.image_to_text.numpy()[asked], unit[asked], num_texts),
            back: (found.text_to_image.numpy()[texts], unit[owner[texts]], num_images),
        }
        statistics = {
            f"{way}_{name}{suffix}": statistic
            for way, (places, units, candidates) in ways.items()
            for name, statistic in _figures(places, units, [k for k in ks if k <= candidates]).items()
        }
        metrics |= bootstrap(statistics, int(asked.sum()), seed=seed, resamples=resamples)
    for name in metrics:
        if "_median_rank" in name:
            metrics[name] = replace(metrics[name], unit="number")
    first, second = ("recordings" if name == "audio" else f"{name}s" for name in modalities)
    stamp = {
        "task": f"retrieval, {num_images} {first} and {num_texts} {second}, both ways",
        **({"without_caption": int((~asking).sum())} if not asking.all() else {}),
        **subset_sizes(subsets or {}),
        **(protocol or {}),
        "recall": f"at least one of the {second} of a query in the first K",
        "interval": f"95 % bootstrap over {first}, {resamples} resamples, seed {seed}",
    }
    return Result(metrics, stamp)


def _figures(places: np.ndarray, units: np.ndarray, ks: Sequence[int]) -> dict[str, Statistic]:
    """Recalls and median rank of queries whose right answers are at ``places``, query j being drawn with unit ``units[j]``."""
    queries = np.bincount(units)
    recalls = {f"r{k}": share(np.bincount(units, places < k), queries) for k in ks}
    return {**recalls, "median_rank": median(places + 1, units)}
