"""Rewards from a configuration, and spans on the policy's tokens."""

from typing import Any

import pytest
import torch

from plaudit.configs.base import load_config
from plaudit.configs.rewards import RewardsConfig
from plaudit.rewards.base import Sample, Score, score_values
from plaudit.rewards.build import build_reward
from plaudit.rewards.spans import token_rewards

SAMPLES = [Sample("p", "one two"), Sample("p", "one two three four")]


def built(**values: Any) -> Score:
    return build_reward(load_config(RewardsConfig, overrides=values))(SAMPLES)


def test_a_sum_as_configured() -> None:
    parts = {
        "brief": {"reward": "length_penalty=1", "weight": 0.5, "clip": [-3, 0]},
        "long": {"reward": "target_length", "options": {"target": 4}, "weight": 0.0},
    }
    score = built(parts=parts)
    assert score.total.tolist() == [-1.0, -1.5]
    assert score.parts["long"].tolist() == [0.5, 1.0]
    assert score.parts["brief/brief"].tolist() == [-2.0, -4.0]
    assert built(parts=parts, clip=[-1.2, 0]).total.tolist() == pytest.approx([-1.0, -1.2])


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("running", [1.0, -1.0]),
        ("running_scale", [-2.0, -4.0]),
        ("group", [2**-0.5, -(2**-0.5)]),
        ("group_mean", [1.0, -1.0]),
        ("rank", [1.0, -1.0]),
    ],
)
def test_normalisers_by_name(kind: str, wanted: list[float]) -> None:
    part = {"reward": "length_penalty=1", "normalise": kind}
    assert built(parts={"brief": part}).total.tolist() == pytest.approx(wanted)
    plain = {"reward": "length_penalty=1"}
    assert built(parts={"brief": plain}, normalise=kind).total.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": {}}, "at least one reward"),
        ({"parts": {"a": {"reward": "mtld", "weight": 0}}}, "at least one reward"),
        ({"parts": {"a": {"reward": "mtld", "clip": [1, 1]}}}, "below the second"),
        ({"parts": {"a": {"reward": "mtld"}}, "normalise": "stored"}, "set it on that part"),
        ({"parts": {"a": {"reward": "mtld", "normalise": "stored"}}}, "needs a reward model"),
        ({"parts": {"a": {"reward": "mtld", "wieght": 1}}}, "wieght: unknown key"),
    ],
)
def test_configurations_that_mean_nothing(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(**values)


def test_spans_are_earned_by_the_token_that_ends_them() -> None:
    # "abcdef" as ab|c|def|end, spans "abc" and "ab" and the empty one at the start.
    samples = [Sample("p", "abcdef"), Sample("p", "x")]
    score = score_values(samples, [2.0, 1.0], name="r", spans=[[(0, 3, 0.5), (0, 2, 0.25), (0, 0, 0.125)], []])
    rewards = token_rewards(score, 0, [2, 3, 6, 6])
    assert rewards.tolist() == [0.375, 0.5, 0.0, 1.125]
    assert float(rewards.sum()) == 2.0
    assert token_rewards(score, 1, [1, 1]).tolist() == [0.0, 1.0]
    # Other tokens, the same sum; a span that ends within a token waits for it.
    assert token_rewards(score, 0, [1, 4, 6]).tolist() == [0.125, 0.75, 1.125]


def test_spans_without_place() -> None:
    score = score_values([Sample("p", "abc"), Sample("p", "d")], [1.0, None], name="r", spans=[[(0, 3, 1.0)], []])
    # The text was decoded a little longer than its tokens say: the last token earns it.
    assert token_rewards(score, 0, [1, 2]).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="no valid reward: r gave no value"):
        token_rewards(score, 1, [1])
    for ends in ([], [2, 1]):
        with pytest.raises(ValueError, match="token_ends"):
            token_rewards(score, 0, ends)
    assert torch.isfinite(token_rewards(score, 0, [3])).all()
