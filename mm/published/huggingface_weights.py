"""Weights of transformers' CLIP and SigLIP towers, under the names of open_clip and timm.

Source: https://github.com/huggingface/transformers (names of its weights).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LAYERS = "encoder.layers."
EMBEDDINGS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


@dataclass(frozen=True)
class _Naming:
    """How a library names the parts of a block; ``joined`` is what holds query, key and value in a row."""

    blocks: str
    joined: str
    parts: Mapping[str, str]


OPEN_CLIP = _Naming(
    blocks="transformer.resblocks.",
    joined="attn.in_proj_",
    parts={
        "layer_norm1.": "ln_1.",
        "layer_norm2.": "ln_2.",
        "self_attn.out_proj.": "attn.out_proj.",
        "mlp.fc1.": "mlp.c_fc.",
        "mlp.fc2.": "mlp.c_proj.",
    },
)
TIMM = _Naming(
    blocks="blocks.",
    joined="attn.qkv.",
    parts={
        "layer_norm1.": "norm1.",
        "layer_norm2.": "norm2.",
        "self_attn.out_proj.": "attn.proj.",
        "mlp.fc1.": "mlp.fc1.",
        "mlp.fc2.": "mlp.fc2.",
    },
)


def open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vision or text transformer of CLIP, or SigLIP's text transformer, under open_clip's names.

    Args:
        state: Names as in ``vision_model.state_dict()`` or ``text_model.state_dict()``; projections are left out.
    """
    return {new: state[old] for old, new in EMBEDDINGS.items() if old in state} | _blocks(state, OPEN_CLIP)


def siglip_vit_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SigLIP's vision transformer with its attention pool, under timm's names.

    Args:
        state: Names as in ``vision_model.state_dict()``.
    """
    width = state["head.probe"].shape[-1]
    result = _blocks(state, TIMM)
    result["attn_pool.latent"] = state["head.probe"]
    result["pos_embed"] = state["embeddings.position_embedding.weight"].unsqueeze(0)
    for kind in ("weight", "bias"):
        joined = state[f"head.attention.in_proj_{kind}"]
        result |= {
            f"patch_embed.proj.{kind}": state[f"embeddings.patch_embedding.{kind}"],
            f"norm.{kind}": state[f"post_layernorm.{kind}"],
            f"attn_pool.q.{kind}": joined[:width],
            f"attn_pool.kv.{kind}": joined[width:],
            f"attn_pool.proj.{kind}": state[f"head.attention.out_proj.{kind}"],
            f"attn_pool.norm.{kind}": state[f"head.layernorm.{kind}"],
            f"attn_pool.mlp.fc1.{kind}": state[f"head.mlp.fc1.{kind}"],
            f"attn_pool.mlp.fc2.{kind}": state[f"head.mlp.fc2.{kind}"],
        }
    return result


def _blocks(state: Mapping[str, Tensor], naming: _Naming) -> dict[str, Tensor]:
    result = {}
    for layer in {name.removeprefix(LAYERS).partition(".")[0] for name in state if name.startswith(LAYERS)}:
        old, new = f"{LAYERS}{layer}.", f"{naming.blocks}{layer}."
        for kind in ("weight", "bias"):
            result |= {f"{new}{theirs}{kind}": state[f"{old}{ours}{kind}"] for ours, theirs in naming.parts.items()}
            joined = [state[f"{old}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            result[f"{new}{naming.joined}{kind}"] = torch.cat(joined)
    return result
