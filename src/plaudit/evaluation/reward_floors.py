"""Floors as if they were models: scores per completion by length alone and by a bag of words, never fitted on
themselves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from plaudit.data.floors import fit_bag_of_words, length_scores
from plaudit.data.records import Comparison, preference_pairs
from plaudit.data.splits import kfold
from plaudit.evaluation.metrics import temperature

Parts = list[tuple[list[Comparison], list[Comparison]]]


@dataclass(frozen=True)
class Floors:
    """Scores of every floor, and in a sentence how they were fitted.

    Attributes:
        scores: per floor and comparison one score per completion.
        note: for the report.
    """

    scores: dict[str, list[list[float]]]
    note: str


def reward_floors(
    comparisons: Sequence[Comparison],
    train: Sequence[Comparison] | None = None,
    *,
    names: Sequence[str] = ("length", "bag_of_words"),
    folds: int = 5,
    seed: int = 0,
) -> Floors:
    """Fit and score the floors `length` and `bag_of_words`.

    `length` scores `w log(1 + characters)` with the sign and scale of `w` fitted by maximum likelihood, so it is
    "the longer wins" or "the shorter wins", whichever held on the data it was fitted to. `bag_of_words` is
    `data.floors.fit_bag_of_words` on completions alone. With `train` both are fitted there; otherwise each fold of
    the comparisons (split by group where there are groups, else by prompt) is scored by floors fitted to the others.

    Args:
        comparisons: what is to be scored.
        train: other comparisons to fit to.
        names: which floors.
        folds: of the cross-fitting; fewer where the data has too few prompts.
        seed: of the folds.
    """
    if not names:
        return Floors({}, "")
    if train is not None:
        parts, note = [(list(train), list(comparisons))], f"Floors were fitted to {len(train):,} training comparisons."
    else:
        parts, note = _folds(comparisons, folds, seed)
    found: dict[str, list[list[float]]] = {}
    for name in names if parts else ():
        try:
            scored = [_FITS[name](known, unknown) for known, unknown in parts]
        except ValueError as error:
            note += f" There is no floor '{name}': {str(error).rstrip('.')}."
            continue
        found[name] = scored[0] if train is not None else _in_order(parts, scored)
    return Floors(found, note)


def _folds(comparisons: Sequence[Comparison], folds: int, seed: int) -> tuple[Parts, str]:
    """`(known, unknown)` parts whose unknown records carry their place as `id`; fewer folds where some are empty."""
    grouped = any(comparison.group is not None for comparison in comparisons)
    numbered = [replace(comparison, id=str(index)) for index, comparison in enumerate(comparisons)]
    for count in range(folds, 1, -1):
        try:
            parts = kfold(numbered, count, "group" if grouped else "prompt", seed)
        except ValueError:
            continue  # a fold is empty
        key = "group" if grouped else "prompt"
        return parts, (
            f"Floors were fitted to the evaluation data itself in {count} folds by {key}, each fold scored by floors "
            "that never saw it."
        )
    return [], "There are too few prompts to fit floors; give training data for them."


def _in_order(parts: Parts, scored: Sequence[list[list[float]]]) -> list[list[float]]:
    rows = {
        int(comparison.id or 0): values
        for (_, test), scores in zip(parts, scored, strict=True)
        for comparison, values in zip(test, scores, strict=True)
    }
    return [rows[index] for index in range(len(rows))]


def _length(train: Sequence[Comparison], test: Sequence[Comparison]) -> list[list[float]]:
    fitted = [[float(np.log1p(value)) for value in row] for row in length_scores(train)]
    differences = [
        values[winner] - values[loser]
        for comparison, values in zip(train, fitted, strict=True)
        for winner, loser in preference_pairs(comparison)
    ]
    if not differences:
        raise ValueError("no judged, untied pair to fit the length floor to")
    forward, backward = temperature(differences), temperature([-value for value in differences])
    # A scale of 0 (every longer one won) would make infinite scores.
    slope = 1.0 / max(forward, 1e-3) if forward <= backward else -1.0 / max(backward, 1e-3)
    return [[slope * float(np.log1p(value)) for value in row] for row in length_scores(test)]


def _bag_of_words(train: Sequence[Comparison], test: Sequence[Comparison]) -> list[list[float]]:
    return fit_bag_of_words(train, response_only=True).scores(test)


_FITS = {"length": _length, "bag_of_words": _bag_of_words}
