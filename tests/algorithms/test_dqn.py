"""DQN and Double DQN: targets by hand, what the target network follows, and what a prioritised replay is told."""

import copy

import pytest
import torch
from torch import nn

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.dqn import DQN
from plaudit.configs.q_learning import QLearningConfig
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.replay import ReplayBatch
from tests.algorithms.problems import Echo

SMALL = {"hidden": (8,), "rollout_steps": 16, "gradient_steps": 1, "batch_size": 8, "learning_starts": 0}


class Table(nn.Module):
    """Action values `[S, A]` of one-hot observations."""

    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))
        self.observation_size = len(values)

    def forward(self, observations):
        return observations @ self.values


def agent_of(**options):
    config = QLearningConfig(**SMALL | options)
    return DQN(config, TaskSizes(4, 4), total_steps=1000, seed=0)


def played(agent, steps=16):
    collector = Collector(make_environments(Echo, 1), seed=0)
    found = collector.collect(agent.policy, steps)
    collector.environments.close()
    return found


@pytest.mark.parametrize(("name", "following"), [("dqn", 7.0), ("double_dqn", 2.0)])
def test_the_targets_by_hand(name, following):
    """The learning network likes the second action best; the target says 2 of it, and 7 of its own favourite."""
    agent = agent_of(name=name)
    agent.network, agent.target = Table([[0.0, 0.0], [3.0, 5.0]]), Table([[0.0, 0.0], [7.0, 2.0]])
    batch = ReplayBatch(
        observations=torch.zeros(3, dtype=torch.int64),
        actions=torch.zeros(3, dtype=torch.int64),
        returns=torch.tensor([1.0, -1.0, 0.5]),
        discounts=torch.tensor([0.9, 0.81, 0.0]),  # one step, two, and a true end
        next_observations=torch.ones(3, dtype=torch.int64),
        places=torch.arange(3),
        weights=torch.ones(3),
    )
    targets = agent.targets(batch)
    torch.testing.assert_close(targets, torch.tensor([1 + 0.9 * following, -1 + 0.81 * following, 0.5]))
    assert not targets.requires_grad


def test_the_target_network_is_copied_now_and_then_or_follows():
    hard, soft = agent_of(target_every=32), agent_of(polyak=0.25)
    before = copy.deepcopy(soft.target.state_dict())
    batch = played(soft)
    soft.update(batch)
    for name, value in soft.target.state_dict().items():
        torch.testing.assert_close(value, 0.25 * soft.network.state_dict()[name] + 0.75 * before[name])
    for update in range(3):
        learned = copy.deepcopy(hard.network.state_dict())
        copied = copy.deepcopy(hard.target.state_dict())
        hard.update(played(hard))
        # 16 steps an update: after the second one 32 have passed, and the copy is made before it learns.
        wanted = learned if update == 1 else copied
        assert all(torch.equal(value, wanted[name]) for name, value in hard.target.state_dict().items())


def test_a_prioritised_replay_is_told_the_errors_of_what_was_drawn():
    agent = agent_of(prioritised=True, priority_exponent=0.5)
    agent.update(played(agent))
    leaves = agent.replay._tree.leaves()[:16]
    drawn = leaves != 1.0
    assert 0 < int(drawn.sum()) <= 8
    torch.testing.assert_close(agent.replay._highest, max(1.0, float(leaves.max())))
    seen = agent.replay._batch(torch.arange(16), torch.ones(16), 0.99, 1)
    fresh = agent_of(prioritised=True, priority_exponent=0.5)  # the weights before the step
    vectors = nn.functional.one_hot(seen.observations, 4).float()
    chosen = fresh.network(vectors).gather(1, seen.actions[:, None]).squeeze(1)
    errors = (chosen.detach() - fresh.targets(seen)).abs().double()
    torch.testing.assert_close(leaves[drawn], (errors[drawn] + 1e-6) ** 0.5, rtol=1e-5, atol=1e-7)


def test_a_step_descends_the_weighted_huber_error_of_what_was_drawn():
    """Twice, from the same state: as the agent does it, and row by row."""
    options = {"prioritised": True, "num_steps": 2, "huber_threshold": 0.3, "max_gradient_norm": 0.05}
    agent = agent_of(**options, importance_exponent=0.4)
    for _ in range(3):  # the first batch has drawn priorities apart
        agent.update(played(agent))
    other = agent_of(**options, importance_exponent=0.4)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    metrics = agent._step()
    batch = other.replay.sample(
        8, discount=0.99, num_steps=2, importance_exponent=0.4 + 0.6 * 48 / 1000, generator=other.generator
    )
    loss, sizes = torch.zeros(()), []
    for row, target in enumerate(other.targets(batch)):
        vector = nn.functional.one_hot(batch.observations[row], 4).float()
        error = other.network(vector)[batch.actions[row]] - target
        sizes.append(abs(float(error.detach())))
        huber = 0.5 * error**2 if sizes[-1] <= 0.3 else 0.3 * (error.abs() - 0.15)
        loss = loss + batch.weights[row] * huber / 8
    assert min(sizes) < 0.3 < max(sizes)
    assert batch.weights.min() < 0.9
    assert 0.99**2 in [pytest.approx(each) for each in batch.discounts.tolist()]
    other.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(other.network.parameters(), 0.05)
    assert norm > 0.1
    other.optimizer.step()
    assert metrics["value/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    for mine, its in zip(agent.network.parameters(), other.network.parameters(), strict=True):
        torch.testing.assert_close(mine, its)


def test_it_plays_at_random_and_learns_nothing_before_it_starts():
    agent = agent_of(learning_starts=40, dueling=True)
    assert agent.network.value is not None
    before = copy.deepcopy(agent.network.state_dict())
    uniform = torch.full((1, 4), 0.25).log()
    for steps in (16, 32):
        assert torch.equal(agent.policy.logprobs(torch.tensor([[0.0, 9.0, 0.0, 0.0]])), uniform)
        assert set(agent.update(played(agent))) == {"replay/size", "exploration/amount"}
        assert agent.policy.steps == steps
    assert all(torch.equal(value, before[name]) for name, value in agent.network.state_dict().items())
    assert "value/loss" in agent.update(played(agent))
    assert agent.policy.logprobs(torch.tensor([[0.0, 9.0, 0.0, 0.0]])).argmax() == 1


def test_exploration_falls_over_its_share_of_the_run():
    agent = agent_of(exploration_start=1.0, exploration_end=0.2, exploration_fraction=0.1)  # of 1000 steps
    amounts = []
    for _ in range(8):
        played(agent)
        amounts.append(agent.policy.amount)
    assert amounts == pytest.approx([max(0.2, 1 - 0.008 * 16 * number) for number in range(1, 9)])


def test_the_rate_falls_to_nothing_where_it_is_asked_to():
    for schedule, wanted in (("constant", [0.01] * 3), ("linear", [0.01 * left for left in (0.984, 0.968, 0.952)])):
        agent, rates = agent_of(learning_rate=0.01, schedule=schedule), []
        for _ in range(3):
            agent.update(played(agent))
            rates.append(agent.optimizer.param_groups[0]["lr"])
        assert rates == pytest.approx(wanted)
