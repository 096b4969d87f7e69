"""What may sit between the states of a language model and its vocabulary head: styles, or a manager's goals."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from plaudit.models.aggregation import TokenSpans
from plaudit.models.beside import files_of
from plaudit.models.goals import GoalHeads
from plaudit.models.styles import StyleHeads


class Steering(Protocol):
    """A module that, from a model's states, says how likely tokens are; `StyleHeads` and `GoalHeads` satisfy it."""

    def terms(
        self,
        states: Tensor,
        last_tokens: Tensor,
        targets: Tensor,
        spans: TokenSpans,
        *,
        head: tuple[Tensor, Tensor | None, float | None],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the tokens of completions, both `[M]`, with gradients.

        Args:
            states: `[M, H]`, what the head reads for each token.
            last_tokens: `[M]` int64, the tokens that those states have read last.
            targets: `[M]` int64, the tokens.
            spans: owner and step of each.
            head: `(weight, bias, softcap)` of the language model.
            temperature: logits are divided by it.
        """

    def metrics(self) -> dict[str, float]:
        """What to log of the last evaluation."""

    def save(self, folder: Path) -> None:
        """Write it beside a saved model."""


KINDS: dict[str, Callable[[Path], StyleHeads | GoalHeads]] = {
    StyleHeads.kind: StyleHeads.load,
    GoalHeads.kind: GoalHeads.load,
}
"""What opens which kind of files in a model's folder."""


def steering_beside(model: str | Path) -> StyleHeads | GoalHeads | None:
    """What steers a saved model, by its folder; None where nothing does, or the name is no folder."""
    folder = Path(model)
    return next((load(folder) for kind, load in KINDS.items() if (folder / files_of(kind)[0]).is_file()), None)


def save_steering(steering: StyleHeads | GoalHeads | None, folder: Path) -> None:
    """Write what steers a model beside it, and take away what steered another one that was saved there."""
    for kind in KINDS:
        for name in files_of(kind):
            (folder / name).unlink(missing_ok=True)
    if steering is not None:
        steering.save(folder)
