"""Configuration: strict, precise in its errors, and equal after a round trip through YAML."""

import re
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from mm.config import (
    StrictConfig,
    apply_overrides,
    differences,
    dump_yaml,
    load_config,
    parse_yaml,
    read_layers,
    validate,
    write_yaml,
)
from mm.errors import ConfigError


class Optimizer(StrictConfig):
    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)


class Source(StrictConfig):
    name: Literal["folder"] = "folder"
    path: str


class Run(StrictConfig):
    steps: int
    optimizer: Optimizer = Optimizer()
    sources: tuple[Source, ...] = ()
    note: str | None = None


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_keys_of_unions_are_shown_as_they_are_written() -> None:
    from mm.run.config import RunConfig

    values = {"system": {"name": "vq", "tokenizer": {"quantizer": {"kind": "fsq"}}}, "data": {"train": "x"}}
    cases = {
        "system.tokenizer.widht=[3]": "unknown key 'widht' in 'system.tokenizer'; did you mean 'widths'",
        "system.tokenizer.quantizer.level=[3]": "unknown key 'level' in 'system.tokenizer.quantizer'; did you mean 'levels'",
        "system.tokenizer.quantizer.kind=foo": "'system.tokenizer.quantizer': there is no 'foo'; there are fsq, vq, gumbel",
        "system.name=dall-e": "'system': there is no 'dall-e'; did you mean 'dalle'",
        "system.tokenizer.patch=x": "'system.tokenizer.patch'",
    }
    for override, message in cases.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            validate(RunConfig, apply_overrides(values, [override]), "test")


def test_file_and_overrides_meet(tmp_path: Path) -> None:
    path = write(tmp_path, "steps: 10\noptimizer: {learning_rate: 3e-4}\n")
    config = load_config(Run, path, ["optimizer.betas=[0.8, 0.9]", "steps=20", "note=a=b"])
    assert config == Run(steps=20, optimizer=Optimizer(learning_rate=3e-4, betas=(0.8, 0.9)), note="a=b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 1\noptimizer: {learning_rat: 1}", "unknown key 'learning_rat' in 'optimizer'; did you mean 'learning_rate'?"),
        ("steps: 1\nsources: [{path: a, pth: b}]", "unknown key 'pth' in 'sources.0'; did you mean 'path'?"),
        ("steps: 1\nzzz: 2", "unknown key 'zzz'; valid keys here: note, optimizer, sources, steps"),
        ("steps: many", "'steps': Input should be a valid integer"),
        ("optimizer: {}", "'steps' is required"),
        ("steps: 1\noptimizer: {learning_rate: 0}", "'optimizer.learning_rate': Input should be greater than 0, got 0"),
        ("steps: 1\nsteps: 2", "run.yaml:2: not valid YAML: key 'steps' is written twice"),
        ("steps: [1", "not valid YAML"),
        ("- 1", "a configuration is a mapping of keys to values, this is a list"),
        ("steps: !!python/object/apply:os.system [echo]", "not valid YAML: could not determine a constructor"),
        ("steps: 1\noptimizer: {learning_rate: .nan}", "'optimizer.learning_rate'"),
    ],
)
def test_errors_name_file_key_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(Run, path)
    message = str(error.value)
    assert expected in message
    assert str(path) in message
    assert "\n" not in message


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such configuration file"):
        load_config(Run, tmp_path / "absent.yaml")


@pytest.mark.parametrize("override", ["steps", "=1", "a..b=1", "steps.deep=1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        apply_overrides({"steps": 1}, [override])


def test_overrides_leave_their_input_alone() -> None:
    values: dict[str, Any] = {"optimizer": {"betas": [0.9, 0.98]}}
    assert apply_overrides(values, ["optimizer.learning_rate=1"]) == {"optimizer": {"betas": [0.9, 0.98], "learning_rate": 1}}
    assert values == {"optimizer": {"betas": [0.9, 0.98]}}


@given(
    steps=st.integers(),
    rate=st.floats(min_value=1e-300, max_value=1e300),
    note=st.none() | st.text(),
    path=st.text(),
)
def test_any_config_survives_a_round_trip(steps: int, rate: float, note: str | None, path: str) -> None:
    config = Run(steps=steps, optimizer=Optimizer(learning_rate=rate), sources=(Source(path=path),), note=note)
    assert validate(Run, parse_yaml(dump_yaml(config), "text"), "text") == config


def test_written_config_loads_and_differences_are_minimal(tmp_path: Path) -> None:
    config = Run(steps=3, optimizer=Optimizer(learning_rate=0.5))
    write_yaml(config, tmp_path / "resolved.yaml")
    assert load_config(Run, tmp_path / "resolved.yaml") == config
    assert differences(config) == {"steps": 3, "optimizer": {"learning_rate": 0.5}}


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Run(steps=1).steps = 2


@given(st.text())
def test_arbitrary_text_is_a_value_or_a_one_line_config_error(text: str) -> None:
    message = ""
    try:
        parse_yaml(text, "text")
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message


def test_a_base_is_merged_section_by_section_and_null_takes_a_key_out(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {x: 1, y: 2}\nb: [1, 2]\nc: 3\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\na: {y: null, z: 4}\nb: [5]\n")
    assert read_layers(tmp_path / "run.yaml") == {"a": {"x": 1, "z": 4}, "b": [5], "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: ../base.yaml", "in the same folder"),
        ("base: [base.yaml]", "in the same folder"),
        ("base: absent.yaml", "no such configuration file"),
        ("base: run.yaml", "has a base itself"),
    ],
)
def test_a_base_that_cannot_be_taken_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_layers(tmp_path / "run.yaml")


def test_aliases_that_could_stand_for_gigabytes_are_refused() -> None:
    with pytest.raises(ConfigError, match="aliases"):
        parse_yaml("a: &a [1, 2]\nb: [*a, *a]", "file.yaml")


def test_a_key_that_is_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="word or a number"):
        parse_yaml("? [a, b]\n: 1", "file.yaml")
