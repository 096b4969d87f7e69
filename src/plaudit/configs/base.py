"""The base that every configuration shares, and how one is put together.

Layers are merged first (defaults < YAML files from left to right < flags or overrides) and validated **once**, so a
file may hold a part of a configuration and a later layer may repair an earlier one. Each value remembers where it
came from; an error names that place. Never imports torch.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Config(BaseModel):
    """A frozen configuration that refuses unknown keys and documents every field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


class ConfigError(ValueError):
    """A configuration that does not hold: one line per fault, each with its place and what to change."""


AnyConfig = TypeVar("AnyConfig", bound=Config)
KeyPath = tuple[str | int, ...]


@dataclass
class Layer:
    """One source of settings: nested values, and where each of them was written.

    Attributes:
        values: nested dictionary of settings, as in the YAML file.
        places: key path to a readable place, such as `run.yaml:12` or `--model.backbone`.
    """

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)


def load_config(
    cls: type[AnyConfig],
    yaml_paths: Sequence[Path | str] = (),
    overrides: Mapping[str, Any] | Layer | None = None,
) -> AnyConfig:
    """Merge defaults, YAML files from left to right and overrides, and validate the result once.

    Args:
        cls: the configuration class.
        yaml_paths: YAML files, each with any part of the configuration; a later file wins.
        overrides: nested (`{"model": {"backbone": "x"}}`) or dotted (`{"model.backbone": "x"}`) values that win over
            every file; or a `Layer` as `plaudit.configs.flags.parse_flags` returns it.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: (a ValueError) with one line per fault: its place (file and line, or flag), the key, the
            offending value, and the nearest known key where a key is unknown.
    """
    layers = [Layer(_nested_defaults(cls)), *(read_yaml_layer(Path(path)) for path in yaml_paths)]
    if overrides is not None:
        layers.append(overrides if isinstance(overrides, Layer) else _mapping_layer(overrides))
    merged = Layer()
    for layer in layers:
        merged = Layer(merge_values(merged.values, layer.values), merged.places | layer.places)
    try:
        return cls.model_validate(merged.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe_errors(cls, error, merged))) from None


def _nested_defaults(config: type[Config] | Config) -> dict[str, Any]:
    """What default instances of nested configurations set themselves.

    Without it a file that changes one key of a nested configuration would silently lose the others that the parent's
    default had set: pydantic builds the nested one anew from its own class. `kind` is always among them, so that a
    layer may change one key of the default kind without naming it.
    """
    values: dict[str, Any] = {}
    fields = type(config).model_fields if isinstance(config, Config) else config.model_fields
    for name, info in fields.items():
        if isinstance(config, Config):
            value = getattr(config, name)
        else:
            value = info.default if info.default_factory is None else None
        if isinstance(value, Config):
            if nested := _nested_defaults(value):
                values[name] = nested
        elif isinstance(config, Config) and (name in config.model_fields_set or name == "kind"):
            values[name] = value
    return values


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge_values(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`update` laid over `base`: nested mappings are merged key by key, everything else is replaced.

    Where both sides name a different `kind`, the update replaces the whole mapping: the keys of one kind mean
    nothing to another.
    """
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        same_kind = isinstance(old, Mapping) and isinstance(value, Mapping) and _kinds_agree(old, value)
        merged[key] = merge_values(old, value) if same_kind and isinstance(old, Mapping) else value
    return merged


def _kinds_agree(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in old or "kind" not in new or old["kind"] == new["kind"]


def read_yaml_layer(path: Path) -> Layer:
    """Read one YAML file as a layer of settings.

    Raises:
        ConfigError: for a missing file, broken YAML, a key given twice, or a file that holds no mapping.
    """
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        raise ConfigError(f"{path}: no such configuration file" + (f"; did you mean '{near[0]}'?" if near else ""))
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: this is not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: this is not YAML text: {' '.join(str(error).split())}") from None
    if values is None:
        return Layer()
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of keys to values, not {type(values).__name__}")
    return Layer(values, dict(_yaml_places(path, node, ())))


def _yaml_places(path: Path, node: yaml.Node | None, prefix: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    """Key path and `file:line` of every key below `node`; refuses a key that is given twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen:
                raise ConfigError(f"{path}:{line}: '{key}' is given twice (first in line {seen[key]})")
            seen[key] = line
            yield (*prefix, key), f"{path}:{line}"
            yield from _yaml_places(path, value_node, (*prefix, key))
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield (*prefix, index), f"{path}:{item.start_mark.line + 1}"
            yield from _yaml_places(path, item, (*prefix, index))


def _mapping_layer(overrides: Mapping[str, Any]) -> Layer:
    """Overrides with dotted keys opened up, as a layer."""
    values: dict[str, Any] = {}
    for key, value in overrides.items():
        for part in reversed(str(key).split(".")):
            value = {part: value}
        values = merge_values(values, value)
    return Layer(values)


def nested_configs(annotation: Any) -> list[type[Config]]:
    """Every configuration class that a field of this annotation may hold, through unions and `Annotated`."""
    return [member for member in union_members(annotation) if isinstance(member, type) and issubclass(member, Config)]


def union_members(annotation: Any) -> list[Any]:
    """The alternatives of a union, flattened, with `Annotated` and type aliases taken off; itself where it is none."""
    if hasattr(annotation, "__value__"):
        return union_members(annotation.__value__)
    if hasattr(annotation, "__metadata__"):
        return union_members(annotation.__origin__)
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for argument in get_args(annotation) for member in union_members(argument)]
    return [annotation]


