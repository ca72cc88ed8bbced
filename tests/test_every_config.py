"""Every file in configs/ loads strictly, builds, says only what differs from the defaults and opens with its header."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stable_diffusion import write_folder

from mm.config import differences, read_layers, read_yaml
from mm.hub import load, shipped
from mm.media.image import ImageSpec
from mm.processor import padded
from mm.run.config import CONFIGS
from mm.run.training import load_run_config
from mm.systems import SystemConfig, build
from mm.types import Batch, TextBatch

PATHS = sorted(CONFIGS.glob("*.yaml"))


PUBLISHED: Mapping[str, Callable[[Path], Path]] = {"latent_diffusion": write_folder}
"""Configurations that begin with a published model, and what writes a small one of its kind."""


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[str]]:
    """Changes by configuration: the small model in the place of the published one."""
    place = tmp_path_factory.mktemp("published")
    return {name: [f"init_from={write(place / name)}"] for name, write in PUBLISHED.items()}


def test_there_are_configs() -> None:
    assert {"clip", "own", "quickstart"} <= {path.stem for path in PATHS}


def test_header_names_command_time_and_result(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(header)
    for word in ("Command:", "Time:", "Result:"):
        assert word in text


def test_file_lists_only_what_differs_from_the_defaults(path: Path, published: Mapping[str, list[str]]) -> None:
    written = read_layers(path)
    if "init_from" in written and "name" not in written.get("system", {}):
        del written["system"]  # says what differs from that model's network
    needed = differences(load_run_config(path, published.get(path.stem, [])))
    assert not _superfluous(written, needed), f"these values are the defaults: {_superfluous(written, needed)}"


def test_file_with_a_base_lists_only_what_differs_from_it(path: Path) -> None:
    written = read_yaml(path)
    base = written.pop("base", None)
    repeated = [] if base is None else _repeated(written, read_yaml(path.parent / base))
    assert not repeated, f"these values are the base's: {repeated}"


def test_system_builds_and_every_parameter_learns(path: Path, published: Mapping[str, list[str]]) -> None:
    config = load_run_config(path, published.get(path.stem, []))
    torch.manual_seed(0)
    network = config.system.with_answers(("yes", "no")) if config.system.answer_limit else config.system
    parts = {name: _part(reference) for name, reference in config.system.parts().items()}
    known = {"answer_text": TextBatch(torch.tensor([[1, 5, 2], [1, 6, 2]]), torch.tensor([3, 3]))}
    built: dict[str, Any] = {name: build(part) for name, part in parts.items()}
    if "align" in network.training_parts():
        built["align"] = build(_part(network.training_parts()["align"]))
    if "teacher" in network.training_parts():  # a run that is not there; a network of the same kind teaches as well
        built["teacher"] = build(network.for_inference(), built)
    system = build(network, built | (known if network.learns_answers else {}))
    system.train()
    whole, length = config.system.model_copy(update=parts), 8
    size = whole.picture_side
    image = None if size is None else torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    batch = Batch(
        ids=("a", "b", "c", "d"),
        image=image,
        text=TextBatch(torch.randint(3, min(250, (whole.text_limits or (250, 0))[0]), (4, length)), torch.tensor([8, 5, 8, 3])),
        groups=torch.arange(4),
        audio=padded(list(torch.randn(4, 12_000))) if config.system.hears else None,
        answers=({"yes": 1.0}, {"no": 1.0}, {"no": 0.3}, {}) if config.system.learns_answers else (),
    )
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], lr=0.1)
    waiting = {_any_expert(name) for name, parameter in system.named_parameters() if parameter.requires_grad}
    for step in range(30):  # zero gains open at the second step, the vector for dropped captions with the first dropped one
        optimizer.zero_grad()
        system.loss(batch, step).total.backward()
        waiting -= {_any_expert(name) for name, p in system.named_parameters() if p.grad is not None and p.grad.any()}
        if not waiting:
            break
        optimizer.step()
    assert not waiting
    assert size is None or isinstance(config.processor.image_spec(size), ImageSpec)


def _any_expert(name: str) -> str:
    """The same name for all experts of a layer: which of them four samples reach is for its router to say."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _part(reference: str) -> SystemConfig:
    """What a configuration's MODEL will be: a shipped model, or a run of the configuration of that name."""
    return (
        load(reference).config if reference in shipped() else load_run_config(CONFIGS / f"{Path(reference).name}.yaml").system
    )


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
