"""diffusers' UNet2DConditionModel as a network that denoises: Stable Diffusion's own, or one of any size.

Shapes as in `mm.generators.denoiser`.
"""

from dataclasses import replace
from typing import Any, Literal

from jaxtyping import Float
from pydantic import JsonValue
from torch import Tensor, nn

from mm.config import StrictConfig
from mm.errors import ConfigError, UserError
from mm.generators.denoiser import Condition, seen
from mm.nn.attention import attend_by_products

NETWORK_FAILURES = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What diffusers and torch raise for sizes that a network cannot have."""

KeysAndValues = tuple[Tensor, Tensor]
"""Of the words, in heads: ``(B, H, T, C / H)`` each."""

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


class PlainAttention:
    """An attention processor of diffusers that can take keys and values of the words as they were computed in advance.

    Args:
        place: Of this attention among all that go to words; 0 where it does not.
    """

    def __init__(self, place: int = 0) -> None:
        self.place = place

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | tuple[KeysAndValues, ...] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend, under diffusers' names: from a sequence ``(B, N, C)`` to itself, to words, or to what `Unet.prepare` made."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        key, value = source[self.place] if isinstance(source, tuple) else keys_and_values(attn, source)
        mask = None if attention_mask is None else attention_mask[:, None]
        attended = attend_by_products(_heads(attn, attn.to_q(hidden_states)), key, value, mask)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


class Unet(nn.Module):
    """See above.

    Args:
        network: A ``UNet2DConditionModel``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network
        self._to_words = _attentions_to_words(network)
        for attention in filter(_is_plain, network.modules()):
            place = self._to_words.index(attention) if attention in self._to_words else 0
            attention.set_processor(PlainAttention(place))  # pyright: ignore[reportCallIssue]

    def forward(self, x: Float[Tensor, "b c h w"], time: Tensor, condition: Condition) -> Float[Tensor, "b c h w"]:
        """See `mm.generators.denoiser.Denoiser`. Words are masked only where some row has fewer than others."""
        dtype = self.network.conv_in.weight.dtype
        mask, words = self._told(condition) if condition.prepared is None else condition.prepared
        vector = condition.vector if self.network.config.time_cond_proj_dim is not None else None
        [output] = self.network(
            seen(x, condition).to(dtype),
            time.expand(len(x)),
            words,
            timestep_cond=None if vector is None else vector.to(dtype),
            encoder_attention_mask=mask,
            return_dict=False,
        )
        return output

    def prepare(self, condition: Condition) -> Condition:
        """See `mm.generators.denoiser.Denoiser`: keys and values of the words in every layer, if all are of the plain kind."""
        mask, words = self._told(condition)
        if self._to_words:
            words = tuple(keys_and_values(part, words) for part in self._to_words)
        return replace(condition, prepared=(mask, words))

    def _told(self, condition: Condition) -> tuple[Tensor | None, Tensor]:
        """Mask and words as the network takes them; whether a mask is needed is asked of the device, which waits for it."""
        words = condition.words.to(self.network.conv_in.weight.dtype)
        return None if bool(condition.known.all()) else condition.known, words


def build_unet(
    config: UnetConfig, shape: tuple[int, int, int], words_width: int, vector_width: int | None, beside: int = 0
) -> Unet:
    """A UNet with fresh weights for samples of ``shape``. Raises `ConfigError` for options that it cannot have."""
    try:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    except ImportError:
        raise UserError('a denoiser of kind unet needs diffusers; pip install "mm-suite[diffusion]"') from None
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


def keys_and_values(attention: Any, x: Tensor) -> KeysAndValues:
    """What a sequence ``(B, T, D)`` offers to an attention of diffusers."""
    return _heads(attention, attention.to_k(x)), _heads(attention, attention.to_v(x))


def _attentions_to_words(network: Any) -> list[Any]:
    """Every attention to the words, in order; none where some do more than attend, or the network itself changes the words."""
    config = network.config
    found = [part for part in network.modules() if getattr(part, "is_cross_attention", False)]
    changed = config.encoder_hid_dim_type or config.addition_embed_type or config.dual_cross_attention
    return found if all(map(_is_plain, found)) and not changed else []


def _is_plain(part: Any) -> bool:
    """Whether a module is an attention of diffusers that does nothing but attend."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    return (
        type(getattr(part, "processor", None)) is AttnProcessor2_0
        and not part.residual_connection
        and part.rescale_output_factor == 1
        and all(norm is None for norm in (part.norm_cross, part.norm_q, part.norm_k, part.group_norm, part.spatial_norm))
    )


def _heads(attention: Any, x: Tensor) -> Tensor:
    """``(B, N, C)`` to ``(B, H, N, C / H)``."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
