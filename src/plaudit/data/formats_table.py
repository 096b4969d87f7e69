"""The reader of a person's own table: which column holds what is given, or found by the columns' names."""

import difflib
from collections.abc import Mapping
from typing import Any

from plaudit.configs.data import ColumnsConfig
from plaudit.data.fields import (
    PROMPT_NAMES,
    flag_of,
    number_of,
    optional_number,
    optional_text,
    prompt_of,
    show,
    text_of,
    tiers_from_ranks,
)
from plaudit.data.records import Best, Comparison, Judgement, Labels, Ranking, RecordError, Scores
from plaudit.data.validation import check_text

Row = Mapping[str, Any]

BEGINNINGS = ("answer", "response", "completion", "output", "reply", "text", "option")
CHOICE_NAMES = ("choice", "chosen", "preferred", "preference", "winner", "better", "best")
JUDGEMENTS = ("choice", "scores", "ranks", "label")
MARKS = ("_", " ", "-", "")
TIES = ("tie", "tied", "equal", "same", "both")


def guess_columns(row: Row, given: ColumnsConfig | None = None) -> ColumnsConfig | None:
    """Which columns hold what, by their names alone, in capitals or not: a prompt, two or more completions
    (`answer_a`, `answer_b`, …), and a choice, or a score or rank per completion (`score_a`, `rank_a`, …); None where
    that is not there.

    What is `given` is kept and only what it leaves open is guessed.
    """
    found: dict[str, Any] = {} if given is None else given.model_dump(exclude_unset=True)
    there = {str(name).casefold(): str(name) for name in row}
    if "prompt" not in found:
        found["prompt"] = next((there[name] for name in PROMPT_NAMES if name in there), None)
    if not found.get("completions"):
        found["completions"] = _guess_completions(row)
    if found["prompt"] is None or not found["completions"]:
        return None
    if not any(found.get(name) for name in JUDGEMENTS):
        found |= _guess_judgement(there, found["completions"])
    if not any(found.get(name) for name in JUDGEMENTS):
        return None
    for name in ("id", "annotator", "weight"):
        if name not in found and name in there:
            found[name] = there[name]
    return ColumnsConfig(**found)


def _guess_completions(row: Row) -> tuple[str, ...]:
    for beginning in BEGINNINGS:
        names = tuple(str(name) for name in row if _ending(name, beginning))
        if len(names) >= 2:
            return names
    return ()


def _guess_judgement(there: Mapping[str, str], completions: tuple[str, ...]) -> dict[str, Any]:
    """`there` leads from the columns' names in lower case to the names as they are."""
    choice = next((there[name] for name in CHOICE_NAMES if name in there), None)
    if choice is not None:
        return {"choice": choice}
    shared = _shared_length(completions)
    for kind in ("score", "rank"):
        names = [[f"{kind}{mark}{name[shared:].lstrip('_- ').casefold()}" for mark in MARKS] for name in completions]
        columns = tuple(next((there[name] for name in options if name in there), "") for options in names)
        if all(columns):
            return {f"{kind}s": columns}
    return {}


def read_table(row: Row, columns: ColumnsConfig | None = None) -> list[Comparison]:
    """A row of a table whose columns were named, or have names that say what they hold."""
    mapping = guess_columns(row, columns)
    if mapping is None:
        raise RecordError(
            "columns not found",
            problem=f"the row has {', '.join(map(str, row))}",
            expected="columns for prompt, completions and choice; name them (--prompt, --completions, …)",
        )
    texts = tuple(text_of(row, name) for name in mapping.completions)
    for name, text in zip(mapping.completions, texts, strict=True):
        check_text(text, name, "completion")
    return [
        Comparison(
            prompt=prompt_of(text_of(row, mapping.prompt), mapping.prompt),
            completions=texts,
            judgement=_judgement(row, mapping),
            id=optional_text(row, mapping.id) if mapping.id else None,
            annotator=optional_text(row, mapping.annotator) if mapping.annotator else None,
            weight=number_of(row, mapping.weight, parse=True) if mapping.weight else 1.0,
        )
    ]


def _judgement(row: Row, columns: ColumnsConfig) -> Judgement:
    if columns.choice:
        return _choice(row, columns.choice, columns)
    if columns.label:
        return Labels((flag_of(row, columns.label),))
    for name in columns.scores or columns.ranks:
        if name not in row:
            raise RecordError(
                "missing key",
                key=name,
                problem=f"the row has {', '.join(map(str, row))}",
                expected="a column with a number or an empty cell",
            )
    if columns.scores:
        return Scores(tuple(optional_number(row, name, parse=True) for name in columns.scores))
    if columns.ranks:
        return tiers_from_ranks([optional_number(row, name, parse=True) for name in columns.ranks])
    raise RecordError("no judgement", expected="a column for choice, scores, ranks or label (--choice, --scores, …)")


def _choice(row: Row, key: str, columns: ColumnsConfig) -> Ranking | Best:
    if key not in row:
        near = difflib.get_close_matches(key, map(str, row), n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RecordError(
            "missing key",
            key=key,
            problem=f"the row has {', '.join(map(str, row))}{hint}",
            expected="the column that names the better completion",
        )
    written = optional_text(row, key)
    names = columns.completions
    everyone = tuple(range(len(names)))
    if written is None:
        raise RecordError("empty cell", key=key, expected=_choices_text(columns))
    value = columns.choices.get(written.strip(), written.strip())
    folded = value.casefold()
    if folded in TIES and folded not in (name.casefold() for name in names):
        return Ranking((everyone,))
    shared = _shared_length(names)
    matches = [index for index, name in enumerate(names) if folded in (name.casefold(), name[shared:].casefold())]
    if len(matches) != 1:
        raise RecordError("unknown choice", key=key, problem=show(written), expected=_choices_text(columns))
    rest = tuple(index for index in everyone if index != matches[0])
    if not rest:
        raise RecordError("one completion for a relative judgement", key=key, expected="two or more completion columns")
    return Ranking(((matches[0],), rest)) if len(rest) == 1 else Best(matches[0])


def _choices_text(columns: ColumnsConfig) -> str:
    shared = _shared_length(columns.completions)
    endings = [name[shared:] for name in columns.completions]
    return (f"one of {', '.join(columns.completions)} (or {', '.join(endings)}), or tie; "
            "say what other values mean with --choices, e.g. --choices 1=answer_a")  # fmt: skip


def _shared_length(names: tuple[str, ...]) -> int:
    shortest = min(len(name) for name in names)
    return next((i for i in range(shortest) if len({name[i] for name in names}) > 1), shortest)


def _ending(name: str, beginning: str) -> str:
    """`a` for `answer_a`, `1` for `answer1`; empty where the name is no such column."""
    if not isinstance(name, str) or not name.casefold().startswith(beginning):
        return ""
    rest = name[len(beginning) :]
    ending = rest.lstrip("_- ")
    return ending if ending and len(ending) <= 2 and ending.isalnum() else ""
