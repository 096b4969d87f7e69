"""Scores for any number of completions in constant memory: rows in, one line out for each, in order.

Rows are read in windows. Inside a window completions are sorted by length and those behind the same prompt share it;
the window's lines are written together, in the order of the rows. Windows end at fixed row numbers, so that a run that
was killed and resumed forms the same windows, and on the same machine the same bytes, as one that was not.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any, Literal

from plaudit.data.fields import list_of, messages_of, need, show
from plaudit.data.native import TEXT_ROLE
from plaudit.data.records import Prompt, RecordError
from plaudit.data.sources import Row
from plaudit.data.validation import check_prompt, check_text

if TYPE_CHECKING:
    from torch import Tensor

    from plaudit.data.tokenising import TokenisedGroup
    from plaudit.models.reward_model import RewardModel

OnError = Literal["refuse", "skip"]

WINDOW_ROWS = 256
"""Rows of a window."""

WINDOW_TOKENS = 1 << 19
"""A window ends early once its rows hold this many tokens."""


@dataclass(frozen=True)
class ScoreRequest:
    """One row: a prompt and what is to be scored behind it.

    Attributes:
        prompt: text or messages.
        completions: the texts.
        cut_off: which of them reached a length limit and therefore have no end token.
        single: whether the row named one `completion` (numbers come back) or `completions` (lists come back).
    """

    prompt: Prompt
    completions: tuple[str, ...]
    cut_off: tuple[bool, ...]
    single: bool


@dataclass
class ScoreTally:
    """What was done.

    Attributes:
        rows: rows read, those that `resumed` skipped not counted.
        completions: completions scored.
        tokens: tokens of the scored texts, each prompt once per row.
        errors: rows without scores, by reason.
        missing: completions that a reward had nothing for, by its name.
        reasons: why it had nothing for the first of them.
        resumed: rows that an earlier run had done.
        seconds: time taken.
    """

    rows: int = 0
    completions: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        seconds = max(self.seconds, 1e-9)
        rates = f"{self.completions / seconds:.1f} completions/s, {self.tokens / seconds:.0f} tokens/s"
        text = f"{self.rows} rows, {self.completions} completions, {self.tokens} tokens in {seconds:.1f} s ({rates})"
        if self.resumed:
            text += f"; {self.resumed} rows were there already"
        if self.errors:
            reasons = ", ".join(f"{count} {reason}" for reason, count in self.errors.most_common())
            text += f"; {self.errors.total()} rows without scores: {reasons}"
        for name, count in self.missing.items():
            why = f" ({self.reasons[name]})" if name in self.reasons else ""
            text += f"; {count} completions without a reward by {name}{why}"
        return text


@dataclass
class _Entry:
    """A row on its way through a window."""

    identity: Any
    request: ScoreRequest | None = None
    group: "TokenisedGroup | None" = None
    error: str | None = None


def score_stream(
    model: "RewardModel",
    rows: Iterable[Row],
    *,
    on_error: OnError = "refuse",
    probabilities: bool = False,
    token_budget: int = 8192,
    window_rows: int = WINDOW_ROWS,
    window_tokens: int = WINDOW_TOKENS,
    tally: ScoreTally | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Score rows window by window.

    A row holds `prompt` (text or messages) and `completion` or `completions` (texts, or objects with `text`), and may
    hold `id` and `cut_off` (a truth value, or one per completion); other keys are left alone, so comparisons and
    demonstrations are rows too. It gives `{"id", "raw", "normalised"}`, with `attributes` (raw, by name) where the
    model has them and `probabilities` (`P(y_i|x)` over the row's completions) where asked for: numbers for
    `completion`, lists for `completions`. A row that cannot be scored gives `{"id", "error"}`, never a number.

    Args:
        model: the reward model.
        rows: where they come from, see `plaudit.data.sources`.
        on_error: `refuse` raises at the first row that cannot be scored, after giving out what stands before it;
            `skip` gives its error and goes on.
        probabilities: whether to add them; every row then needs two or more completions.
        token_budget: most tokens in one forward.
        window_rows: rows of a window.
        window_tokens: a window ends early at this many tokens.
        tally: where counts go.

    Yields:
        The results of each window, one per row, in order.

    Raises:
        ValueError: with place, reason and what was expected, under `refuse`.
    """
    tally = tally or ScoreTally()
    window: list[_Entry] = []
    tokens = 0
    for number, row in enumerate(rows, start=1):
        entry = _Entry(None)
        try:
            _fill(entry, row, model, probabilities=probabilities)
        except ValueError as error:
            if on_error == "refuse":
                yield _finish(model, window, token_budget, probabilities, tally)
                raise ValueError(_placed(error, row)) from error
            entry.request, entry.error = None, _placed(error, row)
            tally.errors[_reason(error)] += 1
        window.append(entry)
        tokens += entry.group.num_tokens if entry.group else 0
        if number % window_rows == 0 or tokens >= window_tokens:
            yield _finish(model, window, token_budget, probabilities, tally)
            window, tokens = [], 0
    yield _finish(model, window, token_budget, probabilities, tally)


