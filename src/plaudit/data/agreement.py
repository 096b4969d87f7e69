"""Do people agree with one another? Pairwise agreement, Krippendorff's alpha, contradictions and cycles.

Everything is computed over *pair judgements*: one annotator's word on two texts of one prompt, +1, 0 (tie) or -1.
The same two texts are one unit in whatever comparison, order or format they were shown.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from plaudit.data.records import Comparison, Votes, preference_pairs, prompt_text, tied_pairs

#: A pair of texts of one prompt: the prompt as text and both texts in alphabetical order.
Unit = tuple[str, str, str]


@dataclass(frozen=True)
class PairJudgement:
    """One annotator's word on a unit: `value` is +1 where the alphabetically first text is better, -1 where the
    second is, 0 for a tie. `comparison` is the index of the record it came from."""

    unit: Unit
    value: int
    annotator: str | None
    comparison: int


def pair_judgements(comparisons: Sequence[Comparison]) -> list[PairJudgement]:
    """Every judged pair of every comparison. Whole-number votes over two completions count as that many annotators."""
    found: list[PairJudgement] = []
    for index, comparison in enumerate(comparisons):
        judged = [(pair, 1, 1) for pair in preference_pairs(comparison)]
        judged += [(pair, 0, 1) for pair in tied_pairs(comparison)]
        votes = comparison.judgement
        if isinstance(votes, Votes) and len(votes.counts) == 2 and all(float(n).is_integer() for n in votes.counts):
            judged = [((0, 1), 1, int(votes.counts[0])), ((0, 1), -1, int(votes.counts[1]))]
        prompt = prompt_text(comparison.prompt)
        for (better, other), value, times in judged:
            first, second = comparison.completions[better], comparison.completions[other]
            unit, sign = ((prompt, first, second), value) if first < second else ((prompt, second, first), -value)
            found.extend([PairJudgement(unit, sign, comparison.annotator, index)] * times)
    return found


def one_per_annotator(members: Sequence[PairJudgement]) -> list[PairJudgement]:
    """The judgements of a unit with only the last of each named annotator (who cannot disagree with himself)."""
    named = {member.annotator: member for member in members if member.annotator is not None}
    return [member for member in members if member.annotator is None] + list(named.values())


def repeated_units(judgements: Iterable[PairJudgement]) -> dict[Unit, list[PairJudgement]]:
    """The units that were judged more than once, with all their judgements."""
    units: dict[Unit, list[PairJudgement]] = {}
    for judgement in judgements:
        units.setdefault(judgement.unit, []).append(judgement)
    return {unit: members for unit, members in units.items() if len(members) > 1}


def pairwise_agreement(units: Iterable[Sequence[int]]) -> float | None:
    """The share of equal values among all pairs of judgements within a unit, each unit weighing by its pairs.

    `Σ_u #{equal pairs in u} / Σ_u C(m_u, 2)`. None where no unit has two judgements.
    """
    equal = total = 0
    for values in units:
        counts = Counter(values)
        equal += sum(count * (count - 1) // 2 for count in counts.values())
        total += len(values) * (len(values) - 1) // 2
    return equal / total if total else None


def krippendorff_alpha(units: Iterable[Sequence[int]]) -> float | None:
    """Krippendorff's alpha with the interval metric on the values -1, 0, +1.

    `α = 1 - D_o / D_e` with `δ²(a, b) = (a - b)²`,
    `D_o = (1/n) Σ_u Σ_{i≠j ∈ u} δ²(v_i, v_j) / (m_u - 1)` and `D_e = Σ_{a,b} n_a n_b δ²(a, b) / (n (n - 1))`
    over the `n` values in units with `m_u ≥ 2` (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").
    Which of two texts comes first means nothing, so each unit also enters mirrored (values negated): the expected
    disagreement then does not depend on the order in which texts are named. 1 is perfect agreement, 0 what chance
    gives, below 0 is worse than chance. None where no unit has two judgements.
    """
    mirrored = [side for values in units if len(values) > 1 for side in (list(values), [-value for value in values])]
    counts = Counter(value for values in mirrored for value in values)
    total = sum(counts.values())
    if not total:
        return None
    observed = 0.0
    for values in mirrored:
        inside = Counter(values)
        apart = sum(inside[a] * inside[b] * (a - b) ** 2 for a in inside for b in inside)
        observed += apart / (len(values) - 1)
    expected = sum(counts[a] * counts[b] * (a - b) ** 2 for a in counts for b in counts) / (total * (total - 1))
    return 1.0 if expected == 0 else 1 - observed / total / expected


def agreement_by_annotator(units: Iterable[Sequence[PairJudgement]]) -> dict[str, tuple[float, int]]:
    """For each named annotator, how often others said the same about the same pair, and on how many such occasions."""
    equal: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for members in units:
        for one, other in combinations(members, 2):
            if one.annotator == other.annotator:
                continue
            for name in (one.annotator, other.annotator):
                if name is not None:
                    total[name] += 1
                    equal[name] += one.value == other.value
    return {name: (equal[name] / count, count) for name, count in sorted(total.items())}


def contradictions(units: Iterable[Sequence[PairJudgement]]) -> list[tuple[PairJudgement, PairJudgement]]:
    """For each unit with both +1 and -1, one judgement of each kind."""
    found = []
    for members in units:
        better = next((member for member in members if member.value > 0), None)
        worse = next((member for member in members if member.value < 0), None)
        if better is not None and worse is not None:
            found.append((better, worse))
    return found


def prompts_with_cycles(judgements: Iterable[PairJudgement]) -> list[tuple[str, list[str]]]:
    """Prompts whose majority preferences run in a circle (A over B over C over A), with the texts on one circle.

    An edge runs from the winner to the loser of every unit whose judgements do not cancel out. Two texts alone are a
    contradiction, not a cycle; so a cycle has three texts or more, and can only arise across comparisons.
    """
    balance: dict[Unit, int] = {}
    for judgement in judgements:
        balance[judgement.unit] = balance.get(judgement.unit, 0) + judgement.value
    graphs: dict[str, dict[str, list[str]]] = {}
    for (key, one, other), value in balance.items():
        if value:
            winner, loser = (one, other) if value > 0 else (other, one)
            graphs.setdefault(key, {}).setdefault(winner, []).append(loser)
    cycles = ((key, find_cycle(graph)) for key, graph in graphs.items())
    return [(key, cycle) for key, cycle in cycles if cycle]


def find_cycle(graph: dict[str, list[str]]) -> list[str]:
    """The nodes of one directed cycle in their order, or an empty list; depth-first, without recursion."""
    done: set[str] = set()
    for start in graph:
        path: list[str] = []
        on_path: set[str] = set()
        stack: list[tuple[str, bool]] = [(start, True)]
        while stack:
            node, entering = stack.pop()
            if not entering:
                on_path.discard(path.pop())
                done.add(node)
            elif node in on_path:
                return path[path.index(node) :]
            elif node not in done:
                path.append(node)
                on_path.add(node)
                stack.append((node, False))
                stack.extend((below, True) for below in graph.get(node, ()))
    return []
