"""Ways of training a network: all of it, or a small part that is added to frozen weights.

| Method    | What is trained                                             | After training |
|-----------|-------------------------------------------------------------|----------------|
| "full"    | everything                                                  | |
| "lora"    | thin corrections of weight matrices, `mm.nn.lora`           | folded into the weights |
| "adapter" | narrow detours behind the branches of blocks                | stay, `mm.nn.adapters` |
| "prefix"  | keys and values in every self-attention                     | stay, `mm.nn.prefixes` |
| "prompt"  | keys and values in the first self-attention of a transformer | stay, `mm.nn.prefixes` |

Each of them changes nothing at first.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from torch import nn

from mm.config import StrictConfig
from mm.nn.adapters import AdapterConfig, add_adapters
from mm.nn.lora import LoraConfig, add_lora, merge_lora
from mm.nn.momentum import Momentum
from mm.nn.prefixes import PrefixConfig, PromptConfig, add_prefixes


class FullConfig(StrictConfig):
    """Everything is trained.

    Args:
        method: Names this way.
    """

    method: Literal["full"] = "full"


TuneConfig = FullConfig | LoraConfig | AdapterConfig | PrefixConfig | PromptConfig
"""The union of all ways."""


def _written_out(value: Any) -> Any:
    """A method alone as the section that it stands for; a section without a method is one of LoRA."""
    if isinstance(value, str):
        return {"method": value}
    return {"method": "lora", **value} if isinstance(value, Mapping) else value


Tune = Annotated[Annotated[TuneConfig, Field(discriminator="method")], BeforeValidator(_written_out)]
"""What ``tune:`` may hold: the name of a method, or a section that ``method`` tells apart."""


def tune(module: nn.Module, config: TuneConfig) -> list[str]:
    """Prepare a module, in place, for training in one of the ways. Momentum copies inside it get the same parts.

    Returns:
        Names of the places where something was added.

    Raises:
        UserError: A pattern of the configuration matches nothing in this module.
    """
    if isinstance(config, FullConfig):
        return []
    if isinstance(config, LoraConfig):
        return add_lora(module, config)
    added = add_adapters(module, config) if isinstance(config, AdapterConfig) else add_prefixes(module, config)
    for part in list(module.modules()):
        if isinstance(part, Momentum):
            part.copy_again()
    return added


def merge(module: nn.Module, config: TuneConfig) -> TuneConfig | None:
    """Fold into the weights, in place, what `tune` added and what can be folded in. Returns what stays beside them, if any."""
    if isinstance(config, LoraConfig):
        merge_lora(module)
    return None if isinstance(config, FullConfig | LoraConfig) else config
