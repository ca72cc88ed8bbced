"""Checkpoints in transformers' layout: CLIP and SigLIP become the suite's towers, other dual towers stay transformers' modules.

Source: https://github.com/huggingface/transformers (formats of its configurations and weights).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm.config import read_json
from mm.encoders.library_towers import BLIP_RETRIEVAL, portable, quiet_transformers, shared_width
from mm.errors import CheckpointError
from mm.processor import Processor
from mm.published.huggingface_processor import read_pixels, read_tokenizer
from mm.published.huggingface_towers import OWN_NAMES, SIGLIP, image_tower, text_tower
from mm.published.imported import (
    PROMPTS,
    Imported,
    no_safetensors,
    one_line,
    pinned,
    put,
    read_safetensors,
    reason,
    widened,
)
from mm.systems.clip import ClipConfig

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"

ARCHITECTURES = {
    "align": "AlignModel",
    "altclip": "AltCLIPModel",
    "blip": "BlipModel",
    "chinese_clip": "ChineseCLIPModel",
    "clip": "CLIPModel",
    "groupvit": "GroupViTModel",
    "metaclip_2": "MetaClip2Model",
    "siglip": "SiglipModel",
}
"""The dual tower of each ``model_type``."""

LANGUAGE_MODELS = {
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "opt": "OPTConfig",
    "qwen2": "Qwen2Config",
}
"""The configuration of each ``model_type`` that `mm.published.language_models` reads."""

TEXT_ENCODERS = {"mt5": "MT5EncoderModel", "t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}
"""The encoder of each ``model_type`` that `mm.published.text_encoders` reads."""

LATER = {
    "bert": "BERT reads no pictures; mm convert FOLDER --image MODEL -o DIR joins it with a picture encoder",
    "clap": "CLAP needs an audio tower",
    "vilt": "ViLT has one tower for both, and no shared space",
    "siglip2": "this SigLIP 2 takes pictures of any aspect ratio; use one of a fixed resolution",
}
"""What is known but cannot be used yet, and why."""

FILES = ("*.json", "*.safetensors", "*.txt")
PIPELINE_INDEX = "model_index.json"
PIPELINE_FILES = (
    PIPELINE_INDEX,
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/*.json",
    "tokenizer/*.txt",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)
"""What is needed of a repository in Stable Diffusion's format; beside it there may be the same weights in other formats."""

PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")


