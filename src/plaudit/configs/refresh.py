"""Refreshing the reward model while a policy is aligned with it."""

from typing import Literal

from pydantic import Field

from plaudit.configs.base import Config
from plaudit.configs.data import DataConfig


class RefreshConfig(Config):
    """Now and then the policy's own answers are judged, and the reward model learns from the judgements."""

    every: int = Field(gt=0)
    """Iterations between two refreshes; the first comes after so many."""
    budget: int = Field(gt=0)
    """Judgements that the run may ask for in all; one is one comparison of `completions` answers."""
    comparisons: int | None = Field(default=None, gt=0)
    """Judgements per refresh; None shares the budget among the refreshes of the run."""
    completions: int = Field(default=4, ge=2)
    """Answers to a prompt that are judged together."""
    annotator: str = "queue"
    """Who judges: `queue` (people: questions are written to `annotation/questions.jsonl`, judgements are read from
    `annotation/answers.jsonl`), or `module:function` or `file.py:function`, a function of a prompt and its
    completions."""
    wait: float = Field(default=0.0, ge=0)
    """`queue`: seconds to wait for all judgements; those that come later are learned from at a later refresh."""

    data: tuple[str | DataConfig, ...] = ()
    """The comparisons that the reward model was trained on (or others like them), so that it does not forget them."""
    old_per_new: float = Field(default=2.0, ge=0)
    """How many earlier comparisons, those of earlier refreshes included, accompany each new one in training."""
    start: Literal["current", "original"] = "current"
    """Whether each refresh goes on from the reward model as it is, or from that of the run's start, with all judgements
    of the run so far."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over these comparisons at each refresh."""
    learning_rate: float = Field(default=1e-5, gt=0)
    """Peak learning rate of the reward model."""
    head_learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of its head; None means the same."""
    records_per_step: int = Field(default=8, gt=0)
    """Comparisons per optimizer step."""

    def share(self, iterations: int, number: int) -> int:
        """Judgements to ask for at refresh `number` (from 0) of a run."""
        if self.comparisons is not None:
            return self.comparisons
        refreshes = max(1, (iterations - 1) // self.every)
        each, rest = divmod(self.budget, refreshes)
        return each + (number < rest)
