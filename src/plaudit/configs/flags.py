"""Command-line flags as one layer of settings: `--model.backbone X`, `--no-shuffle`, `--lora None`.

Values stay text wherever the field is a scalar; the one validation in `load_config` turns them into numbers. Only what
text cannot say is decided here: None, on/off switches, lists and mappings.
"""

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from plaudit.configs.base import (
    Config,
    ConfigError,
    Layer,
    merge_values,
    naming_key,
    nested_configs,
    only_lists,
    suggest_key,
    union_members,
)

_TRUE, _FALSE, _NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null", "~"}
_LISTS = (list, tuple, set, frozenset, Sequence)
_MAPPINGS = (dict, Mapping)


def parse_flags(cls: type[Config], tokens: Sequence[str], *, positional: str | None = None) -> tuple[list[Path], Layer]:
    """Read command-line tokens as configuration files and a layer of flags.

    `--key value` and `--key=value` set a field; hyphens and underscores are the same; dots reach into nested
    configurations and free mappings. A switch (`bool`) needs no value and has a `--no-` form. A list field takes one
    value per flag, and the flag may be repeated, or a YAML list: `--data '[a, b]'`. A nested configuration takes
    `None`, a YAML mapping, or nothing (its defaults); one that is known by a name takes that: `--algorithm dqn`. Words
    that are no flags are YAML files when they end in `.yaml` or `.yml`; others go to the field that `positional` names.
    After `--` every word is one of these.

    Args:
        cls: the configuration class that says which flags exist.
        tokens: the words after the verb.
        positional: the field that takes plain words; all of them if it is a list, else at most one.

    Returns:
        The YAML files in order, and the layer to lay over them.

    Raises:
        ConfigError: for an unknown flag (with the nearest known one), a missing value or a stray word.
    """
    files: list[Path] = []
    words: list[str] = []
    layer = Layer()
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        if token == "--":
            _sort_words(queue, files, words)
            break
        if token.startswith("--"):
            _read_flag(cls, token, queue, layer)
        elif token.startswith("-") and not _is_number(token) and token != "-":
            raise ConfigError(f"{token}: unknown option; options have two hyphens, for example --seed 1")
        else:
            _sort_words([token], files, words)
    if words:
        if positional is None:
            raise ConfigError(f"'{words[0]}': unexpected word; configuration files end in .yaml, options start with --")
        annotation = cls.model_fields[positional].annotation
        if len(words) > 1 and not _admits(annotation, _LISTS):
            raise ConfigError(f"'{words[1]}': only one {positional} can be given (the first was '{words[0]}')")
        for word in words:
            _store(layer, (positional,), _value(annotation, word, positional), annotation, positional)
    return files, layer


def _sort_words(tokens: Sequence[str], files: list[Path], words: list[str]) -> None:
    for token in tokens:
        if token.endswith((".yaml", ".yml")):
            files.append(Path(token))
        else:
            words.append(token)


def _read_flag(cls: type[Config], token: str, queue: list[str], layer: Layer) -> None:
    """Read one flag and, where it takes one, its value from the front of the queue."""
    name, equals, text = token[2:].partition("=")
    flag = f"--{name}"
    key = name.replace("-", "_")
    annotation, negated = _find_field(cls, key), False
    if annotation is None and key.rpartition(".")[2].startswith("no_"):
        parent, dot, last = key.rpartition(".")
        key, negated = parent + dot + last.removeprefix("no_"), True
        annotation = _find_field(cls, key)
        if annotation is not None and bool not in union_members(annotation):
            raise ConfigError(f"{flag}: only switches have a --no- form; give --{key.replace('_', '-')} a value")
    if annotation is None:
        near = suggest_key(cls, name.replace("-", "_"))
        hint = f"did you mean --{near.replace('_', '-')}?" if near else "--help lists every option"
        raise ConfigError(f"{flag}: unknown option; {hint}")
    path = tuple(key.split("."))
    if negated and equals:
        raise ConfigError(f"{flag}: takes no value")
    if equals:
        value = _value(annotation, text, flag)
    elif bool in union_members(annotation) and (negated or not _next_is_value(annotation, queue)):
        value = not negated
    elif nested_configs(annotation) and (not queue or queue[0].startswith("--")):
        value = {}
    else:
        if not queue or queue[0].startswith("--"):
            raise ConfigError(f"{flag}: needs a value (for one that starts with hyphens write {flag}=VALUE)")
        value = _value(annotation, queue.pop(0), flag)
    _store(layer, path, value, annotation, flag)


def _next_is_value(annotation: Any, queue: list[str]) -> bool:
    """Whether the next word is the value of a field that may also stand as a bare switch."""
    if not queue or queue[0].startswith("--"):
        return False
    if all(member in (bool, types.NoneType) for member in union_members(annotation)):
        return queue[0].lower() in _TRUE | _FALSE | _NONE
    return True


def _find_field(cls: type[Config], key: str) -> Any | None:
    """The annotation of a dotted key; `Any` below a free mapping; None where there is no such key."""
    head, _, rest = key.partition(".")
    info = cls.model_fields.get(head)
    if info is None:
        return None
    if not rest:
        return info.annotation
    if _admits(info.annotation, _MAPPINGS):
        return Any
    found = (_find_field(nested, rest) for nested in nested_configs(info.annotation))
    return next((annotation for annotation in found if annotation is not None), None)


def _admits(annotation: Any, kinds: tuple[Any, ...]) -> bool:
    return any((get_origin(member) or member) in kinds for member in union_members(annotation))


def _literals(annotation: Any) -> Iterator[Any]:
    for member in union_members(annotation):
        if get_origin(member) is Literal:
            yield from get_args(member)


def _value(annotation: Any, text: str, flag: str) -> Any:
    """The text of a flag as the merged dictionary shall hold it."""
    members = union_members(annotation)
    for literal in _literals(annotation):
        if str(literal) == text:
            return literal
    if text.lower() in _NONE and (types.NoneType in members or annotation is Any):
        return None
    if all(member in (bool, types.NoneType) for member in members):
        return text.lower() in _TRUE if text.lower() in _TRUE | _FALSE else text
    structured = _admits(annotation, _LISTS + _MAPPINGS) or nested_configs(annotation) or annotation is Any
    if structured and (text[:1] in "[{" or annotation is Any):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{flag}: '{text}' is not YAML: {' '.join(str(error).split())}") from None
    if (key := naming_key(annotation)) is not None:
        return {key: text}
    return text


def _store(layer: Layer, path: tuple[str, ...], value: Any, annotation: Any, flag: str) -> None:
    """Put a value into the layer; words for a list field are gathered, everything else replaces."""
    word = isinstance(value, str) and value not in _literals(annotation)
    if _admits(annotation, _LISTS) and (word or (isinstance(value, Mapping) and only_lists(annotation))):
        old: Any = layer.values
        for part in path:
            old = old.get(part) if isinstance(old, Mapping) else None
        if isinstance(old, str | Mapping | list):
            value = [*(old if isinstance(old, list) else [old]), value]
        elif not _already_text(annotation):
            value = [value]
    nested: Any = value
    for part in reversed(path):
        nested = {part: nested}
    layer.values = merge_values(layer.values, nested)
    layer.places[path] = flag


def _already_text(annotation: Any) -> bool:
    """Whether plain text is itself a value of the field (`str | list[str]`), so that one word is not a list."""
    return any(member in (str, Path) for member in union_members(annotation))


def _is_number(token: str) -> bool:
    try:
        float(token)
    except ValueError:
        return False
    return True
