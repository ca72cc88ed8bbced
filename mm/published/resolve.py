"""From what a user calls a published checkpoint to the checkpoint: a folder, an open_clip tag, a Hugging Face repository."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mm.errors import CheckpointError
from mm.published import huggingface, open_clip
from mm.published.image_tokenizers import import_tokenizer_folder
from mm.published.imported import Imported, read_safetensors
from mm.published.language_models import import_language_model, is_language_model
from mm.published.openai import import_openai
from mm.published.stable_diffusion import import_pipeline_folder
from mm.published.text_encoders import import_text_encoder, is_text_encoder
from mm.published.timm_folder import import_timm
from mm.published.wav2vec2 import import_wav2vec2, is_wav2vec2

HUB = "hf-hub:"
REVISION = "@"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def import_model(model: str) -> Imported | None:
    """The published checkpoint that ``model`` names, or None where it names none.

    Args:
        model: A folder written by open_clip or transformers; ``ARCHITECTURE/TAG`` of open_clip, e.g. ``ViT-B-32/openai``, or a
            Hugging Face repository ``OWNER/NAME``, with ``@REVISION`` if one is pinned; or a file of weights that are like
            those of a tag, ``ARCHITECTURE/TAG@FILE.safetensors``, where ``/TAG`` is only needed if the tags differ.

    Raises:
        CheckpointError: It names one that cannot be had or used.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return import_folder(folder)
    name, _, behind = model.removeprefix(HUB).partition(REVISION)
    if behind.endswith(".safetensors") or Path(behind).is_file():
        weights = Path(behind).expanduser()
        return import_weights(name, weights, read_safetensors(weights), where=model)
    architecture, tag = ("", "") if model.startswith(HUB) else _split(name)
    if tag:
        return _from_tag(architecture, tag, behind or None)
    if architecture:
        tags = ", ".join(_tags(architecture)) or "none"
        raise CheckpointError(f"'{model}': name the weights too, {architecture}/TAG; there are {tags}")
    if not REPOSITORY.fullmatch(name):
        return None
    try:
        snapshot = huggingface.resolve_repo(name, behind or None)
    except CheckpointError as error:
        if model.startswith(HUB):
            raise
        raise CheckpointError(f"there is no folder '{folder}'; on the hub, {error}") from None
    return import_folder(snapshot)


