"""The benchmark's rules against numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pytest

from plaudit.data.records import Best, Comparison, Labels, Ranking
from plaudit.evaluation.rewardbench import SECTIONS, rewardbench, rewardbench_1, rewardbench_2, ties_score


def pair(subset, **more):
    return Comparison(prompt="q", completions=("a", "b"), judgement=Best(0), subset=subset, **more)


def test_version_1_weights_mathematics_like_all_of_code():
    weights = SECTIONS["Reasoning"]
    assert weights["math-prm"] == sum(value for name, value in weights.items() if name != "math-prm") == 984
    assert [len(subsets) for subsets in SECTIONS.values()] == [5, 6, 5, 7]


def test_version_1_by_hand():
    comparisons = [pair("math-prm"), pair("math-prm"), pair("hep-go"), pair("hep-rust"), pair("mt-bench-easy")]
    scores = [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5], [2.0, 1.0]]
    found = rewardbench_1(comparisons, scores)
    assert found.subsets["math-prm"] == (0.5, 2)
    assert found.subsets["hep-rust"] == (0.0, 1)  # equal scores do not count here
    assert found.sections["Reasoning"] == pytest.approx((0.5 * 984 + 1.0 * 164 + 0.0) / (984 + 2 * 164))
    assert found.sections["Chat"] == 1.0
    assert found.score is None
    assert "alpacaeval-hard" in found.missing
    assert len(found.missing) == 19


def test_version_1_final_score_and_prior_sets():
    comparisons = [pair(name) for subsets in SECTIONS.values() for name in subsets]
    scores = [[1.0, 0.0] if c.subset not in SECTIONS["Safety"] else [0.0, 1.0] for c in comparisons]
    assert rewardbench_1(comparisons, scores).score == pytest.approx(0.75)
    prior = [pair("shp"), pair("summarize")]
    with_prior = rewardbench_1(comparisons + prior, [*scores, [1.0, 0.0], [0.0, 1.0]])
    assert with_prior.score == pytest.approx((2 * 3 + 0.5) / 9)


def ties(name, right, wrong):
    size = right + wrong
    return Comparison(
        prompt="q",
        completions=tuple("abcdefghijkl"[:size]),
        judgement=Labels(tuple(slot < right for slot in range(size))),
        subset="Ties",
        id=name,
    )


def test_ties_by_hand():
    """Prompt 0: right 5, 4; wrong 1; alone 3 over 2. Prompt 1: right 5, 1; wrong 2; alone 1 over 0."""
    comparisons = [ties("ref:0", 1, 1), ties("tied:0", 2, 1), ties("ref:1", 1, 1), ties("tied:1", 2, 1)]
    scores = [[3.0, 2.0], [5.0, 4.0, 1.0], [1.0, 0.0], [5.0, 1.0, 2.0]]
    found = rewardbench_2(comparisons, scores)
    # tied apart: 3, -1; spread: 1, 4; ref apart: 1, 1
    margin = np.mean([np.tanh(1 / 1 - 1), np.tanh(-1 / 4 - 1)])
    assert found.parts["tied_accuracy"] == 0.5
    assert found.parts["ref_accuracy"] == 1.0
    assert found.parts["correctness_preferred"] == 0.5  # 3 > 1, not -1 > 4
    assert found.parts["correctness_preferred_hard"] == 0.0  # min(1, 3) > 1 is false
    expected = 0.3 * 0.5 + 0.3 * 1 + 0.2 * 0.5 + 0.2 * 0 + 0.01 * margin
    assert found.subsets["Ties"] == (pytest.approx(expected), 4)


def test_ties_extremes():
    perfect = ties_score([("ref:0", [9.0], [0.0]), ("tied:0", [9.0, 9.0], [0.0])])
    assert perfect["score"] == pytest.approx(1.01)  # 9 / 0 counts as tanh(inf)
    constant = ties_score([("ref:0", [1.0], [1.0]), ("tied:0", [1.0, 1.0], [1.0])])
    assert constant["score"] == 0.0  # 0 / 0 counts 0
    alone = ties_score([("ref:0", [1.0], [0.0])])
    assert alone["score"] == pytest.approx(0.3)


def test_version_2_by_hand():
    four = {"prompt": "q", "completions": tuple("abcd"), "judgement": Ranking(((0,), (1, 2, 3)))}
    comparisons = [
        Comparison(**four, subset="Math"),
        Comparison(**four, subset="Math"),
        Comparison(**four, subset="Focus"),
    ]
    found = rewardbench_2(comparisons, [[2.0, 2.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [3.0, 1.0, 0.0, 0.0]])
    assert found.subsets == {"Math": (0.25, 2), "Focus": (1.0, 1)}
    assert found.score is None
    assert found.missing == ("Factuality", "Precise IF", "Safety", "Ties")


def test_version_2_final_score_is_the_plain_mean():
    four = {"prompt": "q", "completions": tuple("abcd"), "judgement": Best(0)}
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus")
    comparisons = [Comparison(**four, subset=name) for name in names for _ in range(3)]
    scores = [[1.0, 0.0, 0.0, 0.0]] * 12 + [[0.0, 1.0, 0.0, 0.0]] * 3
    found = rewardbench_2([*comparisons, ties("ref:0", 1, 1)], [*scores, [1.0, 0.0]])
    assert found.score == pytest.approx((4 + 0.3) / 6)


@pytest.mark.parametrize(
    ("version", "comparison", "scores", "message"),
    [
        (1, pair(None), [1.0, 0.0], "no 'subset'"),
        (1, pair("hep-go"), [1.0], "2 finite scores"),
        (1, pair("hep-go"), [1.0, float("nan")], "finite"),
        (1, ties("x", 2, 1), [1.0, 0.0, 0.0], "one chosen"),
        (2, ties("7", 1, 1), [1.0, 0.0], "'ref:<number>'"),
        (3, pair("hep-go"), [1.0, 0.0], "versions 1 and 2"),
    ],
)
def test_wrong_files_are_refused(version, comparison, scores, message):
    with pytest.raises(ValueError, match=message):
        rewardbench(version, [comparison], [scores])


def test_intervals_redraw_whole_prompts():
    """Two records of each of 30 prompts, always alike: half as much is known as from 60 prompts."""
    rng = np.random.default_rng(0)
    wins = rng.random(30) < 0.7
    twice = [pair("hep-go", id=str(index)) for index in range(60)]
    twice = [replace(each, prompt=f"q{index // 2}") for index, each in enumerate(twice)]
    scores = [[1.0, 0.0] if wins[index // 2] else [0.0, 1.0] for index in range(60)]
    options = {"resamples": 4000, "seed": 3}
    clustered = rewardbench_1(twice, scores, **options).intervals["hep-go"]
    apart = rewardbench_1(twice, scores, cluster_by="record", **options).intervals["hep-go"]
    share = wins.mean()
    for (low, high), count in ((clustered, 30), (apart, 60)):
        # The percentile interval of a binomial share.
        expected = np.quantile(rng.binomial(count, share, 200_000) / count, [0.025, 0.975], method="inverted_cdf")
        assert (low, high) == pytest.approx(tuple(expected), abs=1 / count + 1e-9)
    assert clustered[1] - clustered[0] > 1.25 * (apart[1] - apart[0])
    assert not rewardbench_1(twice, scores).intervals


def test_intervals_of_ties_redraw_a_prompt_with_both_of_its_forms():
    """Every prompt has `ref` right and `tied` wrong, or both right: parts move together, whatever is drawn."""
    comparisons, scores = [], []
    for number in range(12):
        comparisons += [ties(f"ref:{number}", 1, 1), ties(f"tied:{number}", 2, 1)]
        scores += [[1.0, 0.0] if number % 2 else [0.0, 1.0], [9.0, 9.0, 1.0] if number % 2 else [9.0, 9.0, 10.0]]
    found = rewardbench_2(comparisons, scores, resamples=500)
    low, high = found.intervals["Ties"]
    # The score of a draw is the share of odd numbers times 1.01, less 0.01 for each even one.
    shares = np.arange(13) / 12
    possible = 1.01 * shares - 0.01 * (1 - shares)
    assert min(abs(possible - low)) < 1e-12
    assert min(abs(possible - high)) < 1e-12
    assert low < found.subsets["Ties"][0] < high
    assert "score" not in found.intervals


def test_intervals_of_sections_and_of_the_final_score_hold_them():
    names = [name for subsets in SECTIONS.values() for name in subsets]
    comparisons = [replace(pair(name), prompt=f"{name} {n}") for name in names for n in range(8)]
    rng = np.random.default_rng(1)
    scores = [[float(value), 0.5] for value in rng.random(len(comparisons))]
    found = rewardbench(1, comparisons, scores, resamples=300)
    for name, value in [("score", found.score), *found.sections.items()]:
        low, high = found.intervals[name]
        assert low < value < high
    low, high = found.intervals["score"]
    # Four independent sections: narrower than each of them.
    assert all(high - low < b - a for name in found.sections for a, b in [found.intervals[name]])
    assert len(found.intervals) == 23 + 4 + 1
