"""Checks of everything that a record promises, each with the key, what stood there and what was expected."""

import math
from collections.abc import Mapping, Sequence

from plaudit.data.records import (
    Best,
    Comparison,
    Demonstration,
    Judgement,
    Labels,
    Prompt,
    Ranking,
    Ratings,
    RecordError,
    Scores,
    Votes,
)

ROLES = ("system", "user", "assistant", "tool")


def validate_comparison(comparison: Comparison) -> None:
    """Check everything that a comparison promises.

    Raises:
        RecordError: naming the key, what stood there and what was expected: prompt and completions are non-empty text
            without lone surrogates, completions differ, the judgement covers K completions (K ≥ 2 for rankings, picks
            and votes), numbers are finite, weight ≥ 0, names and images are text that a file can hold.
    """
    check_prompt(comparison.prompt)
    completions: object = comparison.completions
    if not isinstance(completions, Sequence) or isinstance(completions, str) or not completions:
        raise RecordError("no completions", key="completions", problem=_show(completions), expected="a list of texts")
    for index, text in enumerate(completions):
        check_text(text, f"completions[{index}]", "completion")
    if len(set(comparison.completions)) < len(completions):
        first, second = _first_repeat(comparison.completions)
        raise RecordError(
            "identical completions",
            key=f"completions[{second}]",
            problem=f"the same text as completions[{first}]",
            expected="completions that differ (a text cannot be better than itself)",
        )
    _check_judgement(comparison.judgement, len(completions))
    _check_weight(comparison.weight)
    if comparison.margin is not None:
        _check_number(comparison.margin, "margin", "a finite number")
    _check_names(comparison, ("id", "annotator", "group", "subset"))
    for index, image in enumerate(comparison.images):
        check_text(image, f"images[{index}]", "image")


def validate_demonstration(demonstration: Demonstration) -> None:
    """Check prompt, completion and weight of a demonstration; raises `RecordError` like `validate_comparison`."""
    check_prompt(demonstration.prompt)
    check_text(demonstration.completion, "completion", "completion")
    _check_weight(demonstration.weight)
    _check_names(demonstration, ("id", "group"))


def check_prompt(prompt: Prompt) -> None:
    """Refuse prompts that are not text or messages with known roles ending in a turn to be answered."""
    if isinstance(prompt, str):
        return check_text(prompt, "prompt", "prompt")
    if not isinstance(prompt, tuple) or not prompt:
        raise RecordError("wrong type", key="prompt", problem=_show(prompt), expected="text or a list of messages")
    for index, message in enumerate(prompt):
        if message.role not in ROLES:
            raise RecordError(
                "unknown role",
                key=f"prompt[{index}].role",
                problem=_show(message.role),
                expected=f"one of {', '.join(ROLES)}",
            )
        check_text(message.content, f"prompt[{index}].content", "turn", empty=True)
    if prompt[-1].role == "assistant":
        raise RecordError(
            "prompt ends with an assistant turn",
            key=f"prompt[{len(prompt) - 1}]",
            expected="a conversation that ends with a user (or tool) turn",
        )
    if not any(message.content.strip() for message in prompt):
        raise RecordError("empty prompt", key="prompt", problem="no turn has any text", expected="text")
    return None


def check_text(text: object, key: str, name: str, *, empty: bool = False) -> None:
    """Refuse what is not text, is blank (unless `empty`), or holds lone surrogates (which no file can hold)."""
    if not isinstance(text, str):
        raise RecordError("wrong type", key=key, problem=_show(text), expected="text")
    if not empty and not text.strip():
        raise RecordError(f"empty {name}", key=key, problem=_show(text), expected="text that is not blank")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordError(
                "lone surrogate",
                key=key,
                problem=f"half a character, {text[error.start]!r}, at position {error.start}",
                expected="valid Unicode (the text was cut in the middle of a character)",
            ) from None


def _check_weight(weight: float) -> None:
    _check_number(weight, "weight", "a finite number ≥ 0")
    if weight < 0:
        raise RecordError("weight below 0", key="weight", problem=repr(weight), expected="a number ≥ 0")


def _check_names(record: Comparison | Demonstration, keys: Sequence[str]) -> None:
    for key in keys:
        if getattr(record, key) is not None:
            check_text(getattr(record, key), key, key, empty=True)


