"""Exploration: each part on a problem that is solved with it and not without it."""

import copy
import statistics

import pytest
import torch

from plaudit.algorithms.agents import build_agent
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.curious import CuriousAgent, build_bonus
from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.bonus import CountBonusConfig, DistillationBonusConfig
from plaudit.configs.gym import GymConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.trajectory import new_trajectory
from studies.exploration import AGENTS, BONUSES, crossings
from tests.algorithms.problems import TwoArms

NAMES = {"nothing": "nothing", "count": "counts", "rnd": "random network distillation"}


def corridor(agent, kind, *, seed=0):
    """How often the end of the corridor was reached, and whether the greedy policy gets there."""
    config, length, steps = AGENTS[agent]
    return crossings(config, BONUSES[NAMES[kind]], length=length, steps=steps, seed=seed)


def expect_found(kind, reached, greedy, *, often):
    if kind == "nothing":
        assert reached <= 3  # its greedy policy may be "always right" by chance, for nothing was learned
    else:
        assert reached > often
        assert greedy


@pytest.mark.parametrize("kind", NAMES)
def test_the_end_of_a_corridor_is_found_with_a_bonus_and_not_without(kind):
    expect_found(kind, *corridor("PPO", kind), often=40)


@pytest.mark.slow
@pytest.mark.parametrize("kind", NAMES)
def test_it_is_found_on_every_seed(kind):
    for seed in range(1, 5):
        expect_found(kind, *corridor("PPO", kind, seed=seed), often=40)


@pytest.mark.slow
def test_an_agent_with_a_replay_learns_the_way_on_every_seed_with_counts_alone():
    """Ten cells are few enough to be crossed by chance on some seeds, so medians over seeds are compared."""
    found = {kind: [corridor("Double DQN", kind, seed=seed) for seed in range(5)] for kind in ("nothing", "count")}
    often = {kind: statistics.median(reached for reached, _ in each) for kind, each in found.items()}
    assert often["nothing"] <= 3
    assert often["count"] > 40
    assert all(greedy for _, greedy in found["count"])
    assert not all(greedy for _, greedy in found["nothing"])


def play_arms(config, steps, seed):
    """A trained agent of the choice between 0.5 and 1."""
    agent = build_agent(config, TaskSizes(1, 2), total_steps=steps, seed=seed)
    collector = Collector(make_environments(TwoArms, agent.num_environments), seed=seed)
    while collector.num_steps_taken < steps:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    return agent


@pytest.mark.parametrize(
    ("exploration", "wanted"),
    [({"exploration_start": 0.0, "exploration_end": 0.0}, "some"), ({"exploration_end": 0.1}, "all"),
     ({"exploration": "boltzmann", "exploration_end": 0.1}, "all")],
)  # fmt: skip
def test_without_exploration_an_agent_may_stay_with_the_worse_arm(exploration, wanted):
    config = QLearningConfig(
        learning_starts=0, rollout_steps=16, gradient_steps=8, batch_size=16, hidden=(8,), learning_rate=0.05,
        exploration_fraction=1.0, **exploration,
    )  # fmt: skip
    agents = [play_arms(config, 96, seed) for seed in range(5)]
    best = [int(agent.greedy_policy().sample(torch.zeros(1, dtype=torch.int64)).actions) for agent in agents]
    assert (sum(best) == 5) == (wanted == "all")


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_an_entropy_bonus_leaves_the_softmax_of_the_rewards(coefficient):
    """`E[r] + c H(π)` is largest at `π ∝ exp(r / c)`: here `π(better) = σ(0.5 / c)`, and 1 without a bonus."""
    config = PolicyGradientConfig(
        name="a2c", hidden=(8,), learning_rate=0.05, optimizer="adam", schedule="linear", rollout_steps=16,
        entropy_coefficient=coefficient,
    )  # fmt: skip
    agent = play_arms(config, 60 * 8 * 16, seed=0)
    better = agent.policy.network.logits(torch.ones(1, 1)).softmax(-1)[0, 1].item()
    wanted = 1.0 if coefficient == 0 else 1 / (1 + torch.tensor(-0.5 / coefficient).exp().item())
    assert better == pytest.approx(wanted, abs=0.03)


def test_counts_by_hand():
    counts = build_bonus(CountBonusConfig(scale=2.0), TaskSizes(4, 2))
    seen = torch.tensor([[0, 1, 0], [0, 0, 3]])
    assert counts.pay(seen).tolist() == [  # both rows step together, the first row first
        pytest.approx([2 / 1, 2 / 1, 2 / 4**0.5]),
        pytest.approx([2 / 2**0.5, 2 / 3**0.5, 2 / 1]),
    ]
    other = build_bonus(CountBonusConfig(scale=2.0), TaskSizes(4, 2))
    other.load_state_dict(copy.deepcopy(counts.state_dict()))
    assert torch.equal(other.pay(seen), counts.pay(seen))
    points = build_bonus(CountBonusConfig(decimals=1), TaskSizes(2, 2))
    near = points.pay(torch.tensor([[[0.11, -1.0], [0.12, -1.01], [0.2, -1.0]]]))
    assert near[0].tolist() == pytest.approx([0.1, 0.1 / 2**0.5, 0.1])


