"""Tabular Dyna: by hand, against plain loops, and on mazes whose answers are known."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.dyna import DynaTables
from plaudit.algorithms.dyna_agent import Dyna
from plaudit.configs.dyna import DynaConfig
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.gridworlds import Grid, GridWorld, blocking_maze, dyna_maze
from plaudit.rollout.trajectory import new_trajectory

GOAL = (0, 8)


def test_by_hand():
    """Two states in a row; the last step pays 1. What the second step teaches, one imagined step carries back."""
    tables = DynaTables(DynaConfig(planning_steps=0, learning_rate=0.5, discount=0.9), 3, 1)
    assert tables.learn(0, 0, 0.0, 1, 1.0) == 0.0
    assert tables.learn(1, 0, 1.0, 2, 0.0) == 1.0
    assert tables.values == [[0.0], [0.5], [0.0]]
    assert tables.learn(0, 0, 0.0, 1, 1.0) == pytest.approx(0.45)
    assert tables.values[0][0] == pytest.approx(0.225)
    assert tables.model == {0: {0: (0.0, 1, 1.0)}, 1: {0: (1.0, 2, 0.0)}}


def test_one_imagined_step_by_hand():
    tables = DynaTables(DynaConfig(planning_steps=1, learning_rate=0.5), 2, 1)
    tables.learn(0, 0, 1.0, 1, 0.0)
    assert tables.values[0][0] == pytest.approx(0.75)  # the real step gives .5, the same step imagined half the rest


def test_without_imagination_it_is_q_learning():
    config = DynaConfig(planning_steps=0, learning_rate=0.3, discount=0.8)
    tables, drawn = DynaTables(config, 5, 3), random.Random(1)
    plain = np.zeros((5, 3))
    for _ in range(300):
        s, a, t = drawn.randrange(5), drawn.randrange(3), drawn.randrange(5)
        r, c = drawn.gauss(0, 1), float(drawn.random() < 0.8)
        plain[s, a] += 0.3 * (r + 0.8 * c * plain[t].max() - plain[s, a])
        tables.learn(s, a, r, t, c)
    np.testing.assert_allclose(tables.values, plain, atol=1e-12)


@pytest.mark.parametrize("planning", ["uniform", "prioritised"])
def test_planning_in_a_known_world_reaches_the_exact_values(planning):
    maze = Grid(("...", ".#.", "..."), starts=((2, 0),), goals=((0, 2),))
    exact = maze.optimal_action_values((0, 2), 0.9)
    options = {"threshold": 0.0} if planning == "prioritised" else {}
    config = DynaConfig(planning=planning, planning_steps=100, learning_rate=0.5, discount=0.9, **options)
    tables = DynaTables(config, len(maze.cells()), 4)
    goal = maze.cells().index((0, 2))
    for _ in range(20):
        for s, a in np.ndindex(len(maze.cells()), 4):
            if s != goal:
                t = int(maze.transitions()[s, a].argmax())
                tables.learn(s, a, float(t == goal), t, float(t != goal))
    elsewhere = [s for s in range(len(maze.cells())) if s != goal]
    np.testing.assert_allclose(np.array(tables.values)[elsewhere], exact[elsewhere], atol=1e-9)


def test_prioritised_sweeping_needs_fewer_steps_than_uniform():
    """A corridor walked once: the reward at its end reaches the start in as many updates as it has cells."""
    found = {}
    for planning in ("uniform", "prioritised"):
        options = {"threshold": 0.0} if planning == "prioritised" else {}
        config = DynaConfig(planning=planning, planning_steps=20, learning_rate=1.0, discount=0.9, **options)
        tables = DynaTables(config, 21, 1)
        for s in range(20):
            tables.learn(s, 0, float(s == 19), s + 1, float(s < 19))
        found[planning] = tables.values[0][0]
    assert found["prioritised"] == pytest.approx(0.9**19)
    assert found["uniform"] < 1e-6


def test_the_bonus_by_hand():
    """κ √τ on imagined rewards; an action that was never tried leads nowhere and has waited since the state was met."""
    config = DynaConfig(planning_steps=1, learning_rate=1.0, discount=0.0, bonus=0.5)
    tables = DynaTables(config, 2, 2, seed=0)
    for _ in range(9):
        tables.learn(0, 0, 0.0, 1, 0.0)
    assert tables.last_tried == {0: [9, 1]}
    for _ in range(50):
        tables._imagine()
    assert tables.values[0] == pytest.approx([0.0, 0.5 * math.sqrt(8)])


def test_a_step_that_leads_elsewhere_now_replaces_the_old_one():
    config = DynaConfig(planning="prioritised", planning_steps=5, learning_rate=1.0, discount=0.5, threshold=0.0)
    tables = DynaTables(config, 4, 1)
    tables.learn(0, 0, 0.0, 1, 1.0)
    tables.learn(0, 0, 0.0, 2, 1.0)
    tables.learn(1, 0, 1.0, 3, 0.0)
    assert tables.values[0][0] == 0.0
    tables.learn(2, 0, 1.0, 3, 0.0)
    assert tables.values[0][0] == 0.5


@pytest.mark.parametrize("options", [{"planning": "prioritised"}, {"bonus": 0.01}, {}])
def test_going_on_from_a_saved_state_is_the_same(options):
    config = DynaConfig(planning_steps=5, **options)
    whole, first, second = (DynaTables(config, 6, 3, seed=4) for _ in range(3))

    def play(tables, steps, seed):
        drawn = random.Random(seed)
        for _ in range(steps):
            state = drawn.randrange(6)
            tables.learn(state, tables.act(state), drawn.gauss(0, 1), drawn.randrange(6), float(drawn.random() < 0.9))

    play(whole, 60, 1)
    play(whole, 40, 2)
    play(first, 60, 1)
    second.load_state_dict(first.state_dict())
    play(second, 40, 2)
    assert second.values == whole.values
    assert second.model == whole.model


def lengths(planning_steps, seed, episodes=25):
    world = GridWorld(dyna_maze())
    tables = DynaTables(DynaConfig(planning_steps=planning_steps), 47, 4, seed=seed)
    ends = (step for step, (_, ended) in enumerate(tables.play(world, seed=seed), 1) if ended)
    return np.diff([0, *itertools.islice(ends, episodes)]).tolist()


def test_the_maze_of_the_book():
    """Known figures, 30 runs: n = 0: 741, 743, 474; n = 50: 805, 40, 17.8, then 17.2; ε-greedy optimum 15.88."""
    plain = np.mean([lengths(0, seed, 2)[1] for seed in range(6)])
    runs = np.array([lengths(50, seed, 15) for seed in range(6)])
    second, third, last = runs[:, 1].mean(), runs[:, 2].mean(), runs[:, 5:].mean()
    assert 20 < second < 60 < 300 < plain
    assert third < 30
    assert 15 < last < 18.5


def test_only_the_bonus_finds_the_new_way():
    """Blocking maze, κ = 1e-4, n = 10, α = 1: rewards in the last third, a thousand steps after the way closed."""
    before, after = blocking_maze()
    gained = {}
    for bonus in (0.0, 1e-4):
        config = DynaConfig(planning_steps=10, learning_rate=1.0, bonus=bonus)
        totals = []
        for seed in range(3):
            tables = DynaTables(config, 54, 4, seed=seed)
            steps = tables.play(GridWorld(before, later=[(1000, after)]), seed=seed)
            total = sum(reward for reward, _ in itertools.islice(steps, 2000, 3000))
            totals.append(total)
        gained[bonus] = np.mean(totals)
    assert gained[1e-4] > 45  # one episode takes 16 steps at best: at most 62
    assert gained[0.0] < 30


def test_as_an_agent_it_learns_the_maze():
    agent = Dyna(DynaConfig(planning_steps=30), TaskSizes(47, 4), total_steps=1500, seed=0)
    collector = Collector(make_environments(lambda: GridWorld(dyna_maze()), agent.num_environments), seed=0)
    for _ in range(1500):
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    assert set(metrics) == {"value/td_error", "model/steps_known"}
    again = Dyna(DynaConfig(planning_steps=30), TaskSizes(47, 4), total_steps=1500, seed=9)
    again.load_state_dict(agent.state_dict())
    policy, maze, cells = again.greedy_policy(), dyna_maze(), dyna_maze().cells()
    state, steps = cells.index((2, 0)), 0
    while cells[state] != GOAL and steps < 100:
        action = int(policy.sample(torch.tensor([state])).actions)
        state, steps = int(maze.transitions()[state, action].argmax()), steps + 1
    assert steps <= 18


def test_the_agent_learns_from_ends_and_from_what_follows():
    agent = Dyna(DynaConfig(planning_steps=0, learning_rate=0.5, discount=0.9), TaskSizes(3, 1), total_steps=1, seed=0)
    agent.tables.values = [[0.0], [2.0], [4.0]]
    zeros, ones = torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)
    batch = new_trajectory(
        actions=zeros.long(),
        behaviour_logprobs=zeros,
        rewards=torch.tensor([[1.0], [3.0]]),
        continues=torch.tensor([[1.0], [0.0]]),
        mask=ones,
        observations=torch.tensor([[0], [1]]),
        next_observations=torch.tensor([[2], [2]]),
    )
    metrics = agent.update(batch)
    assert agent.tables.values == [[pytest.approx(0.5 * (1 + 0.9 * 4))], [pytest.approx(2 + 0.5 * (3 - 2))], [4.0]]
    assert metrics == {"value/td_error": pytest.approx((4.6 + 1) / 2), "model/steps_known": 2}


def test_the_policy_s_probabilities():
    agent = Dyna(DynaConfig(exploration=0.2), TaskSizes(2, 4), total_steps=1, seed=0)
    agent.tables.values = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
    drawn = agent.policy.sample(torch.tensor([0] * 2000 + [1] * 2000), generator=torch.Generator().manual_seed(0))
    share = [(drawn.actions[:2000] == action).double().mean().item() for action in range(4)]
    assert share == pytest.approx([0.45, 0.45, 0.05, 0.05], abs=0.03)
    zeros = torch.zeros(1, 2)
    row = new_trajectory(
        actions=torch.tensor([[3, 3]]),
        behaviour_logprobs=zeros,
        rewards=zeros,
        continues=zeros,
        mask=torch.ones(1, 2, dtype=torch.bool),
        observations=torch.tensor([[0, 1]]),
    )
    assert agent.policy.evaluate(row).logprobs.exp().flatten().tolist() == pytest.approx([0.05, 0.85])
    assert agent.policy.evaluate(row).values.flatten().tolist() == [1.0, 2.0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="bonus: time since"):
        DynaConfig(bonus=0.1, planning="prioritised")
    with pytest.raises(ValueError, match="planning_steps must be at least 1"):
        DynaConfig(bonus=0.1, planning_steps=0)
    agent = Dyna(DynaConfig(), TaskSizes(4, 2), total_steps=1, seed=0)
    with pytest.raises(ValueError, match="needs discrete observations"):
        agent.policy.sample(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least 1"):
        DynaTables(DynaConfig(), 0, 2)
