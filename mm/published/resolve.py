"""From what a user calls a published checkpoint to the checkpoint: a folder, an open_clip tag, a Hugging Face repository."""

import difflib
import re
from pathlib import Path
from typing import Any

from mm.errors import CheckpointError
from mm.published import huggingface, open_clip
from mm.published.imported import Imported, read_safetensors

HUB = "hf-hub:"
REVISION = "@"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def import_model(model: str) -> Imported | None:
    """The published checkpoint that ``model`` names, or None where it names none.

    Args:
        model: A folder written by open_clip or transformers; ``ARCHITECTURE/TAG`` of open_clip, e.g. ``ViT-B-32/openai``;
            ``ARCHITECTURE@FILE.safetensors``; or a Hugging Face repository ``OWNER/NAME``, with ``@REVISION`` if one is pinned.

    Raises:
        CheckpointError: It names one that cannot be had or used.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return import_folder(folder)
    name, _, behind = model.removeprefix(HUB).partition(REVISION)
    if behind.endswith(".safetensors"):
        return _from_file(name, Path(behind).expanduser())
    architecture, _, tag = name.rpartition("/")
    known = _architectures()
    if architecture.replace("/", "-") in known and not model.startswith(HUB):
        return _from_tag(architecture.replace("/", "-"), tag)
    if name in known:
        raise CheckpointError(f"'{model}': name the weights too, {name}/TAG; there are {', '.join(_tags(name)) or 'none'}")
    if REPOSITORY.fullmatch(name):
        return import_folder(huggingface.resolve_repo(name, behind or None))
    return None


def import_folder(folder: Path) -> Imported | None:
    """A folder in open_clip's or transformers' layout; None for any other."""
    if (folder / open_clip.CONFIG_FILE).is_file():
        return open_clip.import_folder(folder)
    if (folder / "config.json").is_file():
        return huggingface.import_huggingface(folder)
    return None


def model_config(architecture: str) -> dict[str, Any]:
    """open_clip's configuration of an architecture. Raises `CheckpointError` with the nearest name."""
    known = _architectures()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "open_clip.list_models() lists them"
        raise CheckpointError(f"open_clip has no architecture '{architecture}'; {hint}")
    from open_clip import get_model_config

    return dict(get_model_config(architecture) or {})


def _from_file(architecture: str, weights: Path) -> Imported:
    config = model_config(architecture)
    state = read_safetensors(weights)
    return open_clip.import_checkpoint(
        config, state, preprocessing={}, folder=weights.parent, where=f"{architecture}{REVISION}{weights}"
    )


def _from_tag(architecture: str, tag: str) -> Imported:
    """Weights by open_clip's own list. The activation is that of the tag: a mismatch costs accuracy without a word."""
    from open_clip.pretrained import get_pretrained_cfg

    name = f"{architecture}/{tag}"
    published = get_pretrained_cfg(architecture, tag)
    if not published:
        near = difflib.get_close_matches(tag, _tags(architecture), n=1)
        hint = f"did you mean '{architecture}/{near[0]}'?" if near else f"there are {', '.join(_tags(architecture))}"
        raise CheckpointError(f"'{name}': open_clip has no such weights; {hint}")
    repository, _, _ = str(published.get("hf_hub", "")).rpartition("/")
    if not repository:
        raise CheckpointError(
            f"'{name}': is published as a pickled file outside the hub ({published.get('url')}); download it, then: "
            f"mm convert FILE --arch {architecture} --i-trust-this-file -o DIR"
        )
    folder = huggingface.resolve_repo(repository, None)
    weights = next((folder / file for file in open_clip.WEIGHT_FILES if (folder / file).is_file()), None)
    if weights is None:
        raise CheckpointError(f"'{name}': {repository} holds no safetensors weights")
    config = model_config(architecture) | {"quick_gelu": bool(published.get("quick_gelu", False))}
    return open_clip.import_checkpoint(config, read_safetensors(weights), preprocessing=published, folder=folder, where=name)


def _architectures() -> list[str]:
    try:
        from open_clip import list_models
    except ImportError:
        return []
    return list_models()


def _tags(architecture: str) -> list[str]:
    from open_clip import list_pretrained_tags_by_model

    return list_pretrained_tags_by_model(architecture)
