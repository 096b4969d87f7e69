"""Rules about length, repetition, form, words and answers. Each makes a reward; its docstring has formula and range.

Rules read the completion alone, and the columns that they name. Texts of any language are counted as
`plaudit.rewards.text` says.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from plaudit.rewards.base import Reward, Sample
from plaudit.rewards.functions import SampleReward
from plaudit.rewards.text import Unit, contains_words, length, ngrams, normal, words

_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+−])?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?(?:\s*/\s*\d+(?:\.\d+)?)?"
)
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL | re.IGNORECASE)


def length_penalty(coefficient: float = 0.01, *, free: int = 0, unit: Unit = "words") -> Reward:
    """`r = −c · max(0, n − free)`, in −∞..0: every unit beyond the free ones costs the same.

    Args:
        coefficient: `c`, what one unit costs; a negative one rewards length.
        free: units that cost nothing.
        unit: of the length `n`: `words`, `characters` or `sentences`.
    """
    _check_unit(unit)
    return SampleReward(lambda sample: -coefficient * max(0, length(sample.completion, unit) - free), "length_penalty")


def target_length(target: int, *, tolerance: int = 0, unit: Unit = "words") -> Reward:
    """`r = 1 − max(0, |n − target| − tolerance) / target`, cut at −1, in −1..1; 1 at the target, 0 at twice it.

    Args:
        target: the length that is wanted, at least 1.
        tolerance: how far off costs nothing.
        unit: of lengths.

    Raises:
        ValueError: if the target is below 1.
    """
    _check_unit(unit)
    if target < 1:
        raise ValueError(f"target is {target}; a length to aim at must be at least 1")

    def reward(sample: Sample) -> float:
        off = abs(length(sample.completion, unit) - target) - tolerance
        return max(-1.0, 1.0 - max(0, off) / target)

    return SampleReward(reward, "target_length")


def repetition(n: int = 3) -> Reward:
    """`r = −(1 − distinct / all)` over the runs of `n` words, in −1..0; 0 where no run comes twice or there is none.

    The rate is seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319). One character is one word in scripts without
    spaces; take a larger `n` there (5 or so), since common words would count as repetitions.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; runs have at least one word")

    def reward(sample: Sample) -> float:
        runs = ngrams(words(sample.completion), n)
        return len(set(runs)) / len(runs) - 1.0 if runs else 0.0

    return SampleReward(reward, "repetition")


def matches(pattern: str, *, whole: bool = True, ignore_case: bool = False) -> Reward:
    r"""`r = 1` where the completion matches a regular expression, else 0. The dot matches line breaks too.

    Args:
        pattern: Python's syntax, e.g. `<think>.*</think>\s*<answer>.*</answer>`.
        whole: whether the whole completion must match (white space around it apart), or a part is enough.
        ignore_case: whether capitals do not matter.

    Raises:
        ValueError: if the pattern is no regular expression.
    """
    compiled = _compiled(pattern, re.IGNORECASE if ignore_case else 0)

    def reward(sample: Sample) -> float:
        text = sample.completion
        return float(bool(compiled.fullmatch(text.strip()) if whole else compiled.search(text)))

    return SampleReward(reward, "matches")


def json_schema(
    schema: Mapping[str, Any] | str | Path | None = None, *, partial: float = 0.0, fenced: bool = False
) -> Reward:
    """`r = 1` where the completion is JSON that fits a schema, `partial` where it is other JSON, else 0.

    Args:
        schema: a JSON schema, its file, or its text; None takes any JSON. Needs `jsonschema` (the extra `rewards`).
        partial: what JSON that does not fit is worth, in 0..1.
        fenced: whether a fence of three backticks around it is allowed.

    Raises:
        ValueError: if the schema is none, refers to what is not in it (nothing is downloaded), or `jsonschema` is not
            installed.
    """
    if not 0 <= partial <= 1:
        raise ValueError(f"partial is {partial}; it must lie in 0..1")
    validator = None if schema is None else _validator(schema)

    def reward(sample: Sample) -> float:
        text = sample.completion
        inside = _FENCE.match(text) if fenced else None
        try:
            value = json.loads(inside[1] if inside else text, parse_constant=_refuse_constant)
            fits = validator is None or validator.is_valid(value)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if fits else partial

    return SampleReward(reward, "json_schema")


def keywords(present: Sequence[str] | str = (), absent: Sequence[str] | str = ()) -> Reward:
    """`r = |found| / |present| − |found| / |absent|`, in −1..1: the share of wanted words less that of unwanted ones.

    A keyword of several words must stand there as neighbours. Capitals do not matter; a part of a word does not count
    (`cat` is not in `category`), except in scripts without spaces, which have no borders between words.

    Raises:
        ValueError: if there is no keyword, or one holds no letter.
    """
    wanted, unwanted = (_keywords(given) for given in (present, absent))
    if not wanted and not unwanted:
        raise ValueError("keywords needs a word in `present` or in `absent`")

    def share(found: Sequence[str], given: list[list[str]]) -> float:
        return sum(contains_words(found, word) for word in given) / len(given) if given else 0.0

    def reward(sample: Sample) -> float:
        found = words(sample.completion)
        return share(found, wanted) - share(found, unwanted)

    return SampleReward(reward, "keywords")


