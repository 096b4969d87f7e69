"""Readers of formats whose rows compare two completions (or several chosen with several rejected)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plaudit.data.fields import (
    PROMPT_NAMES,
    completion_of,
    first_is_better,
    flag_of,
    list_of,
    messages_of,
    need,
    number_of,
    object_of,
    optional_number,
    optional_text,
    prompt_of,
    show,
    split_transcript,
    steerlm_prompt,
    text_of,
)
from plaudit.data.records import Best, Comparison, Labels, Message, Prompt, Ranking, RecordError
from plaudit.data.validation import check_text

Row = Mapping[str, Any]

CHOSEN_FIRST = Ranking(((0,), (1,)))
#: Of HelpSteer's strengths; what lies beyond is a code for something else, and would make an absurd margin.
MAX_STRENGTH = 3


def read_hh(row: Row) -> list[Comparison]:
    """Anthropic HH: two whole transcripts that share their history up to the last answer."""
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    history, prompt, better = split_transcript(chosen, "chosen")
    other_history, _, worse = split_transcript(rejected, "rejected")
    if history != other_history:
        place = len(_common_beginning(history, other_history))
        raise RecordError(
            "histories differ",
            key="rejected",
            problem=f"from character {place} on",
            expected="transcripts that are equal up to the last '\\n\\nAssistant:'",
        )
    return [_pair(row, prompt, better, worse)]


def read_preference(row: Row) -> list[Comparison]:
    """TRL preference data: `chosen`/`rejected` as text or messages, with a prompt or with a shared beginning.

    Also RewardBench (`subset`), UltraFeedback-binarized and Skywork files (messages that repeat the prompt), and those
    that call the prompt `question` (`instruction`, …), with or without a `system` text.
    """
    chosen, rejected = need(row, "chosen", "text or messages"), need(row, "rejected", "text or messages")
    if type(chosen) is not type(rejected):
        raise RecordError("wrong type", key="rejected", problem=show(rejected), expected="the same kind as chosen")
    prompt = _stated_prompt(row)
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = _shared_text(chosen, rejected)
        return [_pair(row, prompt, chosen, rejected)]
    better, worse = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
    if prompt is None or (len(better) > 1 and len(worse) > 1):
        prompt, better, worse = _shared_messages(better, worse, prompt)
    for key, messages in (("chosen", better), ("rejected", worse)):
        if len(messages) != 1 or messages[0].role != "assistant":
            raise RecordError(
                "wrong type",
                key=key,
                problem=f"{len(messages)} messages after the prompt",
                expected="one assistant message after what both sides share",
            )
    return [_pair(row, prompt, better[0].content, worse[0].content)]


def _stated_prompt(row: Row) -> Prompt | None:
    """The prompt under whatever name it stands, behind the `system` text where there is one; None without any."""
    names = [name for name in PROMPT_NAMES if row.get(name) not in (None, "", [])]
    if not names:
        return None
    if len(names) > 1 and names[0] != "prompt":
        raise RecordError("several prompts", key=", ".join(names), expected="one of them, or one called prompt")
    prompt, system = prompt_of(row[names[0]], names[0]), row.get("system")
    if isinstance(prompt, str) and isinstance(system, str) and system.strip():
        return (Message("system", system), Message("user", prompt))
    return prompt


def read_chosen_lists(row: Row) -> list[Comparison]:
    """RewardBench 2: `chosen` and `rejected` are lists; each chosen one is better than each rejected one."""
    chosen = [completion_of(item, f"chosen[{i}]") for i, item in enumerate(list_of(row, "chosen"))]
    rejected = [completion_of(item, f"rejected[{i}]") for i, item in enumerate(list_of(row, "rejected"))]
    if not chosen or not rejected:
        raise RecordError(
            "one completion for a relative judgement",
            key="rejected" if chosen else "chosen",
            problem="an empty list",
            expected="at least one chosen and one rejected completion",
        )
    count = len(chosen)
    # Labels rather than tiers: the chosen ones were called good, not equally good.
    labels = Labels(tuple(index < count for index in range(count + len(rejected))))
    return [_with_extras(Comparison(prompt=_prompt(row), completions=(*chosen, *rejected), judgement=labels), row)]


def read_kto(row: Row) -> list[Comparison]:
    """KTO: one completion that was called good or bad."""
    completion = completion_of(need(row, "completion", "text"), "completion")
    label = Labels((flag_of(row, "label"),))
    return [_with_extras(Comparison(prompt=_prompt(row), completions=(completion,), judgement=label), row)]


def read_shp(row: Row) -> list[Comparison]:
    """Stanford Human Preferences: `labels` is 1 where answer A was preferred; the scores are votes on the forum."""
    label = number_of(row, "labels")
    if label not in (0, 1):
        raise RecordError("unknown label", key="labels", problem=show(label), expected="1 (A is better) or 0 (B is)")
    return [
        Comparison(
            prompt=prompt_of(text_of(row, "history"), "history"),
            completions=(text_of(row, "human_ref_A"), text_of(row, "human_ref_B")),
            judgement=first_is_better(label - 0.5),
            id=None if row.get("id") is not None else _joined(row, "c_root_id_A", "c_root_id_B"),
            subset=optional_text(row, "domain"),
            group=optional_text(row, "post_id"),
        )
    ]


def read_webgpt(row: Row) -> list[Comparison]:
    """WebGPT comparisons: `score_0` and `score_1` add up to 0; equal scores are a tie."""
    question = need(row, "question", "an object with full_text")
    prompt = (
        question if isinstance(question, str) else text_of(object_of(question, "question"), "full_text", "question.")
    )
    difference = number_of(row, "score_0") - number_of(row, "score_1")
    completions = (text_of(row, "answer_0"), text_of(row, "answer_1"))
    return [Comparison(prompt=prompt, completions=completions, judgement=_finite(difference, "score_0"))]


def read_summaries(row: Row) -> list[Comparison]:
    """Summarize from feedback, comparisons: two summaries of a post and the `choice` of one worker."""
    summaries = list_of(row, "summaries")
    texts = [
        text_of(object_of(item, f"summaries[{i}]"), "text", f"summaries[{i}].") for i, item in enumerate(summaries)
    ]
    choice = need(row, "choice", "the index of the better summary")
    if isinstance(choice, bool) or not isinstance(choice, int) or not 0 <= choice < len(texts):
        raise RecordError("index out of range", key="choice", problem=show(choice), expected=f"0..{len(texts) - 1}")
    rest = tuple(index for index in range(len(texts)) if index != choice)
    return [
        Comparison(
            prompt=post_of(row),
            completions=tuple(texts),
            judgement=Ranking(((choice,), rest)) if len(rest) == 1 else Best(choice),
            annotator=optional_text(row, "worker"),
            subset=optional_text(row, "batch"),
            group=optional_text(object_of(row["info"], "info"), "id"),
        )
    ]


def post_of(row: Row) -> str:
    """The post (or article) of a summarize-from-feedback row as a prompt: title and text."""
    info = object_of(need(row, "info", "an object with post or article"), "info")
    body = info.get("post") or info.get("article")
    if not isinstance(body, str):
        raise RecordError("missing key", key="info.post", expected="the text to be summarised (post or article)")
    title = optional_text(info, "title")
    return f"{title}\n\n{body}" if title else body


def read_helpsteer_preference(row: Row) -> list[Comparison]:
    """HelpSteer 2 preference: strength -3..3, below 0 the first response is better; |strength| is the margin."""
    completions = (text_of(row, "response_1"), text_of(row, "response_2"))
    prompt = steerlm_prompt(text_of(row, "prompt"))
    return [_by_strength(prompt, completions, number_of(row, "preference_strength"), "preference_strength")]


def read_helpsteer3(row: Row) -> list[Comparison]:
    """HelpSteer 3: the overall preference -3..3 of two responses to `context`; |preference| is the margin."""
    prompt, completions = _helpsteer3_texts(row)
    record = _by_strength(prompt, completions, number_of(row, "overall_preference"), "overall_preference")
    return [_with_subset(record, optional_text(row, "domain"))]


def read_helpsteer3_annotators(row: Row) -> list[Comparison]:
    """HelpSteer 3 with one comparison for each of its `individual_preference` entries."""
    prompt, completions = _helpsteer3_texts(row)
    records = []
    for index, item in enumerate(list_of(row, "individual_preference")):
        path = f"individual_preference[{index}]"
        strength = number_of(object_of(item, path), "score", f"{path}.")
        record = _by_strength(prompt, completions, strength, f"{path}.score", annotator=str(index))
        records.append(_with_subset(record, optional_text(row, "domain")))
    return records


def _helpsteer3_texts(row: Row) -> tuple[Prompt, tuple[str, str]]:
    return prompt_of(row.get("context"), "context"), (text_of(row, "response1"), text_of(row, "response2"))


def _with_subset(record: Comparison, subset: str | None) -> Comparison:
    return record if subset is None else replace(record, subset=subset)


def _by_strength(
    prompt: Prompt, completions: tuple[str, str], strength: float, key: str, annotator: str | None = None
) -> Comparison:
    ranking = _finite(-strength, key)
    if abs(strength) > MAX_STRENGTH:
        raise RecordError("strength out of range", key=key, problem=show(strength), expected="a strength from -3 to 3")
    margin = abs(strength) if strength != 0 else None
    return Comparison(prompt=prompt, completions=completions, judgement=ranking, margin=margin, annotator=annotator)


def _finite(preference: float, key: str) -> Ranking:
    if preference != preference or preference in (float("inf"), -float("inf")):
        raise RecordError("not a finite number", key=key, problem=str(preference), expected="a finite number")
    return first_is_better(preference)


def _pair(row: Row, prompt: Prompt, better: str, worse: str) -> Comparison:
    check_text(better, "chosen", "completion")
    check_text(worse, "rejected", "completion")
    if better == worse:
        raise RecordError(
            "identical completions",
            key="rejected",
            problem="the same text as chosen",
            expected="completions that differ (a text cannot be better than itself)",
        )
    margin = optional_number(row, "margin")
    record = Comparison(prompt=prompt, completions=(better, worse), judgement=CHOSEN_FIRST, margin=margin)
    return _with_extras(record, row)


def _with_extras(record: Comparison, row: Row) -> Comparison:
    """The record with the row's annotator, group and weight, where a format that has none of them is given them."""
    weight = optional_number(row, "weight")
    annotator, group = optional_text(row, "annotator"), optional_text(row, "group")
    return replace(record, annotator=annotator, group=group, weight=1.0 if weight is None else weight)


