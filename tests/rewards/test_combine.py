"""Sums of rewards, their parts, limits and normalisers."""

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plaudit.rewards.base import NonFiniteRewardError, Sample, Score, as_reward
from plaudit.rewards.combine import clipped, combine
from plaudit.rewards.normalise import Normaliser, PerGroup, Ranks, Running, Stored, normalised, without_updates

SAMPLES = [Sample(f"p{n // 2}", "x" * n) for n in range(4)]


def fixed(values: list[float | None]) -> Callable[..., list[float | None]]:
    return lambda completions: values[: len(completions)]


def score_of(values: list[float | None], spans: Any = None) -> Score:
    numbers = torch.tensor([math.nan if v is None else v for v in values])
    return Score(numbers, ~numbers.isnan(), {"raw": numbers}, spans)


def listed(values: torch.Tensor) -> list[float | None]:
    return [None if math.isnan(value) else round(value, 5) for value in values.tolist()]


def test_a_weighted_sum_keeps_its_parts() -> None:
    reward = combine({"helpful": (fixed([1.0, 2.0, 3.0, 4.0]), 1.0), "brief": (fixed([10.0, 0.0, -10.0, 5.0]), 0.2)})
    score = reward(SAMPLES)
    assert listed(score.total) == [3.0, 2.0, 1.0, 5.0]
    assert {name: listed(part) for name, part in score.parts.items()} == {
        "helpful": [1.0, 2.0, 3.0, 4.0],
        "brief": [10.0, 0.0, -10.0, 5.0],
    }


def test_what_one_part_lacks_is_invalid_or_skipped_but_never_0() -> None:
    rewards = {"a": fixed([1.0, None, 3.0, None]), "b": (fixed([1.0, 1.0, None, None]), 2.0)}
    score = combine(rewards)(SAMPLES)
    assert listed(score.total) == [3.0, None, None, None]
    assert listed(score.parts["a"]) == [1.0, None, 3.0, None]
    assert score.problems == {
        1: "a: a gave no value",
        2: "b: b gave no value",
        3: "a: a gave no value; b: b gave no value",
    }
    score = combine(rewards, missing="skip")(SAMPLES)
    assert listed(score.total) == [3.0, 2.0, 3.0, None]
    assert set(score.problems) == {3}


def test_a_reward_without_weight_is_only_logged() -> None:
    score = combine({"a": fixed([1.0, 2.0]), "watched": (fixed([None, 5.0]), 0.0)})(SAMPLES[:2])
    assert listed(score.total) == [1.0, 2.0]
    assert listed(score.parts["watched"]) == [None, 5.0]


def test_sums_of_sums_keep_the_inner_parts() -> None:
    inner = combine({"x": fixed([1.0, 2.0]), "y": fixed([3.0, 4.0])})
    score = combine({"inner": (inner, 0.5), "z": fixed([1.0, 1.0])})(SAMPLES[:2])
    assert listed(score.total) == [3.0, 4.0]
    assert {name: listed(part) for name, part in score.parts.items()} == {
        "inner": [4.0, 6.0],
        "inner/x": [1.0, 2.0],
        "inner/y": [3.0, 4.0],
        "z": [1.0, 1.0],
    }


