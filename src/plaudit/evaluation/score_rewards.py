"""Rewards beside, or in place of, a reward model's scores in `plaudit score`: rows in, one result each, in order."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from plaudit.data.records import RecordError
from plaudit.data.sources import Row
from plaudit.evaluation.score_stream import (
    WINDOW_ROWS,
    OnError,
    ScoreRequest,
    ScoreTally,
    parse_request,
    score_stream,
)
from plaudit.rewards.base import Reward, Sample

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

_NO_COLUMNS = frozenset({"prompt", "completion", "completions", "cut_off"})


def build_rewards(texts: Sequence[str]) -> dict[str, Reward]:
    """Rewards as they are written on the command line, by name: the rule's or the folder's, in full where it recurs.

    Raises:
        ValueError: for one that cannot be built, or the same one twice.
    """
    from plaudit.rewards.named import named_reward

    short = [text.partition("=")[0] for text in texts]
    names = [one if short.count(one) == 1 else text for one, text in zip(short, texts, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--reward {twice[0]} was given twice")
    return {name: named_reward(text, name=name) for name, text in zip(names, texts, strict=True)}


def score_rewards(
    rewards: Mapping[str, Reward],
    rows: Iterable[Row],
    *,
    model: "RewardModel | None" = None,
    on_error: OnError = "refuse",
    probabilities: bool = False,
    token_budget: int = 8192,
    window_rows: int = WINDOW_ROWS,
    tally: ScoreTally | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Score rows by rewards, window by window.

    A row is what `score_stream` takes; its other keys are the columns that rewards may read. Its result gets
    `"rewards": {name: number}`, lists for `completions`, null where a reward had nothing to say.

    Args:
        rewards: by name.
        rows: where they come from.
        model: a reward model whose scores stand beside; None gives `{"id", "rewards"}`.
        on_error: see `score_stream`.
        probabilities: see `score_stream`; needs a model.
        token_budget: of the model.
        window_rows: rows of a window.
        tally: where counts go.

    Yields:
        The results of each window, one per row, in order.

    Raises:
        ValueError: for a row that cannot be scored (under `refuse`), or a reward that is not finite, in any case.
    """
    if not rewards and model is None:
        raise ValueError("nothing to score with: give a reward model, or rewards")
    if probabilities and model is None:
        raise ValueError("P(y|x) is a reward model's; rewards alone have none")
    counts = tally or ScoreTally()
    waiting: deque[Row] = deque()

    def noted() -> Iterator[Row]:
        for row in rows:
            waiting.append(row)
            yield row

    if model is not None:
        windows = score_stream(
            model,
            noted(),
            on_error=on_error,
            probabilities=probabilities,
            token_budget=token_budget,
            window_rows=window_rows,
            tally=counts,
        )
    else:
        windows = _plain_windows(noted(), on_error, window_rows, counts)
    for window in windows:
        _add_rewards(rewards, [waiting.popleft() for _ in window], window, counts)
        yield window


def _plain_windows(
    rows: Iterator[Row], on_error: OnError, window_rows: int, tally: ScoreTally
) -> Iterator[list[dict[str, Any]]]:
    """Results without a model's scores: the row's id, or its error."""
    while chunk := list(islice(rows, window_rows)):
        window: list[dict[str, Any]] = []
        for row in chunk:
            try:
                identity = _identity(row)
                request = parse_request(row.value or {})
            except ValueError as error:
                text = str(error) if str(error).startswith(row.place) else f"{row.place}: {error}"
                if on_error == "refuse":
                    yield window
                    raise ValueError(text) from error
                tally.errors[error.reason if isinstance(error, RecordError) else text] += 1
                window.append({"id": None if row.value is None else row.value.get("id"), "error": text})
            else:
                tally.completions += len(request.completions)
                window.append({"id": identity})
            tally.rows += 1
        yield window


def _identity(row: Row) -> Any:
    if row.error is not None or row.value is None:
        raise row.error or RecordError("not a JSON object", place=row.place)
    identity = row.value.get("id")
    if isinstance(identity, dict | list):
        raise RecordError("wrong type", key="id", problem=repr(identity)[:60], expected="text or a number")
    return identity


def _add_rewards(
    rewards: Mapping[str, Reward], rows: list[Row], results: list[dict[str, Any]], tally: ScoreTally
) -> None:
    """Put every reward's numbers into the results that are no errors."""
    requests: list[ScoreRequest] = []
    samples: list[Sample] = []
    places: list[int] = []
    for place, (row, result) in enumerate(zip(rows, results, strict=True)):
        if "error" in result or row.value is None:
            continue
        request = parse_request(row.value)
        columns = {key: value for key, value in row.value.items() if key not in _NO_COLUMNS}
        requests.append(request)
        places.append(place)
        result["rewards"] = {}
        for text, cut_off in zip(request.completions, request.cut_off, strict=True):
            samples.append(Sample(request.prompt, text, not cut_off, columns))
    for name, reward in rewards.items():
        score = reward(samples)
        tally.missing[name] += int((~score.valid).sum())
        if score.problems:
            tally.reasons.setdefault(name, score.problems[min(score.problems)])
        # The shortest digits that give the same float32 back.
        listed = [
            float(str(number)) if valid else None
            for number, valid in zip(score.total.numpy(), score.valid.tolist(), strict=True)
        ]
        numbers = iter(listed)
        for request, place in zip(requests, places, strict=True):
            own = [next(numbers) for _ in request.completions]
            results[place]["rewards"][name] = own[0] if request.single else own
    for name in [name for name, count in tally.missing.items() if not count]:
        del tally.missing[name]