def config_keys(cls: type[Config], prefix: str = "") -> list[str]:
    """Every key of a configuration and of those nested in it, dotted, parents before children."""
    keys: list[str] = []
    for name, info in cls.model_fields.items():
        keys.append(prefix + name)
        for nested in nested_configs(info.annotation):
            keys.extend(key for key in config_keys(nested, f"{prefix}{name}.") if key not in keys)
    return keys


def suggest_key(cls: type[Config], unknown: str) -> str | None:
    """The known dotted key that an unknown one most likely meant: a near spelling, or the same name elsewhere."""
    keys = config_keys(cls)
    parent, _, name = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    if near := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return siblings[near[0]]
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    near = elsewhere or difflib.get_close_matches(unknown, keys, n=1, cutoff=0.6)
    return near[0] if near else None


def _describe_errors(cls: type[Config], error: ValidationError, merged: Layer) -> list[str]:
    """One line per faulty key: place, key, what is wrong with which value, what to change."""
    messages: dict[tuple[str, str], list[str]] = {}
    for fault in error.errors():
        path, value = _path_in_values(fault["loc"], merged.values)
        place = next((merged.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in merged.places), "")
        key = ".".join(str(part) for part in path)
        text = _describe_fault(cls, fault["type"], fault["msg"], key, value)
        alternatives = messages.setdefault((place, key), [])
        if text not in alternatives:
            alternatives.append(text)
    lines = []
    for (place, key), texts in messages.items():
        where = f"{place}: " if place else ""
        what = f"{key}: " if key and place.removeprefix("--").replace("-", "_") != key else ""
        lines.append(where + what + ", or ".join(texts))
    return lines


def _path_in_values(location: tuple[int | str, ...], values: Any) -> tuple[KeyPath, Any]:
    """The part of a pydantic location that is a key path (it also names union members), and the value there."""
    path: list[int | str] = []
    for index, part in enumerate(location):
        inside_mapping = isinstance(values, Mapping) and part in values
        inside_list = isinstance(values, list | tuple) and isinstance(part, int) and part < len(values)
        if inside_mapping or inside_list:
            path.append(part)
            values = values[part]
        elif index == len(location) - 1 and isinstance(values, Mapping):
            path.append(part)
            values = None
    return tuple(path), values


def _describe_fault(cls: type[Config], kind: str, message: str, key: str, value: Any) -> str:
    if kind == "extra_forbidden":
        near = suggest_key(cls, key)
        if near == key:
            return f"this key belongs to another kind; set {key.rpartition('.')[0]}.kind to the kind that has it"
        return "unknown key; " + (f"did you mean '{near}'?" if near else f"known keys: {', '.join(cls.model_fields)}")
    if kind == "missing":
        return f"required but not given: write it in a YAML file or pass --{key.replace('_', '-')}"
    message = " ".join(message.removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    if kind in ("value_error", "assertion_error"):
        return message
    return f"{message[:1].lower()}{message[1:]}, not {value!r}"
