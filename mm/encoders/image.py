"""Image encoder: any timm backbone behind one interface; it normalises its own pixels.

Shapes: B batch, H and W pixels, N tokens, D width.
"""

import copy
import difflib
import inspect
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, JsonValue, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from mm.config import StrictConfig
from mm.errors import UserError
from mm.nn.experts import Experts, ExpertsConfig, refuse_hash
from mm.types import Encoded

FIELDS_OF_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "patch_drop_rate": "patch_dropout",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
}
"""Arguments of timm backbones that have a field of their own here."""

PYRAMID = "pyramid"
"""The one pooling that is not timm's."""

PYRAMID_SIDE = 6
"""Most cells to a side that a stage contributes to the pooled vector."""

BACKBONE_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError)
"""What timm and torch raise for sizes and options that a backbone cannot have."""


class ImageEncoderConfig(StrictConfig):
    """A timm backbone.

    Args:
        backbone: Name in timm, e.g. "convnext_atto" or "vit_tiny_patch16_224".
        image_size: Side of the square picture in pixels.
        patch_size: Side of a patch, or stride of the stem, for backbones that take one.
        options: Other arguments of the backbone, e.g. ``{depths: [2, 2, 6, 2], dims: [32, 64, 128, 256]}``.
        pool: Pooling in timm's terms ("avg", "token", "map"); the backbone's own if None. "pyramid" puts the pixels and the
            features of every stage in a row, averaged over 6 x 6 cells: the pooled vector knows what is where, coarse and fine
            (hypercolumns, https://arxiv.org/abs/1411.5752), which suits small pictures that are cut to their content.
        tokens: The backbone's "last" features or, with pool: pyramid, the "pyramid": 6 x 6 cells, each with the pixels and
            features of every stage there, so that words have more to attend to than a few coarse features.
        patch_dropout: Share of patches left out in training (ViTs only).
        drop_path: Probability of skipping a residual branch in training, at the last block; less before.
        experts: Feed-forward layers of several experts, with learned routing (ViTs only, https://arxiv.org/abs/2106.05974).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
    """

    backbone: str = "convnext_atto"
    image_size: int = Field(default=64, ge=1)
    patch_size: int | None = Field(default=None, ge=1)
    options: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    pool: str | None = None
    tokens: Literal["last", "pyramid"] = "last"
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    experts: ExpertsConfig | None = None
    gradient_checkpointing: bool = False
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    @model_validator(mode="after")
    def _possible(self) -> "ImageEncoderConfig":
        refuse_hash(self.experts)
        if self.pool == PYRAMID and self.patch_dropout:
            raise ValueError("pool: pyramid needs every patch; leave patch_dropout out")
        if self.tokens == PYRAMID and self.pool != PYRAMID:
            raise ValueError("tokens: pyramid are the cells of pool: pyramid; set both")
        if min(self.std) <= 0:
            raise ValueError("std must be above 0")
        return self


