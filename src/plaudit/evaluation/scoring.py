"""Scores of models for evaluation: from a reward model, or from a file of scores made earlier."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plaudit.data.records import Comparison, Prompt

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

#: Prompts that are tokenised and scored together; bounds what one text that cannot be scored holds up.
PROMPTS_AT_ONCE = 128


class ModelScorer:
    """A reward model as a scorer of text that says what it could not score instead of stopping.

    Attributes:
        unscored: how many completions got no score, by reason.
    """

    def __init__(
        self, model: "RewardModel", *, token_budget: int = 8192, progress: Callable[[int], None] | None = None
    ) -> None:
        """Wrap a model.

        Args:
            model: scores are its **raw** ones, whose differences are log-odds.
            token_budget: most tokens in one forward pass.
            progress: called with the number of prompts after each portion.
        """
        self.model, self.token_budget, self.progress = model, token_budget, progress
        self.unscored: Counter[str] = Counter()

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[float | None]]:
        """One raw reward per prompt and completion; None where the model cannot read the text (too long, empty)."""
        scores: list[list[float | None]] = []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            some = slice(start, start + PROMPTS_AT_ONCE)
            scores.extend(self._portion(prompts[some], completions[some]))
            if self.progress is not None:
                self.progress(len(prompts[some]))
        return scores

    def _portion(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[float | None]]:
        try:
            results = self.model.score(prompts, completions, token_budget=self.token_budget)
        except ValueError as error:
            if len(prompts) == 1 and len(completions[0]) == 1:
                self.unscored[_reason(error)] += 1
                return [[None]]
            if len(prompts) == 1:
                return [[self._portion(prompts, [[text]])[0][0] for text in completions[0]]]
            middle = len(prompts) // 2
            halves = (slice(0, middle), slice(middle, None))
            return [row for half in halves for row in self._portion(prompts[half], completions[half])]
        return [[float(value) for value in result.raw] for result in results]


def _reason(error: ValueError) -> str:
    name = type(error).__name__
    return "too long" if name == "TextTooLongError" else str(error).splitlines()[0]


def read_scores(path: Path, comparisons: Sequence[Comparison]) -> list[list[float | None]]:
    """Read scores made earlier, one line `{"scores": [...], "id": ...}` per comparison.

    Lines that `plaudit score` wrote are read as well: their `raw` scores count.

    Lines are matched by id where every line and every comparison has one (and they are distinct), else by order.

    Args:
        path: JSON Lines, `.gz` too.
        comparisons: what was scored.

    Raises:
        ValueError: with file and line, if a line is broken, does not fit its comparison, or one is missing.
    """
    rows = list(_score_rows(path))
    wanted = [comparison.id for comparison in comparisons]
    found = {row["id"]: row["scores"] for _, row in rows if row.get("id") is not None}
    by_id = len(found) == len(rows) and None not in wanted and len(set(wanted)) == len(wanted)
    if by_id:
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise ValueError(f"{path}: no scores for the comparison with id {missing!r}")
        return [found[name] for name in wanted]
    if len(rows) != len(comparisons):
        raise ValueError(f"{path}: {len(rows)} lines of scores for {len(comparisons)} comparisons")
    for (line, row), comparison in zip(rows, comparisons, strict=True):
        if len(row["scores"]) != len(comparison.completions):
            counts = f"{len(row['scores'])} scores for {len(comparison.completions)} completions"
            raise ValueError(f"{path}:{line}: {counts}; are the lines in the order of the comparisons?")
    return [row["scores"] for _, row in rows]


def write_scores(path: Path, comparisons: Sequence[Comparison], scores: Sequence[Sequence[float | None]]) -> None:
    """Write scores in the form that `read_scores` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for comparison, values in zip(comparisons, scores, strict=True):
            identity = {"id": comparison.id} if comparison.id is not None else {}
            file.write(json.dumps({**identity, "scores": list(values)}, ensure_ascii=False) + "\n")


def _score_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of scores")
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: this is not JSON: {error.msg}") from None
            scores = row.get("scores", row.get("raw")) if isinstance(row, dict) else None
            numbers = isinstance(scores, list) and all(
                value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in scores
            )
            if not numbers:
                raise ValueError(f'{path}:{number}: expected {{"scores": [one number or null per completion]}}')
            row["scores"] = scores
            if row.get("id") is not None:
                row["id"] = str(row["id"])
            yield number, row
