"""Typed look-ups in rows, conversations and transcripts: what every reader is made of.

Every function raises `RecordError` with the key, what stood there and what was expected.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from plaudit.data.records import Message, Prompt, Ranking, RecordError

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
STEERLM_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")

#: What the field calls a prompt, the usual name first.
PROMPT_NAMES = ("prompt", "question", "instruction", "input", "query")

ROLE_NAMES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}


def show(value: object) -> str:
    """A value as an error message shows it: its type and its beginning."""
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:60] + '…'}"


def need(row: Mapping[str, Any], key: str, expected: str, path: str = "") -> Any:
    """The value under `key`; refuses a missing or null one."""
    value = row.get(key)
    if value is None:
        reason = "null value" if key in row else "missing key"
        found = ", ".join(sorted(map(str, row))[:12])
        raise RecordError(reason, key=path + key, problem=f"the row has {found}", expected=expected)
    return value


def nothing_to_compare() -> RecordError:
    """What is told of a row that is whole but holds, or belongs to, no judgement; it never stops a run."""
    return RecordError("nothing to compare", expected="two or more judged completions", is_fault=False)


def text_of(row: Mapping[str, Any], key: str, path: str = "") -> str:
    """The text under `key`; refuses anything else."""
    value = need(row, key, "text", path)
    if not isinstance(value, str):
        raise RecordError("wrong type", key=path + key, problem=show(value), expected="text")
    return value


def optional_text(row: Mapping[str, Any], key: str) -> str | None:
    """The text (or number, as text) under `key`, or None where it is missing, null or blank."""
    value = row.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RecordError("wrong type", key=key, problem=show(value), expected="text or a number")
    return str(value)


def number_of(row: Mapping[str, Any], key: str, path: str = "", *, parse: bool = False) -> float:
    """The number under `key` as a float (with `parse` also from text); whether it is finite is checked later."""
    value = need(row, key, "a number", path)
    if parse and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise RecordError("wrong type", key=path + key, problem=show(value), expected="a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong type", key=path + key, problem=show(value), expected="a number")
    try:
        return float(value)
    except OverflowError:
        raise RecordError("not a finite number", key=path + key, problem="too large", expected="a number") from None


def optional_number(row: Mapping[str, Any], key: str, path: str = "", *, parse: bool = False) -> float | None:
    """The number under `key`, or None where it is missing, null or (with `parse`) blank."""
    value = row.get(key)
    return None if value is None or (parse and value == "") else number_of(row, key, path, parse=parse)


def list_of(row: Mapping[str, Any], key: str, path: str = "", expected: str = "a list") -> Sequence[Any]:
    """The list under `key`; refuses anything else."""
    value = need(row, key, expected, path)
    if not isinstance(value, list | tuple):
        raise RecordError("wrong type", key=path + key, problem=show(value), expected=expected)
    return value


def object_of(value: object, key: str, expected: str = "an object") -> Mapping[str, Any]:
    """The value itself if it is an object; refuses anything else."""
    if not isinstance(value, Mapping):
        raise RecordError("wrong type", key=key, problem=show(value), expected=expected)
    return value


def flag_of(row: Mapping[str, Any], key: str) -> bool:
    """Yes or no under `key`: true/false, 1/0, and in text also yes/no, good/bad."""
    value = need(row, key, "true or false")
    if isinstance(value, bool):
        return value
    words = {"true": True, "yes": True, "good": True, "1": True, "false": False, "no": False, "bad": False, "0": False}
    if isinstance(value, int | str) and str(value).strip().lower() in words:
        return words[str(value).strip().lower()]
    raise RecordError("wrong type", key=key, problem=show(value), expected="true or false")


def messages_of(value: object, key: str, expected: str = "a list of messages") -> tuple[Message, ...]:
    """A list of `{"role", "content"}` (or `{"from", "value"}`) as messages; other tools' role names are translated."""
    if not isinstance(value, list | tuple) or not value:
        raise RecordError("wrong type", key=key, problem=show(value), expected=expected)
    messages = []
    for index, item in enumerate(value):
        path = f"{key}[{index}]"
        item = object_of(item, path, '{"role": …, "content": …}')
        role_key, content_key = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
        role = text_of(item, role_key, f"{path}.")
        content = item.get(content_key)
        if isinstance(content, list):
            content = _joined_parts(content, f"{path}.{content_key}")
            item = {**item, content_key: content}
        messages.append(Message(ROLE_NAMES.get(role.lower(), role), text_of(item, content_key, f"{path}.")))
    return tuple(messages)


