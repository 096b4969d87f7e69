"""Every agent solves the environment that Stable-Baselines3 tests its own with, and goes on from its state dict."""

import copy

import pytest
import torch
from pydantic import TypeAdapter

from plaudit.algorithms.agents import AGENTS, build_agent, task_sizes
from plaudit.configs.agents import AgentConfig
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from tests.algorithms.problems import Echo

Q = {"learning_starts": 100, "rollout_steps": 50, "gradient_steps": 15, "batch_size": 32, "hidden": (32,)}
SOLVES = {
    "reinforce": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 16}),
    "actor_critic": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 16, "optimizer": "adam"}),
    "a2c": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 16, "optimizer": "adam"}),
    "ppo": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 16, "epochs": 4}),
    "dqn": (1500, Q),
    "double_dqn": (1500, Q),
    "option_critic": (4000, {"learning_rate": 0.02, "hidden": (16,), "num_options": 2}),
    "acer": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 8, "learning_starts": 200}),
    "a3c": (4000, {"learning_rate": 0.02, "hidden": (16,), "rollout_steps": 16}),
    "dyna": (1500, {"planning_steps": 3}),
    "feudal": (
        8000,
        {"learning_rate": 0.02, "percept_size": 16, "num_environments": 8, "rollout_steps": 16, "horizon": 4},
    ),
    "world_model": (2000, {"epochs": 40, "horizon": 8, "generations": 20, "population": 16, "dreams": 8, "segment": 8}),
}
"""Name to the steps it may take (the budget) and options that keep the test cheap."""


def make(name, total, options, seed=0):
    discounts = {"feudal": ("discount", "manager_discount"), "world_model": ()}.get(name, ("discount",))
    given = {"name": name} | dict.fromkeys(discounts, 0.5) | options
    if name == "world_model":
        pytest.importorskip("cma")
    config = TypeAdapter(AgentConfig).validate_python(given)
    trial = make_environments(Echo, 1)
    sizes = task_sizes(trial)
    trial.close()
    agent = build_agent(config, sizes, total_steps=total, seed=seed)
    return agent, Collector(make_environments(Echo, agent.num_environments), seed=seed)


def names():
    union = AgentConfig.__origin__.__args__
    return sorted(name for member in union for name in member.model_fields["name"].annotation.__args__)


def test_every_agent_is_made_and_tested():
    assert set(AGENTS) == set(AgentConfig.__origin__.__args__)
    assert names() == sorted(SOLVES)


@pytest.mark.parametrize("name", SOLVES)
def test_the_identity_environment_is_solved_within_its_budget(name):
    total, options = SOLVES[name]
    agent, collector = make(name, total, options)
    while collector.num_steps_taken < total:
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    collector.environments.close()
    assert metrics
    returns = evaluate_policy(Echo, agent.greedy_policy(), num_episodes=8, num_environments=4)
    assert returns == [Echo.limit] * 8
    assert isinstance(agent.greedy_policy(), torch.nn.Module)


@pytest.mark.parametrize(("name", "schedule"), [("ppo", None), ("a2c", "linear"), ("a2c", None)])
def test_the_rate_of_a_policy_gradient_falls_with_its_updates(name, schedule):
    agent, collector = make(name, 4 * 128, {"rollout_steps": 16, "learning_rate": 0.01, "schedule": schedule})
    rates = []
    for _ in range(4):
        agent.update(collector.collect(agent.policy, agent.num_steps))
        rates.append(agent.optimizer.param_groups[0]["lr"])
    collector.environments.close()
    falls = name == "ppo" or schedule == "linear"
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025] if falls else [0.01] * 4)


@pytest.mark.parametrize("name", SOLVES)
def test_an_agent_goes_on_from_its_state_as_if_it_had_never_stopped(name):
    total, options = SOLVES[name]
    agent, collector = make(name, total, options)
    for _ in range(3):
        agent.update(collector.collect(agent.policy, agent.num_steps))
    other, _ = make(name, total, options, seed=1)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))  # as from a file: nothing is shared
    trajectory = collector.collect(agent.policy, agent.num_steps)
    agent.update(trajectory)
    if hasattr(other.policy, "steps"):
        other.policy.steps = agent.policy.steps  # it has not played these steps itself
    other.update(trajectory)
    collector.environments.close()
    for mine, its in zip(
        agent.greedy_policy().state_dict().values(), other.greedy_policy().state_dict().values(), strict=True
    ):
        assert torch.equal(mine, its)
