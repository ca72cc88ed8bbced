"""diffusers' UNet2DConditionModel as a network that denoises: Stable Diffusion's own, or one of any size.

Shapes as in `mm.generators.denoiser`.
"""

from typing import Any, Literal

from jaxtyping import Float
from pydantic import JsonValue
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import ConfigError
from mm.generators.denoiser import Condition, seen

NETWORK_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What diffusers and torch raise for sizes that a network cannot have."""

FIXED = ("in_channels", "out_channels", "sample_size", "cross_attention_dim", "time_cond_proj_dim")
"""Options that follow from the latents and the text."""


class UnetConfig(StrictConfig):
    """A UNet in diffusers' terms.

    Args:
        options: Arguments of ``UNet2DConditionModel``, such as ``{block_out_channels: [64, 128], layers_per_block: 1,
            down_block_types: [DownBlock2D, CrossAttnDownBlock2D], up_block_types: [CrossAttnUpBlock2D, UpBlock2D]}``; what the
            latents and the text decide is filled in.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
    """

    kind: Literal["unet"] = "unet"
    options: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    gradient_checkpointing: bool = False


class Unet(nn.Module):
    """See above.

    Args:
        network: A ``UNet2DConditionModel``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, x: Float[Tensor, "b c h w"], time: Tensor, condition: Condition) -> Float[Tensor, "b c h w"]:
        """See `mm.generators.denoiser.Denoiser`. Words are masked only where some row has fewer than others."""
        dtype = self.network.conv_in.weight.dtype
        mask = None if bool(condition.known.all()) else condition.known
        vector = condition.vector if self.network.config.time_cond_proj_dim is not None else None
        [output] = self.network(
            seen(x, condition).to(dtype),
            time.expand(len(x)),
            condition.words.to(dtype),
            timestep_cond=None if vector is None else vector.to(dtype),
            encoder_attention_mask=mask,
            return_dict=False,
        )
        return output

    def prepare(self, condition: Condition) -> Condition:
        """See `mm.generators.denoiser.Denoiser`: nothing is computed in advance."""
        return condition


def build_unet(
    config: UnetConfig, shape: tuple[int, int, int], words_width: int, vector_width: int | None, beside: int = 0
) -> Unet:
    """A UNet with fresh weights for samples of ``shape``. Raises `ConfigError` for options that it cannot have."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    for name in FIXED:
        if name in config.options:
            raise ConfigError(f"denoiser.options.{name}: follows from the latents and the text; leave it out")
    channels, height, width = shape
    try:
        network = UNet2DConditionModel(
            **config.options,  # pyright: ignore[reportArgumentType]
            in_channels=channels + beside,
            out_channels=channels,
            sample_size=(height, width),
            cross_attention_dim=words_width,
            time_cond_proj_dim=vector_width,
        )
    except NETWORK_FAILURES as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"denoiser.options: diffusers cannot make this UNet: {reason}") from error
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    return Unet(network)