def exact_match(column: str = "answer", *, pattern: str | None = None, ignore_case: bool = True) -> Reward:
    """`r = 1` where the completion is the reference, else 0. Width of characters, white space and case do not matter.

    A sample whose column is missing or empty has no reward (invalid).

    Args:
        column: the column with the reference; a list there holds several right answers.
        pattern: a regular expression; its first group (or all of it) in its last match is compared instead of the
            whole completion. Without a match the answer is wrong.
        ignore_case: whether capitals do not matter.
    """
    compiled = None if pattern is None else _compiled(pattern)

    def tidy(text: str) -> str:
        plain = " ".join(normal(text).split())
        return plain.casefold() if ignore_case else plain

    def reward(sample: Sample) -> float | None:
        given = sample.columns.get(column)
        references = [
            text for text in (given if isinstance(given, list | tuple) else [given]) if text not in (None, "")
        ]
        if not references:
            return None
        text = sample.completion
        if compiled is not None:
            found = list(compiled.finditer(text))
            if not found:
                return 0.0
            text = found[-1][1] if compiled.groups else found[-1][0]
        return float(tidy(text or "") in {tidy(str(reference)) for reference in references})

    return SampleReward(reward, "exact_match")


def numeric_match(
    column: str = "answer", *, marker: str = "####", find: Literal["last", "marked"] = "last", tolerance: float = 1e-6
) -> Reward:
    """`r = 1` where the completion's number is the reference's: `|a − b| ≤ tolerance · max(1, |b|)`; else 0.

    The number is the first behind the last `marker` (as GSM8K writes it, `#### 72`); without a marker the last one of
    the text, which in the reference may be all there is. Thousands commas (`1,234`), fractions (`3/4`), signs, powers
    (`1e3`) and full-width digits are read; `$` and `%` around a number do not matter. A sample without a number in its
    column has no reward (invalid).

    Args:
        column: the column with the reference, a text or a number.
        marker: what stands before the answer.
        find: `last` takes the last number of a completion without a marker, `marked` gives such a completion 0.
        tolerance: relative above 1, absolute below.
    """
    if find not in ("last", "marked"):
        raise ValueError(f"find is {find!r}; it must be 'last' or 'marked'")

    def reward(sample: Sample) -> float | None:
        given = sample.columns.get(column)
        reference = answer_number(str(given), marker) if given is not None else None
        if reference is None:
            return None
        answer = answer_number(sample.completion, marker, only_marked=find == "marked")
        close = answer is not None and abs(answer - reference) <= tolerance * max(1.0, abs(reference))
        return float(close)

    return SampleReward(reward, "numeric_match")


def answer_number(text: str, marker: str = "####", *, only_marked: bool = False) -> float | None:
    """The first number behind the last marker; without a marker the last number; None where there is none."""
    _, marked, behind = normal(text).rpartition(normal(marker))
    if only_marked and not marked:
        return None
    numbers = [number for found in _NUMBER.finditer(behind) if (number := _number(found[0])) is not None]
    if not numbers:
        return None
    return numbers[0] if marked else numbers[-1]


def _number(text: str) -> float | None:
    above, _, below = text.replace(",", "").replace("−", "-").partition("/")
    if not any(character.isdigit() for character in above):
        return None
    try:
        value = float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        return None
    return value if math.isfinite(value) else None


def _compiled(pattern: str, flags: int = 0) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL | flags)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _keywords(given: Sequence[str] | str) -> list[list[str]]:
    listed = given.split("|") if isinstance(given, str) else list(given)
    split = [words(word) for word in listed]
    for word, parts in zip(listed, split, strict=True):
        if not parts:
            raise ValueError(f"keyword {word!r} holds no letter or digit")
    return split


def _validator(schema: Mapping[str, Any] | str | Path) -> Any:
    try:
        import jsonschema
        from jsonschema_specifications import REGISTRY
        from referencing import Resource
        from referencing.jsonschema import DRAFT202012
    except ImportError as error:
        raise ValueError("json_schema needs the package jsonschema: pip install 'plaudit[rewards]'") from error
    if isinstance(schema, str | Path):
        text = str(schema)
        source = text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8")
        try:
            schema = json.loads(source)
        except ValueError as error:
            raise ValueError(f"{text[:80]}: this schema is no JSON: {error}") from error
    kind = jsonschema.validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"this is no JSON schema: {error.message}") from error
    # What it knows are the standard's own schemas; it fetches no others.
    validator = kind(schema, registry=REGISTRY)
    try:
        resource = Resource.from_contents(schema, default_specification=DRAFT202012)
        _look_up_references(resource, REGISTRY.resolver_with_root(resource))
        validator.is_valid(None)
    except RecursionError as error:
        raise ValueError("this schema refers to itself without an end") from error
    return validator


def _look_up_references(resource: Any, resolver: Any) -> None:
    """Look up every reference of a schema."""
    from referencing.exceptions import Unresolvable

    for keyword in ("$ref", "$dynamicRef"):
        if isinstance(resource.contents, Mapping) and (wanted := resource.contents.get(keyword)) is not None:
            try:
                resolver.lookup(wanted)
            except Unresolvable as error:
                raise ValueError(f"this schema refers to {wanted!r}, which is not in it") from error
    for each in resource.subresources():
        _look_up_references(each, resolver.in_subresource(each))


def _refuse_constant(name: str) -> None:
    # NaN and Infinity are Python's, not JSON's.
    raise ValueError(name)


def _check_unit(unit: str) -> None:
    length("", unit)  # type: ignore[arg-type]