def test_spans_are_weighted_and_the_rest_is_earned_at_the_end() -> None:
    def piecewise(samples: list[Sample]) -> Score:
        return score_of([1.0] * len(samples), [[(0, len(s.completion), 0.75)] for s in samples])

    score = combine({"steps": (piecewise, 2.0), "end": fixed([10.0] * 4)})(SAMPLES)
    assert score.spans == [[(0, n, 1.5)] for n in range(4)]
    assert listed(score.remainder()) == [10.5] * 4


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "no reward with a weight"),
        ({"a": (fixed([1.0]), 0.0)}, "no reward with a weight"),
        ({"a": (fixed([1.0]), math.nan)}, "weight of reward 'a' is nan"),
        ({"a": (fixed([1.0]), "2")}, "weight of reward 'a' is '2'"),
        ({"a/b": fixed([1.0])}, "'a/b'"),
        ({"mean": fixed([1.0])}, "'mean': in the logs it would hide"),
    ],
)
def test_sums_that_mean_nothing(rewards: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        combine(rewards)


def test_a_sum_that_overflows_stops() -> None:
    with pytest.raises(NonFiniteRewardError, match="a \\+ b"):
        combine({"a": (fixed([3e38]), 1.0), "b": (fixed([3e38]), 1.0)})(SAMPLES[:1])


def test_rewards_that_wait_wait_together() -> None:
    # Nobody answers before all five have been asked.
    meeting = threading.Barrier(5)

    async def slow(completions: list[str]) -> list[float]:
        await asyncio.to_thread(meeting.wait, 20)
        return [1.0] * len(completions)

    score = combine({name: as_reward(slow) for name in "abcde"})(SAMPLES)
    assert listed(score.total) == [5.0] * 4


def test_limits() -> None:
    score = clipped(fixed([-5.0, 0.5, None, 9.0]), -1, 2, name="r")(SAMPLES)
    assert listed(score.total) == [-1.0, 0.5, None, 2.0]
    assert listed(score.parts["r"]) == [-5.0, 0.5, None, 9.0]
    with pytest.raises(ValueError, match="limits 1 and 1"):
        clipped(fixed([1.0]), 1, 1)


def test_stored_mean_and_spread() -> None:
    score = Stored(2.0, 4.0)(score_of([2.0, 6.0, None], [[(0, 0, 2.0)], [], []]))
    assert listed(score.total) == [0.0, 1.0, None]
    # The shift is borne by the last token: 0 = 2/4 of the span + the rest.
    assert score.spans == [[(0, 0, 0.5)], [], []]
    assert listed(score.remainder()) == [-0.5, 1.0, None]
    with pytest.raises(ValueError, match="std above 0"):
        Stored(0.0, 0.0)


def test_running_statistics_are_those_of_everything_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, generator=generator, dtype=torch.float64) * 3 + 7
    running = Running()
    for part in values.split([1, 9, 20, 0, 20]):
        running.take_in(part)
    assert running.count == 50
    assert running.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert running.std == pytest.approx(float(values.std(correction=0)), rel=1e-12)


def test_running_whitening_with_and_without_shift() -> None:
    values: list[float | None] = [1.0, 2.0, None, 6.0]
    std = math.sqrt(14 / 3)  # mean 3, squares 4 + 1 + 9
    assert listed(Running()(score_of(values)).total) == [round((v - 3) / std, 5) if v else None for v in values]
    unshifted = Running(shift=False)(score_of(values)).total
    assert listed(unshifted) == [round(v / std, 5) if v else None for v in values]


def test_equal_rewards_are_not_blown_up() -> None:
    assert listed(Running()(score_of([5.0, 5.0])).total) == [0.0, 0.0]
    assert listed(Running(shift=False)(score_of([5.0])).total) == [5.0]


def test_per_prompt_groups() -> None:
    ids = torch.tensor([7, 7, 3, 3, 7, 9, 3, 3])
    score = score_of([1.0, 3.0, 10.0, 10.0, None, 4.0, None, 10.0])
    wanted = [-1 / math.sqrt(2), 1 / math.sqrt(2), 0.0, 0.0, None, None, None, 0.0]
    result = PerGroup()(score, ids)
    assert listed(result.total) == [None if w is None else round(w, 5) for w in wanted]
    assert result.valid.tolist() == [True, True, True, True, False, False, False, True]
    assert "no other valid sample" in result.problems[5]
    assert listed(PerGroup(scale=False)(score, ids).total) == [-1.0, 1.0, 0.0, 0.0, None, None, None, 0.0]
    with pytest.raises(ValueError, match="group_ids"):
        PerGroup()(score, ids[:3])