def _prompt(row: Row) -> Prompt:
    return prompt_of(need(row, "prompt", "text or a list of messages"))


def _joined(row: Row, *keys: str) -> str | None:
    parts = [optional_text(row, key) for key in keys]
    return "-".join(part for part in parts if part) or None


def _shared_text(chosen: str, rejected: str) -> tuple[Prompt, str, str]:
    """Split two texts after the last white space of their common beginning."""
    shared = _common_beginning(chosen, rejected)
    cut = max((index + 1 for index, character in enumerate(shared) if character.isspace()), default=0)
    if not shared[:cut].strip():
        raise RecordError(
            "no shared beginning",
            key="prompt",
            problem="there is no prompt and nothing in common",
            expected="a prompt, or chosen and rejected that begin with the same one",
        )
    return shared[:cut].rstrip(), chosen[cut:], rejected[cut:]


def _shared_messages(
    better: Sequence[Message], worse: Sequence[Message], prompt: Prompt | None
) -> tuple[Prompt, tuple[Message, ...], tuple[Message, ...]]:
    """Split two conversations after the messages that they share; a prompt given as messages stands before them."""
    shared = 0
    while shared < min(len(better), len(worse)) - 1 and better[shared] == worse[shared]:
        shared += 1
    if shared == 0:
        raise RecordError("histories differ", key="rejected[0]", expected="conversations with a shared beginning")
    history = tuple(better[:shared])
    if isinstance(prompt, tuple) and history[: len(prompt)] != prompt:
        history = (*prompt, *history)
    return history, tuple(better[shared:]), tuple(worse[shared:])


def _common_beginning(first: str, second: str) -> str:
    length = min(len(first), len(second))
    return first[: next((i for i in range(length) if first[i] != second[i]), length)]