def resolve_repo(repo_id: str, revision: str | None) -> Path:
    """The folder of a Hugging Face repository: configurations, safetensors and vocabularies, downloaded once.

    ``HF_HUB_OFFLINE=1`` and a missing network leave what was downloaded before.

    Args:
        repo_id: ``OWNER/NAME``.
        revision: Branch, tag or commit; a commit pins the content. None for the newest.

    Raises:
        CheckpointError: There is no such repository or revision, it may not be read, or there is no network.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError:
        raise CheckpointError(f"'{repo_id}': the hub needs huggingface_hub; pip install \"mm-suite[hub]\"") from None
    name = repo_id if revision is None else f"{repo_id}@{revision}"
    pipeline = resolve_file(repo_id, PIPELINE_INDEX, revision) is not None
    wanted, left = (PIPELINE_FILES, None) if pipeline else (FILES, ["*/*"])
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(wanted), ignore_patterns=left))
    except GatedRepoError:
        raise CheckpointError(
            f"'{name}': its owner asks for a consent; give it on its page and log in with: hf auth login"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointError(f"'{name}': the repository has no such revision; leave it out for the newest") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"'{name}': no such repository on the hub, or it is private; check the name") from None
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"'{name}': the hub cannot be reached and no earlier download is complete; give a local folder ({first})"
        ) from None


def resolve_file(repo_id: str, name: str, revision: str | None = None) -> Path | None:
    """One small file of a Hugging Face repository, downloaded once; None where it cannot be had."""
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(repo_id, name, revision=revision))
    except (ImportError, OSError, ValueError):
        return None


def import_huggingface(folder: Path, state: Mapping[str, Tensor] | None = None) -> Imported:
    """A folder with ``config.json``, safetensors, ``preprocessor_config.json`` and a tokenizer.

    Args:
        folder: Where they are.
        state: All weights, where they were read already; None reads the folder's safetensors.

    Raises:
        CheckpointError: A file is missing or damaged, or the checkpoint needs what is not supported.
    """
    with one_line(folder):
        return _import_huggingface(folder, state)


def pickled_weights(folder: Path) -> list[Path]:
    """The files, one or shards, with the pickled weights of a folder that transformers wrote."""
    return sorted(path for pattern in PICKLED for path in folder.glob(pattern))


def _import_huggingface(folder: Path, state: Mapping[str, Tensor] | None) -> Imported:
    values = read_json(folder / CONFIG_FILE)
    architecture = _architecture(values, folder)
    config = configuration(architecture, values, folder)
    state = prepared(read_weights(folder) if state is None else state)
    if architecture not in OWN_NAMES:
        state = renamed(architecture, config, state, folder)
    pixels = read_pixels(folder, int(config.vision_config.image_size))
    tokenizer, limit = read_tokenizer(folder, siglip=architecture == SIGLIP)
    image = image_tower(architecture, config, state, pixels)
    text = text_tower(architecture, config, state, tokenizer, str(folder))
    if architecture == SIGLIP and limit < text.config.context_length:
        raise CheckpointError(f"{folder}: its tokenizer ends at {limit} tokens, its text tower at {text.config.context_length}")
    scale, bias = _scale(state), state.get("logit_bias")
    left_out = sorted(
        {name.partition(".")[0] for name in state if not name.startswith(("vis", "text", "logit_", "temperature"))}
    )
    return Imported(
        config=ClipConfig(
            image=image.config,
            text=text.config,
            embed_dim=shared_width(architecture, config, "image"),
            image_projection=image.projection,
            text_projection=text.projection,
            loss="infonce" if bias is None else "siglip",
        ),
        state={
            **put(image.state, "towers."),
            **put(text.state, "towers."),
            "towers.logit_scale": scale,
            **({} if bias is None else {"towers.logit_bias": bias.float().reshape(())}),
        },
        processor=Processor(
            image=pixels.spec, tokenizer=tokenizer, context_length=min(text.config.context_length, limit), templates=PROMPTS
        ),
        card={
            "source": str(folder),
            "format": "transformers",
            "architecture": architecture,
            **pinned(folder),
            **({"left_out": left_out} if left_out else {}),
        },
    )


def _architecture(values: Mapping[str, Any], folder: Path) -> str:
    kind = str(values.get("model_type"))
    if kind in LATER:
        raise CheckpointError(f"{folder}: {LATER[kind]}; model_type '{kind}' is not supported")
    named = values.get("architectures") or [None]
    if kind == "blip" and named[0] not in (None, "BlipModel"):
        if named[0] != BLIP_RETRIEVAL:
            raise CheckpointError(
                f"{folder}: {named[0]} has no shared space; take a BLIP checkpoint for retrieval ({BLIP_RETRIEVAL})"
            )
        return BLIP_RETRIEVAL
    if kind not in ARCHITECTURES:
        known = ", ".join([*ARCHITECTURES, *LANGUAGE_MODELS, *TEXT_ENCODERS])
        raise CheckpointError(f"{folder}: model_type '{kind}' is not supported; there are {known}")
    return ARCHITECTURES[kind]


def configuration(architecture: str, values: Mapping[str, Any], folder: Path) -> Any:
    """transformers' own object, because it fills in what the file leaves out."""
    try:
        import transformers
    except ImportError:
        raise CheckpointError(f'{folder}: this layout needs transformers; pip install "mm-suite[hub]"') from None
    try:
        with quiet_transformers():
            return getattr(transformers, architecture).config_class.from_dict(portable(values))
    except Exception as error:  # validation errors of several libraries
        raise CheckpointError(f"{folder / CONFIG_FILE}: is no configuration of {architecture}: {reason(error)}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, one or the shards that its index lists."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise no_safetensors(folder, WEIGHTS_FILE, pickled_weights(folder))
    with one_line(folder / INDEX_FILE):
        names = sorted(set(read_json(folder / INDEX_FILE, 64 << 20)["weight_map"].values()))
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise CheckpointError(f"{folder / INDEX_FILE}: is no list of files in this folder; download it again")
    return [folder / name for name in names]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder that transformers wrote, from one safetensors file or from shards. Raises `CheckpointError`."""
    return {name: tensor for file in _weight_files(folder) for name, tensor in read_safetensors(file).items()}


def prepared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All weights in fp32, without the position numbers that older checkpoints hold."""
    return widened({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})


def renamed(architecture: str, config: Any, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Weights under the names of today's module. Raises `CheckpointError` where one is missing, which transformers makes up."""
    import transformers

    try:
        with quiet_transformers():
            model, report = getattr(transformers, architecture).from_pretrained(
                None, config=config, state_dict=dict(state), dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # shapes that differ
        raise CheckpointError(f"{folder}: its weights cannot be read as {architecture}: {reason(error)}") from None
    if report["missing_keys"]:
        raise CheckpointError(
            f"{folder}: its weights have no {sorted(report['missing_keys'])[:3]}; download the checkpoint again"
        )
    return model.state_dict()


def _scale(state: Mapping[str, Tensor]) -> Tensor:
    """Log of the multiplier of cosines; 0 where transformers compares by the cosine alone (BLIP)."""
    if "temperature" in state:
        return -state["temperature"].log().reshape(())
    return state.get("logit_scale", torch.zeros(())).float().reshape(())
