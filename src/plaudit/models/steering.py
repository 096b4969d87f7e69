"""What may sit between the states of a language model and its vocabulary head: styles, or a manager's goals."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from torch import Tensor

from plaudit.models import goals, styles
from plaudit.models.aggregation import TokenSpans
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


FILES: dict[str, Callable[[Path], StyleHeads | GoalHeads]] = {
    styles.WEIGHTS: StyleHeads.load,
    goals.WEIGHTS: GoalHeads.load,
}
"""Which file of a model's folder is opened by what."""


def steering_beside(model: str | Path) -> StyleHeads | GoalHeads | None:
    """What steers a saved model, by its folder; None where nothing does, or the name is no folder."""
    folder = Path(model)
    return next((load(folder) for name, load in FILES.items() if (folder / name).is_file()), None)


def save_steering(steering: StyleHeads | GoalHeads | None, folder: Path) -> None:
    """Write what steers a model beside it, and take away what steered another one that was saved there."""
    for module in (styles, goals):
        for name in (module.WEIGHTS, module.DESCRIPTION):
            (folder / name).unlink(missing_ok=True)
    if steering is not None:
        steering.save(folder)