def test_ranks() -> None:
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    score = score_of([5.0, 1.0, 1.0, 1e4, 2.0, None, 1.0])
    assert listed(Ranks()(score, ids).total) == [0.33333, -0.66667, -0.66667, 1.0, None, None, None]
    both = Ranks(within="batch")(score_of([3.0, 1.0, 2.0]))
    assert listed(both.total) == [1.0, -1.0, 0.0]
    normal = Ranks(within="batch", shape="normal")(score_of([3.0, 1.0]))
    assert listed(normal.total) == [0.67449, -0.67449]  # the quartiles of a normal distribution
    # Blind to scale and shift.
    again = Ranks()(score_of([-1e3, -1e4, -1e4, 0.0, 2.0, None, 1.0]), ids)
    assert listed(again.total) == listed(Ranks()(score, ids).total)


@pytest.mark.parametrize("make", [lambda: Stored(1.0, 2.0), Running, lambda: Running(shift=False), PerGroup, Ranks])
def test_state_goes_through_a_checkpoint(make: Callable[[], Normaliser], tmp_path: Any) -> None:
    first, again = make(), make()
    first(score_of([1.0, 2.0, 8.0]))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    score = score_of([3.0, 5.0, -1.0])
    assert torch.equal(first(score).total, again(score).total)
    other = Ranks() if isinstance(first, Stored) else Stored(0.0)
    with pytest.raises(ValueError, match="saved state"):
        other.load_state_dict(first.state_dict())


def test_a_shifting_state_is_not_taken_by_one_that_does_not() -> None:
    with pytest.raises(ValueError, match="shift"):
        Running(shift=False).load_state_dict(Running().state_dict())


def test_normalised_rewards_in_a_sum_and_their_state() -> None:
    def build() -> Any:
        return combine(
            {"a": (normalised(fixed([1.0, 3.0, 5.0, 9.0]), Running(), name="a"), 1.0), "b": fixed([0.0] * 4)}
        )

    reward, again = build(), build()
    first = reward(SAMPLES)
    assert listed(first.parts["a/a"]) == [1.0, 3.0, 5.0, 9.0]
    assert listed(first.parts["a"])[0] == round((1 - 4.5) / math.sqrt(8.75), 5)
    again.load_state_dict(reward.state_dict())
    assert torch.equal(again(SAMPLES[:3]).total, reward(SAMPLES[:3]).total)
    with pytest.raises(ValueError, match="those with a state"):
        combine({"c": fixed([1.0])}).load_state_dict(reward.state_dict())


def test_the_prompt_is_the_group() -> None:
    reward = normalised(fixed([1.0, 3.0, 10.0, 10.0]), PerGroup(scale=False))
    assert listed(reward(SAMPLES).total) == [-1.0, 1.0, 0.0, 0.0]


def test_evaluation_does_not_move_running_statistics() -> None:
    reward = combine({"a": clipped(normalised(fixed([1.0, 3.0]), Running()), -3, 3)})
    reward(SAMPLES[:2])
    before = reward.state_dict()
    with without_updates(reward):
        reward(SAMPLES[:1])
    assert reward.state_dict() == before
    reward(SAMPLES[:1])
    assert reward.state_dict() != before


def test_equal_rewards_that_float32_cannot_average_give_0() -> None:
    same = Score(torch.full((7,), 123456.79), torch.ones(7, dtype=torch.bool))
    assert PerGroup()(same).total.tolist() == [0.0] * 7


def test_the_state_of_a_reward_of_ones_own_is_saved_too() -> None:
    class Counting:
        def __call__(self, samples: Any) -> Score:
            return Score(torch.zeros(len(samples)), torch.ones(len(samples), dtype=torch.bool))

        def state_dict(self) -> dict[str, int]:
            return {"seen": 3}

        def load_state_dict(self, state: Any) -> None:
            self.loaded = dict(state)

    own = Counting()
    reward = combine({"own": own, "rule": lambda prompts, completions: [1.0] * len(prompts)})
    assert reward.state_dict() == {"own": {"seen": 3}}
    reward.load_state_dict({"own": {"seen": 5}})
    assert own.loaded == {"seen": 5}
    whole = normalised(own, Running())
    assert whole.state_dict()["reward"] == {"seen": 3}
    whole.load_state_dict({**whole.state_dict(), "reward": {"seen": 9}})
    assert own.loaded == {"seen": 9}
