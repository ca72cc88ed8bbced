"""mm: a multimodal foundation-model suite. ``import mm`` is quick; what a name needs is imported when it is first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm.data.sources import open_source
    from mm.errors import BadSample, UserError
    from mm.evaluation.sheet import contact_sheet
    from mm.hub import Model, load, save, shipped
    from mm.run.captioning import caption
    from mm.run.generation import generate, vary
    from mm.run.inference import classify, search
    from mm.run.tasks import evaluate
    from mm.run.training import train
    from mm.run.weighing import weigh

__version__ = "0.1.0"

_HOMES = {
    "BadSample": "mm.errors",
    "Model": "mm.hub",
    "UserError": "mm.errors",
    "contact_sheet": "mm.evaluation.sheet",
    "open_source": "mm.data.sources",
    "load": "mm.hub",
    "save": "mm.hub",
    "shipped": "mm.hub",
    "evaluate": "mm.run.tasks",
    "caption": "mm.run.captioning",
    "classify": "mm.run.inference",
    "generate": "mm.run.generation",
    "search": "mm.run.inference",
    "train": "mm.run.training",
    "vary": "mm.run.generation",
    "weigh": "mm.run.weighing",
}

__all__ = [
    "BadSample",
    "Model",
    "UserError",
    "__version__",
    "caption",
    "classify",
    "contact_sheet",
    "evaluate",
    "generate",
    "load",
    "open_source",
    "save",
    "search",
    "shipped",
    "train",
    "vary",
    "weigh",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mm' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
