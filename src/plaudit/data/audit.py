"""The audit of a set of comparisons: what is in it, what is odd about it, and what a model has to beat."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from plaudit.data.agreement import (
    PairJudgement,
    Unit,
    agreement_by_annotator,
    contradictions,
    krippendorff_alpha,
    one_per_annotator,
    pair_judgements,
    pairwise_agreement,
    prompts_with_cycles,
    repeated_units,
)
from plaudit.data.floors import Rate, clustered_rate, cross_validated_floor, fit_bag_of_words, length_floor, pair_rate
from plaudit.data.io import Tally
from plaudit.data.native import judgement_to_json
from plaudit.data.records import Best, Comparison, Ranking, preference_pairs, prompt_text, tied_pairs, tiers_of
from plaudit.data.splits import NearDuplicate, near_duplicates, prompt_key

#: Comparisons beyond this number are sampled for the bag-of-words floor and the near-duplicate search.
SAMPLE = 5_000
#: Examples kept of every kind of oddity.
EXAMPLES = 5


@dataclass(frozen=True)
class LengthSummary:
    """Lengths in characters: smallest, quantiles, mean, largest, and a histogram over `edges` (`len(counts) + 1`)."""

    count: int
    minimum: int
    quartiles: tuple[float, float, float]
    p95: float
    maximum: int
    mean: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How far annotators of the same pair agree; see `plaudit.data.agreement` for the formulas.

    Attributes:
        units: pairs of texts that were judged more than once (each named annotator counted once).
        judgements: judgements of them.
        agreement: share of equal values among pairs of judgements.
        alpha: Krippendorff's alpha, interval metric.
        by_annotator: for each named annotator, agreement with the others and the occasions it rests on.
    """

    units: int
    judgements: int
    agreement: float | None
    alpha: float | None
    by_annotator: dict[str, tuple[float, int]]


