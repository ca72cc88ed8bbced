"""The literal list of systems. A configuration's ``system.name`` picks one; nothing is registered by being imported."""

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Annotated, Any

from pydantic import Field

from mm.config import validate
from mm.errors import ConfigError
from mm.systems import (
    albef,
    albef_vqa,
    captioner,
    clap,
    clip,
    coca,
    dalle,
    dalle2,
    flamingo,
    flow,
    frozen,
    image_tower,
    imagebind,
    imagen,
    kl,
    language_model,
    latent_diffusion,
    muse,
    published_vae,
    published_vq,
    text_tower,
    vilt,
    vq,
    wav2vec2,
    wav2vec2_ctc,
)
from mm.systems.albef import AlbefConfig
from mm.systems.albef_vqa import AlbefVqaConfig
from mm.systems.captioner import CaptionerConfig
from mm.systems.clap import ClapConfig
from mm.systems.clip import ClipConfig
from mm.systems.coca import CocaConfig
from mm.systems.dalle import DalleConfig
from mm.systems.dalle2 import Dalle2Config
from mm.systems.flamingo import FlamingoConfig
from mm.systems.flow import FlowConfig
from mm.systems.frozen import FrozenConfig
from mm.systems.image_tower import ImageTowerConfig
from mm.systems.imagebind import ImagebindConfig
from mm.systems.imagen import ImagenConfig
from mm.systems.kl import KlConfig
from mm.systems.language_model import LanguageConfig
from mm.systems.latent_diffusion import LatentDiffusionConfig
from mm.systems.muse import MuseConfig
from mm.systems.published_vae import PublishedVaeConfig
from mm.systems.published_vq import PublishedVqConfig
from mm.systems.text_tower import TextTowerConfig
from mm.systems.vilt import ViltConfig
from mm.systems.vq import VqConfig
from mm.systems.wav2vec2 import Wav2Vec2Config
from mm.systems.wav2vec2_ctc import Wav2Vec2CtcConfig
from mm.types import System

SystemConfig = (
    ClipConfig
    | ClapConfig
    | ImagebindConfig
    | ImageTowerConfig
    | TextTowerConfig
    | VqConfig
    | KlConfig
    | PublishedVqConfig
    | DalleConfig
    | MuseConfig
    | ViltConfig
    | AlbefConfig
    | AlbefVqaConfig
    | CaptionerConfig
    | CocaConfig
    | LanguageConfig
    | FrozenConfig
    | FlamingoConfig
    | FlowConfig
    | ImagenConfig
    | Dalle2Config
    | PublishedVaeConfig
    | LatentDiffusionConfig
    | Wav2Vec2Config
    | Wav2Vec2CtcConfig
)
"""The union of all systems' configurations."""

NamedSystem = Annotated[SystemConfig, Field(discriminator="name")]
"""What ``system:`` may hold, told apart by ``name``."""

MODULES: Mapping[str, ModuleType] = {
    "clip": clip,
    "clap": clap,
    "imagebind": imagebind,
    "image-tower": image_tower,
    "text-tower": text_tower,
    "vq": vq,
    "kl": kl,
    "published-vq": published_vq,
    "dalle": dalle,
    "muse": muse,
    "vilt": vilt,
    "albef": albef,
    "albef-vqa": albef_vqa,
    "captioner": captioner,
    "coca": coca,
    "language-model": language_model,
    "frozen": frozen,
    "flamingo": flamingo,
    "flow": flow,
    "imagen": imagen,
    "dalle2": dalle2,
    "published-vae": published_vae,
    "latent-diffusion": latent_diffusion,
    "wav2vec2": wav2vec2,
    "wav2vec2-ctc": wav2vec2_ctc,
}
"""Name to the file that composes the system."""

CONFIGS: Mapping[str, type[SystemConfig]] = {
    "clip": ClipConfig,
    "clap": ClapConfig,
    "imagebind": ImagebindConfig,
    "image-tower": ImageTowerConfig,
    "text-tower": TextTowerConfig,
    "vq": VqConfig,
    "kl": KlConfig,
    "published-vq": PublishedVqConfig,
    "dalle": DalleConfig,
    "muse": MuseConfig,
    "vilt": ViltConfig,
    "albef": AlbefConfig,
    "albef-vqa": AlbefVqaConfig,
    "captioner": CaptionerConfig,
    "coca": CocaConfig,
    "language-model": LanguageConfig,
    "frozen": FrozenConfig,
    "flamingo": FlamingoConfig,
    "flow": FlowConfig,
    "imagen": ImagenConfig,
    "dalle2": Dalle2Config,
    "published-vae": PublishedVaeConfig,
    "latent-diffusion": LatentDiffusionConfig,
    "wav2vec2": Wav2Vec2Config,
    "wav2vec2-ctc": Wav2Vec2CtcConfig,
}
"""Name to the configuration's class."""


def read_system(values: Any, where: str) -> SystemConfig:
    """Validate the ``system`` section of a configuration. Raises `ConfigError`."""
    name = str(values.get("name")) if isinstance(values, Mapping) else ""
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"systems: {', '.join(CONFIGS)}"
        raise ConfigError(f"{where}: system.name is '{name}'; {hint}")
    return validate(CONFIGS[name], values, where)


def build(config: SystemConfig, parts: Mapping[str, Any] | None = None) -> System:
    """Build a system from its configuration and from parts that a configuration cannot hold (loaded towers, other models)."""
    return MODULES[config.name].build(config, parts or {})