def import_folder(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported | None:
    """A folder of open_clip, timm, transformers, diffusers' pipelines, torchaudio or of a picture tokenizer, or None.

    Args:
        folder: What to read.
        state: Its weights where they are pickled and have been read, as for the importers of the first two layouts.
    """
    if (folder / open_clip.CONFIG_FILE).is_file():
        return open_clip.import_folder(folder, state)
    if state is None:
        for read in (import_pipeline_folder, import_tokenizer_folder, import_timm):
            if (found := read(folder)) is not None:
                return found
    for recognised, read in (
        (is_language_model, import_language_model),
        (is_wav2vec2, import_wav2vec2),
        (is_text_encoder, import_text_encoder),
    ):
        if recognised(folder):
            return read(folder, state)
    if (folder / huggingface.CONFIG_FILE).is_file():
        return huggingface.import_huggingface(folder, state)
    return None


def pickled_weights(folder: Path) -> list[Path]:
    """The pickled files that the weights of such a folder have to be read from; none where there are safetensors."""
    if (folder / open_clip.CONFIG_FILE).is_file():
        return [] if open_clip.find_weights(folder) else open_clip.pickled_weights(folder)
    return [] if any(folder.glob("*.safetensors")) else huggingface.pickled_weights(folder)


def import_weights(name: str | None, weights: Path, state: Mapping[str, Tensor], where: str) -> Imported:
    """A lone file of weights.

    Args:
        name: ``ARCHITECTURE`` or ``ARCHITECTURE/TAG`` of open_clip. Without a tag, an ``open_clip_config.json`` beside the
            file decides; without both, the weights must be of OpenAI's CLIP.
        weights: The file.
        state: What it holds.
        where: Name for messages.

    Raises:
        CheckpointError: There is no such architecture or tag, the tags of the architecture differ, or the weights do not fit.
    """
    architecture, tag = _split(name or "")
    if name and not architecture:
        model_config(name)
    if not tag and (weights.parent / open_clip.CONFIG_FILE).is_file():
        config, preprocessing = open_clip.read_config(weights.parent)
    elif name:
        config, preprocessing = published_as(architecture, tag)
    else:
        return import_openai(state, where)
    return open_clip.import_checkpoint(config, state, preprocessing=preprocessing, folder=weights.parent, where=where)


def published_as(architecture: str, tag: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and picture preparation of open_clip's published weights: of a tag, or what all tags have in common.

    A wrong preparation or activation costs accuracy without a word, so none is guessed. Where nothing was published, whoever
    trained the weights had open_clip's defaults.

    Raises:
        CheckpointError: There is no such tag, or none is given and they differ.
    """
    from open_clip.pretrained import get_pretrained_cfg

    config = model_config(architecture)
    published = [_tag(architecture, tag)] if tag else [get_pretrained_cfg(architecture, each) for each in _tags(architecture)]
    preparations = {tuple(each[key] for key in open_clip.PREPROCESSING) for each in published}
    activations = {bool(each.get("quick_gelu", config.get("quick_gelu", False))) for each in published}
    listed = f"{architecture}/TAG (TAG: {', '.join(_tags(architecture))})"
    if len(preparations) > 1:
        raise CheckpointError(f"'{architecture}' is published with several preparations of pictures; name one: {listed}")
    if len(activations) > 1:
        raise CheckpointError(f"'{architecture}' is published with two activations; give {architecture}-quickgelu or {listed}")
    for quick_gelu in activations:
        config["quick_gelu"] = quick_gelu
    return config, {key: value for each in preparations for key, value in zip(open_clip.PREPROCESSING, each, strict=True)}


def model_config(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture. Raises `CheckpointError` with the nearest name."""
    known = _architectures()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "open_clip.list_models() lists them"
        raise CheckpointError(f"open_clip has no architecture '{architecture}'; {hint}")
    from open_clip import get_model_config

    return dict(get_model_config(architecture) or {})


def _from_tag(architecture: str, tag: str, revision: str | None) -> Imported:
    """Weights by open_clip's own list."""
    published, name = _tag(architecture, tag), f"{architecture}/{tag}"
    repository, _, file = str(published.get("hf_hub", "")).rpartition("/")
    if not repository:
        raise CheckpointError(
            f"'{name}': is published as a pickled file outside the hub ({published.get('url')}); download it, then: "
            f"mm convert FILE --arch {name} --i-trust-this-file -o DIR"
        )
    folder = huggingface.resolve_repo(repository, revision)
    weights = open_clip.find_weights(folder)
    if weights is None:
        file = file or open_clip.PICKLED[0]
        raise CheckpointError(
            f"'{name}': is published as a pickled file; if you trust whoever wrote it: hf download {repository} {file} "
            f"--local-dir FOLDER, then: mm convert FOLDER/{file} --arch {name} --i-trust-this-file -o DIR"
        )
    config, preprocessing = published_as(architecture, tag)
    return open_clip.import_checkpoint(
        config, read_safetensors(weights), preprocessing=preprocessing, folder=folder, where=name
    )


def _split(name: str) -> tuple[str, str]:
    """``ARCHITECTURE/TAG`` or ``ARCHITECTURE``, in which open_clip takes / for -, as the two; both empty for other names."""
    known = _architectures()
    architecture, _, tag = name.rpartition("/")
    for found in ((name.replace("/", "-"), ""), (architecture.replace("/", "-"), tag)):
        if found[0] in known:
            return found
    return "", ""


def _tag(architecture: str, tag: str) -> dict[str, Any]:
    """How open_clip lists published weights. Raises `CheckpointError` with the nearest name."""
    from open_clip.pretrained import get_pretrained_cfg

    published = get_pretrained_cfg(architecture, tag)
    if not published:
        near = difflib.get_close_matches(tag, _tags(architecture), n=1)
        hint = f"did you mean '{architecture}/{near[0]}'?" if near else f"there are {', '.join(_tags(architecture)) or 'none'}"
        raise CheckpointError(f"'{architecture}/{tag}': open_clip has no such weights; {hint}")
    return dict(published)


def _architectures() -> list[str]:
    try:
        from open_clip import list_models
    except ImportError:
        return []
    return list_models()


def _tags(architecture: str) -> list[str]:
    from open_clip import list_pretrained_tags_by_model

    return list_pretrained_tags_by_model(architecture)