@dataclass(frozen=True)
class Audit:
    """Everything the audit found. `to_json` gives plain values.

    Attributes:
        source: where the records came from.
        rows: rows read, used and refused by reason, and the format of each file.
        comparisons, prompts, distinct_prompts, annotators, groups: counts (`prompts` by their full text,
            `distinct_prompts` by first user turn, which is what splits keep together).
        judgements: how many of each kind.
        completions: number of completions K to how many comparisons.
        prompt_lengths, completion_lengths: in characters.
        pairs, ties: judged pairs that have a winner, and that were tied.
        longer_wins: how often the longer of an untied pair won, equal lengths left out.
        longer_wins_by_difference: (lower, upper) bound of the absolute difference in characters, and the rate there.
        first_wins: position bias: how often the first shown of an untied pair won.
        best_by_position: position to (times shown there, times ranked best there with ties at the top shared, times
            that chance would give: the sum of 1 / number of judged completions).
        position_informative: False where the first always wins, as in formats that put the winner first.
        duplicates: comparisons that repeat prompt, completions, judgement and annotator of an earlier one.
        contradictory_pairs: pairs judged both ways, and of those, by one and the same named annotator.
        cyclic_prompts: prompts whose majority preferences run in a circle.
        agreement: between annotators.
        bag_of_words: accuracy of the bag-of-words floor, cross-validated; None where there is too little data.
        preferred_words, dispreferred_words: the words with the strongest weights.
        near_duplicate_prompts: pairs of different but almost equal prompts.
        examples: a few of each oddity, as text.
    """

    source: str
    rows: dict[str, Any]
    comparisons: int
    prompts: int
    distinct_prompts: int
    annotators: dict[str, int]
    groups: int
    subsets: dict[str, int]
    judgements: dict[str, int]
    completions: dict[int, int]
    prompt_lengths: LengthSummary
    completion_lengths: LengthSummary
    pairs: int
    ties: int
    longer_wins: Rate | None
    longer_wins_by_difference: list[tuple[int, int, Rate]]
    first_wins: Rate | None
    best_by_position: dict[int, tuple[int, float, float]]
    position_informative: bool
    duplicates: int
    contradictory_pairs: int
    self_contradictions: int
    cyclic_prompts: int
    agreement: Agreement
    bag_of_words: Rate | None
    preferred_words: list[tuple[str, float]]
    dispreferred_words: list[tuple[str, float]]
    near_duplicate_prompts: int
    sampled: int
    examples: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values only: what is written as JSON."""
        value: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return value


def audit_comparisons(
    comparisons: Sequence[Comparison],
    *,
    tally: Tally | None = None,
    source: str = "",
    floor: bool = True,
    seed: int = 0,
) -> Audit:
    """Audit comparisons.

    Args:
        comparisons: what was read (annotators apart, else there is no agreement to measure).
        tally: the reader's counts, shown beside the findings.
        source: where they came from, for the title.
        floor: whether to fit the bag-of-words floor (the slowest part).
        seed: of the floor's folds and of the near-duplicate search.

    Raises:
        ValueError: if there is no comparison.
    """
    if not comparisons:
        raise ValueError(f"{source or 'audit'}: no comparison to audit" + (f" ({tally.summary()})" if tally else ""))
    judgements = pair_judgements(comparisons)
    repeated = repeated_units(judgements)
    opposed = contradictions(repeated.values())
    sample = _sample(comparisons)
    bag = _fit(sample) if floor else None
    best_words, worst_words = bag.strongest_words() if bag else ([], [])
    near = near_duplicates(sample, seed=seed)
    cycles = prompts_with_cycles(judgements)
    duplicates = _duplicates(comparisons)
    first_wins = pair_rate(comparisons, lambda _, winner, loser: float(winner < loser))
    return Audit(
        source=source,
        rows=_rows(tally, len(comparisons)),
        comparisons=len(comparisons),
        prompts=len({prompt_text(comparison.prompt) for comparison in comparisons}),
        distinct_prompts=len({prompt_key(comparison.prompt) for comparison in comparisons}),
        annotators=_counted(comparison.annotator for comparison in comparisons),
        groups=len({comparison.group for comparison in comparisons if comparison.group is not None}),
        subsets=_counted(comparison.subset for comparison in comparisons),
        judgements=dict(Counter(next(iter(judgement_to_json(c.judgement))) for c in comparisons).most_common()),
        completions=dict(sorted(Counter(len(comparison.completions) for comparison in comparisons).items())),
        prompt_lengths=_lengths([len(prompt_text(comparison.prompt)) for comparison in comparisons]),
        completion_lengths=_lengths([len(text) for comparison in comparisons for text in comparison.completions]),
        pairs=sum(len(preference_pairs(comparison)) for comparison in comparisons),
        ties=sum(len(tied_pairs(comparison)) for comparison in comparisons),
        longer_wins=length_floor(comparisons),
        longer_wins_by_difference=_longer_by_difference(comparisons),
        first_wins=first_wins,
        best_by_position=_best_by_position(comparisons),
        position_informative=first_wins is not None and 0 < first_wins.value < 1,
        duplicates=len(duplicates),
        contradictory_pairs=len(opposed),
        self_contradictions=_self_contradictions(repeated.values()),
        cyclic_prompts=len(cycles),
        agreement=_agreement(repeated),
        bag_of_words=cross_validated_floor(sample, seed=seed) if bag else None,
        preferred_words=best_words,
        dispreferred_words=worst_words,
        near_duplicate_prompts=len(near),
        sampled=len(sample),
        examples={
            "contradictory pairs": [_told(one, other) for one, other in opposed[:EXAMPLES]],
            "cycles": [f"{prompt}\n\n" + "\n  > ".join(texts) for prompt, texts in cycles[:EXAMPLES]],
            "duplicates": [prompt_text(comparisons[index].prompt) for index in duplicates[:EXAMPLES]],
            "near-duplicate prompts": [_alike(sample, pair) for pair in near[:EXAMPLES]],
        },
    )


def _alike(sample: Sequence[Comparison], pair: NearDuplicate) -> str:
    """How alike two prompts are, and both."""
    first, second = (prompt_text(sample[place].prompt) for place in (pair.first, pair.second))
    return f"{pair.similarity:.2f}\n{first}\n—\n{second}"


def _rows(tally: Tally | None, count: int) -> dict[str, Any]:
    if tally is None:
        return {"read": count, "used": count, "refused": {}, "formats": {}}
    return {
        "read": tally.read,
        "used": tally.used,
        "refused": dict(tally.refused.most_common()),
        "formats": tally.formats,
    }


def _counted(values: Any) -> dict[str, int]:
    return dict(Counter(value for value in values if value is not None).most_common())


def _sample(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """At most `SAMPLE` comparisons, whole prompts at a time, in the order of their keys' hashes."""
    if len(comparisons) <= SAMPLE:
        return list(comparisons)
    keys = [prompt_key(comparison.prompt) for comparison in comparisons]
    order = sorted(range(len(keys)), key=lambda index: hashlib.sha256(keys[index].encode()).digest())
    return [comparisons[index] for index in order[:SAMPLE]]


