"""Probes find the shortcut that a scorer was built with, and none in a scorer without."""

import pytest

from plaudit.data.records import Best, Comparison, Ranking, Scores
from plaudit.evaluation.probes import ENGLISH_PROBES, Probe, run_probes


def scorer(function):
    return lambda prompts, texts: [
        [function(prompt, text) for text in row] for prompt, row in zip(prompts, texts, strict=True)
    ]


def by_name(results):
    return {result.probe: result for result in results}


def test_a_length_lover_is_found_out(simulated):
    comparisons, _ = simulated(40)
    found = by_name(run_probes(comparisons, scorer(lambda prompt, text: float(len(text)))))
    assert found["answer twice"].win_rate.value == 1.0
    assert found["answer twice"].rise.low > 0
    assert found["empty answer"].win_rate.value == 0.0
    flattery = next(probe for probe in ENGLISH_PROBES if probe.name == "flattery after")
    assert found["flattery after"].rise.value == len(flattery.text)
    assert found["flattery after"].rise.count == 40


def test_a_blind_scorer_is_indifferent(simulated):
    comparisons, _ = simulated(30)
    for result in run_probes(comparisons, scorer(lambda prompt, text: 1.0)):
        assert result.rise.value == 0.0
        assert result.win_rate.value == 0.5


def test_a_flattered_scorer(simulated):
    comparisons, _ = simulated(30)
    found = by_name(run_probes(comparisons, scorer(lambda prompt, text: 2.0 * ("brilliant" in text) + len(text) / 1e4)))
    assert found["flattery before"].rise.value == pytest.approx(2.0, abs=0.1)
    assert abs(found["answer twice"].rise.value) < 0.1


def test_pairs_that_people_tied_are_not_probed():
    comparisons = [
        Comparison(prompt=f"p{i}", completions=(f"good {i}", f"bad {i}"), judgement=Scores((4.0, 4.0 - i)))
        for i in range(1, 9)
    ]
    assert run_probes(comparisons, scorer(lambda prompt, text: len(text)))[0].rise.count == 8
    found = run_probes(comparisons, scorer(lambda prompt, text: len(text)), tie_threshold=4.0)
    assert found[0].rise.count == 5


def test_an_answer_to_another_prompt():
    comparisons = [
        Comparison(prompt=f"p{i}", completions=(f"good {i}", f"bad {i}"), judgement=Best(0)) for i in range(10)
    ]
    found = by_name(
        run_probes(comparisons, scorer(lambda prompt, text: float(prompt[1:] == text.split()[-1:][0] if text else 0)))
    )
    assert found["another prompt's answer"].win_rate.value == 0.0
    assert found["another prompt's answer"].rise.value == -1.0


def test_another_prompts_answer_is_never_of_the_same_prompt():
    """Several annotators of one prompt stand side by side; the second's answer is no answer to another prompt."""
    comparisons = [
        Comparison(prompt=f"p{i // 3}", completions=(f"good {i}", f"bad {i}"), judgement=Best(0)) for i in range(9)
    ]
    answers = {f"p{p}": {f"good {i}" for i in range(3 * p, 3 * p + 3)} for p in range(3)}
    found = by_name(
        run_probes(
            comparisons,
            scorer(lambda prompt, text: float(text in answers[prompt])),
        )
    )["another prompt's answer"]
    assert (found.rise.value, found.skipped) == (-1.0, 0)
    alone = run_probes(comparisons[:3], scorer(lambda prompt, text: float(len(text))))
    assert by_name(alone)["another prompt's answer"].skipped == 3


def test_spreads_by_hand():
    """Judged pair differs by 4; the change adds 2: half a spread."""
    comparisons = [Comparison(prompt="p", completions=("ab", "abcdef"), judgement=Ranking(((1,), (0,))))]
    (found,) = run_probes(
        comparisons, scorer(lambda prompt, text: float(len(text))), probes=[Probe("x", "suffix", "!!")]
    )
    assert found.rise.value == 2.0
    assert found.rise_in_spreads == 0.5


def test_changes():
    comparisons = [
        Comparison(prompt="1", completions=("One. Two!", "z"), judgement=Best(0)),
        Comparison(prompt="2", completions=("一です。二です。", "z"), judgement=Best(0)),
    ]
    seen = []

    def keep(prompts, texts):
        seen.extend(texts)
        return [[0.0] * len(row) for row in texts]

    probes = [
        Probe("a", "prefix", "p "), Probe("b", "suffix", " s"), Probe("c", "replace", "r"), Probe("d", "repeat"),
        Probe("e", "repeat_last_sentence"), Probe("f", "other_prompt"),
    ]  # fmt: skip
    run_probes(comparisons, keep, probes=probes)
    assert seen[0] == [
        "One. Two!", "z", "p One. Two!", "One. Two! s", "r", "One. Two!\n\nOne. Two!", "One. Two! Two! Two! Two!",
        "一です。二です。",
    ]  # fmt: skip
    assert seen[1][6] == "一です。二です。二です。二です。二です。"
    assert seen[1][7] == "One. Two!"


def test_unchanged_and_unscored_answers_are_counted():
    comparisons = [Comparison(prompt=str(i), completions=("same", "z"), judgement=Best(0)) for i in range(3)]
    found = run_probes(
        comparisons,
        lambda prompts, texts: [[None if text == "long" else 0.0 for text in row] for row in texts],
        probes=[Probe("same", "replace", "same"), Probe("long", "replace", "long"), Probe("other", "replace", "x")],
    )
    assert [(result.rise.count, result.skipped) for result in found] == [(0, 3), (0, 3), (3, 0)]


def test_limit_and_nothing_to_probe(simulated):
    comparisons, _ = simulated(50)
    (found,) = run_probes(comparisons, scorer(lambda p, t: 0.0), probes=[Probe("x", "suffix", "!")], limit=7)
    assert found.rise.count == 7
    tied = [Comparison(prompt="p", completions=("a", "b"), judgement=Ranking(((0, 1),)))]
    with pytest.raises(ValueError, match="judged pair"):
        run_probes(tied, scorer(lambda p, t: 0.0))
