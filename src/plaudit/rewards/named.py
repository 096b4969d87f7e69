"""Rewards by name, as the command line and configuration files write them: `length_penalty=0.01`."""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from plaudit.rewards.base import Reward, as_reward
from plaudit.rewards.diversity import mtld, type_token
from plaudit.rewards.fluency import fluency
from plaudit.rewards.functions import function_named, names_function
from plaudit.rewards.readability import readability
from plaudit.rewards.relevance import lexical_overlap, similarity
from plaudit.rewards.rules import (
    exact_match,
    json_schema,
    keywords,
    length_penalty,
    matches,
    numeric_match,
    repetition,
    target_length,
)

RULES: dict[str, Callable[..., Reward]] = {
    "length_penalty": length_penalty,
    "target_length": target_length,
    "repetition": repetition,
    "type_token": type_token,
    "mtld": mtld,
    "matches": matches,
    "json_schema": json_schema,
    "keywords": keywords,
    "exact_match": exact_match,
    "numeric_match": numeric_match,
    "fluency": fluency,
    "similarity": similarity,
    "lexical_overlap": lexical_overlap,
    "readability": readability,
}
"""Every rule by its name."""

MODEL_OPTIONS = (
    *("normalised", "token_budget", "token_spans", "device", "dtype", "attn_implementation", "trust_remote_code"),
    *("max_length", "template", "too_long", "attribute_weights"),
)
"""Options of a reward model: see `ModelReward.from_pretrained` and `plaudit.models.saving.load_reward_model`."""

_ONE_TEXT = frozenset({"matches"})
"""Rules whose value is one text, with commas and equal signs in it."""


def named_reward(
    text: str, *, name: str | None = None, options: Mapping[str, Any] | None = None, device: str | None = None
) -> Reward:
    """A reward from what a user writes.

    Args:
        text: `http://…`, the address of a server; `RULE`, `RULE=VALUE` (its first option), `RULE=VALUE,KEY=VALUE,…`
            or `RULE={"key": value, …}` (JSON); `file.py:function` or `module:function`, a function of one's own;
            anything else is the folder or Hugging Face name of a reward model.
        name: its name in logs.
        options: more options of the rule, the model or the server, which win over those in the text; keywords of a
            function.
        device: where its model runs, if it has one and no option says otherwise; None takes the accelerator.

    Raises:
        ValueError: for an unknown rule or option, or a model or function that cannot be opened.
    """
    more = dict(options or {})
    if re.match(r"https?://", text):
        from plaudit.rewards.remote import server_reward

        return _renamed(_call("of a server", server_reward, {"url": text, **more}), name)
    rule, given, value = text.partition("=")
    if rule in RULES:
        return _renamed(_build(rule, value if given else None, more, device), name)
    if names_function(text):
        return _own_function(text, name, more)
    if names_function(rule):
        raise ValueError(f"reward {text!r}: options of a function are given as `options`, not behind its name")
    if re.search(r"\.py(:.*)?$", rule) and not Path(text).is_dir():
        raise ValueError(f"reward {text!r}: which function of the file? Name it as file.py:function")
    near = difflib.get_close_matches(rule, RULES, n=1, cutoff=0.75)
    if given and not Path(text).exists():
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"reward {text!r}: there is no rule {rule!r}{hint} The rules are {', '.join(RULES)}")
    if near and not Path(text).exists():
        raise ValueError(f"reward {text!r} is neither a rule nor a folder; did you mean {near[0]}?")
    from plaudit.rewards.model import ModelReward

    _refuse_unknown("of a model", more, MODEL_OPTIONS)
    return ModelReward.from_pretrained(text, **{"name": name, "device": device, **more})


def rule_table() -> list[tuple[str, str, str]]:
    """Name, options with their defaults, and formula of every rule."""
    rows = []
    for name, factory in RULES.items():
        parameters = inspect.signature(factory).parameters.values()
        listed = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters)
        rows.append((name, listed, (inspect.getdoc(factory) or "").partition("\n")[0]))
    return rows


def _own_function(text: str, name: str | None, options: Mapping[str, Any]) -> Reward:
    function = function_named(text)
    parameters = inspect.signature(function).parameters.values()
    if not any(each.kind is each.VAR_KEYWORD for each in parameters):
        _refuse_unknown(text, options, [each.name for each in parameters])
    # As it is without options: it may be a finished reward, such as a sum.
    return as_reward(partial(function, **options) if options else function, name=name or text.rpartition(":")[2])


def _build(rule: str, value: str | None, more: dict[str, Any], device: str | None) -> Reward:
    factory = RULES[rule]
    parameters = inspect.signature(factory).parameters
    place = {"device": device} if device is not None and "device" in parameters else {}
    options = {**place, **_options(rule, value, next(iter(parameters), "")), **more}
    _refuse_unknown(rule, options, list(parameters))
    missing = [name for name, each in parameters.items() if each.default is each.empty and name not in options]
    if missing:
        raise ValueError(f"reward {rule} needs {missing[0]}: {rule}=VALUE")
    return _call(rule, factory, options)


def _call(kind: str, factory: Callable[..., Reward], options: Mapping[str, Any]) -> Reward:
    """What a factory makes of options whose types are checked."""
    _refuse_unknown(kind, options, list(inspect.signature(factory).parameters))
    try:
        checked: Reward = validate_call(config=ConfigDict(arbitrary_types_allowed=True))(factory)(**options)
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][0] if first["loc"] else "?"
        raise ValueError(f"reward {kind}: option {where} is {first['input']!r}: {first['msg'].lower()}") from error
    return checked


def _refuse_unknown(kind: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"reward {kind} has no option {key!r}{hint} Its options are {', '.join(known)}")


def _options(rule: str, value: str | None, first: str) -> dict[str, Any]:
    if value is None:
        return {}
    if value.startswith("{"):
        try:
            found = json.loads(value)
        except ValueError as error:
            raise ValueError(f"reward {rule}: {value!r} begins like JSON and is none: {error}") from error
        return dict(found)
    if rule in _ONE_TEXT:
        return {first: value}
    options: dict[str, Any] = {}
    for item in value.split(","):
        key, given, text = item.partition("=")
        if given:
            options[key.strip()] = _value(text)
        elif options:
            raise ValueError(f"reward {rule}={value}: {item!r} is no KEY=VALUE")
        else:
            options[first] = _value(item)
    return options


def _value(text: str) -> Any:
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, int | float | bool) or found is None else text


def _renamed(reward: Reward, name: str | None) -> Reward:
    return reward if name is None else replace(reward, name=name)  # type: ignore[type-var]
