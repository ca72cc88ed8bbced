"""OpenAI's CLIP files: the configuration is read off the shapes of the weights.

Source: https://github.com/openai/CLIP (format of its weights).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mm.errors import CheckpointError
from mm.published.imported import UNUSABLE, Imported, reason, widened
from mm.published.open_clip import import_checkpoint

META = ("input_resolution", "context_length", "vocab_size")
HEAD_WIDTH = 64


def import_openai(state: Mapping[str, Tensor], where: str) -> Imported:
    """A checkpoint with the names of OpenAI's CLIP. Raises `CheckpointError` for any other.

    Args:
        state: All weights; fp16 ones are widened.
        where: Name for messages.
    """
    weights = widened({name: tensor for name, tensor in state.items() if name not in META})
    try:
        config = _config(weights)
    except UNUSABLE as error:
        raise CheckpointError(
            f"{where}: no checkpoint of OpenAI's CLIP, its weights are others ({reason(error)}); give --arch ARCHITECTURE/TAG"
        ) from None
    return import_checkpoint(config, weights, preprocessing={}, folder=None, where=where)


def _config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    text_width = state["ln_final.weight"].shape[0]
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": _transformer(state) if "visual.proj" in state else _residual_network(state),
        "text_cfg": {
            "context_length": state["positional_embedding"].shape[0],
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // HEAD_WIDTH,
            "layers": _count(state, "transformer.resblocks."),
        },
    }


def _transformer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    grid = round((state["visual.positional_embedding"].shape[0] - 1) ** 0.5)
    layers = _count(state, "visual.transformer.resblocks.")
    return {"layers": layers, "width": width, "patch_size": patch_size, "image_size": patch_size * grid}


def _residual_network(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """A stride of 32 lies between the pixels and the grid that the attention pool has positions for."""
    grid = round((state["visual.attnpool.positional_embedding"].shape[0] - 1) ** 0.5)
    return {
        "layers": [_count(state, f"visual.layer{stage}.") for stage in (1, 2, 3, 4)],
        "width": state["visual.layer1.0.conv1.weight"].shape[0],
        "image_size": grid * 32,
    }


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks below a prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in state if name.startswith(prefix)})