def test_distillation_pays_what_is_new_and_less_and_less_for_the_rest():
    config = DistillationBonusConfig(learning_rate=0.003)
    rnd = build_bonus(config, TaskSizes(2, 2))
    generator = torch.Generator().manual_seed(0)
    often = torch.randn(4, 16, 2, generator=generator)
    first = rnd.pay(often)
    assert first.shape == (4, 16)
    assert first.mean().item() == pytest.approx(0.1)  # as new as they were on average so far: themselves
    for _ in range(60):
        paid = rnd.pay(torch.randn(4, 16, 2, generator=generator))
    assert paid.mean() < 0.02
    state = copy.deepcopy(rnd.state_dict())
    rare = rnd.pay(torch.full((1, 1, 2), 4.0))
    assert rare > 5 * paid.mean()
    again = build_bonus(config, TaskSizes(2, 2), seed=9)
    again.load_state_dict(state)
    assert torch.equal(again.pay(torch.full((1, 1, 2), 4.0)), rare)
    # Units do not matter: observations are standardised.
    small, large = (build_bonus(config, TaskSizes(2, 2)) for _ in range(2))
    assert torch.allclose(small.pay(often), large.pay(1000 * often + 5), atol=1e-5)


def test_distillation_by_hand():
    """Standardised by all that was seen so far; paid by the error before anything is learned from it."""
    rnd, seen = build_bonus(DistillationBonusConfig(scale=2.0), TaskSizes(2, 2)), []
    rnd.target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batches = torch.randn(2, 3, 4, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([[[[0.0]]], [[[3.0]]]])
    errors = []
    for number, batch in enumerate(batches):
        known = batches[: number + 1].reshape(-1, 2)
        standard = (batch - known.mean(0)) / known.std(0, correction=0)
        error = (rnd.predictor(standard) - rnd.target(standard)).square().mean(-1).detach()
        errors.append(error)
        seen.clear()
        paid = rnd.pay(batch)
        torch.testing.assert_close(seen[0], standard)
        torch.testing.assert_close(paid, 2 * error / torch.stack(errors).mean())


def test_distillation_limits_what_is_far_away():
    rnd, seen = build_bonus(DistillationBonusConfig(), TaskSizes(2, 2)), []
    rnd.target.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    spread = torch.randn(1, 199, 2, generator=torch.Generator().manual_seed(0))
    rnd.pay(torch.cat([spread, torch.tensor([[[1e6, -1e6]]])], 1))
    # Alone among 200 it is √199 deviations away.
    assert seen[0][0, -1].tolist() == [5, -5]
    assert seen[0][0, :-1].abs().max() < 0.1


class Recorder:
    """An agent that keeps what it was handed."""

    num_environments, num_steps, policy = 1, 2, None

    def update(self, trajectory):
        self.rewards = trajectory.rewards
        return {"value/loss": 1.0}


def test_the_bonus_is_added_for_what_a_step_led_to():
    agent = CuriousAgent(Recorder(), build_bonus(CountBonusConfig(scale=0.5), TaskSizes(3, 2)))
    ones = torch.ones(1, 2)
    parts = {"actions": ones.long(), "behaviour_logprobs": -ones, "rewards": 3 * ones, "values": ones,
             "next_values": ones, "continues": ones, "truncated": ones < 0, "mask": ones > 0}  # fmt: skip
    trajectory = new_trajectory(**parts, observations=torch.tensor([[0, 1]]), next_observations=torch.tensor([[1, 1]]))
    metrics = agent.update(trajectory)
    assert agent.agent.rewards[0].tolist() == pytest.approx([3.5, 3 + 0.5 / 2**0.5])
    assert trajectory.rewards[0].tolist() == [3, 3]
    assert metrics == {"value/loss": 1.0, "exploration/bonus": pytest.approx((0.5 + 0.5 / 2**0.5) / 2)}
    with pytest.raises(ValueError, match="next_observations, which is None"):
        agent.update(new_trajectory(**parts))


def test_a_bonus_is_configured_by_its_kind():
    assert load_config(GymConfig, overrides={"bonus": "rnd"}).bonus == DistillationBonusConfig()
    assert load_config(GymConfig, overrides={"bonus": {"kind": "count", "scale": 1}}).bonus.scale == 1
    with pytest.raises(ConfigError, match="there is no 'rdn'; did you mean 'rnd'"):
        load_config(GymConfig, overrides={"bonus": "rdn"})
    with pytest.raises(ConfigError, match="use a2c"):
        load_config(GymConfig, overrides={"bonus": "rnd", "algorithm": "a3c"})
