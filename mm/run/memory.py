"""Texts known by heart, by which recordings are read."""

import copy
from dataclasses import replace

from mm.errors import UserError
from mm.hub import Model
from mm.run.evaluation import opened
from mm.systems.imagebind import Imagebind, ImagebindConfig
from mm.types import Source


def remembering(model: Model, data: str | Source) -> Model:
    """The same model with the captions of a source as its memory, see `mm.systems.imagebind`.

    Args:
        model: An imagebind whose hub was held fixed.
        data: Its captions are remembered, each once; nothing else of it is read.

    Raises:
        UserError: The model is of another kind, or the source has no captions.
    """
    if not isinstance(model.system, Imagebind) or not isinstance(model.config, ImagebindConfig) or model.config.train_hub:
        raise UserError(
            f"{model.name}: only an imagebind with a fixed hub remembers texts; take a run of configs/imagebind.yaml"
        )
    source = opened(data, model)
    texts = list(dict.fromkeys(text for row in range(len(source)) for text in source.read(row).texts if text.strip()))
    if not texts:
        raise UserError(f"{source.name}: has no captions to remember")
    system = copy.deepcopy(model.system)
    system.remember(model.embed_texts(texts).to(next(system.parameters())))
    config = model.config.model_copy(update={"memory_size": len(texts)})
    card = {**model.card, "remembers": f"{len(texts)} captions of {source.name}"}
    return replace(model, system=system, config=config, card=card)
