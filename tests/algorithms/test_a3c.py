"""A3C in one process: one worker is A2C to the bit, several move the same weights, and staleness is counted."""

import copy

import pytest
import torch

from plaudit.algorithms.a3c import A3CAgent, SharedRMSprop, SharedWeights
from plaudit.algorithms.agents import PolicyGradientAgent
from plaudit.algorithms.base import TaskSizes
from plaudit.configs.a3c import A3CConfig
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from tests.algorithms.test_control import LIMIT, Echo

SIZES = TaskSizes(4, 4)


def settings(**options):
    values = {"discount": 0.9, "hidden": (16,), "learning_rate": 0.02, "rollout_steps": 16}
    return A3CConfig(**values | options)


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_one_worker_is_a2c_with_one_environment(schedule):
    config = settings(workers=1, schedule=schedule, entropy_coefficient=0.01)
    found = []
    for agent in (A3CAgent(config, SIZES, total_steps=320, seed=3),
                  PolicyGradientAgent(config.worker(), SIZES, total_steps=320, seed=3)):  # fmt: skip
        collector = Collector(make_environments(Echo, 1), seed=5)
        metrics = [agent.update(collector.collect(agent.policy, agent.num_steps)) for _ in range(20)]
        collector.environments.close()
        found.append((weights(agent.policy), weights(agent.greedy_policy()), metrics))
    (mine, greedy, seen), (theirs, _, expected) = found
    assert torch.equal(mine, theirs)
    assert torch.equal(greedy, mine)
    assert [each.pop("workers/staleness") for each in seen] == [0.0] * 20
    assert seen == expected


def test_shared_statistics_are_those_of_torch():
    start = torch.randn(7, generator=torch.Generator().manual_seed(0))
    plain, mine = start.clone().requires_grad_(), start.clone().requires_grad_()
    reference = torch.optim.RMSprop([plain], lr=0.1, alpha=0.9, eps=1e-3)
    shared = SharedWeights.of([mine], 1)
    optimizer = SharedRMSprop([mine], shared, lr=0.1, alpha=0.9, eps=1e-3, own=False)
    for seed in range(4):
        gradient = torch.randn(7, generator=torch.Generator().manual_seed(seed + 1))
        plain.grad, mine.grad = gradient.clone(), gradient.clone()
        reference.step()
        optimizer.step()
        assert torch.equal(shared.parameters[0], plain.detach())
        assert torch.equal(shared.squares[0], reference.state[plain]["square_avg"])
        assert torch.equal(mine.detach(), start)  # a worker's own weights wait for the next reading


def test_workers_that_take_turns_learn_with_stale_gradients():
    """Two workers in a fixed interleaving: each writes after the other has, so every gradient is one update old."""
    config = settings(workers=2)
    first = A3CAgent(config, SIZES, total_steps=4000, seed=0)
    second = A3CAgent(config, SIZES, total_steps=4000, seed=0, shared=first.shared, place=1)
    collectors = [Collector(make_environments(Echo, 1), seed=seed) for seed in (0, 1)]
    staleness = []
    for _ in range(80):
        played = [collector.collect(agent.policy, 16)
                  for collector, agent in zip(collectors, (first, second), strict=True)]  # fmt: skip
        for agent, trajectory in zip((first, second), played, strict=True):
            staleness.append(agent.update(trajectory)["workers/staleness"])
    for collector in collectors:
        collector.environments.close()
    assert staleness[::2] == [0.0] + [1.0] * 79
    assert staleness[1::2] == [1.0] * 80
    assert first.shared.counts.tolist() == [[80 * 16, 80]] * 2
    assert first.shared.steps == 2560
    assert evaluate_policy(Echo, second.greedy_policy(), num_episodes=8) == [LIMIT] * 8


def test_own_statistics_and_resuming():
    config = settings(workers=2, share_statistics=False)
    collector = Collector(make_environments(Echo, 1), seed=0)
    agent = A3CAgent(config, SIZES, total_steps=320, seed=0)
    agent.update(collector.collect(agent.policy, 16))
    assert all(not square.any() for square in agent.shared.squares)
    shared = A3CAgent(settings(workers=2), SIZES, total_steps=320, seed=0)
    batches = [collector.collect(shared.policy, 16) for _ in range(3)]
    collector.environments.close()
    shared.update(batches[0])
    shared.shared.counts[1] = torch.tensor([32, 2])  # another worker's
    shared.read()
    other = A3CAgent(settings(workers=1), SIZES, total_steps=320, seed=4)
    other.load_state_dict(copy.deepcopy(shared.state_dict()))
    assert other.shared.counts.tolist() == [[48, 3]]
    for batch in batches[1:]:
        assert shared.update(batch) == other.update(batch)
    assert torch.equal(weights(shared.policy), weights(other.policy))