def _fit(comparisons: Sequence[Comparison]) -> Any:
    try:
        return fit_bag_of_words(comparisons)
    except ValueError:
        return None


def _lengths(lengths: Sequence[int]) -> LengthSummary:
    values = np.asarray(lengths)
    quartiles = np.quantile(values, [0.25, 0.5, 0.75])
    # Logarithmic bins: lengths of text spread over orders of magnitude.
    low, high = max(1, int(values.min())), max(2, int(values.max()))
    edges = np.unique(np.round(np.geomspace(low, high + 1, 31)))
    counts, _ = np.histogram(np.clip(values, low, None), bins=edges)
    first, median, third = (float(value) for value in quartiles)
    return LengthSummary(
        count=len(values), minimum=int(values.min()), quartiles=(first, median, third),
        p95=float(np.quantile(values, 0.95)), maximum=int(values.max()), mean=float(values.mean()),
        edges=tuple(edges.tolist()), counts=tuple(counts.tolist()),
    )  # fmt: skip


def _longer_by_difference(comparisons: Sequence[Comparison]) -> list[tuple[int, int, Rate]]:
    """How often the longer one wins, in five bins of the absolute difference with equally many pairs."""
    found = []
    for comparison in comparisons:
        lengths = [len(text) for text in comparison.completions]
        key = prompt_key(comparison.prompt)
        for winner, loser in preference_pairs(comparison):
            if lengths[winner] != lengths[loser]:
                found.append((abs(lengths[winner] - lengths[loser]), float(lengths[winner] > lengths[loser]), key))
    if len(found) < 10:
        return []
    found.sort(key=lambda item: item[0])
    bins = []
    for part in np.array_split(np.arange(len(found)), 5):
        members = [found[index] for index in part]
        rate = clustered_rate([member[1] for member in members], [member[2] for member in members])
        if rate is not None:
            bins.append((members[0][0], members[-1][0], rate))
    return bins


def _best_by_position(comparisons: Sequence[Comparison]) -> dict[int, tuple[int, float, float]]:
    shown: Counter[int] = Counter()
    best: dict[int, float] = {}
    chance: dict[int, float] = {}
    for comparison in comparisons:
        tiers = tiers_of(comparison.judgement, len(comparison.completions))
        judged = [index for tier in tiers for index in tier]
        if len(tiers) < 2:
            continue
        shown.update(judged)
        for index in judged:
            chance[index] = chance.get(index, 0.0) + 1 / len(judged)
        for index in tiers[0]:
            best[index] = best.get(index, 0.0) + 1 / len(tiers[0])
    return {place: (shown[place], best.get(place, 0.0), chance[place]) for place in sorted(shown)}


def _duplicates(comparisons: Sequence[Comparison]) -> list[int]:
    """Indices of comparisons that say again what an earlier one said, in whatever order the completions stand."""
    seen: set[tuple[object, ...]] = set()
    found = []
    for index, comparison in enumerate(comparisons):
        judgement = comparison.judgement
        tiers = tiers_of(judgement, len(comparison.completions))
        said: object = tuple(frozenset(comparison.completions[i] for i in tier) for tier in tiers)
        if not isinstance(judgement, Ranking | Best):
            said = json.dumps(judgement_to_json(judgement), sort_keys=True), comparison.completions
        key = (comparison.prompt, frozenset(comparison.completions), said, comparison.annotator)
        if key in seen:
            found.append(index)
        seen.add(key)
    return found


def _self_contradictions(units: Any) -> int:
    found = 0
    for members in units:
        values: dict[str, set[int]] = {}
        for member in members:
            if member.annotator is not None and member.value:
                values.setdefault(member.annotator, set()).add(member.value)
        found += any(len(said) == 2 for said in values.values())
    return found


def _agreement(repeated: dict[Unit, list[PairJudgement]]) -> Agreement:
    units = [kept for members in repeated.values() if len(kept := one_per_annotator(members)) > 1]
    values = [[member.value for member in members] for members in units]
    return Agreement(
        units=len(units), judgements=sum(map(len, units)), agreement=pairwise_agreement(values),
        alpha=krippendorff_alpha(values), by_annotator=agreement_by_annotator(units),
    )  # fmt: skip


def _told(one: PairJudgement, other: PairJudgement) -> str:
    prompt, first, second = one.unit
    who = f"{one.annotator or 'somebody'} preferred A, {other.annotator or 'somebody'} preferred B"
    return f"{prompt}\n\nA: {first}\n\nB: {second}\n\n{who}"
