"""Every file in configs/ loads strictly, builds, says only what differs from the defaults and opens with its header."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mm.config import differences, read_layers, read_yaml
from mm.hub import load_parts, with_parts
from mm.media.image import ImageSpec
from mm.run.config import CONFIGS
from mm.run.training import load_run_config
from mm.systems import build
from mm.types import Batch, System, TextBatch

PATHS = sorted(CONFIGS.glob("*.yaml"))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_there_are_configs() -> None:
    assert {"clip", "own", "quickstart"} <= {path.stem for path in PATHS}


def test_header_names_command_time_and_result(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Command:", "Time:", "Result:"):
        assert word in text


def test_file_lists_only_what_differs_from_the_defaults(path: Path) -> None:
    written = read_layers(path)
    if "init_from" in written and "name" not in written.get("system", {}):
        del written["system"]  # says what differs from that model's network
    needed = differences(load_run_config(path))
    assert not _superfluous(written, needed), f"these values are the defaults: {_superfluous(written, needed)}"


def test_file_with_a_base_lists_only_what_differs_from_it(path: Path) -> None:
    written = read_yaml(path)
    base = written.pop("base", None)
    repeated = [] if base is None else _repeated(written, read_yaml(path.parent / base))
    assert not repeated, f"these values are the base's: {repeated}"


def test_system_builds_and_every_parameter_learns(path: Path) -> None:
    config = load_run_config(path)
    torch.manual_seed(0)
    parts = load_parts(config.system.parts() | config.system.training_parts())
    system = build(config.system, {name: part.system for name, part in parts.items()})
    system.train()
    size, length = with_parts(config.system, parts).picture_side, 8
    batch = Batch(
        ids=("a", "b", "c", "d"),
        image=torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8),
        text=TextBatch(torch.randint(3, 250, (4, length)), torch.tensor([8, 5, 8, 3])),
        groups=torch.arange(4),
    )
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):  # residual branches whose last gain starts at zero pass gradients on from the second step
        optimizer.zero_grad()
        system.loss(batch, step).total.backward()
        optimizer.step()
    assert not _without_gradient(system)
    assert isinstance(config.processor.image_spec(size), ImageSpec)


def _without_gradient(system: System) -> list[str]:
    return [name for name, p in system.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)]


def _repeated(written: dict[str, Any], base: dict[str, Any], prefix: str = "") -> list[str]:
    """Keys of the file that have the same value in its base."""
    found = []
    for key, value in written.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            found += _repeated(value, base[key], f"{prefix}{key}.")
        elif key in base and value == base[key]:
            found.append(prefix + key)
    return found


def _superfluous(written: Any, needed: Any, prefix: str = "") -> list[str]:
    """Keys of the file that the configuration's differences from its defaults do not hold."""
    if not isinstance(written, dict) or not isinstance(needed, dict):
        return []
    found = [prefix + key for key in written if key not in needed and key != "name"]
    for key in written.keys() & needed.keys():
        found += _superfluous(written[key], needed[key], f"{prefix}{key}.")
    return found
