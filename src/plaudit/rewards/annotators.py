"""Who judges answers while a run goes on: a function, or people through a queue of files."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from plaudit.data.fields import prompt_of
from plaudit.data.native import judgement_from_json, prompt_to_json
from plaudit.data.records import Best, Comparison, Judgement, Prompt, Ranking, Scores
from plaudit.data.sources import whole_lines
from plaudit.data.validation import validate_comparison
from plaudit.rewards.functions import function_named


@dataclass(frozen=True, kw_only=True)
class Question:
    """Answers to one prompt that are to be judged.

    Attributes:
        id: unique in the run.
        prompt: what was answered.
        completions: different answers to it.
    """

    id: str
    prompt: Prompt
    completions: tuple[str, ...]

    def judged(self, judgement: Judgement, annotator: str | None = None) -> Comparison:
        """The comparison that this judgement makes of it.

        Raises:
            ValueError: if the judgement does not fit the completions.
        """
        record = Comparison(
            prompt=self.prompt, completions=self.completions, judgement=judgement, id=self.id, annotator=annotator
        )
        validate_comparison(record)
        return record


class Annotator(Protocol):
    """Judges questions; may take its time."""

    def __call__(self, questions: Sequence[Question]) -> list[Comparison]:
        """The judged ones; those of earlier calls whose judgement has come since are among them."""
        ...


def open_annotator(name: str, folder: Path, *, wait: float = 0.0) -> Annotator:
    """The annotator that a configuration names.

    Args:
        name: `queue`, or `module:function`, or `file.py:function`.
        folder: of the queue's files.
        wait: see `QueueAnnotator`.

    Raises:
        ValueError: if there is no such function.
    """
    if name == "queue":
        return QueueAnnotator(folder, wait=wait)
    try:
        return as_annotator(function_named(name))
    except ValueError as error:
        raise ValueError(f"annotator: neither queue nor module:function nor file.py:function: {error}") from None


def as_annotator(judge: Any) -> Annotator:
    """A function `f(prompt, completions)` as an annotator; what is marked as one (`takes_questions`) as it is.

    The function returns a judgement (`plaudit.data.records`), tiers of completion numbers, best first, the number of
    the best completion, one score per completion, or None where it cannot say.
    """
    return judge if getattr(judge, "takes_questions", False) else FunctionAnnotator(judge)


@dataclass(frozen=True)
class FunctionAnnotator:
    """A plain function that judges one prompt's completions.

    Attributes:
        judge: see `as_annotator`.
    """

    judge: Callable[[Prompt, list[str]], Any]

    takes_questions = True

    def __call__(self, questions: Sequence[Question]) -> list[Comparison]:
        """The questions about which the function had something to say."""
        name = getattr(self.judge, "__name__", type(self.judge).__name__)
        found = []
        for question in questions:
            said = self.judge(question.prompt, list(question.completions))
            if said is not None:
                found.append(question.judged(_judgement(said), name))
        return found


def _judgement(said: Any) -> Judgement:
    if isinstance(said, int) and not isinstance(said, bool):
        return Best(said)
    if isinstance(said, list | tuple):
        if said and all(isinstance(tier, list | tuple) for tier in said):
            return Ranking(tuple(tuple(tier) for tier in said))
        return Scores(tuple(said))
    judgement: Judgement = said
    return judgement


@dataclass
class QueueAnnotator:
    """People, through two files of JSON Lines.

    `questions.jsonl` has rows `{"id", "prompt", "completions"}`. A row `{"id": …, "ranking": [[2], [0, 3], [1]]}` in
    `answers.jsonl` (or any other judgement of `plaudit.data`, with an `annotator` if wished) is a judgement; of several
    for one question the first counts. `{"id": …, "skip": true}` says that somebody looked and cannot judge.

    Attributes:
        folder: of both files.
        wait: seconds to wait for all questions of a call; 0 takes what is there.
        poll: seconds between two looks.
        asked: questions without a judgement so far, by id.
        done: ids of the questions whose judgement was handed out, or that were skipped.
        heed: is called before every look but the first; what it raises ends the waiting.
    """

    folder: Path
    wait: float = 0.0
    poll: float = 1.0
    asked: dict[str, Question] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    heed: Callable[[], object] = lambda: None

    takes_questions = True

    def __call__(self, questions: Sequence[Question]) -> list[Comparison]:
        """Ask, wait a while, and hand out whatever was judged since the last call.

        Raises:
            ValueError: with file and line, for an answer that cannot be read or does not fit its question.
        """
        self._ask(questions)
        ids, deadline = {question.id for question in questions}, time.monotonic() + self.wait
        found = self._collect()
        while not ids <= self.done and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(self.poll, left))
            self.heed()
            found += self._collect()
        return found

    def state_dict(self) -> dict[str, Any]:
        """What was asked and not yet answered, and what is done, as texts."""
        return {"asked": [json.dumps(_row(each)) for each in self.asked.values()], "done": sorted(self.done)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        rows = [json.loads(text) for text in state["asked"]]
        self.asked = {row["id"]: _question(row) for row in rows}
        self.done = set(state["done"])

    def _ask(self, questions: Sequence[Question]) -> None:
        path = self.folder / "questions.jsonl"
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = whole_lines(path) if path.exists() else []
        # A run that was killed and resumed asks again what it has asked before: the same id, the same question.
        there = {json.loads(line)["id"] for line in lines}
        with path.open("a", encoding="utf-8") as file:
            file.truncate(len("".join(lines).encode("utf-8")))  # of a line that the kill has cut off
            for question in questions:
                if question.id not in self.done:
                    self.asked[question.id] = question
                if question.id not in there:
                    file.write(json.dumps(_row(question), ensure_ascii=False) + "\n")

    def _collect(self) -> list[Comparison]:
        path = self.folder / "answers.jsonl"
        if not path.exists():
            return []
        found = []
        lines = path.read_text(encoding="utf-8").split("\n")
        # The last line may still be in the middle of being written.
        for number, line in enumerate(lines[:-1], 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                question = self.asked.get(row["id"])
                if question is None:
                    continue
                if not row.get("skip"):
                    found.append(question.judged(judgement_from_json(row), row.get("annotator")))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: this answer cannot be used: {error}") from error
            del self.asked[question.id]
            self.done.add(question.id)
        return found


def _row(question: Question) -> dict[str, Any]:
    return {
        "id": question.id,
        "prompt": prompt_to_json(question.prompt),
        "completions": list(question.completions),
    }


def _question(row: dict[str, Any]) -> Question:
    return Question(id=row["id"], prompt=prompt_of(row["prompt"]), completions=tuple(row["completions"]))
