"""Two-stage retrieval with a model that both embeds and matches: nearest vectors first, then every candidate pair is read.

Memory is that of encoding `PICTURES_AT_ONCE`, of at most `TOKEN_BYTES` of their tokens, of a tile of pairs and of the scores of
the candidates. A picture is encoded once; processes share the pictures, each reading the pairs of its own, in both directions.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from mm.config import StrictConfig, validate
from mm.data.sources import Subset
from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.evaluation.reranking import BothWays, candidates, reranked
from mm.evaluation.retrieval import ranks, recalls
from mm.hub import Model
from mm.run.evaluation import Captioned, check_retrieval_set, encode_captioned, stamp, stretch
from mm.run.reading import evaluation_loader
from mm.training.parallel import World, open_world, sum_tensors
from mm.types import Embeds, Encoded, Matches, Source, TextBatch

Progress = Callable[[int, int | None], None]
Score = Literal["itm", "itc", "sum"]

TOP_K = 128
PICTURES_AT_ONCE = 32
PAIRS_AT_ONCE = 256
PICTURES_HELD, TOKEN_BYTES = 256, 128 << 20
"""Encoded pictures whose pairs are read together, at most so many and so many bytes of tokens (twice that while they are
joined). The more there are, the more pairs share the encoding of a text."""

SCORES: dict[str, str] = {
    "itm": "logit of matching",
    "itc": "contrastive logit alone, no second stage",
    "sum": "weighted logit of matching plus contrastive logit",
}
"""With negatives drawn by contrastive similarity, matching learns what that similarity lacks, hence the sum. BLIP and LAVIS add
the bare cosine instead of its logit: their figures are others."""


class Reranking(StrictConfig):
    """How candidates are put in order; see `evaluate_reranked`."""

    score: Score = "itm"
    itm_weight: float = Field(default=1.0, ge=0)
    top_k: int = Field(default=TOP_K, ge=1)


class Recommended(StrictConfig):
    """The ``evaluation`` section of a model's card: how it is best used, chosen on validation data."""

    retrieval: Reranking = Reranking()


def recommended(model: Model) -> dict[str, Any]:
    """Options of `evaluate_reranked` that a model's card states. Raises `ConfigError` where it cannot be understood."""
    where = f"{model.name}: the 'evaluation' section of its card"
    return validate(Recommended, model.card.get("evaluation", {}), where).retrieval.model_dump(exclude_unset=True)


