"""The suite's text encoder under open_clip's names: the inverse of `mm.encoders.text.from_open_clip`."""

from collections.abc import Mapping

import torch
from torch import Tensor

NAMES = {
    "embedding.tokens.weight": "token_embedding.weight",
    "embedding.positions.weight": "positional_embedding",
    "transformer.final_norm.weight": "ln_final.weight",
    "transformer.final_norm.bias": "ln_final.bias",
}
BLOCK_PARTS = {
    "attention_residual.norm": "ln_1",
    "feed_forward_residual.norm": "ln_2",
    "attention.output": "attn.out_proj",
    "feed_forward.input": "mlp.c_fc",
    "feed_forward.output": "mlp.c_proj",
}
BLOCKS = "transformer.blocks."


def open_clip_text_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `TextEncoder` under the names of open_clip's text transformer; the projection is not among them.

    Args:
        state: Its ``state_dict``.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in NAMES:
            result[NAMES[name]] = tensor
            continue
        layer, _, rest = name.removeprefix(BLOCKS).partition(".")
        part, _, kind = rest.rpartition(".")
        place = f"transformer.resblocks.{layer}."
        if part == "attention.query":
            key_value = state[f"{BLOCKS}{layer}.attention.key_value.{kind}"]
            result[f"{place}attn.in_proj_{kind}"] = torch.cat([tensor, key_value])
        elif part != "attention.key_value":
            result[f"{place}{BLOCK_PARTS[part]}.{kind}"] = tensor
    return result
