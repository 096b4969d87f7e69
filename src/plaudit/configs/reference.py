"""What every configuration key means, taken from the configurations themselves, for `--help` and for the manual."""

import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from plaudit.configs.base import Config, names_of, nested_configs, union_members

REQUIRED = "(required)"


@dataclass(frozen=True)
class KeyReference:
    """One configuration key: its dotted name, type, default (as a user writes it) and meaning."""

    key: str
    type: str
    default: str
    meaning: str


def key_references(cls: type[Config], prefix: str = "", defaults: Config | None = None) -> Iterator[KeyReference]:
    """Every key of a configuration in the order of its source, those nested in it just after their parent.

    Args:
        cls: the configuration class.
        prefix: put before every key.
        defaults: an instance whose values are the defaults; the class's own defaults where None.
    """
    for name, info in cls.model_fields.items():
        default = getattr(defaults, name) if defaults is not None else _default(info)
        nested = nested_configs(info.annotation)
        is_group = bool(nested) and isinstance(default, Config)
        if not is_group:
            constraints = ", ".join(filter(None, (_constraint(item) for item in info.metadata)))
            kind = type_text(info.annotation) + (f" ({constraints})" if constraints else "")
            yield KeyReference(prefix + name, kind, _text(default), _meaning(info))
        if isinstance(info.discriminator, str):
            yield from _named_references(nested, info.discriminator, f"{prefix}{name}.", default)
            continue
        seen: set[str] = set()
        for member in nested:
            instance = default if isinstance(default, member) else None
            for reference in key_references(member, f"{prefix}{name}.", instance):
                if reference.key not in seen:
                    seen.add(reference.key)
                    yield reference


def _named_references(members: list[type[Config]], tag: str, prefix: str, default: Any) -> Iterator[KeyReference]:
    """Keys of configurations that are told apart by a name: the name, then each key with the names that have it.

    A key that several have with the same default and meaning stands once.
    """
    names = {member: [str(name) for name in names_of(member, tag)] for member in members}
    meanings = [_meaning(member.model_fields[tag]) for member in members]
    every = " or ".join(name for known in names.values() for name in known)
    chosen = getattr(default, tag) if isinstance(default, Config) else PydanticUndefined
    yield KeyReference(prefix + tag, every, _text(chosen), " ".join(meanings))
    rows: dict[KeyReference, list[str]] = {}
    for member in members:
        instance = default if isinstance(default, member) else None
        for reference in key_references(member, prefix, instance):
            if reference.key != prefix + tag:
                rows.setdefault(reference, []).extend(names[member])
    for reference, having in rows.items():
        yield replace(reference, meaning=f"({', '.join(having)}) {reference.meaning}")


def markdown_table(cls: type[Config]) -> str:
    """The keys of a configuration as a Markdown table."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in key_references(cls):
        kind, default, meaning = (text.replace("|", "\\|") for text in (row.type, row.default, row.meaning))
        lines.append(f"| `{row.key}` | {kind} | `{default}` | {meaning} |".replace("`(required)`", "(required)"))
    return "\n".join(lines)


def type_text(annotation: Any) -> str:
    """An annotation in a user's words: `integer`, `text or none`, `best or pairs`, `list of path`."""
    words = {str: "text", int: "integer", float: "number", bool: "true/false", Path: "path", types.NoneType: "none"}
    texts: list[str] = []
    for member in union_members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if origin is Literal:
            texts.extend(str(value) for value in arguments)
        elif origin in (list, tuple, set, frozenset) or (origin and origin.__name__ == "Sequence"):
            texts.append(f"list of {type_text(arguments[0])}" if arguments else "list")
        elif origin is not None:
            texts.append("mapping")
        elif member is Any:
            texts.append("any")
        elif isinstance(member, type) and issubclass(member, Config):
            texts.append("group")
        else:
            texts.append(words.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(dict.fromkeys(texts))


def _meaning(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _default(info: FieldInfo) -> Any:
    if info.is_required():
        return PydanticUndefined
    return info.get_default(call_default_factory=True, validated_data={})


def _constraint(item: Any) -> str:
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return ", ".join(f"{sign} {getattr(item, name)}" for name, sign in signs.items() if hasattr(item, name))


def _text(default: Any) -> str:
    if default is PydanticUndefined:
        return REQUIRED
    if default is None or isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple | list | set | frozenset):
        return "[" + ", ".join(_text(item) for item in default) + "]"
    return str(default) if str(default) else "''"