def _check_judgement(judgement: Judgement, num_completions: int) -> None:
    if isinstance(judgement, Ranking | Best | Votes) and num_completions < 2:
        raise RecordError(
            "one completion for a relative judgement",
            key="completions",
            problem="K = 1",
            expected="at least two completions for a ranking, a pick or votes",
        )
    match judgement:
        case Ranking(tiers):
            _check_tiers(tiers, num_completions)
        case Best(index):
            _check_index(index, "best", num_completions)
        case Votes(counts):
            _check_values(counts, "votes", num_completions, required=True)
            if min(counts) < 0 or sum(counts) <= 0:
                raise RecordError("no votes", key="votes", problem=_show(counts), expected="counts ≥ 0, some above 0")
        case Scores(values=numbers):
            _check_values(numbers, "scores", num_completions)
        case Labels(values):
            _check_length(values, "labels", num_completions)
            for index, label in enumerate(values):
                if label is not None and not isinstance(label, bool):
                    raise RecordError(
                        "wrong type", key=f"labels[{index}]", problem=_show(label), expected="true, false or null"
                    )
            _check_any(values, "labels")
        case Ratings(attributes):
            if not isinstance(attributes, Mapping) or not attributes:
                raise RecordError("wrong type", key="ratings", problem=_show(attributes), expected="named lists")
            for name, ratings in attributes.items():
                check_text(name, f"ratings.{name!a}", "attribute")
                _check_values(ratings, f"ratings.{name}", num_completions, allow_empty=True)
            _check_any([value for ratings in attributes.values() for value in ratings], "ratings")
        case _:
            raise RecordError("no judgement", problem=_show(judgement), expected="a judgement")


def _check_tiers(tiers: object, num_completions: int) -> None:
    form = "tiers of completion indices, best first, e.g. [[2], [0, 3], [1]]"
    if not isinstance(tiers, Sequence) or isinstance(tiers, str):
        raise RecordError("wrong type", key="ranking", problem=_show(tiers), expected=form)
    seen: set[int] = set()
    for place, tier in enumerate(tiers):
        if not isinstance(tier, Sequence) or isinstance(tier, str) or not tier:
            raise RecordError("wrong type", key=f"ranking[{place}]", problem=_show(tier), expected=form)
        for index in tier:
            _check_index(index, f"ranking[{place}]", num_completions)
            if index in seen:
                raise RecordError(
                    "completion ranked twice",
                    key=f"ranking[{place}]",
                    problem=f"index {index} again",
                    expected="every completion in at most one tier",
                )
            seen.add(index)
    if len(seen) < 2:
        raise RecordError(
            "ranking judges fewer than two completions",
            key="ranking",
            problem=_show(tiers),
            expected="at least two judged completions",
        )


def _check_index(index: object, key: str, num_completions: int) -> None:
    if isinstance(index, bool) or not isinstance(index, int):
        raise RecordError("wrong type", key=key, problem=_show(index), expected="the index of a completion, from 0")
    if not 0 <= index < num_completions:
        raise RecordError(
            "index out of range",
            key=key,
            problem=repr(index),
            expected=f"0..{num_completions - 1} for {num_completions} completions",
        )


def _check_values(
    values: Sequence[float | None], key: str, num_completions: int, *, required: bool = False, allow_empty: bool = False
) -> None:
    _check_length(values, key, num_completions)
    for index, value in enumerate(values):
        if value is not None or required:
            _check_number(value, f"{key}[{index}]", "a finite number" + ("" if required else " or null"))
    if not allow_empty:
        _check_any(values, key)


def _check_length(values: object, key: str, num_completions: int) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise RecordError("wrong type", key=key, problem=_show(values), expected="a list, one entry per completion")
    if len(values) != num_completions:
        raise RecordError(
            "judgement does not cover the completions",
            key=key,
            problem=f"{len(values)} entries",
            expected=f"{num_completions}, one per completion (null where unjudged)",
        )


def _check_any(values: Sequence[object], key: str) -> None:
    if all(value is None for value in values):
        raise RecordError("nothing judged", key=key, problem="only nulls", expected="at least one value")


def _check_number(value: object, key: str, expected: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong type", key=key, problem=_show(value), expected=expected)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise RecordError("not a finite number", key=key, problem=str(value)[:40], expected=expected)


def _first_repeat(texts: Sequence[str]) -> tuple[int, int]:
    seen: dict[str, int] = {}
    for index, text in enumerate(texts):
        if text in seen:
            return seen[text], index
        seen[text] = index
    return -1, -1


def _show(value: object) -> str:
    shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + '…'}"
