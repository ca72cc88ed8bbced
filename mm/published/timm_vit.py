"""CLIP's vision transformer in timm's terms: the same network, with timm's fused attention and options.

Source of the architecture: https://arxiv.org/abs/2103.00020, section 2.4.
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import JsonValue
from torch import Tensor

from mm.encoders.image import ImageEncoderConfig

BACKBONE = "vit_base_patch32_clip_224"
"""The member of timm's family that all others are made from by options."""

RENAMED = {
    "conv1.weight": "patch_embed.proj.weight",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
}
BLOCK_PARTS = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj": "attn.qkv",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "ls_1": "ls1",
    "ls_2": "ls2",
}
BLOCKS = "transformer.resblocks."


EXPRESSED = frozenset(
    {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "patch_dropout"}
    | {"no_ln_pre", "pool_type", "final_ln_after_pool", "output_tokens"}
)
"""Settings of open_clip's ``vision_cfg`` that `clip_vit_config` knows."""

NEUTRAL = {"pos_embed_type": "learnable"}
"""Values of other settings which say what is so anyway; so do null and false."""

WITHOUT_EFFECT = ("timm_drop", "attn_pooler")
"""Beginnings of settings that concern other networks."""


def clip_vit_config(
    *,
    image_size: int,
    patch_size: int,
    width: int,
    layers: int,
    heads: int,
    mlp_ratio: float,
    quick_gelu: bool,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    average: bool = False,
    pre_norm: bool = True,
    layer_scale: float | None = None,
) -> ImageEncoderConfig:
    """The encoder that holds CLIP's vision transformer.

    Args:
        image_size: Side of the picture in pixels.
        patch_size: Side of a patch in pixels.
        width: D of the tokens.
        layers: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the feed-forward over D.
        quick_gelu: Whether the weights were trained with ``x * sigmoid(1.702 x)``.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
        average: Pool the mean of the patches and normalise after it (CLIPA), not the class token.
        pre_norm: Whether there is a norm before the first block.
        layer_scale: Initial value of a learnable gain of each branch, None for none.
    """
    options: dict[str, JsonValue] = {"embed_dim": width, "depth": layers, "num_heads": heads, "mlp_ratio": mlp_ratio}
    if quick_gelu:
        options["act_layer"] = "quick_gelu"
    if not pre_norm:
        options["pre_norm"] = False
    if layer_scale is not None:
        options["init_values"] = layer_scale
    return ImageEncoderConfig(
        backbone=BACKBONE,
        image_size=image_size,
        patch_size=patch_size,
        options=options,
        pool="avg" if average else None,
        mean=mean,
        std=std,
    )


def clip_vit_weights(state: Mapping[str, Tensor], *, average: bool = False) -> dict[str, Tensor]:
    """Weights of open_clip's ``VisionTransformer``, under timm's names; the projection is left out.

    Args:
        state: Names as in ``visual.state_dict()``.
        average: As for `clip_vit_config`.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in RENAMED:
            result[RENAMED[name]] = tensor
        elif name.startswith(BLOCKS):
            layer, _, rest = name.removeprefix(BLOCKS).partition(".")
            part, _, kind = rest.replace("in_proj_", "in_proj.").rpartition(".")
            result[f"blocks.{layer}.{BLOCK_PARTS[part]}.{kind}"] = tensor
    result["cls_token"] = state["class_embedding"].reshape(1, 1, -1)
    result["pos_embed"] = state["positional_embedding"].unsqueeze(0)
    if "norm_pre.weight" not in result:  # timm's patches have a bias where no norm follows them
        result["patch_embed.proj.bias"] = torch.zeros(result["patch_embed.proj.weight"].shape[0])
    if average:
        for kind in ("weight", "bias"):
            result[f"fc_norm.{kind}"] = result.pop(f"norm.{kind}")
    return result


def is_plain(vision: Mapping[str, Any]) -> bool:
    """Whether an open_clip ``vision_cfg`` describes a transformer that `clip_vit_config` can express exactly."""
    others = {key: value for key, value in vision.items() if key not in EXPRESSED and not key.startswith(WITHOUT_EFFECT)}
    plain = all(value in (None, False, NEUTRAL.get(key)) for key, value in others.items())
    square = all(isinstance(vision.get(key, 1), int) for key in ("layers", "image_size", "patch_size"))
    pooling = vision.get("pool_type", "tok"), bool(vision.get("final_ln_after_pool", False))
    return plain and square and pooling in {("tok", False), ("tok", True), ("avg", True)}
