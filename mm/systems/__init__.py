"""The literal list of systems. A configuration's ``system.name`` picks one; nothing is registered by being imported."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from mm.systems import clip
from mm.systems.clip import ClipConfig
from mm.types import System

SystemConfig = ClipConfig
"""What ``system:`` may hold: the union of all systems' configurations, told apart by ``name``."""

MODULES: Mapping[str, ModuleType] = {"clip": clip}
"""Name to the file that composes the system."""


def build(config: SystemConfig, parts: Mapping[str, Any] | None = None) -> System:
    """Build a system from its configuration and from parts that a configuration cannot hold (loaded towers)."""
    return MODULES[config.name].build(config, parts or {})