def write_scores_stream(
    windows: Iterable[Sequence[Mapping[str, Any]]],
    sink: IO[bytes],
    *,
    tally: ScoreTally,
    progress: Callable[[ScoreTally], None] | None = None,
) -> None:
    """Write the results of `score_stream` as JSON Lines, each window at once.

    Args:
        windows: the results.
        sink: where to write, flushed after each window.
        tally: the counts that `score_stream` keeps; its `seconds` are set here.
        progress: called after each window.
    """
    started = time.perf_counter()
    for window in windows:
        lines = (json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n" for result in window)
        sink.write("".join(lines).encode())
        sink.flush()
        tally.seconds = time.perf_counter() - started
        if progress is not None:
            progress(tally)


def parse_request(value: Mapping[str, Any]) -> ScoreRequest:
    """The request in a row.

    Raises:
        RecordError: for a missing key, a wrong type, blank prompts, or both `completion` and `completions`.
    """
    prompt = need(value, "prompt", "text or a list of messages (first make a table one: plaudit data convert)")
    if not isinstance(prompt, str):
        messages = messages_of(prompt, "prompt", "text or a list of messages")
        prompt = messages[0].content if len(messages) == 1 and messages[0].role == TEXT_ROLE else messages
    check_prompt(prompt)
    single = value.get("completion") is not None
    if single and value.get("completions") is not None:
        raise RecordError("two kinds of completions", key="completion, completions", expected="one of them")
    if single:
        texts = [value["completion"]]
    else:
        form = "a list of texts (or `completion`, one text)"
        need(value, "completions", form)
        texts = list(list_of(value, "completions", expected=form))
        if not texts:
            raise RecordError("no completions", key="completions", problem="an empty list", expected=form)
    for index, text in enumerate(texts):
        if isinstance(text, dict) and "text" in text:
            texts[index] = text = text["text"]
        # An empty answer is an answer too: its end token carries the score.
        check_text(text, "completion" if single else f"completions[{index}]", "completion", empty=True)
    return ScoreRequest(prompt, tuple(texts), _cut_off(value.get("cut_off"), len(texts)), single)


def _cut_off(value: Any, count: int) -> tuple[bool, ...]:
    if value is None or isinstance(value, bool):
        return (bool(value),) * count
    if isinstance(value, list) and len(value) == count and all(isinstance(item, bool) for item in value):
        return tuple(value)
    raise RecordError("wrong type", key="cut_off", problem=show(value), expected="true, false, or one per completion")


def _fill(entry: _Entry, row: Row, model: "RewardModel", *, probabilities: bool) -> None:
    """Read and tokenise a row."""
    if row.error is not None or row.value is None:
        raise row.error or RecordError("not a JSON object", place=row.place)
    identity = row.value.get("id")
    if isinstance(identity, dict | list):
        raise RecordError("wrong type", key="id", problem=show(identity), expected="text or a number")
    entry.identity = identity
    entry.request = parse_request(row.value)
    if probabilities and len(entry.request.completions) < 2:
        raise RecordError(
            "one completion for probabilities",
            key="completions",
            problem="P(y|x) compares completions of one row",
            expected="two or more in `completions`",
        )
    request = entry.request
    entry.group = model.text_tokeniser.group(request.prompt, request.completions, cut_off=request.cut_off)


def _finish(
    model: "RewardModel", window: list[_Entry], token_budget: int, probabilities: bool, tally: ScoreTally
) -> list[dict[str, Any]]:
    """Score a window and turn it into results, in order."""
    from plaudit.models.scoring import score_groups

    groups = [entry.group for entry in window if entry.group is not None]
    scores = iter(score_groups(model, groups, token_budget=token_budget) if groups else [])
    results = []
    for entry in window:
        tally.rows += 1
        if entry.group is None or entry.request is None:
            results.append({"id": entry.identity, "error": entry.error})
            continue
        raw = next(scores)
        if not bool(raw.isfinite().all()):
            tally.errors["score not finite"] += 1
            results.append({"id": entry.identity, "error": "the model's score is not finite"})
            continue
        tally.completions += len(entry.request.completions)
        tally.tokens += entry.group.num_tokens
        results.append(_result(model, entry, raw, probabilities=probabilities))
    return results


def _result(model: "RewardModel", entry: _Entry, raw: "Tensor", *, probabilities: bool) -> dict[str, Any]:
    """One row's result from `[K]` raw scores, or `[K, A]` with attributes."""
    single = entry.request is not None and entry.request.single

    def numbers(values: "Tensor") -> Any:
        # The shortest digits that give the same float32 back.
        listed = [float(str(value)) for value in values.numpy()]
        return listed[0] if single else listed

    total = model.total(raw)
    result = {"id": entry.identity, "raw": numbers(total), "normalised": numbers(model.total(model.normalise(raw)))}
    if model.attributes:
        result["attributes"] = {name: numbers(raw[:, index]) for index, name in enumerate(model.attributes)}
    if probabilities:
        result["probabilities"] = numbers(total.softmax(-1))
    return result


def _placed(error: ValueError, row: Row) -> str:
    text = str(error)
    return text if text.startswith(row.place) else f"{row.place}: {text}"


def _reason(error: ValueError) -> str:
    if isinstance(error, RecordError):
        return error.reason
    return "too long" if type(error).__name__ == "TextTooLongError" else str(error).splitlines()[0]
