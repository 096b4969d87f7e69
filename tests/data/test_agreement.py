import itertools
import random

import pytest

from plaudit.data.agreement import (
    agreement_by_annotator,
    contradictions,
    find_cycle,
    krippendorff_alpha,
    one_per_annotator,
    pair_judgements,
    pairwise_agreement,
    prompts_with_cycles,
    repeated_units,
)
from plaudit.data.records import Comparison, Judgement, Ranking, Votes


def make(completions: str, judgement: Judgement, annotator: str | None = None) -> Comparison:
    return Comparison(prompt="p", completions=tuple(completions), judgement=judgement, annotator=annotator)


AB = Ranking(((0,), (1,)))


def test_pairs_are_the_same_in_any_order() -> None:
    found = pair_judgements([make("ab", AB), make("ba", AB), make("ab", Ranking(((0, 1),)))])
    assert [(one.unit, one.value) for one in found] == [
        (("p", "a", "b"), 1),
        (("p", "a", "b"), -1),
        (("p", "a", "b"), 0),
    ]
    votes = pair_judgements([make("ba", Votes((2.0, 1.0)))])
    assert [one.value for one in votes] == [-1, -1, 1]


def test_agreement_by_hand() -> None:
    assert pairwise_agreement([[1, 1, -1], [0, 0]]) == 2 / 4
    assert pairwise_agreement([[1]]) is None


def alpha_by_definition(units: list[list[int]]) -> float:
    """Straight from the formula: loops over ordered pairs, both orientations of each unit."""
    both = [side for unit in units if len(unit) > 1 for side in (unit, [-value for value in unit])]
    values = [value for unit in both for value in unit]
    observed = sum((a - b) ** 2 / (len(unit) - 1) for unit in both for a, b in itertools.permutations(unit, 2))
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


def test_alpha_is_its_definition() -> None:
    generator = random.Random(1)
    units = [[generator.choice([-1, 0, 1, 1]) for _ in range(generator.randint(1, 4))] for _ in range(40)]
    assert krippendorff_alpha(units) == pytest.approx(alpha_by_definition(units), abs=1e-12)


def test_alpha_at_its_extremes() -> None:
    assert krippendorff_alpha([[1, 1], [-1, -1, -1]]) == pytest.approx(1.0)
    assert krippendorff_alpha([[1, -1]] * 50) == pytest.approx(1 - 4 / (80_000 / (200 * 199)))
    assert krippendorff_alpha([[1], [0]]) is None
    generator = random.Random(2)
    chance = krippendorff_alpha([[generator.choice([-1, 1]), generator.choice([-1, 1])] for _ in range(4000)])
    assert chance == pytest.approx(0.0, abs=0.06)


def test_alpha_does_not_depend_on_which_text_is_named_first() -> None:
    units = [[1, 1, -1], [0, 1], [-1, -1], [1, 0, 0]]
    flipped = [units[0], [-1 * value for value in units[1]], units[2], [-1 * value for value in units[3]]]
    assert krippendorff_alpha(units) == pytest.approx(krippendorff_alpha(flipped))


def test_contradictions_and_annotators() -> None:
    records = [make("ab", AB, "x"), make("ba", AB, "y"), make("ab", AB, "z"), make("cd", AB, "x"), make("cd", AB, "x")]
    units = repeated_units(pair_judgements(records))
    assert set(units) == {("p", "a", "b"), ("p", "c", "d")}
    assert len(contradictions(units.values())) == 1
    assert len(one_per_annotator(units[("p", "c", "d")])) == 1
    rates = agreement_by_annotator(units.values())
    assert rates == {"x": (0.5, 2), "y": (0.0, 2), "z": (0.5, 2)}


def test_cycles_need_three_texts_and_a_majority() -> None:
    circle = [make("ab", AB), make("bc", AB), make("ca", AB)]
    ((prompt, texts),) = prompts_with_cycles(pair_judgements(circle))
    assert prompt == "p"
    assert sorted(texts) == ["a", "b", "c"]
    assert prompts_with_cycles(pair_judgements([*circle, make("ac", AB)])) == []
    assert prompts_with_cycles(pair_judgements([make("ab", AB), make("ba", AB)])) == []


def test_find_cycle_matches_brute_force() -> None:
    generator = random.Random(3)
    for _ in range(300):
        nodes = "abcde"
        edges = {(a, b) for a, b in itertools.combinations(nodes, 2) if generator.random() < 0.5}
        edges = {(a, b) if generator.random() < 0.6 else (b, a) for a, b in edges}
        graph: dict[str, list[str]] = {}
        for a, b in edges:
            graph.setdefault(a, []).append(b)
        acyclic = any(all(order.index(a) < order.index(b) for a, b in edges) for order in itertools.permutations(nodes))
        cycle = find_cycle(graph)
        assert bool(cycle) != acyclic
        assert all((a, b) in edges for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True))
