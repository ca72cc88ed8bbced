"""Scale and shift of the latents of an autoencoder, measured on pictures."""

import copy
from dataclasses import replace
from itertools import islice

from mm.errors import UserError
from mm.hub import Model
from mm.run.evaluation import opened
from mm.run.picture_controls import picture_loader
from mm.run.reading import BATCH_SIZE
from mm.systems.published_vae import PublishedVae, PublishedVaeConfig
from mm.tokenizers.library_vae import measured
from mm.types import Source

NUM_PICTURES = 1024


def rescaled(model: Model, data: str | Source, *, num_pictures: int = NUM_PICTURES, shifted: bool = False) -> Model:
    """The same autoencoder with the scale that gives the latents of these pictures unit spread.

    Stable Diffusion's 0.18215 is the inverse of the standard deviation of its own latents; another autoencoder, or other kinds
    of pictures, need their own. A generator has to be trained with the scale that it is used with.

    Args:
        model: A published KL autoencoder.
        data: A source of pictures.
        num_pictures: Most pictures that are looked at, in whole batches.
        shifted: Also bring their mean to zero, as for Stable Diffusion 3.

    Raises:
        UserError: The model is no such autoencoder, or there are no pictures.
    """
    system, config = copy.deepcopy(model.system), model.config
    if not isinstance(system, PublishedVae) or not isinstance(config, PublishedVaeConfig):
        raise UserError(f"{model.name}: is no KL autoencoder of diffusers, whose latents have a scale; take a folder of one")
    source = opened(data, model)
    batches = islice(picture_loader(source, model).one_epoch(), -(-num_pictures // BATCH_SIZE))
    latents = (system.to_latents(batch.image.to(model.device)) for batch in batches if batch.image is not None)
    system.vae.config = measured(config.vae, latents, shifted=shifted)
    config = config.model_copy(update={"vae": system.vae.config})
    measure = {"data": source.name, "most_pictures": num_pictures, "shifted": shifted}
    return replace(model, system=system, config=config, card={**model.card, "rescaled": measure})
