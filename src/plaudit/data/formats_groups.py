"""Readers of formats with K completions per row, and of those that spread one group over several rows or a tree."""

from collections.abc import Mapping, Sequence
from typing import Any

from plaudit.data.fields import (
    flag_of,
    list_of,
    need,
    nothing_to_compare,
    number_of,
    object_of,
    optional_number,
    optional_text,
    prompt_of,
    show,
    steerlm_prompt,
    text_of,
    tiers_from_ranks,
)
from plaudit.data.formats_pairs import post_of
from plaudit.data.native import comparison_from_json
from plaudit.data.records import Comparison, Judgement, Labels, Message, Ratings, RecordError, Scores
from plaudit.data.validation import check_text, validate_comparison

Row = Mapping[str, Any]
Grouped = tuple[list[Comparison], dict[int, RecordError]]

HELPSTEER_ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TEXT_KEYS = ("text", "response", "answer", "completion", "content")
ENTRY_JUDGEMENTS = ("rank", "score", "label", "ratings")


def read_native(row: Row) -> list[Comparison]:
    """Plaudit's own form."""
    return [comparison_from_json(row)]


def read_entries(row: Row) -> list[Comparison]:
    """`{prompt, completions: [{text, rank | score | label | ratings}]}`; a rank wins over a score beside it."""
    entries = [object_of(item, f"completions[{i}]", "{text, score | rank | …}")
               for i, item in enumerate(list_of(row, "completions"))]  # fmt: skip
    texts = [_entry_text(entry, f"completions[{i}].") for i, entry in enumerate(entries)]
    return [
        Comparison(
            prompt=prompt_of(need(row, "prompt", "text or a list of messages")),
            completions=tuple(texts),
            judgement=_entry_judgement(entries),
            annotator=optional_text(row, "annotator"),
            weight=1.0 if row.get("weight") is None else number_of(row, "weight"),
            group=optional_text(row, "group"),
        )
    ]


def read_ultrafeedback(row: Row) -> list[Comparison]:
    """UltraFeedback: ratings of each aspect (`annotations.<aspect>.Rating`, "N/A" is unjudged) for each completion."""
    texts: list[str] = []
    columns: list[dict[str, float | None]] = []
    for index, item in enumerate(list_of(row, "completions")):
        path = f"completions[{index}]."
        entry = object_of(item, path[:-1])
        texts.append(text_of(entry, "response", path))
        annotations = object_of(need(entry, "annotations", "ratings by aspect", path), f"{path}annotations")
        columns.append({name: _aspect(value, f"{path}annotations.{name}") for name, value in annotations.items()})
    names = list(dict.fromkeys(name for column in columns for name in column))
    ratings = Ratings({name: tuple(column.get(name) for column in columns) for name in names})
    return [
        Comparison(prompt=prompt_of(row.get("instruction"), "instruction"), completions=tuple(texts), judgement=ratings,
                   subset=optional_text(row, "source"))
    ]  # fmt: skip


def read_nectar(row: Row) -> list[Comparison]:
    """Nectar: `answers` with a `rank` each, 1 is best; the prompt is a transcript."""
    entries = [object_of(item, f"answers[{i}]") for i, item in enumerate(list_of(row, "answers"))]
    ranks = [number_of(entry, "rank", f"answers[{i}].") for i, entry in enumerate(entries)]
    texts = tuple(text_of(entry, "answer", f"answers[{i}].") for i, entry in enumerate(entries))
    prompt = prompt_of(need(row, "prompt", "text or a transcript"))
    return [Comparison(prompt=prompt, completions=texts, judgement=tiers_from_ranks(ranks))]


def read_oasst_tree(row: Row) -> list[Comparison | RecordError]:
    """An OpenAssistant tree: one comparison for every turn of a person that has two or more ranked replies.

    A turn that cannot be used, or whose replies cannot, is a fault in its place; the rest of the tree stands.
    """
    tree = optional_text(row, "message_tree_id")
    records: list[Comparison | RecordError] = []
    stack: list[tuple[Row, tuple[Message, ...], str]] = [(object_of(row.get("prompt"), "prompt"), (), "prompt")]
    while stack:
        node, history, path = stack.pop()
        replies: list[Row] = []
        try:
            # An answer that nobody replied to is judged with its siblings; here it would be counted twice.
            if not node.get("replies"):
                continue
            replies = [object_of(each, f"{path}.replies[{i}]") for i, each in enumerate(list_of(node, "replies"))]
            here = (*history, _oasst_turn(node, path))
        except RecordError as error:
            records.append(error)
            continue
        try:
            records += _oasst_siblings(here, replies, tree, optional_text(node, "message_id"), path)
        except RecordError as error:
            records.append(error)
        numbered = reversed(list(enumerate(replies)))
        stack += [(reply, here, f"{path}.replies[{i}]") for i, reply in numbered if not reply.get("deleted")]
    if not records:
        raise RecordError(
            "no ranked siblings",
            key="prompt.replies",
            is_fault=False,
            problem="no turn has two ranked replies",
            expected="two or more replies with a rank",
        )
    return records


