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
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

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


def refuse_unused(config: Config, names: Sequence[str], reason: str) -> None:
    """Refuse the first of these fields that is not at its default, where the others leave it without effect.

    Raises:
        ValueError: with the field, its value and the reason.
    """
    for name in names:
        value = getattr(config, name)
        if value != type(config).model_fields[name].get_default(call_default_factory=True):
            raise ValueError(f"{name}: {value} {reason}")


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
        values = expand_names(cls, layer.values)
        merged = Layer(merge_values(merged.values, values, cls), merged.places | layer.places)
    try:
        return cls.model_validate(merged.values)
    except ValidationError as error:
        raise ConfigError("\n".join(_describe_errors(cls, error, merged))) from None


def _nested_defaults(config: type[Config] | Config) -> dict[str, Any]:
    """What default instances of nested configurations set themselves.

    Without it a file that changes one key of a nested configuration would silently lose the others that the parent's
    default had set: pydantic builds the nested one anew from its own class. What tells the members of a union apart
    (`kind`, or the field's `discriminator`) is always among them, so that a layer may change one key of the default
    member without naming it.
    """
    values: dict[str, Any] = {}
    fields = type(config).model_fields if isinstance(config, Config) else config.model_fields
    for name, info in fields.items():
        if isinstance(config, Config):
            value = getattr(config, name)
        else:
            value = info.default if info.default_factory is None else None
        if isinstance(value, Config):
            tag = info.discriminator if isinstance(info.discriminator, str) else None
            if nested := ({tag: getattr(value, tag)} if tag else {}) | _nested_defaults(value):
                values[name] = nested
        elif isinstance(config, Config) and (name in config.model_fields_set or name == "kind"):
            values[name] = value
    return values


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def merge_values(base: Mapping[str, Any], update: Mapping[str, Any], cls: type[Config] | None = None) -> dict[str, Any]:
    """`update` laid over `base`: nested mappings are merged key by key, everything else is replaced.

    Where the two sides name different members of a union, the update replaces the whole mapping, since the keys of one
    mean nothing to another: different `kind`s, or (where `cls` says what the keys are) `name`s of different classes.
    """
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping) and _kinds_agree(old, value)):
            merged[key] = value
            continue
        info = None if cls is None else cls.model_fields.get(key)
        members = [] if info is None else nested_configs(info.annotation)
        tag = None if info is None else info.discriminator
        if isinstance(tag, str) and tag in old:
            member = _member_called(members, tag, old[tag])
            if member is not _member_called(members, tag, value.get(tag, old[tag])):
                merged[key] = value
                continue
            members = [] if member is None else [member]
        merged[key] = merge_values(old, value, members[0] if len(members) == 1 else None)
    return merged


def _kinds_agree(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" not in old or "kind" not in new or old["kind"] == new["kind"]


def _member_called(members: Sequence[type[Config]], tag: str, name: Any) -> type[Config] | None:
    return next((member for member in members if name in names_of(member, tag)), None)


def names_of(cls: type[Config], key: str) -> tuple[Any, ...]:
    """The values that a `Literal` field admits; none where there is no such field."""
    info = cls.model_fields.get(key)
    return get_args(info.annotation) if info is not None and get_origin(info.annotation) is Literal else ()


def naming_key(annotation: Any) -> str | None:
    """`name` or `kind`, where every alternative of a field is a configuration that is known by that key, else None.

    A plain word then stands for the whole configuration: `algorithm: dqn` is `algorithm: {name: dqn}`.
    """
    members = [member for member in union_members(annotation) if member is not types.NoneType]
    configs = nested_configs(annotation)
    if not configs or len(configs) != len(members):
        return None
    return next((key for key in ("name", "kind") if all(names_of(each, key) for each in configs)), None)


def expand_names(cls: type[Config], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which short forms are written out, as they may stand in a file or behind a flag.

    A plain word for a whole configuration has become `{name: word}` (see `naming_key`), and a text or a mapping where
    only a list can stand a list of one (`data: answers.csv`).
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        info = cls.model_fields.get(key)
        nested = [] if info is None else nested_configs(info.annotation)
        if info is not None and isinstance(value, str | Mapping) and only_lists(info.annotation):
            value = [value]
        word = naming_key(info.annotation) if info is not None and isinstance(value, str) else None
        if word is not None:
            found[key] = {word: value}
        elif isinstance(value, Mapping) and len(nested) == 1:
            found[key] = expand_names(nested[0], value)
        else:
            found[key] = value
    return found


def only_lists(annotation: Any) -> bool:
    """Whether a field holds a list of texts or of mappings and nothing else (None aside)."""
    members = [member for member in union_members(annotation) if member is not types.NoneType]
    return bool(members) and all(get_origin(member) in (list, tuple) for member in members) and all(
        any(kind is str or nested_configs(kind) for kind in union_members(get_args(member)[0])) for member in members
    )  # fmt: skip


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
        if fault["type"] == "union_tag_invalid":
            path = (*path, str(fault["ctx"]["discriminator"]).strip("'"))
        place = next((merged.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in merged.places), "")
        key = ".".join(str(part) for part in path)
        text = _describe_fault(cls, fault, key, value)
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


EXPECTED = {
    "list_type": "expected a list",
    "tuple_type": "expected a list",
    "string_type": "expected text",
    "dict_type": "expected a mapping of keys to values",
    "mapping_type": "expected a mapping of keys to values",
    "model_type": "expected a mapping of keys to values",
}
"""Kinds of pydantic's faults whose own words name a type of Python."""


def _describe_fault(cls: type[Config], fault: Any, key: str, value: Any) -> str:
    kind, message = fault["type"], fault["msg"]
    if kind == "extra_forbidden":
        near = suggest_key(cls, key)
        if near == key:
            parent = key.rpartition(".")[0]
            tag = "name" if f"{parent}.name" in config_keys(cls) else "kind"
            return f"this key belongs to another {tag}; set {parent}.{tag} to the {tag} that has it"
        return "unknown key; " + (f"did you mean '{near}'?" if near else f"known keys: {', '.join(cls.model_fields)}")
    if kind == "missing":
        info = cls.model_fields.get(key)
        inside = [] if info is None else nested_configs(info.annotation)
        flag = f"{key}.{next(iter(inside[0].model_fields))} VALUE" if inside else key
        return f"required but not given: write it in a YAML file or pass --{flag.replace('_', '-')}"
    if kind == "union_tag_invalid":
        known = [word.strip(" '") for word in fault["ctx"]["expected_tags"].split(",")]
        close = difflib.get_close_matches(fault["ctx"]["tag"], known, n=1, cutoff=0.6)
        hint = f"did you mean '{close[0]}'? " if close else ""
        return f"there is no '{fault['ctx']['tag']}'; {hint}it is one of {', '.join(known)}"
    message = " ".join(message.removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    if kind in ("value_error", "assertion_error"):
        return message
    return f"{EXPECTED.get(kind, message[:1].lower() + message[1:])}, not {value!r}"