def evaluate_reranked(
    model: Model,
    source: Source,
    *,
    score: str = "itm",
    itm_weight: float = 1.0,
    top_k: int = TOP_K,
    cache: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Retrieval both ways by contrastive similarity, its best candidates put in a new order by the matching of each pair.

    Args:
        model: Its system `Embeds` and `Matches`.
        source: Captioned pictures.
        score: What candidates are ordered by, see `SCORES`.
        itm_weight: Of the logit of matching in the sum. Below 1 where matching is surer of itself than it is right, as it is of
            pictures unlike those that it learned from; to be chosen on validation data.
        top_k: Candidates of each query; all, where there are fewer.
        cache: As `evaluate_retrieval`.
        progress: Called with (done, total) while encoding, then with (pairs read, pairs of this process).

    Returns:
        The figures of `evaluate_retrieval` after the second stage and, named ``contrastive_...``, after the first.

    Raises:
        UserError: As `evaluate_retrieval`; an unknown score, ``top_k`` below 1, a weight below 0 or without a sum.
    """
    if score not in get_args(Score):
        raise UserError(f"score '{score}': there are {', '.join(SCORES)}")
    if top_k < 1:
        raise UserError(f"top_k {top_k}: at least one candidate of each query is read; for none take score itc")
    if itm_weight != 1 and (score != "sum" or itm_weight < 0):
        raise UserError(f"itm_weight {itm_weight}: weighs the logit of matching in score sum, with 0 or more")
    check_retrieval_set(source)
    fingerprint = model.fingerprint
    with open_world(model.device.type) as world:
        data = encode_captioned(model, source, world, cache=cache, progress=progress, fingerprint=fingerprint)
        first = second = ranks(data.images, data.texts, data.image_of)
        weighed = f" (weight {itm_weight:g})" if score == "sum" else ""
        facts: dict[str, Any] = {"scores": f"{SCORES[score]}{weighed}; of equal ones the lowest index wins"}
        if score != "itc":
            found, weight = candidates(data.images, data.texts, top_k), itm_weight if score == "sum" else None
            second = reranked(first, found, _shared_scores(model, source, data, found, weight, world, progress), data.image_of)
            facts["reranked"] = (
                f"the {found.texts.shape[1]} nearest texts of each image and {found.images.shape[1]} nearest images of each "
                "text, by dot product in fp32; the others follow in their order"
            )
    protocol = stamp(model, source, data.accounting, fingerprint) | facts
    contrastive = recalls(first, data.image_of).metrics
    return recalls(second, data.image_of, protocol=protocol) | Result(
        {f"contrastive_{name}": figure for name, figure in contrastive.items()}, {}
    )


def _shared_scores(
    model: Model,
    source: Source,
    data: Captioned,
    found: BothWays,
    weight: float | None,
    world: World,
    progress: Progress | None,
) -> BothWays:
    """Scores of all candidates, each process having read the pairs of its pictures; without a weight of matching alone."""
    start, stop = stretch(len(data.ids), world)
    own = pair_scores(
        model.system,
        _pictures(model, source, data.ids[start:stop]),
        model.processor.text(data.captions),
        found,
        first_row=start,
        vectors=None if weight is None else (data.images, data.texts),
        weight=1.0 if weight is None else weight,
        device=model.device,
        progress=progress,
    )
    sum_tensors(own, world)
    return own


def _pictures(model: Model, source: Source, ids: Sequence[str]) -> Iterator[Tensor]:
    """Prepared pictures of some samples, a few at a time."""
    if not ids:  # fewer pictures than processes
        return
    index = {source.key(position): position for position in range(len(source))}
    wanted = Subset(source, [index[name] for name in ids])
    loader = evaluation_loader(wanted, model.processor, batch_size=PICTURES_AT_ONCE, max_bad_fraction=0.0)
    for batch in loader.one_epoch():
        assert batch.image is not None
        yield batch.image


@torch.no_grad()
def pair_scores(
    system: Any,
    pictures: Iterable[Tensor],
    text: TextBatch,
    found: BothWays,
    *,
    first_row: int = 0,
    vectors: tuple[Tensor, Tensor] | None = None,
    weight: float = 1.0,
    device: torch.device,
    pairs_at_once: int = PAIRS_AT_ONCE,
    token_bytes: int = TOKEN_BYTES,
    progress: Progress | None = None,
) -> BothWays:
    """Scores of candidate pairs, fp32; a pair that both directions ask for is read once.

    Args:
        system: `Matches`, and `Embeds` where there are vectors.
        pictures: Pixels ``(n, 3, H, W)`` of consecutive pictures, encoded together.
        text: All M texts.
        found: Candidates of all N pictures and M texts.
        first_row: Number of the first picture.
        vectors: Unit vectors of all pictures and texts, whose contrastive logits are added.
        weight: Of the logits of matching.
        device: Where to compute.
        pairs_at_once: Pairs of a pass.
        token_bytes: Of the encoded pictures in memory together, at least those of one of ``pictures``.
        progress: Called with (pairs read, None).

    Returns:
        Scores in the places of their candidates; 0 for pairs with other pictures.
    """
    assert isinstance(system, Matches)
    result = BothWays(torch.zeros(found.texts.shape), torch.zeros(found.images.shape))
    num_texts, done = len(text), 0
    for encoded in _encoded(system, pictures, device, token_bytes):
        rows = slice(first_row, first_row + len(encoded.tokens))
        first_row = rows.stop
        askers, places = ((found.images >= rows.start) & (found.images < rows.stop)).nonzero(as_tuple=True)
        forward = torch.arange(len(encoded.tokens))[:, None] * num_texts + found.texts[rows]
        back = (found.images[askers, places] - rows.start) * num_texts + askers
        pairs, inverse = torch.cat([forward.flatten(), back]).unique(return_inverse=True)
        images, texts = pairs // num_texts, pairs % num_texts
        chunk = weight * _read(system, encoded, text, images, texts, pairs_at_once)
        if vectors is not None:
            chunk += _contrastive(system, vectors[0][rows], vectors[1], images, texts, device, pairs_at_once)
        chunk = chunk[inverse]
        result.texts[rows] = chunk[: forward.numel()].view_as(forward)
        result.images[askers, places] = chunk[forward.numel() :]
        done += len(pairs)
        if progress:
            progress(done, None)
    return result


def _encoded(system: Matches, pictures: Iterable[Tensor], device: torch.device, budget: int) -> Iterator[Encoded]:
    """Pictures encoded as they come, as many of them joined as may be held."""
    held: list[Encoded] = []
    for pixels in pictures:
        encoded = system.encode_image(pixels.to(device))
        together = [one.tokens for one in (*held, encoded)]
        if held and (sum(map(len, together)) > PICTURES_HELD or sum(one.nbytes for one in together) > budget):
            yield _joined(held)
            held = []
        held.append(encoded)
    if held:
        yield _joined(held)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    tokens, mask, pooled = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask", "pooled"))
    return Encoded(tokens, mask, pooled)


def _contrastive(
    system: Any, images: Tensor, texts: Tensor, rows: Tensor, columns: Tensor, device: torch.device, pairs_at_once: int
) -> Tensor:
    """Contrastive logits of pairs of vectors, by their numbers, without those of all others."""
    assert isinstance(system, Embeds)
    logits = []
    for row, column in zip(rows.split(pairs_at_once), columns.split(pairs_at_once), strict=True):
        (queries, i), (items, j) = row.unique(return_inverse=True), column.unique(return_inverse=True)
        logits.append(system.scores(images[queries].to(device), texts[items].to(device)).float().cpu()[i, j])
    return torch.cat(logits)


def _read(system: Matches, encoded: Encoded, text: TextBatch, images: Tensor, texts: Tensor, pairs_at_once: int) -> Tensor:
    """Logits of pairs of given pictures, by their number in ``encoded``, and texts; texts of like length share a pass."""
    device = encoded.tokens.device
    logits = torch.empty(len(images))
    for tile in (text.lengths[texts] * len(text) + texts).argsort().split(pairs_at_once):
        rows, which = texts[tile].unique(return_inverse=True)
        longest = int(text.lengths[rows].max())
        words = system.encode_text(TextBatch(text.ids[rows, :longest], text.lengths[rows]).to(device))
        logits[tile] = system.match(encoded[images[tile].to(device)], words[which.to(device)]).float().cpu()
    return logits
