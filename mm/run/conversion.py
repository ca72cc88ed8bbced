"""Foreign weights as a model folder."""

from pathlib import Path

import torch

from mm.encoders.image import ImageEncoderConfig
from mm.errors import UserError
from mm.hub import check_folder, from_imported, load, save
from mm.published.bert_start import PictureEncoder
from mm.published.convert import Added, import_file
from mm.run.latents import rescaled
from mm.types import Embeds

SEED = 0
"""Of what a checkpoint has no weights for."""


def convert(
    file: str | Path,
    out: str | Path,
    *,
    architecture: str | None = None,
    trusted: bool = False,
    vocab: str | Path | None = None,
    image: str | None = None,
    image_size: int | None = None,
    rescale: str | None = None,
    shifted: bool = False,
) -> Path:
    """Write a model folder; see `mm.published.convert.import_file`.

    Args:
        file: Weights, or a folder with weights.
        out: New folder.
        architecture: One of open_clip's, where the weights do not tell it.
        trusted: The user's word that whoever wrote a pickled file is trusted.
        vocab: For ALBEF: the ``vocab.txt`` of bert-base-uncased.
        image: For BERT: a MODEL whose picture encoder it is joined with.
        image_size: For ALBEF and BERT: side of the pictures in pixels, where it is not that of the weights.
        rescale: For KL autoencoders of diffusers: pictures whose latents are to have unit spread, see `mm.run.latents`.
        shifted: With ``rescale``: bring their mean to zero, too.

    Raises:
        UserError: As `mm.published.convert.import_file`; ``out`` cannot be written, ``image`` has no such encoder, or the
            latents of what is no such autoencoder are to be rescaled.
    """
    if shifted and rescale is None:
        raise UserError("--shifted: brings the mean of latents to zero; give their pictures with --rescale")
    out, file = check_folder(out), Path(file)
    added = Added(
        vocab=None if vocab is None else Path(vocab),
        image=None if image is None else _picture_encoder(image),
        image_size=image_size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        imported = import_file(file, architecture=architecture, trusted=trusted, added=added)
    model = from_imported(imported, name=file.stem, device="cpu", precision="fp32")
    return save(model if rescale is None else rescaled(model, rescale, shifted=shifted), out)


def _picture_encoder(name: str) -> PictureEncoder:
    model = load(name, device="cpu", precision="fp32")
    config = getattr(model.config, "image", None)
    if not isinstance(config, ImageEncoderConfig) or not isinstance(model.system, Embeds):
        raise UserError(f"--image {name}: has no picture encoder of timm; take a timm folder, a run of clip or of albef")
    return PictureEncoder(config, model.system.encoders()["image"].state_dict(), model.processor.image_spec)