def read_oasst_messages(rows: Sequence[Row]) -> Grouped:
    """OpenAssistant messages, one per row; all rows of a tree stand together.

    A message is used where it stands in a comparison, as one of the replies or in the history before them.
    """
    faults: dict[int, RecordError] = {}
    children: dict[str | None, list[int]] = {}
    known: dict[str, int] = {}
    for index, row in enumerate(rows):
        try:
            known[text_of(row, "message_id")] = index
            _oasst_turn(row, "")
            children.setdefault(optional_text(row, "parent_id"), []).append(index)
        except RecordError as error:
            faults[index] = error
    for parent, indices in list(children.items()):
        if parent is not None and parent not in known:
            faults |= {i: RecordError("parent missing", key="parent_id", problem=parent,
                                      expected="all messages of a tree together") for i in indices}  # fmt: skip
            del children[parent]
    records: list[Comparison] = []
    used: set[int] = set()
    stack: list[tuple[int, ...]] = [(index,) for index in reversed(children.get(None, []))]
    while stack:
        path = stack.pop()
        index = path[-1]
        here = tuple(_oasst_turn(rows[place], "") for place in path)
        below = children.get(text_of(rows[index], "message_id"), [])
        tree = optional_text(rows[index], "message_tree_id")
        replies = [rows[i] for i in below]
        try:
            found = _oasst_siblings(here, replies, tree, optional_text(rows[index], "message_id"), "")
        except RecordError as error:
            faults |= dict.fromkeys(below, error)
            found = []
        if found:
            records += found
            used.update(path, (i for i in below if _is_reply(rows[i])))
        stack += [(*path, i) for i in reversed(below) if not rows[i].get("deleted")]
    unused = [index for index in range(len(rows)) if index not in used and index not in faults]
    return records, faults | dict.fromkeys(unused, nothing_to_compare())


def read_helpsteer2(rows: Sequence[Row]) -> Grouped:
    """HelpSteer 2: one rated response per row; rows of one prompt that follow one another are one comparison."""
    faults: dict[int, RecordError] = {}
    texts: list[str] = []
    columns: dict[str, list[float | None]] = {name: [] for name in HELPSTEER_ATTRIBUTES if name in rows[0]}
    prompt = None
    for index, row in enumerate(rows):
        try:
            prompt = steerlm_prompt(text_of(row, "prompt"))
            text, values = text_of(row, "response"), [optional_number(row, name) for name in columns]
            check_text(text, "response", "completion")
        except RecordError as error:
            faults[index] = error
            continue
        texts.append(text)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    if prompt is None or not texts:
        return [], faults
    ratings = Ratings({name: tuple(column) for name, column in columns.items()})
    return [Comparison(prompt=prompt, completions=tuple(texts), judgement=ratings)], faults


def read_summary_axes(row: Row) -> list[Comparison]:
    """Summarize from feedback, axes: one summary rated on several axes by one worker."""
    summary = object_of(need(row, "summary", "an object with text and axes"), "summary")
    axes = object_of(need(summary, "axes", "ratings by axis", "summary."), "summary.axes")
    ratings = {str(name): (optional_number(axes, name, "summary.axes."),) for name in axes}
    return [
        Comparison(prompt=post_of(row), completions=(text_of(summary, "text", "summary."),), judgement=Ratings(ratings),
                   annotator=optional_text(row, "worker"), subset=optional_text(row, "batch"),
                   group=optional_text(object_of(row["info"], "info"), "id"))
    ]  # fmt: skip


def _oasst_turn(node: Row, path: str) -> Message:
    role = text_of(node, "role", f"{path}.")
    if role not in ("prompter", "assistant"):
        raise RecordError("unknown role", key=f"{path}.role", problem=show(role), expected="prompter or assistant")
    return Message("user" if role == "prompter" else "assistant", text_of(node, "text", f"{path}."))


def _is_reply(message: Row) -> bool:
    return not message.get("deleted") and message.get("role") == "assistant"


def _oasst_siblings(
    history: tuple[Message, ...], replies: Sequence[Row], tree: str | None, parent: str | None, path: str
) -> list[Comparison]:
    kept = [reply for reply in replies if _is_reply(reply)]
    ranks = [optional_number(reply, "rank", f"{path}.replies.") for reply in kept]
    if sum(rank is not None for rank in ranks) < 2:
        return []
    texts = tuple(text_of(reply, "text", f"{path}.replies.") for reply in kept)
    record = Comparison(prompt=history, completions=texts, judgement=tiers_from_ranks(ranks), group=tree, id=parent)
    validate_comparison(record)
    return [record]


def _entry_text(entry: Row, path: str) -> str:
    key = next((key for key in TEXT_KEYS if key in entry), "text")
    return text_of(entry, key, path)


def _entry_judgement(entries: Sequence[Row]) -> Judgement:
    key = next((key for key in ENTRY_JUDGEMENTS if any(entry.get(key) is not None for entry in entries)), None)
    if key is None:
        raise RecordError(
            "no judgement",
            key="completions[0]",
            problem=f"it has {', '.join(entries[0]) if entries else ''}",
            expected=f"one of {', '.join(ENTRY_JUDGEMENTS)} beside each text",
        )
    for index, entry in enumerate(entries):
        if key not in entry:
            raise RecordError(
                "judgement does not cover the completions",
                key=f"completions[{index}].{key}",
                problem="missing",
                expected=f"a {key} for every completion (null where unjudged)",
            )
    if key == "label":
        return Labels(tuple(None if entry[key] is None else flag_of(entry, key) for entry in entries))
    if key == "ratings":
        named = [object_of(entry[key] or {}, f"completions[{i}].ratings") for i, entry in enumerate(entries)]
        names = dict.fromkeys(name for one in named for name in one)
        return Ratings({str(name): tuple(optional_number(one, name, "ratings.") for one in named) for name in names})
    values = [optional_number(entry, key, f"completions[{i}].") for i, entry in enumerate(entries)]
    return tiers_from_ranks(values) if key == "rank" else Scores(tuple(values))


def _aspect(value: object, key: str) -> float | None:
    if value is None:
        return None
    rating = object_of(value, key).get("Rating")
    if rating is None or rating == "N/A":
        return None
    return number_of({"Rating": rating}, "Rating", f"{key}.", parse=True)