class ImageEncoder(nn.Module):
    """Normalises pixels, runs a timm model and returns its features and its pooled vector.

    Args:
        trunk: A timm model made with ``num_classes=0``.
        image_size: Side of the pictures it accepts, pixels.
        mean: Of each colour channel, in 0..1.
        std: Of each colour channel, in 0..1.
        pyramid: Pool pixels and features of every stage instead of using the model's own head.
        pyramid_tokens: Give the cells of the pyramid as tokens instead of the model's last features.

    Attributes:
        width: D of the pooled vector.
        token_width: D of the tokens; a few mobile backbones widen only the pooled vector.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        *,
        image_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        pyramid: bool = False,
        pyramid_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.pyramid, self.pyramid_tokens = pyramid, pyramid_tokens
        self.image_size = image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        _exempt_from_decay(trunk)
        if pyramid:
            _freeze_head(trunk)
        self.num_tokens = 0
        whole = _dry_run(self)
        self.num_tokens, self.token_width = whole.tokens.shape[1:]
        self.width = whole.pooled.shape[1]

    def forward(self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]) -> Encoded:
        """Encode pictures, uint8 in 0..255 or float in 0..1. Raises `UserError` for pictures of another size.

        ``extras["prefix"]`` is the number of tokens (class, registers) before the patches; ``extras["grid"]`` the rows and
        columns of the patches, absent where some were dropped.
        """
        if image.shape[1:] != (3, self.image_size, self.image_size):
            size = self.image_size
            raise UserError(
                f"image encoder: pictures of shape {tuple(image.shape[1:])} where (3, {size}, {size}) is expected; "
                "prepare them with the model's processor or change image_size"
            )
        pixels = self._normalise(image)
        if self.pyramid:
            features, stages = self.trunk.forward_intermediates(pixels, norm=True)
            tokens, extras = _columns((pixels, *stages)) if self.pyramid_tokens else self._flatten(features)
            pooled = torch.cat([_cells(stage) for stage in (pixels, *stages)], dim=1)
        else:
            features = self.trunk.forward_features(pixels)
            tokens, extras = self._flatten(features)
            pooled = self.trunk.forward_head(features, pre_logits=True)
        return Encoded(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device), pooled, extras)

    def stages(self, image: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Feature maps ``(B, C, h, w)`` of every stage, fine to coarse, for perceptual distances."""
        return self.trunk.forward_intermediates(self._normalise(image), intermediates_only=True)

    def cast_(self, dtype: torch.dtype) -> None:
        """Hold the network in another floating type, for inference; pixels are still normalised in fp32."""
        self.trunk.to(dtype)

    def _normalise(self, image: Tensor) -> Tensor:
        white = 1.0 if image.is_floating_point() else 255.0
        pixels = (image.to(self.mean.dtype) - self.mean * white) / (self.std * white)
        return pixels.to(next(self.trunk.parameters()).dtype, memory_format=torch.channels_last)

    def _flatten(self, features: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Feature maps of either layout, or tokens as they are, to ``(B, N, D)``."""
        if features.ndim == 4:
            if getattr(self.trunk, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)
            return features.flatten(1, 2), {"prefix": 0, "grid": tuple(features.shape[1:3])}
        prefix = getattr(self.trunk, "num_prefix_tokens", 0)
        num_patches = features.shape[1] - prefix
        side = math.isqrt(num_patches)
        if features.shape[1] == self.num_tokens and side * side == num_patches:
            return features, {"prefix": prefix, "grid": (side, side)}
        return features, {"prefix": prefix}


def _cells(stage: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n"]:
    """Averages over at most 6 x 6 cells of a feature map, in a row, brought to mean 0 and variance 1."""
    side = min(PYRAMID_SIDE, stage.shape[2])
    cells = F.adaptive_avg_pool2d(stage.float(), side).flatten(1)
    return F.layer_norm(cells, cells.shape[1:])


def _columns(stages: Sequence[Float[Tensor, "b c h w"]]) -> tuple[Float[Tensor, "b n d"], dict[str, Any]]:
    """What all stages hold above each of 6 x 6 cells; each stage is brought to mean 0 and variance 1."""
    grids = [F.adaptive_avg_pool2d(stage.float(), PYRAMID_SIDE) for stage in stages]
    tokens = torch.cat([F.layer_norm(grid, grid.shape[1:]) for grid in grids], dim=1).flatten(2).mT
    return tokens.to(stages[-1].dtype), {"prefix": 0, "grid": (PYRAMID_SIDE, PYRAMID_SIDE)}


def _freeze_head(trunk: Any) -> None:
    """Parameters of the backbone's own pooling take no part in another one."""
    for name in ("head", "fc_norm", "attn_pool"):
        part = getattr(trunk, name, None)
        if isinstance(part, nn.Module):
            part.requires_grad_(False)


def _exempt_from_decay(trunk: Any) -> None:
    """Mark what the backbone says should not decay (positions, class tokens), for `System.parameter_groups`."""
    names = trunk.no_weight_decay() if hasattr(trunk, "no_weight_decay") else ()
    for name, parameter in trunk.named_parameters():
        if name in names:
            parameter.no_decay = True


def _dry_run(encoder: ImageEncoder) -> Encoded:
    """Encode one picture on the meta device: finds every shape, and whether the backbone can take the size, at no cost."""
    tensors = [*encoder.named_parameters(), *encoder.named_buffers()]
    image = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta")
    training = encoder.training
    encoder.eval()
    try:
        with torch.no_grad():
            return functional_call(encoder, {name: tensor.to("meta") for name, tensor in tensors}, image)
    except BACKBONE_FAILURES as error:
        name = type(encoder.trunk).__name__
        raise UserError(f"backbone {name} cannot encode {encoder.image_size} px pictures: {_first_line(error)}") from None
    finally:
        encoder.train(training)


@cache
def reserved_options() -> frozenset[str]:
    """Arguments that `options` may not pass on: they fetch or read files, change the interface, or have a field."""
    import timm

    named = inspect.signature(timm.create_model).parameters
    return frozenset([*FIELDS_OF_ARGUMENTS, *named, "num_classes", "in_chans", "features_only"]) - {"kwargs"}


def build_image_encoder(config: ImageEncoderConfig) -> ImageEncoder:
    """An image encoder with fresh weights. Raises `UserError` where timm has no such model or it takes no such option."""
    import timm  # takes seconds, which models without such an encoder do without

    name = config.backbone
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"backbone '{name}': timm has no such model; {hint}")
    reserved = sorted(reserved_options() & config.options.keys())
    if reserved:
        field = FIELDS_OF_ARGUMENTS.get(reserved[0])
        instead = f"set {field} instead" if field else "leave it out"
        raise UserError(f"backbone '{name}': '{reserved[0]}' may not be one of the options; {instead}")
    arguments = _arguments(config)
    try:
        trunk = timm.create_model(name, num_classes=0, **arguments)
    except BACKBONE_FAILURES as error:
        raise UserError(_explain(name, arguments, error)) from None
    _check_patches(trunk, config.image_size)
    if config.experts is not None:
        _add_experts(trunk, name, config.experts)
    if config.gradient_checkpointing:
        try:
            trunk.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
        except (AttributeError, AssertionError):
            raise UserError(f"backbone '{name}' has no gradient checkpointing; leave gradient_checkpointing out") from None
    return ImageEncoder(
        trunk,
        image_size=config.image_size,
        mean=config.mean,
        std=config.std,
        pyramid=config.pool == PYRAMID,
        pyramid_tokens=config.tokens == PYRAMID,
    )


