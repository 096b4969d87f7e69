"""Learning by playing: an environment whose optimum is known at once, and CartPole with published settings (slow)."""

import numpy as np
import pytest
import torch

from plaudit.algorithms.agents import build_agent, task_sizes
from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.control import learn
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from studies import control_peer
from tests.algorithms.problems import Echo

STATES, LIMIT = Echo.states, Echo.limit


def agent(seed=0, rate=0.02, **options):
    policy = ControlPolicy(ActorCriticNetwork(STATES, STATES, hidden=(16,), seed=seed))
    optimizer = torch.optim.Adam(policy.parameters(), lr=rate)
    config = AlgorithmConfig(kl_placement="none", discount=0.9, **options)
    return policy, optimizer, build_algorithm(config, policy, optimizer, max_gradient_norm=0.5, total_updates=30)


@pytest.mark.parametrize(
    "options", [{"name": "ppo", "clip_schedule": "linear"}, {"name": "a2c"}, {"name": "actor_critic"}]
)
def test_learns_to_echo(options):
    policy, optimizer, algorithm = agent(**options)
    collector = Collector(make_environments(Echo, 8), seed=0)
    seen, rates = [], []

    def report(update, metrics):
        seen.append(metrics)
        rates.append(optimizer.param_groups[0]["lr"])

    metrics = learn(algorithm, policy, optimizer, collector, num_steps=16, num_updates=30, schedule="linear",
                    generator=torch.Generator().manual_seed(0), report=report)  # fmt: skip
    collector.environments.close()
    assert metrics == seen[-1]
    assert rates == pytest.approx([0.02 * (1 - update / 30) for update in range(30)])
    assert collector.num_steps_taken == 30 * 16 * 8
    returns = evaluate_policy(Echo, ControlPolicy(policy.network, greedy=True), num_episodes=16)
    assert returns == [LIMIT] * 16
    assert np.mean(collector.episode_returns[:8]) < 4  # a fresh agent gets a quarter of it
    if options["name"] == "ppo":
        # Cut off, not ended: the values are those of going on for ever, 1 / (1 - γ) = 10; ends would give 3.6.
        assert policy.values(torch.arange(STATES)).mean().item() == pytest.approx(10, rel=0.3)


def test_learning_is_the_same_twice():
    found = []
    for _ in range(2):
        policy, optimizer, algorithm = agent(name="ppo", minibatches=2)
        collector = Collector(make_environments(Echo, 4), seed=3)
        learn(algorithm, policy, optimizer, collector, num_steps=8, num_updates=3,
              generator=torch.Generator().manual_seed(1))  # fmt: skip
        collector.environments.close()
        found.append(torch.cat([parameter.detach().flatten() for parameter in policy.parameters()]))
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="at least 1, got 8 and 0"):
        learn(algorithm, policy, optimizer, collector, num_steps=8, num_updates=0)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"name": "ppo", "discount": 0.98}, 5120),
        ({"name": "a2c", "discount": 0.98, "gae_lambda": 0.9, "learning_rate": 3e-3}, 10_240),
    ],
)
def test_a_pole_is_balanced_longer_within_seconds(options, steps):
    """Chance balances for 22 steps; on seeds 100 to 102 the last episodes lasted 63 to 123 steps."""
    environments = make_environments("CartPole-v1", 8)
    agent = build_agent(PolicyGradientConfig(**options), task_sizes(environments), total_steps=steps, seed=0)
    collector = Collector(environments, seed=0)
    while collector.num_steps_taken < steps:
        agent.update(collector.collect(agent.policy, agent.num_steps))
    environments.close()
    assert np.mean(collector.episode_returns[:20]) < 35
    assert np.mean(collector.episode_returns[-20:]) > 45


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", control_peer.ALGORITHMS)
def test_cartpole_reaches_the_return_of_the_peer(name):
    """Ten seeds with the settings of Stable-Baselines3's zoo, beside the recorded seeds of the peer itself.

    The bootstrap intervals of the two interquartile means have to overlap.
    """
    means = [float(np.mean(control_peer.ours(name, seed)[0])) for seed in range(10)]
    theirs = [row["mean"] for row in control_peer.rows() if (row["algorithm"], row["side"]) == (name, "theirs")]
    assert len(theirs) >= 10
    (low, high), (least, most) = map(control_peer.bootstrap_interval, (means, theirs))
    said = f"{name}: {means}, 95 % {low:.1f} to {high:.1f}, the peer's {least:.1f} to {most:.1f}"
    assert high >= least, said
    assert low <= most, said
