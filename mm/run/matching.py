"""Retrieval with a model that reads every picture together with every text: no vectors, only pairs."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mm.errors import UserError
from mm.evaluation.metrics import Result
from mm.evaluation.retrieval import ranks_of_scores, recalls
from mm.hub import Model
from mm.run.evaluation import check_retrieval_set, stamp
from mm.run.reading import MAX_BAD_SHARE, evaluation_loader
from mm.types import Matches, Source

Progress = Callable[[int, int | None], None]

PAIRS_AT_ONCE = 256


def evaluate_matching(model: Model, source: Source, *, progress: Progress | None = None) -> Result:
    """Retrieval both ways by the logits of all pairs. A picture is encoded once, its pairs with all texts are read in tiles.

    Args:
        model: Its system `Matches`.
        source: Captioned pictures.
        progress: Called with (pairs done, pairs in all).

    Raises:
        UserError: No sample of the source has a caption, its figures are published for another task, or a published set is
            not whole.
    """
    assert isinstance(model.system, Matches)
    check_retrieval_set(source)
    allowed = 0.0 if getattr(source, "evaluation", None) else MAX_BAD_SHARE
    loader = evaluation_loader(source, model.processor, batch_size=1, workers=0, max_bad_fraction=allowed)
    pictures: list[Tensor] = []
    captions: list[tuple[str, ...]] = []
    for batch in loader.one_epoch():
        assert batch.image is not None
        if batch.captions[0]:
            pictures.append(batch.image)
            captions.append(batch.captions[0])
    if not pictures:
        raise UserError(
            f"{source.name}: no sample has a caption; put a .txt beside each picture or a caption column in the table"
        )
    texts = [caption for several in captions for caption in several]
    scores = _all_pairs(model, pictures, texts, progress)
    image_of = torch.tensor([row for row, several in enumerate(captions) for _ in several])
    facts = stamp(model, source, loader.accounting.describe()) | {
        "compared": f"{scores.numel()} pairs, each read together",
        "scores": "logits of matching, of equal ones the lowest index wins",
    }
    return recalls(ranks_of_scores(scores, image_of), image_of, protocol=facts)


@torch.no_grad()
def _all_pairs(model: Model, pictures: Sequence[Tensor], texts: Sequence[str], progress: Progress | None) -> Tensor:
    """Logits of every picture with every text, ``(N, M)``, fp32."""
    system = model.system
    assert isinstance(system, Matches)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of like length share a tile
    tiles = [order[start : start + PAIRS_AT_ONCE] for start in range(0, len(order), PAIRS_AT_ONCE)]
    words = [system.encode_text(model.processor.text([texts[i] for i in tile]).to(model.device)) for tile in tiles]
    scores = torch.empty(len(pictures), len(texts))
    for row, picture in enumerate(pictures):
        image = system.encode_image(picture.to(model.device))
        for tile, text in zip(tiles, words, strict=True):
            repeated = image[torch.zeros(len(tile), dtype=torch.int64, device=model.device)]
            scores[row, tile] = system.match(repeated, text).float().cpu()
        if progress:
            progress((row + 1) * len(texts), scores.numel())
    return scores
