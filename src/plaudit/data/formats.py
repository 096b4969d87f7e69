"""The formats of the field by name: how each is recognised by its columns, and what reads it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from plaudit.data import formats_demonstrations as demonstrations
from plaudit.data import formats_groups as groups
from plaudit.data import formats_pairs as pairs
from plaudit.data import formats_table as table
from plaudit.data.native import JUDGEMENT_KEYS
from plaudit.data.records import Comparison, Demonstration, PromptRecord, RecordError

Row = Mapping[str, Any]
Record = TypeVar("Record", Comparison, Demonstration, PromptRecord)


@dataclass(frozen=True)
class Format(Generic[Record]):
    """One format.

    Attributes:
        about: what it is, with the columns that identify it.
        recognise: whether a row has its columns. Formats are asked in the order of their dictionary.
        read: the records in one row; raises `RecordError`. In a collection a group that cannot be used is
            a `RecordError` in its place.
        group_by: for formats that spread a group over rows: rows that follow one another and agree in this are read
            together by `read_group`.
        read_group: the records in such rows, and the fault of each row that could not be used.
        collection: whether a row holds groups that have nothing to do with each other (a tree): each then counts as
            a row that was read, used or refused.
    """

    about: str
    recognise: Callable[[Row], bool]
    read: Callable[[Row], Sequence[Record | RecordError]] | None = None
    group_by: Callable[[Row], object] | None = None
    read_group: Callable[[Sequence[Row]], tuple[list[Record], dict[int, RecordError]]] | None = None
    collection: bool = False


def has(*keys: str) -> Callable[[Row], bool]:
    """A recogniser: all of these keys are there."""
    return lambda row: all(key in row for key in keys)


def _first_in(row: Row, key: str) -> object:
    value = row.get(key)
    return value[0] if isinstance(value, list | tuple) and value else None


def _is_native(row: Row) -> bool:
    return has("prompt", "completions")(row) and (
        isinstance(_first_in(row, "completions"), str) or any(row.get(key) is not None for key in JUDGEMENT_KEYS)
    )


def _is_transcript(row: Row) -> bool:
    chosen = row.get("chosen")
    return has("chosen", "rejected")(row) and row.get("prompt") is None and isinstance(chosen, str) and (
        "\n\nAssistant:" in chosen
    )  # fmt: skip


def _is_chosen_lists(row: Row) -> bool:
    chosen = _first_in(row, "chosen")
    return has("prompt", "chosen", "rejected")(row) and (
        isinstance(chosen, str) or (isinstance(chosen, Mapping) and "role" not in chosen and "from" not in chosen)
    )


COMPARISON_FORMATS: dict[str, Format[Comparison]] = {
    "plaudit": Format(
        "Plaudit's own form: prompt, completions (texts) and one of " + ", ".join(JUDGEMENT_KEYS),
        _is_native, groups.read_native,
    ),
    "ultrafeedback": Format(
        "UltraFeedback: instruction, completions with response and annotations",
        has("instruction", "completions"), groups.read_ultrafeedback,
    ),
    "completions": Format(
        "prompt and completions, each {text, rank | score | label | ratings}",
        has("prompt", "completions"), groups.read_entries,
    ),
    "summaries": Format(
        "Summarize from feedback, comparisons: info, summaries, choice",
        has("info", "summaries", "choice"), pairs.read_summaries,
    ),
    "hh": Format(
        "Anthropic HH: chosen and rejected as whole '\\n\\nHuman: … \\n\\nAssistant: …' transcripts",
        _is_transcript, pairs.read_hh,
    ),
    "rewardbench2": Format(
        "RewardBench 2: prompt with lists of chosen and rejected texts", _is_chosen_lists, pairs.read_chosen_lists
    ),
    "preference": Format(
        "TRL preference, RewardBench: chosen and rejected as text or messages, with or without a prompt",
        has("chosen", "rejected"), pairs.read_preference,
    ),
    "nectar": Format("Nectar: prompt and answers, each {answer, rank}", has("prompt", "answers"), groups.read_nectar),
    "oasst-trees": Format(
        "OpenAssistant trees: message_tree_id and a nested prompt with ranked replies",
        lambda row: "message_tree_id" in row and isinstance(row.get("prompt"), Mapping), groups.read_oasst_tree,
        collection=True,
    ),
    "oasst-messages": Format(
        "OpenAssistant messages: message_id, parent_id, text, role, rank; one message per row",
        has("message_id", "parent_id", "text", "role"),
        group_by=lambda row: row.get("message_tree_id"), read_group=groups.read_oasst_messages,
    ),
    "helpsteer3": Format(
        "HelpSteer 3: context, response1, response2, overall_preference (-3..3)",
        has("context", "response1", "response2", "overall_preference"), pairs.read_helpsteer3,
    ),
    "helpsteer3-annotators": Format(
        "HelpSteer 3 with one comparison per entry of individual_preference (by name only, unless it stands alone)",
        has("context", "response1", "response2", "individual_preference"), pairs.read_helpsteer3_annotators,
    ),
    "helpsteer2-preference": Format(
        "HelpSteer 2 preference: prompt, response_1, response_2, preference_strength (-3..3)",
        has("prompt", "response_1", "response_2", "preference_strength"), pairs.read_helpsteer_preference,
    ),
    "helpsteer2": Format(
        "HelpSteer 2: prompt, response and ratings (helpfulness, …); one response per row",
        has("prompt", "response", "helpfulness"),
        group_by=lambda row: repr(row.get("prompt")), read_group=groups.read_helpsteer2,
    ),
    "shp": Format(
        "Stanford Human Preferences: history, human_ref_A, human_ref_B, labels",
        has("history", "human_ref_A", "human_ref_B", "labels"), pairs.read_shp,
    ),
    "webgpt": Format(
        "WebGPT comparisons: question, answer_0, answer_1, score_0, score_1",
        has("question", "answer_0", "answer_1", "score_0", "score_1"), pairs.read_webgpt,
    ),
    "summary-axes": Format(
        "Summarize from feedback, axes: info and one summary with axes", has("info", "summary"),
        groups.read_summary_axes,
    ),
    "kto": Format(
        "KTO: prompt, one completion, and a label (good or bad)", has("prompt", "completion", "label"), pairs.read_kto
    ),
    "table": Format(
        "A table (CSV) with named columns: a prompt, completions, and a choice, scores, ranks or a label",
        lambda row: table.guess_columns(row) is not None, table.read_table,
    ),
}  # fmt: skip
"""Formats of comparisons, in the order in which they are asked whether a row is theirs."""

DEMONSTRATION_FORMATS: dict[str, Format[Demonstration]] = {
    "conversation": Format(
        "messages (or conversations) that end with an assistant turn",
        lambda row: "messages" in row or "conversations" in row, demonstrations.read_conversation,
    ),
    "instruction": Format(
        "Alpaca, Dolly: instruction, perhaps input (or context), and output (or response)",
        lambda row: "instruction" in row and ("output" in row or "response" in row), demonstrations.read_instruction,
    ),
    "prompt-completion": Format(
        "prompt and completion (or response, output, answer, chosen)",
        lambda row: "prompt" in row and any(key in row for key in demonstrations.COMPLETION_KEYS),
        demonstrations.read_prompt_completion,
    ),
    "hh": Format("The chosen side of HH transcripts", _is_transcript, demonstrations.read_chosen_transcript),
}  # fmt: skip
"""Formats of demonstrations, in the order in which they are asked."""


def recognise(row: Row, formats: Mapping[str, Format[Record]]) -> str | None:
    """The name of the first format that has this row's columns, or None."""
    return next((name for name, form in formats.items() if form.recognise(row)), None)


def unrecognised_hint(row: Row, formats: Mapping[str, Format[Record]]) -> str:
    """What to do about a row that none of the formats knows: another verb, named columns, or a named format."""
    names = f"name the format (--format) as one of {', '.join(formats)}"
    if "prompt" in formats:
        text = next((key for key, value in row.items() if isinstance(value, str)), "COLUMN")
        return f"say which one holds the prompt: --data '{{path: FILE, columns: {{prompt: {text}}}}}', or {names}"
    if "table" not in formats:
        looks = recognise(row, COMPARISON_FORMATS)
        return f"they are those of comparisons ({looks}), which plaudit reward learns from" if looks else names
    if looks := recognise(row, DEMONSTRATION_FORMATS):
        return f"they are those of demonstrations ({looks}), which plaudit sft learns from"
    return (
        f"{names}, or say which columns of your own table hold what: plaudit data convert FILE OUT.jsonl "
        "--prompt COLUMN --completions COLUMN,COLUMN --choice COLUMN (or --scores, --ranks)"
    )