def _add_experts(trunk: nn.Module, name: str, config: ExpertsConfig) -> None:
    """Put experts, each with fresh weights, in place of feed-forward layers of a ViT."""
    from timm.models.vision_transformer import VisionTransformer, init_weights_vit_timm

    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"backbone '{name}' is no plain ViT; leave experts out, or take one such as vit_small_patch16_224")
    blocks: Any = trunk.blocks
    for layer, block in enumerate(blocks):
        if config.in_layer(layer):
            original = block.mlp
            block.mlp = Experts(lambda of=original: copy.deepcopy(of), trunk.embed_dim, config, layer)
            block.mlp.apply(init_weights_vit_timm)


def _arguments(config: ImageEncoderConfig) -> dict[str, Any]:
    """What timm's constructor is given; a field that is at its default is not mentioned to backbones that may not know it."""
    import timm

    arguments: dict[str, Any] = dict(config.options)
    architecture = timm.get_pretrained_cfg(config.backbone.partition(".")[0])  # what is behind the dot names weights
    if architecture is not None and architecture.fixed_input_size:
        arguments["img_size"] = config.image_size
    chosen = {
        "patch_size": config.patch_size,
        "patch_drop_rate": config.patch_dropout,
        "drop_path_rate": config.drop_path,
        "global_pool": None if config.pool == PYRAMID else config.pool,
    }
    return arguments | {key: value for key, value in chosen.items() if value}


def _check_patches(trunk: Any, image_size: int) -> None:
    """timm cuts off the pixels that fill no patch, without a word."""
    from timm.layers.patch_embed import PatchEmbed

    patches: Any = getattr(trunk, "patch_embed", None)
    if isinstance(patches, PatchEmbed) and not patches.dynamic_img_pad:
        side = int(patches.patch_size[0])
        if image_size % side:
            raise UserError(f"image_size {image_size} is not a multiple of the patch size {side}; change one of them")


def _explain(name: str, arguments: dict[str, Any], error: Exception) -> str:
    unknown = next((key for key in arguments if f"unexpected keyword argument '{key}'" in str(error)), None)
    if unknown is not None:
        return f"backbone '{name}' takes no {FIELDS_OF_ARGUMENTS.get(unknown, unknown)}; leave it out"
    return f"backbone '{name}' cannot be made with {arguments}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
