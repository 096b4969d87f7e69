"""Targets: what people said about the completions of a batch, as tensors for the losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from plaudit.core.transfer import to_device
from plaudit.data.records import (
    Comparison,
    Judgement,
    Labels,
    Ratings,
    Scores,
    Votes,
    rating_totals,
    tiers_of,
)


@dataclass(frozen=True)
class PreferenceTargets:
    """Judgements of `P` prompts over `K` slots with `A` named attributes. Masks: True = counts.

    A pick, yes/no labels and votes leave completions uncompared, yet in one tier: a tie in `tiers` is one that people
    declared only for rankings, scores and ratings (see `records.tied_pairs`).

    Attributes:
        mask: `[P, K]` bool, the completion exists.
        judged: `[P, K]` bool, it stands in some tier: somebody judged it.
        tiers: `[P, K]` int64, 0 best; -1 where not judged.
        best: `[P]` int64, the slot of the one completion above all others; -1 where there is none.
        votes: `[P, K]` float32, votes as counted; for any other judgement with at least two tiers one vote shared by
            the best tier; else 0.
        scores: `[P, K]` float32, scores, labels as 0 and 1, weighted totals of ratings; 0 where absent.
        score_mask: `[P, K]` bool, where `scores` holds something.
        ratings: `[P, K, A]` float32; 0 where absent.
        rating_mask: `[P, K, A]` bool, where `ratings` holds something.
        weights: `[P]` float32, the records' weights.
        margins: `[P]` float32, how much better the better of two must be; 0 where the record says nothing.
    """

    mask: Tensor
    judged: Tensor
    tiers: Tensor
    best: Tensor
    votes: Tensor
    scores: Tensor
    score_mask: Tensor
    ratings: Tensor
    rating_mask: Tensor
    weights: Tensor
    margins: Tensor

    @property
    def num_prompts(self) -> int:
        """`P`."""
        return self.mask.shape[0]

    def to(self, device: torch.device | str) -> "PreferenceTargets":
        """The same targets on `device`."""
        return PreferenceTargets(**{f.name: to_device(getattr(self, f.name), device) for f in fields(self)})


def make_targets(
    comparisons: Sequence[Comparison],
    *,
    num_slots: int | None = None,
    attributes: Sequence[str] = (),
    tie_threshold: float = 0.0,
    attribute_weights: Mapping[str, float] | None = None,
) -> PreferenceTargets:
    """Write the judgements of comparisons as tensors on the CPU, row `p` for comparison `p`.

    Args:
        comparisons: `P` records.
        num_slots: `K`; default: the largest number of completions.
        attributes: the `A` names that `ratings` is made from, in this order; a record without one is masked there.
        tie_threshold: scores, votes and rating totals closer than this tie (see `records.tiers_of`).
        attribute_weights: weights of attributes in the totals of ratings; default: 1 each.

    Raises:
        ValueError: if there is no comparison, one has more than `num_slots` completions, or a judgement does not
            cover exactly its completions.
    """
    if not comparisons:
        raise ValueError("no comparisons to make targets from")
    widest = max(len(c.completions) for c in comparisons)
    width = widest if num_slots is None else num_slots
    if widest > width:
        raise ValueError(f"a comparison has {widest} completions, more than num_slots {width}")
    shape = (len(comparisons), width)
    mask = np.zeros(shape, bool)
    tiers = np.full(shape, -1, np.int64)
    best = np.full(shape[0], -1, np.int64)
    votes = np.zeros(shape, np.float32)
    scores = np.full(shape, np.nan, np.float32)
    ratings = np.full((*shape, len(attributes)), np.nan, np.float32)
    for row, comparison in enumerate(comparisons):
        count, judgement = len(comparison.completions), comparison.judgement
        mask[row, :count] = True
        ordered = tiers_of(judgement, count, tie_threshold, attribute_weights)
        for place, tier in enumerate(ordered):
            for slot in tier:
                _check_slot(slot, count, row, comparison)
                tiers[row, slot] = place
        if len(ordered) > 1:
            if len(ordered[0]) == 1:
                best[row] = ordered[0][0]
            votes[row, list(ordered[0])] = 1 / len(ordered[0])
        if isinstance(judgement, Votes):
            _fill(votes[row], judgement.counts, count, row, comparison)
        _fill(scores[row], _values(judgement, attribute_weights), count, row, comparison)
        if isinstance(judgement, Ratings):
            for column, name in enumerate(attributes):
                _fill(ratings[row, :, column], judgement.attributes.get(name, ()), count, row, comparison)
    return PreferenceTargets(
        mask=torch.from_numpy(mask),
        judged=torch.from_numpy(tiers >= 0),
        tiers=torch.from_numpy(tiers),
        best=torch.from_numpy(best),
        votes=torch.from_numpy(votes),
        scores=torch.from_numpy(np.nan_to_num(scores, nan=0.0)),
        score_mask=torch.from_numpy(~np.isnan(scores)),
        ratings=torch.from_numpy(np.nan_to_num(ratings, nan=0.0)),
        rating_mask=torch.from_numpy(~np.isnan(ratings)),
        weights=torch.tensor([c.weight for c in comparisons], dtype=torch.float32),
        margins=torch.tensor([c.margin or 0.0 for c in comparisons], dtype=torch.float32),
    )


def _values(judgement: Judgement, attribute_weights: Mapping[str, float] | None) -> Sequence[float | bool | None]:
    """The numbers of an absolute judgement; empty for a relative one."""
    if isinstance(judgement, Scores | Labels):
        return judgement.values
    if isinstance(judgement, Ratings):
        return rating_totals(judgement, attribute_weights)
    return ()


def _fill(
    row: np.ndarray, values: Sequence[float | bool | None], count: int, index: int, comparison: Comparison
) -> None:
    """Write values into a row of the table, None as NaN; no values at all leave it alone."""
    if not values:
        return
    if len(values) != count:
        raise ValueError(f"comparison {comparison.id or index} has {count} completions but {len(values)} judged values")
    row[:count] = [np.nan if value is None else float(value) for value in values]


def _check_slot(slot: int, count: int, index: int, comparison: Comparison) -> None:
    if not 0 <= slot < count:
        raise ValueError(f"comparison {comparison.id or index} judges completion {slot} of only {count}")