def prompt_of(value: object, key: str = "prompt") -> Prompt:
    """A prompt in any common form: messages, a `\\n\\nHuman: …` transcript (becomes messages), or plain text."""
    if isinstance(value, str):
        return transcript_prompt(value) if value.startswith("\n\nHuman:") else value
    if value is None:
        raise RecordError("missing key", key=key, expected="text or a list of messages")
    return messages_of(value, key, "text or a list of messages")


def completion_of(value: object, key: str) -> str:
    """A completion: text, one message, or a list with one assistant message."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    messages = messages_of(value, key, "text or one assistant message")
    if len(messages) != 1 or messages[0].role != "assistant":
        raise RecordError("wrong type", key=key, problem=f"{len(messages)} messages", expected="one assistant message")
    return messages[0].content


def transcript_turns(text: str, key: str) -> tuple[Message, ...]:
    """The turns of a `\\n\\nHuman: …\\n\\nAssistant: …` transcript; neighbours of one role are joined."""
    marks = list(TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise RecordError("no transcript", key=key, problem=show(text), expected="'\\n\\nHuman: …\\n\\nAssistant: …'")
    turns: list[Message] = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        content = text[mark.end() : following.start() if following else len(text)].strip()
        role = "user" if mark.group(1) == "Human" else "assistant"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{content}".strip())
        else:
            turns.append(Message(role, content))
    return tuple(turns)


def transcript_prompt(text: str, key: str = "prompt") -> tuple[Message, ...]:
    """The turns of a transcript that is to be answered; a trailing, empty `Assistant:` is dropped."""
    turns = transcript_turns(text, key)
    return turns[:-1] if turns[-1].role == "assistant" and not turns[-1].content else turns


def steerlm_prompt(text: str) -> Prompt:
    """A HelpSteer 2 prompt: several turns stand in one text between `<extra_id_1>Assistant` and `<extra_id_1>User`.

    A prompt of one turn stays the text it is.
    """
    first, *rest = STEERLM_TURN.split(text)
    if not rest:
        return text
    turns = zip(rest[::2], rest[1::2], strict=True)
    later = tuple(Message("user" if name == "User" else "assistant", content) for name, content in turns)
    return (Message("user", first), *later) if first else later


def split_transcript(text: str, key: str) -> tuple[str, tuple[Message, ...], str]:
    """A transcript ending in an assistant turn as `(history as written, history as messages, last answer)`."""
    cut = text.rfind("\n\nAssistant:")
    if cut < 0 or "\n\nHuman:" in text[cut:]:
        raise RecordError(
            "transcript does not end with an answer",
            key=key,
            problem="…" + repr(text[-40:]),
            expected="a last turn '\\n\\nAssistant: …'",
        )
    history = text[:cut]
    return history, transcript_turns(history, key), text[cut + len("\n\nAssistant:") :].strip()


def tiers_from_ranks(ranks: Sequence[float | None]) -> Ranking:
    """One rank per completion (lower is better, equal ranks tie, None unjudged) as tiers."""
    if any(rank is not None and not math.isfinite(rank) for rank in ranks):
        raise RecordError("not a finite number", key="rank", problem=show(list(ranks)), expected="finite ranks or null")
    levels = sorted({rank for rank in ranks if rank is not None})
    return Ranking(tuple(tuple(i for i, rank in enumerate(ranks) if rank == level) for level in levels))


def first_is_better(preference: float) -> Ranking:
    """The ranking of two: above 0 the first is better, below 0 the second, 0 is a tie."""
    if preference == 0:
        return Ranking(((0, 1),))
    return Ranking(((0,), (1,))) if preference > 0 else Ranking(((1,), (0,)))


def look_up(row: Mapping[str, Any], path: str) -> Any:
    """The value under a dotted path such as `meta.doc`; refuses a missing one."""
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or value.get(part) is None:
            raise RecordError(
                "missing key",
                key=path,
                problem=f"the row has {', '.join(sorted(map(str, row))[:12])}",
                expected="a value",
            )
        value = value[part]
    if isinstance(value, bool | Mapping | list):
        raise RecordError("wrong type", key=path, problem=show(value), expected="text or a number")
    return value


def _joined_parts(parts: Sequence[object], key: str) -> str:
    texts = []
    for index, part in enumerate(parts):
        part = object_of(part, f"{key}[{index}]")
        if part.get("type") != "text":
            raise RecordError(
                "content that is no text",
                key=f"{key}[{index}]",
                problem=show(part.get("type")),
                expected='{"type": "text", "text": …}; images belong in the key "images"',
            )
        texts.append(text_of(part, "text", f"{key}[{index}]."))
    return "".join(texts)
