"""Typed, strict, frozen configuration: YAML plus ``key.path=value`` overrides.

A key that does not exist, a value of the wrong type or an impossible combination stops before any work, naming the file,
the key and the nearest valid key. Files are read with ``yaml.safe_load``; nothing in a file can name a Python object.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mm.errors import ConfigError

MAX_CONFIG_BYTES = 1 << 20

TAG_PREFIX = "tag:"
"""Tags of unions without a ``name`` field begin so; they are left out of messages."""


class StrictConfig(BaseModel):
    """Base of every configuration class: unknown keys are errors, values are never changed after construction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=StrictConfig)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key written twice and reads ``1e-3`` as a number (YAML 1.1 alone reads it as text)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few lines of them can stand for gigabytes
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not read; write the value out", problem_mark=self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.MarkedYAMLError(problem="a key is a word or a number", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key}' is written twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text safely. ``where`` names the file or option for the error message."""
    try:
        return yaml.load(text, _UniqueKeyLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{where}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping from a file of at most 1 MiB."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than 1 MiB; this is not a configuration file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file; see configs/ for the ones that come with mm") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, this is a {type(values).__name__}")
    return values


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size. Raises `ConfigError`."""
    try:
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path}: larger than {max_bytes >> 20} MiB; this is not the file it should be")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``values`` with each ``key.path=value`` set; values are parsed as YAML."""
    result = _deep_copy(values)
    for override in overrides:
        path, separator, text = override.partition("=")
        keys = path.strip().split(".")
        if not separator or not all(keys):
            raise ConfigError(f"override '{override}': write it as key.path=value, for example train.steps=100")
        target = result
        for key in keys[:-1]:
            child = target.get(key)
            if child is None:
                child = target[key] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override '{override}': '{key}' holds a value, not a section")
            target = child
        value = parse_yaml(text, f"override '{override}'")
        if isinstance(value, dict) and isinstance(target.get(keys[-1]), dict):
            target[keys[-1]] = {**target[keys[-1]], **value}
        else:
            target[keys[-1]] = value
    return result


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _deep_copy(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_deep_copy(v) for v in value]
    return value


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = ()) -> C:
    """Read ``path`` on top of its ``base:``, apply ``overrides`` and validate as ``cls``. Raises `ConfigError`."""
    return validate(cls, apply_overrides(read_layers(path), overrides), str(path))


def read_layers(path: Path) -> dict[str, Any]:
    """The values of a YAML file on top of those of the file beside it that ``base:`` names, if it names one.

    Sections are merged key by key, everything else is replaced; null takes a key out again. Raises `ConfigError`.
    """
    values = read_yaml(path)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or Path(base).name != base:
        raise ConfigError(f"{path}: 'base' is the name of a file in the same folder, got {base!r}")
    below = read_yaml(path.parent / base)
    if "base" in below:
        raise ConfigError(f"{path}: its base {base} has a base itself; name that one, or copy what is needed")
    return merge(below, values)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with the values of ``above``, sections merged key by key; null takes a key out."""
    result = dict(below)
    for key, value in above.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = value
    return result


def validate(cls: type[C], values: Mapping[str, Any], where: str) -> C:
    """Validate a mapping as ``cls``; the first problem becomes a one-line `ConfigError`."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{where}: {_explain(cls, first)}{more}") from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    location = [part for part in problem["loc"] if isinstance(part, int) or not part.startswith(("function-", TAG_PREFIX))]
    written = _written(cls, location)
    key = ".".join(map(str, written))
    if problem["type"] == "union_tag_invalid":
        given, tags = str(problem["ctx"]["tag"]), [tag.strip("'") for tag in problem["ctx"]["expected_tags"].split(", ")]
        near = difflib.get_close_matches(given, tags, n=1)
        return f"'{key}': there is no '{given}'; " + (f"did you mean '{near[0]}'?" if near else f"there are {', '.join(tags)}")
    if problem["type"] == "extra_forbidden":
        known, unknown = _valid_keys(cls, location[:-1]), str(location[-1])
        near = difflib.get_close_matches(unknown, known, n=1, cutoff=0.5)
        parent = ".".join(map(str, written[:-1]))
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys here: {', '.join(known)}"
        return f"unknown key '{unknown}'" + (f" in '{parent}'" if parent else "") + f"; {hint}"
    if problem["type"] == "missing":
        return f"'{key}' is required"
    message = problem["msg"].removeprefix("Value error, ")
    got = "" if isinstance(problem.get("input"), dict) else f", got {problem.get('input')!r}"
    return f"'{key}': {message}{got}" if key else message


def _written(cls: type[BaseModel], location: Sequence[int | str]) -> list[int | str]:
    """A validation location as its writer knows it: without the tags of unions, which pydantic puts between the keys."""
    candidates: list[Any] = [cls]
    written: list[int | str] = []
    for part in location:
        chosen = [candidate for candidate in candidates if part not in candidate.model_fields and part == _tag(candidate)]
        if chosen:
            candidates = chosen
            continue
        written.append(part)
        if not isinstance(part, int):
            candidates = [
                model
                for candidate in candidates
                if part in candidate.model_fields
                for model in _models_in(candidate.model_fields[part].annotation)
            ]
    return written


def _valid_keys(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Keys of the section that a validation location points at, following unions and containers."""
    candidates: list[Any] = [cls]
    for part in location:
        following: list[Any] = []
        for candidate in candidates:
            if part in candidate.model_fields:
                following += _models_in(candidate.model_fields[part].annotation)
            elif part == _tag(candidate) or isinstance(part, int):
                following.append(candidate)
        candidates = following
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, tuple, dict, typing.Annotated):
        return [model for argument in get_args(annotation) for model in _models_in(argument)]
    return []


def _tag(cls: type[BaseModel]) -> str | None:
    """The value of a discriminating ``name``, ``kind`` or ``method`` field, which pydantic puts into error locations."""
    field = next((cls.model_fields[key] for key in ("name", "kind", "method") if key in cls.model_fields), None)
    return field.default if field is not None and isinstance(field.default, str) else None


def to_dict(config: BaseModel) -> dict[str, Any]:
    """All values of a resolved configuration, JSON and YAML ready."""
    return config.model_dump(mode="json")


def differences(config: BaseModel) -> dict[str, Any]:
    """Only what differs from the defaults, with the discriminating ``name`` of each section kept."""
    return config.model_dump(mode="json", exclude_defaults=True)


def dump_yaml(config: BaseModel) -> str:
    """YAML text of a resolved configuration, in ASCII: PyYAML does not restore all that it writes otherwise."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def write_yaml(config: BaseModel, path: Path) -> None:
    """Write the resolved configuration so that `load_config` reads it back to an equal object."""
    path.write_text(dump_yaml(config), encoding="utf-8")
