"""Samples in, scores out: plain functions, checks, and what is invalid."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from plaudit.data.records import Message
from plaudit.rewards.base import NonFiniteRewardError, Reward, Sample, Score, as_reward, score_values
from plaudit.rewards.functions import FunctionReward, SampleReward

SAMPLES = [
    Sample("what is 2+2?", "4", columns={"answer": "4"}),
    Sample((Message("system", "be kind"), Message("user", "hello")), "hi there", finished=False),
    Sample("where?", "", columns={"answer": None}),
]


def test_a_plain_function_gets_prompts_completions_and_columns() -> None:
    seen: dict[str, Any] = {}

    def longer(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
        seen.update(columns, prompts=prompts)
        return [float(len(text)) if text else None for text in completions]

    score = as_reward(longer)(SAMPLES)
    assert seen == {
        "prompts": [
            "what is 2+2?",
            [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}],
            "where?",
        ],
        "answer": ["4", None, None],
        "finished": [True, False, True],
    }
    assert score.total[:2].tolist() == [1.0, 8.0]
    assert math.isnan(score.total[2])
    assert score.valid.tolist() == [True, True, False]
    assert list(score.parts) == ["longer"]
    assert score.problems == {2: "longer gave no value"}
    assert isinstance(as_reward(longer), Reward)


def test_a_function_gets_only_what_it_names() -> None:
    def right(completions: list[str], answer: list[str | None]) -> list[float]:
        return [float(text == wanted) for text, wanted in zip(completions, answer, strict=True)]

    assert as_reward(right)(SAMPLES).total.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"'right' asks for \['answer'\]"):
        as_reward(right)([Sample("a", "b")])


def test_conversational_functions_get_messages() -> None:
    def count(completions: list[Any], **columns: Any) -> list[float]:
        return [float(not isinstance(c, str) and len(c[0]["content"])) for c in completions]

    assert as_reward(count, conversational=True)(SAMPLES).total.tolist() == [0.0, 8.0, 0.0]
    assert as_reward(count)(SAMPLES).total.tolist() == [0.0, 0.0, 0.0]


def test_async_functions_with_and_without_a_running_loop() -> None:
    async def slow(prompts: list[Any], completions: list[str], **columns: Any) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if not text else 1.5 for text in completions]

    reward = as_reward(slow)
    assert isinstance(reward, FunctionReward)
    assert reward.waits
    assert reward(SAMPLES).valid.tolist() == [True, True, False]

    async def notebook() -> Score:
        return reward(SAMPLES)

    assert asyncio.run(notebook()).total[:2].tolist() == [1.5, 1.5]


def test_a_coroutine_from_a_plain_function_is_awaited() -> None:
    async def inner(count: int) -> list[float]:
        return [2.0] * count

    assert as_reward(lambda completions: inner(len(completions)))(SAMPLES).total.tolist() == [2.0] * 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_number_that_is_not_finite_stops_and_shows_the_text(bad: float) -> None:
    def broken(completions: list[str]) -> list[float]:
        return [0.0, bad, 1.0]

    with pytest.raises(NonFiniteRewardError) as caught:
        as_reward(broken)(SAMPLES)
    assert all(text in str(caught.value) for text in ("'broken'", "sample 1", "hi there", "user: hello"))


@pytest.mark.parametrize("values", [[1.0], [1.0] * 4, ["1", 2.0, 3.0], [object(), 1.0, 1.0], 3.0])
def test_other_results_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="'odd'"):
        as_reward(lambda completions: values, name="odd")(SAMPLES)


def test_an_error_in_a_function_is_not_swallowed() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        as_reward(broken)(SAMPLES)


def test_numbers_of_every_kind() -> None:
    assert as_reward(lambda completions: torch.tensor([1.0, 2.0, 3.0]))(SAMPLES).total.tolist() == [1.0, 2.0, 3.0]
    assert as_reward(lambda completions: [True, 2, torch.tensor(3.0)])(SAMPLES).total.tolist() == [1.0, 2.0, 3.0]
    assert len(as_reward(lambda completions: [])([]).total) == 0


class Own:
    """Somebody's own reward."""

    def __init__(self, total: Any, spans: Any = None) -> None:
        self.total, self.spans = total, spans

    def __call__(self, samples: Sequence[Sample]) -> Score:
        return Score(torch.tensor(self.total), torch.ones(len(self.total), dtype=torch.bool), spans=self.spans)


def test_own_rewards_are_checked_too() -> None:
    assert as_reward(Own([1.0, 2.0, 3.0]))(SAMPLES).total.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(NonFiniteRewardError, match="'Own'"):
        as_reward(Own([1.0, 2.0, math.nan]))(SAMPLES)
    with pytest.raises(ValueError, match="2 scores for 3 samples"):
        as_reward(Own([1.0, 2.0]))(SAMPLES)
    with pytest.raises(ValueError, match=r"span 0\.\.2 of sample 0"):
        as_reward(Own([1.0, 2.0, 3.0], [[(0, 2, 1.0)], [], []]))(SAMPLES)
    with pytest.raises(NonFiniteRewardError, match="span"):
        as_reward(Own([1.0, 2.0, 3.0], [[(0, 1, math.inf)], [], []]))(SAMPLES)
    with pytest.raises(ValueError, match="must return a Score"):
        as_reward(lambda samples: [1.0] * len(samples))(SAMPLES)


def test_what_is_no_reward() -> None:
    with pytest.raises(ValueError, match="3 is no reward"):
        as_reward(3)


def test_the_remainder_is_what_spans_leave() -> None:
    samples = [Sample("a", "abcdef"), Sample("b", "xy")]
    score = score_values(samples, [2.0, 1.0], name="r", spans=[[(0, 2, 0.5), (2, 4, 0.25)], []])
    assert score.remainder().tolist() == [1.25, 1.0]
    assert score_values(samples, [2.0, 1.0], name="r").remainder().tolist() == [2.0, 1.0]


def test_metrics_leave_invalid_samples_out_and_count_them() -> None:
    score = score_values(SAMPLES, [1.0, 4.0, None], name="r", parts={"x": [1.0, None, None], "y": [None] * 3})
    assert score.metrics() == {
        "reward/mean": 2.5,
        "reward/std": pytest.approx(math.sqrt(4.5)),
        "reward/min": 1.0,
        "reward/max": 4.0,
        "reward/invalid": pytest.approx(1 / 3),
        "reward/x": 1.0,
    }
    # A part that is called as a number of the total does not take its place.
    assert score_values(SAMPLES, [1.0, 4.0, None], name="r", parts={"mean": [9.0] * 3}).metrics()["reward/mean"] == 2.5
    assert score_values(SAMPLES, [None] * 3, name="r").metrics() == {"reward/invalid": 1.0}
    assert SampleReward(lambda s: 1.0, "one")([]).metrics() == {"reward/invalid": 0.0}


@pytest.mark.parametrize(
    ("total", "valid"),
    [
        (torch.zeros(3, 1), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(3), torch.ones(3)),
        (torch.zeros(3), torch.ones(2, dtype=torch.bool)),
    ],
)
def test_scores_of_the_wrong_form_are_refused(total: Any, valid: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        Score(total, valid)
