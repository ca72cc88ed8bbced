"""Computing once what frozen parts of a generator make of samples, and training on it (`mm data encode`).

Latents of pictures (https://arxiv.org/abs/2112.10752) and features of captions do not change in training, while computing them
takes most of its time in small models. What is stored in half precision differs from what training would compute by rounding.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mm.data.augment import AugmentConfig, augment, flips_alone
from mm.data.captions import CaptionTemplate
from mm.data.features import MEDIA, DtypeName, Encoding, Features, TextEncoding, TextFeatures, encoding_of, to_bytes
from mm.data.sources import open_source
from mm.data.write import DEFAULT_SAMPLES_PER_SHARD, Packed, Progress, write_shards
from mm.errors import BadSample, ConfigError, UserError
from mm.hub import Model, load, network_fingerprint
from mm.processor import Processor
from mm.run.config import RunConfig
from mm.run.preparation import picture
from mm.systems import SystemConfig
from mm.systems.prompted import PromptEncoder, build_prompt_network
from mm.types import Compresses, Sample, Source, System

BATCH_SIZE = 64


def encode_samples(
    source: str | Source,
    folder: str | Path,
    latents: str | Path | Model,
    *,
    text: str | Path | Model | None = None,
    flip: bool = False,
    dtype: DtypeName = "fp16",
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    image_field: str | None = None,
    text_field: str | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Packed:
    """Write a source as shards that hold latents in place of pictures, and features beside captions.

    Ids, texts and fields are those that `mm.data.write.pack` would write. Samples that cannot be used are left out, by cause.

    Args:
        source: Pictures, with captions or without.
        folder: New or empty folder for the shards.
        latents: Compresses pictures; they are prepared as for itself.
        text: Reads captions, as the part ``text`` of a generator; None stores no features of them.
        flip: Store latents of the mirror image, too.
        dtype: Of what is stored.
        samples_per_shard: Samples a file.
        image_field: Column with the pictures, for sources given by name.
        text_field: Column with the captions, for sources given by name.
        device: Where to compute, in fp32.
        progress: Called with (samples done, in all).

    Raises:
        UserError: A model does not compress pictures or read texts, the source is encoded already, none of its samples can be
            used, or the folder cannot take shards.
    """
    eye = _loaded(latents, device)
    if not isinstance(eye.system, Compresses):
        raise UserError(f"{eye.name} does not compress pictures; take emoji-vq, or a run of configs/vq.yaml or configs/kl.yaml")
    reader = None if text is None else _Reader(_loaded(text, device))
    if isinstance(source, str):
        size = eye.processor.image_spec.size
        source = open_source(source, image_field=image_field, text_field=text_field, image_size=size)
    if encoding_of(source) is not None:
        raise UserError(f"{source.name}: holds latents already; give the source that they were made of")
    encoding = Encoding(
        model=eye.name,
        fingerprint=network_fingerprint(eye.config, eye.system.state_dict()),
        shape=eye.system.latent_shape,
        image=eye.processor.image_spec,
        mirrored=flip,
        dtype=dtype,
        text=None if reader is None else reader.encoding,
    )
    packed = Packed(shards=[], samples=0)

    def encoded() -> Iterator[Sample]:
        waiting: list[tuple[Sample, Tensor]] = []
        for pair in _readable(source, eye.processor, packed):
            waiting.append(pair)
            if len(waiting) == BATCH_SIZE:
                yield from _encoded(waiting, eye, reader, encoding)
                waiting = []
        if waiting:
            yield from _encoded(waiting, eye, reader, encoding)

    packed.shards = write_shards(
        encoded(),
        folder,
        samples_per_shard=samples_per_shard,
        attributes=encoding.attributes,
        total=len(source),
        progress=progress,
    )
    if not packed.samples:
        raise UserError(f"{source.name}: no sample can be used; run `mm data check` on it")
    return packed


def check_encoding(
    encoding: Encoding, config: RunConfig, whole: SystemConfig, system: System, processor: Processor, name: str
) -> None:
    """Whether a network can learn from encoded samples as it would from raw ones.

    Args:
        encoding: What the shards say.
        config: The run.
        whole: The network's configuration with those of its parts in it.
        system: The network, with the weights that it begins with.
        processor: Its preparation.
        name: Of the source, for messages.

    Raises:
        ConfigError: The network needs pictures, its parts or its preparation are not those of the shards, or the data are to be
            changed in ways that were not encoded.
    """
    data = config.data
    if "latents" not in whole.encodable:
        raise ConfigError(
            f"{name}: holds latents, no pictures, which '{whole.name}' needs as it is configured; give the source that they "
            "were made of"
        )
    _check_part("latents", encoding.fingerprint, encoding.model, whole, system, name)
    if processor.image_spec != encoding.image:
        raise ConfigError(f"{name}: its pictures were prepared otherwise ({encoding.image}); set 'processor' to that")
    if not flips_alone(data.augment):
        raise ConfigError(
            f"data.augment: latents in {name} cannot be changed at random; leave all but flip out, or take pictures"
        )
    if data.augment.flip and not encoding.mirrored:
        raise ConfigError(f"data.augment.flip: {name} has no mirror images; set it to 0, or make them: mm data encode --flip")
    if encoding.text is None:
        return
    if "text" not in whole.encodable:
        raise ConfigError(
            f"{name}: holds features of captions, but system.text is an encoder of its own; encode it without --text"
        )
    _check_part("text", encoding.text.fingerprint, encoding.text.model, whole, system, name, _reading(processor))
    if data.captions != (CaptionTemplate(template="{text}"),) or data.text_field is not None:
        raise ConfigError(
            f"data.captions: {name} holds features of its texts as they are; set data.captions='[{{template: \"{{text}}\"}}]' "
            "without data.text_field, or encode it without --text"
        )


def _check_part(part: str, expected: str, model: str, whole: SystemConfig, system: System, name: str, added: str = "") -> None:
    own = network_fingerprint(getattr(whole, part), system.part_state(part))
    if _joined(own, added) != expected:
        raise ConfigError(
            f"system.{part}: not the model that encoded {name}, which was '{model}'; name that, or run `mm data encode` again"
        )


def _joined(fingerprint: str, added: str) -> str:
    return hashlib.sha256(f"{fingerprint}\n{added}".encode()).hexdigest() if added else fingerprint


def _reading(processor: Processor) -> str:
    """What decides how captions become ids."""
    return f"{processor.context_length}\n{processor.tokenizer.to_json()}"


class _Reader:
    """Makes features of captions."""

    def __init__(self, model: Model) -> None:
        self._model = model
        fingerprint = network_fingerprint(model.config, model.system.state_dict())
        self._read = PromptEncoder(build_prompt_network(model.name, {"text": model.system}))
        self.encoding = TextEncoding(
            model=model.name,
            fingerprint=_joined(fingerprint, _reading(model.processor)),
            words_width=self._read.words_width,
            vector_width=self._read.vector_width,
        )

    def __call__(self, texts: Sequence[str]) -> list[TextFeatures]:
        found: list[TextFeatures] = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = self._model.processor.text(texts[start : start + BATCH_SIZE]).to(self._model.device)
            condition = self._read(batch)
            assert condition.vector is not None
            counts = condition.known.sum(1).tolist()
            rows = zip(condition.words.cpu(), condition.vector.cpu(), counts, strict=True)
            found += [TextFeatures(words[:count], vector) for words, vector, count in rows]
        return found


def _loaded(model: str | Path | Model, device: str) -> Model:
    return model if isinstance(model, Model) else load(model, device=device, precision="fp32")


def _readable(source: Source, processor: Processor, packed: Packed) -> Iterator[tuple[Sample, Tensor]]:
    """Samples with the pixels that training without changes would see; the others are counted."""
    spec = processor.image_spec
    for index in range(len(source)):
        try:
            sample = source.read(index)
            image = picture(sample, processor, keep_alpha=True)
        except BadSample as error:
            packed.bad[error.cause] += 1
            continue
        packed.samples += 1
        [pixels] = augment([image], [0], AugmentConfig(), spec.size, background=spec.background)
        yield replace(sample, texts=tuple(text.strip() for text in sample.texts if text.strip())), pixels


def _encoded(
    pairs: Sequence[tuple[Sample, Tensor]], eye: Model, reader: _Reader | None, encoding: Encoding
) -> Iterator[Sample]:
    assert isinstance(eye.system, Compresses)
    pixels = torch.stack([image for _, image in pairs]).to(eye.device)
    variants = [pixels, pixels.flip(-1)] if encoding.mirrored else [pixels]
    latents = torch.stack([eye.system.to_latents(variant) for variant in variants], 1).cpu()
    read = iter([] if reader is None else reader([text for sample, _ in pairs for text in sample.texts]))
    for (sample, _), rows in zip(pairs, latents, strict=True):
        texts = () if reader is None else tuple(next(read) for _ in sample.texts)
        yield replace(sample, media={MEDIA: to_bytes(Features(rows, texts), encoding.dtype)})
