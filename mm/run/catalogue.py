"""What there is: shipped models, systems, configurations, data; and what a model says of itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm.config import read_json, to_dict
from mm.data.emoji import SPLITS
from mm.data.questions import SCHEME
from mm.data.speech import VOICES
from mm.hub import ASSETS, CARD_FILE, Model, shipped
from mm.run.config import CONFIGS
from mm.systems import MODULES


def catalogue() -> dict[str, dict[str, str]]:
    """Names with one line each, by kind: models, systems, configurations, data."""
    return {
        "models": {name: str(_card(name).get("summary", "")) for name in shipped()},
        "systems": {name: (module.__doc__ or "").strip().splitlines()[0] for name, module in MODULES.items()},
        "configurations": {str(path.relative_to(CONFIGS.parent)): _header(path) for path in sorted(CONFIGS.glob("*.yaml"))},
        "data": {f"emoji:{split}": "artists " + ", ".join(artists) for split, artists in SPLITS.items()}
        | {f"{SCHEME}:{split}": f"questions about emoji:{split}, with answers" for split in SPLITS}
        | {f"emoji-speech:{split}": "names spoken by " + ", ".join(voices) for split, voices in VOICES.items()},
    }


def describe(model: Model) -> dict[str, Any]:
    """Size, preparation, capabilities and system card of a model."""
    return {
        "name": model.name,
        "system": model.config.name,
        **({} if model.tune is None else {"tune": to_dict(model.tune)}),
        "capabilities": sorted(model.capabilities),
        "parameters": model.parameters(),
        "preparation": model.processor.stamp() | _text_preparation(model),
        "fingerprint": model.fingerprint,
        "card": dict(model.card),
    }


def _text_preparation(model: Model) -> dict[str, Any]:
    if not model.processor.has_text:
        return {}
    return {"vocabulary": model.processor.tokenizer.vocab_size, "templates": list(model.processor.templates)}


def _card(name: str) -> Mapping[str, Any]:
    path = ASSETS / "models" / name / CARD_FILE
    return read_json(path) if path.is_file() else {}


def _header(path: Path) -> str:
    """The first comment line of a configuration."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip()
