"""Vision transformers of timm, read off their modules, under the names that open_clip and transformers give the same weights.

The inverse of `mm.published.timm_vit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mm.encoders.image import ImageEncoder
from mm.published.huggingface_weights import EMBEDDINGS, LAYERS, OPEN_CLIP
from mm.published.timm_vit import BLOCK_PARTS, BLOCKS, RENAMED


@dataclass(frozen=True)
class VisionShape:
    """What weights alone do not tell.

    Args:
        width: D of the tokens.
        layers: Number of blocks.
        heads: Attention heads.
        hidden_width: Of the feed-forward.
        patch_size: Side of a patch in pixels.
        activation: "gelu", "quick_gelu" or "gelu_tanh".
        norm_eps: Added to the variance in the norms.
        pool: "token", "avg" or "map".
        pre_norm: Whether there is a norm before the first block.
        layer_scale: Whether branches have a learnable gain.
    """

    width: int
    layers: int
    heads: int
    hidden_width: int
    patch_size: int
    activation: str
    norm_eps: float
    pool: str
    pre_norm: bool
    layer_scale: bool


def vision_shape(encoder: nn.Module) -> VisionShape | None:
    """The shape of a timm vision transformer of the plain kind; None for any other encoder."""
    trunk: Any = getattr(encoder, "trunk", None)
    if not isinstance(encoder, ImageEncoder) or encoder.pyramid or type(trunk) is not VisionTransformer:
        return None
    blocks: Any = trunk.blocks
    first = blocks[0]
    epsilons = {module.eps for module in trunk.modules() if isinstance(module, nn.LayerNorm)}
    activation = activation_name(first.mlp.act)
    patch = trunk.patch_embed.patch_size
    if len(epsilons) != 1 or activation is None or patch[0] != patch[1]:
        return None
    return VisionShape(
        width=trunk.embed_dim,
        layers=len(blocks),
        heads=first.attn.num_heads,
        hidden_width=first.mlp.fc1.out_features,
        patch_size=patch[0],
        activation=activation,
        norm_eps=epsilons.pop(),
        pool=trunk.global_pool,
        pre_norm=not isinstance(trunk.norm_pre, nn.Identity),
        layer_scale=not isinstance(first.ls1, nn.Identity),
    )


def activation_name(activation: nn.Module) -> str | None:
    """Which of the activations a module computes; None for another one. Libraries have several classes for each."""
    x = torch.linspace(-6, 6, 101)
    known = {"gelu": F.gelu(x), "gelu_tanh": F.gelu(x, approximate="tanh"), "quick_gelu": x * torch.sigmoid(1.702 * x)}
    y = activation(x.clone())
    return next((name for name, values in known.items() if torch.allclose(values, y, atol=1e-6)), None)


def clip_vision_weights(trunk: nn.Module) -> dict[str, Tensor] | None:
    """Weights of CLIP's vision transformer under the names of open_clip's ``visual``, its ``proj`` left out.

    A bias of the patches, for which CLIP has no place, becomes part of the patches' positions: the sum is the same.

    Args:
        trunk: A timm vision transformer with `VisionShape.pool` "token" or "avg".

    Returns:
        None where it has other parts, or lacks some.
    """
    names = {new: old for old, new in RENAMED.items()}
    names |= {f"fc_norm.{kind}": f"ln_post.{kind}" for kind in ("weight", "bias")}
    parts = {new: old for old, new in BLOCK_PARTS.items()}
    result: dict[str, Tensor] = {}
    bias: Tensor | None = None
    for name, tensor in trunk.state_dict().items():
        if name in names:
            result[names[name]] = tensor
        elif name == "patch_embed.proj.bias":
            bias = tensor
        elif (moved := _block_name(name, parts)) is not None:
            result[moved] = tensor
        else:
            return None
    grid: Any = trunk.patch_embed
    if not {"class_embedding", "conv1.weight", "ln_post.weight"} <= result.keys():
        return None
    result["class_embedding"] = result["class_embedding"].flatten()
    positions = result["positional_embedding"].squeeze(0).clone()
    if len(positions) != grid.num_patches + 1:
        return None
    if bias is not None:
        positions[1:] += bias
    return result | {"positional_embedding": positions}


def _block_name(name: str, parts: Mapping[str, str]) -> str | None:
    if not name.startswith("blocks."):
        return None
    layer, _, rest = name.removeprefix("blocks.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"{BLOCKS}{layer}.{parts[part]}.{kind}".replace("in_proj.", "in_proj_") if part in parts else None


def siglip_vision_weights(trunk: nn.Module) -> dict[str, Tensor] | None:
    """Weights of SigLIP's vision transformer under the names of transformers' ``vision_model``; None where it is not one."""
    state = trunk.state_dict()
    result: dict[str, Tensor] = {}
    try:
        result["head.probe"] = state.pop("attn_pool.latent")
        result["embeddings.position_embedding.weight"] = state.pop("pos_embed").squeeze(0)
        for kind in ("weight", "bias"):
            result[f"embeddings.patch_embedding.{kind}"] = state.pop(f"patch_embed.proj.{kind}")
            result[f"post_layernorm.{kind}"] = state.pop(f"norm.{kind}")
            joined = [state.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
            result[f"head.attention.in_proj_{kind}"] = torch.cat(joined)
            result[f"head.attention.out_proj.{kind}"] = state.pop(f"attn_pool.proj.{kind}")
            result[f"head.layernorm.{kind}"] = state.pop(f"attn_pool.norm.{kind}")
            result[f"head.mlp.fc1.{kind}"] = state.pop(f"attn_pool.mlp.fc1.{kind}")
            result[f"head.mlp.fc2.{kind}"] = state.pop(f"attn_pool.mlp.fc2.{kind}")
    except KeyError:
        return None
    parts = {new: old for old, new in BLOCK_PARTS.items()}
    blocks = {_block_name(name, parts): tensor for name, tensor in state.items()}
    if None in blocks:
        return None
    return result | transformers_names({str(name): tensor for name, tensor in blocks.items()})


def transformers_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A transformer under open_clip's names (vision or text), under those of transformers' CLIP and SigLIP.

    Args:
        state: Names as in open_clip's ``visual.state_dict()`` or those of its text tower, without projections and gains.
    """
    embeddings = {old: new for new, old in EMBEDDINGS.items()}
    parts = {old: new for new, old in OPEN_CLIP.parts.items()}
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in embeddings:
            result[embeddings[name]] = tensor
            continue
        layer, _, rest = name.removeprefix(BLOCKS).partition(".")
        part, _, kind = rest.rpartition(".")
        place = f"{LAYERS}{layer}."
        if rest.startswith(OPEN_CLIP.joined):
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{place}self_attn.{letter}_proj.{rest.removeprefix(OPEN_CLIP.joined)}"] = third
        else:
            result[f"{place}{parts[part + '.']}{kind}"] = tensor
    return result
