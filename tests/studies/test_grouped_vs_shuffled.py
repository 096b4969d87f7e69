"""The arms of the study must differ in what they say they differ in, and its curves be read where they say."""

from pathlib import Path

import pytest
import torch
from grouped_frozen import Elements, Texts, train_network
from grouped_report import at, best_rate, mean_and_error
from grouped_vs_shuffled import ARMS, curve_of, only, plan_of

from plaudit.data.records import Comparison, Ranking, Scores, preference_pairs
from plaudit.training.objectives import explode_pairs

FOUR = Ranking(((2,), (0,), (3,), (1,)))


def rankings(count: int) -> list[Comparison]:
    return [Comparison(prompt=f"p{n}", completions=("a", "b", "c", "d"), judgement=FOUR) for n in range(count)]


def test_each_control_holds_what_it_is_named_after() -> None:
    plans = {name: plan_of(arm, rankings(32)) for name, arm in ARMS.items()}
    grouped, pairs = plans["grouped"], plans["shuffled-equal-pairs"]
    completions, elements = plans["shuffled-equal-completions"], plans["shuffled-equal-elements"]
    # 32 prompts of six pairs and four completions, 8 prompts a step.
    assert (grouped.elements, grouped.steps_per_epoch, grouped.visits) == (8, 4, 1 / 4)
    assert (pairs.elements, pairs.steps_per_epoch) == (48, 4)
    assert (completions.elements, completions.steps_per_epoch) == (16, 12)
    assert completions.visits == grouped.visits
    assert elements.elements == grouped.elements
    # Every completion stands in K − 1 = 3 pairs, so an epoch of pairs shows it three times.
    assert [p.visits * p.steps_per_epoch for p in (pairs, completions, elements)] == [3.0, 3.0, 3.0]


def test_a_cut_ranking_keeps_the_order_of_what_is_left() -> None:
    record = Comparison(prompt="p", completions=("a", "b", "c"), judgement=FOUR)
    assert only(record, 2).judgement == Ranking(((0,), (1,)))
    scored = Comparison(prompt="p", completions=("a", "b", "c"), judgement=Scores((1.0, 1.5, 4.0)))
    assert only(scored, 3, tie_threshold=1.0).judgement == Ranking(((2,), (0, 1)))
    assert preference_pairs(only(scored, 2, tie_threshold=1.0)) == []


def test_a_curve_is_read_on_lines_between_its_points() -> None:
    curve = [{"step": 2.0, "log_loss": 0.7}, {"step": 4.0, "log_loss": 0.5}]
    assert at(curve, "step", 3)["log_loss"] == pytest.approx(0.6)
    assert at(curve, "step", 1)["log_loss"] == 0.7
    assert at(curve, "step", 9)["log_loss"] == 0.5


def test_the_rate_is_chosen_among_those_that_all_seeds_have() -> None:
    def runs(*lowest: float) -> list[dict[str, list[dict[str, float]]]]:
        return [{"curve": [{"log_loss": 1.0}, {"log_loss": value}]} for value in lowest]

    assert best_rate({0.1: runs(0.5, 0.7), 0.2: runs(0.5, 0.6), 0.3: runs(0.1)}) == 0.2
    assert mean_and_error([1.0, 3.0]) == (2.0, pytest.approx(1.0))


def test_points_stand_where_the_trainer_looked() -> None:
    lines = [
        {"step": 1, "loss": 0.8, "num_tokens": 10.0},
        {"step": 2, "loss": 0.6, "num_tokens": 30.0},
        {"step": 2, "eval/log_loss": 0.65, "eval/accuracy": 0.6},
    ]
    plan = plan_of(ARMS["grouped"], rankings(32))
    (point,) = curve_of(lines, plan)
    assert point == {
        "step": 2,
        "epoch": 0.5,
        "visits": 0.5,
        "tokens": 30.0,
        "log_loss": 0.65,
        "accuracy": 0.6,
        "train_loss": pytest.approx(0.7),
    }


def test_the_small_network_learns_what_the_states_show(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    records = rankings(24)
    quality = torch.tensor([2.0, 0.0, 3.0, 1.0])
    states = torch.randn(96, 5, generator=generator)
    states[:, 0] = quality.repeat(24) + 0.1 * states[:, 1]
    places = {(record.prompt, text): 4 * n + k for n, record in enumerate(records) for k, text in enumerate("abcd")}
    texts = Texts(states, places, [3] * 96, {record.prompt: 10 for record in records})
    held_out = texts.elements(records[16:])
    for arm, elements in (("grouped", records[:16]), ("shuffled-equal-pairs", explode_pairs(records[:16]))):
        inside: Elements = texts.elements(elements)
        plan = plan_of(ARMS[arm], records[:16])
        curve = train_network(states, inside, held_out, plan, rate=3e-2, seed=0)
        assert curve[-1]["accuracy"] == 1.0
        assert curve[-1]["log_loss"] < 0.2
        # A decoder reads a shared prompt once per element: 10 + 4 · 3 tokens a ranking, 10 + 2 · 3 a pair.
        assert curve[-1]["tokens"] == plan.epochs * (16 * 22 if arm == "grouped" else 96 * 16)
