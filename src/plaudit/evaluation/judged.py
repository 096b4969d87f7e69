"""Comparisons laid flat: which pairs people judged, in which cluster each stands, and what is known about it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from plaudit.data.records import (
    Best,
    Comparison,
    Labels,
    Ranking,
    Ratings,
    Scores,
    Votes,
    preference_pairs,
    rating_totals,
    tied_pairs,
    tiers_of,
)
from plaudit.data.splits import split_keys
from plaudit.evaluation.metrics import FloatArray, IntArray

ClusterBy = Literal["auto", "prompt", "group", "record"]


@dataclass(frozen=True)
class JudgedSet:
    """`N` comparisons with all of their completions in one flat list of length `L` and their `M` judged pairs.

    Attributes:
        comparisons: the `N` records, in their order.
        tiers: per record, completion indices by tier, best first.
        offsets: `[N + 1]`; completion `k` of record `n` stands at `offsets[n] + k` in the flat list.
        clusters: `[N]` cluster of each record, in `0..num_clusters-1`.
        num_clusters: `C`.
        cluster_by: what a cluster is, in words for the report.
        record: `[M]` the record of each untied pair.
        winner: `[M]` place of the preferred completion in the flat list.
        loser: `[M]` place of the other.
        weight: `[M]` weight of the pair's record.
        gap: `[M]` how far apart people put the two, in the units of `gap_kind`; nan where they did not say.
        tied: `[U, 2]` places of pairs that people tied.
        lengths: `[L]` number of characters of every completion.
    """

    comparisons: tuple[Comparison, ...]
    tiers: tuple[tuple[tuple[int, ...], ...], ...]
    offsets: IntArray
    clusters: IntArray
    num_clusters: int
    cluster_by: str
    record: IntArray
    winner: IntArray
    loser: IntArray
    weight: FloatArray
    gap: FloatArray
    tied: IntArray
    lengths: FloatArray

    @property
    def pair_clusters(self) -> IntArray:
        """`[M]` the cluster of each pair."""
        return self.clusters[self.record]

    def counts(self) -> dict[str, int]:
        """How many records, prompts, completions, judged pairs and human ties there are."""
        paired = np.unique(self.record).size
        return {
            "records": len(self.comparisons),
            "clusters": self.num_clusters,
            "completions": int(self.offsets[-1]),
            "pairs": int(self.record.size),
            "human_ties": int(self.tied.shape[0]),
            "records_without_pairs": len(self.comparisons) - int(paired),
        }


def judge(
    comparisons: Sequence[Comparison], *, cluster_by: ClusterBy = "auto", tie_threshold: float = 0.0
) -> JudgedSet:
    """Lay comparisons flat.

    Args:
        comparisons: any judgements; records without an untied pair (one completion, all tied) are kept and counted.
        cluster_by: what is redrawn as a whole for intervals: `prompt` (the first user turn), `group` (every record
            must have one; groups that share a prompt are one), `record`, or `auto`: by group where any record has
            one, else by prompt.
        tie_threshold: scores closer than this are human ties.

    Raises:
        ValueError: if there is no comparison, or `group` is asked for and a record has none.
    """
    if not comparisons:
        raise ValueError("there is no comparison to evaluate on")
    clusters, names = cluster_numbers(comparisons, cluster_by)
    offsets = np.concatenate([[0], np.cumsum([len(c.completions) for c in comparisons])]).astype(np.int64)
    record: list[int] = []
    pairs: list[tuple[int, int]] = []
    gaps: list[float] = []
    tied: list[tuple[int, int]] = []
    for index, comparison in enumerate(comparisons):
        start = int(offsets[index])
        found = preference_pairs(comparison, tie_threshold)
        record.extend([index] * len(found))
        pairs.extend((start + winner, start + loser) for winner, loser in found)
        gaps.extend(_gaps(comparison, found, tie_threshold))
        tied.extend((start + first, start + second) for first, second in tied_pairs(comparison, tie_threshold))
    places = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    records = np.array(record, dtype=np.int64)
    return JudgedSet(
        comparisons=tuple(comparisons),
        tiers=tuple(tiers_of(c.judgement, len(c.completions), tie_threshold) for c in comparisons),
        offsets=offsets,
        clusters=clusters,
        num_clusters=int(clusters.max()) + 1,
        cluster_by=names,
        record=records,
        winner=places[:, 0],
        loser=places[:, 1],
        weight=np.array([c.weight for c in comparisons], dtype=np.float64)[records],
        gap=np.array(gaps, dtype=np.float64),
        tied=np.array(tied, dtype=np.int64).reshape(-1, 2),
        lengths=np.array([len(text) for c in comparisons for text in c.completions], dtype=np.float64),
    )


def flat_scores(judged: JudgedSet, scores: Sequence[Sequence[float | None]]) -> FloatArray:
    """Scores per completion as one `[L]` array; a completion that was not scored (`None`) is nan.

    Args:
        judged: the comparisons that were scored.
        scores: per record one score per completion.

    Raises:
        ValueError: if a number of scores does not fit, or a score is nan or infinite (a model that returns such a
            number is broken; give `None` for a completion that it refused).
    """
    if len(scores) != len(judged.comparisons):
        raise ValueError(f"scores for {len(scores)} records, but there are {len(judged.comparisons)} comparisons")
    flat = np.full(int(judged.offsets[-1]), np.nan)
    for index, (comparison, values) in enumerate(zip(judged.comparisons, scores, strict=True)):
        name = f"record {index}" + (f" (id {comparison.id!r})" if comparison.id is not None else "")
        if len(values) != len(comparison.completions):
            raise ValueError(f"{name}: {len(values)} scores for {len(comparison.completions)} completions")
        for slot, value in enumerate(values):
            if value is None:
                continue
            if not np.isfinite(value):
                raise ValueError(f"{name}: the score of completion {slot} is {value}; use null for one without a score")
            flat[judged.offsets[index] + slot] = value
    return flat


def gap_kind(comparison: Comparison) -> str | None:
    """In which units this record says how far apart two completions are; None where it does not say."""
    if comparison.margin is not None:
        return "stated margin"
    match comparison.judgement:
        case Scores() | Ratings():
            return "score difference"
        case Votes():
            return "difference in vote share"
        case Ranking(tiers) if len(tiers) > 2:
            return "places apart"
        case Ranking() | Best() | Labels():
            return None


def cluster_numbers(comparisons: Sequence[Comparison], cluster_by: ClusterBy = "auto") -> tuple[IntArray, str]:
    """The cluster of each record, `[N]` from 0, and what a cluster is, in a word.

    Clusters are split keys: what a split keeps together is also redrawn together.

    Raises:
        ValueError: if `group` is asked for and a record has none.
    """
    missing = [index for index, comparison in enumerate(comparisons) if comparison.group is None]
    if cluster_by == "group" and missing:
        raise ValueError(f"record {missing[0]} has no 'group'; give every record one or cluster by prompt")
    by_group = cluster_by == "group" or (cluster_by == "auto" and len(missing) < len(comparisons))
    if cluster_by == "record":
        keys = [str(index) for index in range(len(comparisons))]
    else:
        keys = split_keys(comparisons, "group" if by_group else "prompt")
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    name = "record" if cluster_by == "record" else "group" if by_group else "prompt"
    return np.array([order[key] for key in keys], dtype=np.int64), name


def _gaps(comparison: Comparison, pairs: Sequence[tuple[int, int]], tie_threshold: float) -> list[float]:
    """How far apart people put the two completions of each pair."""
    values: Sequence[float | None]
    if gap_kind(comparison) is None:
        return [float("nan")] * len(pairs)
    if comparison.margin is not None:
        return [comparison.margin] * len(pairs)
    match comparison.judgement:
        case Scores(values=numbers):
            values = numbers
        case Ratings() as ratings:
            values = rating_totals(ratings)
        case Votes(counts):
            total = sum(counts)
            values = [count / total for count in counts]
        case judgement:
            place = {
                index: -depth
                for depth, tier in enumerate(tiers_of(judgement, len(comparison.completions), tie_threshold))
                for index in tier
            }
            values = [place.get(index) for index in range(len(comparison.completions))]
    return [_gap(values[winner], values[loser]) for winner, loser in pairs]


def _gap(winner: float | None, loser: float | None) -> float:
    # Rounding keeps 0.3 - 0.2 and 0.2 - 0.1 in one bucket.
    return float("nan") if winner is None or loser is None else round(winner - loser, 9)
