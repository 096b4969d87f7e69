"""Exploration: each part on a problem that is solved with it and not without it."""

import copy

import pytest
import torch

from plaudit.algorithms.agents import build_agent
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.curious import CuriousAgent, build_bonus
from plaudit.configs.base import ConfigError, load_config
from plaudit.configs.bonus import CountBonusConfig, DistillationBonusConfig
from plaudit.configs.gym import GymConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from tests.algorithms.problems import Chain, TwoArms

STEPS = 6000
BONUSES = {
    "nothing": None,
    "count": CountBonusConfig(scale=0.1),
    "rnd": DistillationBonusConfig(scale=0.1, learning_rate=3e-3),
}


def chain_return(bonus, seed=0):
    """What the greedy policy of a small DQN earns after `STEPS` steps in the corridor; and its training returns."""
    config = QLearningConfig(
        name="double_dqn", learning_starts=64, rollout_steps=32, gradient_steps=8, batch_size=64, hidden=(32,),
        learning_rate=3e-3, discount=0.95, exploration_start=0.1, exploration_end=0.1, target_every=200,
    )  # fmt: skip
    sizes = TaskSizes(Chain.length + 1, 2)
    agent = build_agent(config, sizes, total_steps=STEPS, seed=seed)
    if bonus is not None:
        agent = CuriousAgent(agent, build_bonus(bonus, sizes, seed=seed))
    collector = Collector(make_environments(Chain, 1), seed=seed)
    while collector.num_steps_taken < STEPS:
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    assert ("exploration/bonus" in metrics) == (bonus is not None)
    (found,) = evaluate_policy(Chain, agent.greedy_policy(), num_episodes=1, num_environments=1)
    return found, sum(collector.episode_returns)


def test_the_corridor_is_solved_with_counts():
    assert chain_return(BONUSES["count"])[0] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", BONUSES)
def test_the_corridor_is_solved_with_a_bonus_and_not_without_on_every_seed(kind):
    solved = [chain_return(BONUSES[kind], seed)[0] for seed in range(5)]
    assert solved == [0.0 if kind == "nothing" else 1.0] * 5


@pytest.mark.parametrize(
    ("exploration", "wanted"),
    [({"exploration_start": 0.0, "exploration_end": 0.0}, "some"), ({"exploration_end": 0.1}, "all"),
     ({"exploration": "boltzmann", "exploration_end": 0.1}, "all")],
)  # fmt: skip
def test_without_exploration_an_agent_may_stay_with_the_worse_arm(exploration, wanted):
    best = 0
    for seed in range(6):
        config = QLearningConfig(
            learning_starts=0, rollout_steps=16, gradient_steps=8, batch_size=16, hidden=(8,), learning_rate=0.02,
            exploration_fraction=1.0, **exploration,
        )  # fmt: skip
        agent = build_agent(config, TaskSizes(1, 2), total_steps=320, seed=seed)
        collector = Collector(make_environments(TwoArms, 1), seed=seed)
        while collector.num_steps_taken < 320:
            agent.update(collector.collect(agent.policy, agent.num_steps))
        collector.environments.close()
        best += int(agent.greedy_policy().sample(torch.zeros(1, dtype=torch.int64)).actions) == 1
    assert (best == 6) == (wanted == "all")


def test_bonuses_by_hand_and_as_time_goes_by():
    counts = build_bonus(CountBonusConfig(scale=2.0), TaskSizes(4, 2))
    seen = torch.tensor([[0, 1, 0], [0, 0, 3]])
    assert counts.pay(seen).tolist() == [  # both rows step together, the first row first
        pytest.approx([2 / 1, 2 / 1, 2 / 4**0.5]),
        pytest.approx([2 / 2**0.5, 2 / 3**0.5, 2 / 1]),
    ]
    points = build_bonus(CountBonusConfig(decimals=1), TaskSizes(2, 2))
    near = points.pay(torch.tensor([[[0.11, -1.0], [0.12, -1.01], [0.2, -1.0]]]))
    assert near[0].tolist() == pytest.approx([0.1, 0.1 / 2**0.5, 0.1])
    rnd = build_bonus(DistillationBonusConfig(learning_rate=0.01), TaskSizes(2, 2))
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        often = torch.randn(4, 16, 2, generator=generator)
        paid = rnd.pay(often)
    assert paid.mean().item() == pytest.approx(0.1, rel=0.5)
    state = copy.deepcopy(rnd.state_dict())
    rare = rnd.pay(torch.full((1, 1, 2), 4.0))
    assert rare.item() > 5 * paid.mean().item()
    again = build_bonus(DistillationBonusConfig(learning_rate=0.01), TaskSizes(2, 2), seed=9)
    again.load_state_dict(state)
    assert again.pay(torch.full((1, 1, 2), 4.0)).item() == rare.item()
    other = build_bonus(CountBonusConfig(scale=2.0), TaskSizes(4, 2))
    other.load_state_dict(copy.deepcopy(counts.state_dict()))
    assert torch.equal(other.pay(seen), counts.pay(seen))


def test_a_bonus_is_configured_by_its_kind():
    assert load_config(GymConfig, overrides={"bonus": "rnd"}).bonus == DistillationBonusConfig()
    assert load_config(GymConfig, overrides={"bonus": {"kind": "count", "scale": 1}}).bonus.scale == 1
    with pytest.raises(ConfigError, match="there is no 'rdn'; did you mean 'rnd'"):
        load_config(GymConfig, overrides={"bonus": "rdn"})
    with pytest.raises(ConfigError, match="use a2c"):
        load_config(GymConfig, overrides={"bonus": "rnd", "algorithm": "a3c"})
