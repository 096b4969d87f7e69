"""Feudal networks: who learns from what, the dilated LSTM, goals across segments, and the tasks."""

import copy

import numpy as np
import pytest
import torch

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.feudal import Feudal, feudal_losses
from plaudit.configs.feudal import FeudalConfig
from plaudit.core.hierarchy_losses import cosine
from plaudit.models.feudal import FeudalNetwork
from plaudit.models.recurrent import LSTMActorCritic
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.corridor import KeyDoorCorridor, LastTokenEnvironment
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.recurrent import RecurrentPolicy
from plaudit.rollout.token_mdp import TokenMDP


def corridor():
    return KeyDoorCorridor(4, max_steps=9, key_seen=False)


def collected(**options):
    agent = Feudal(
        FeudalConfig(horizon=3, num_environments=3, rollout_steps=12, manager_size=5, percept_size=6, **options),
        TaskSizes(4, 2),
        total_steps=1000,
        seed=1,
    )
    collector = Collector(make_environments(corridor, 3), seed=0)
    collector.collect(agent.policy, 7)
    return agent, collector.collect(agent.policy, 12)


def gradients(loss, module):
    found = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return [0.0 if gradient is None else gradient.abs().max().item() for gradient in found]


def test_the_manager_is_untouched_by_the_worker_s_loss():
    agent, trajectory = collected()
    manager, worker, _ = feudal_losses(agent.policy, agent.network, trajectory, agent.config)
    assert not any(gradients(worker, agent.network.manager))
    assert not any(gradients(manager, agent.network.worker))
    assert all(gradients(worker, agent.network.worker))
    assert all(gradients(manager, agent.network.manager))
    for loss in (manager, worker):
        assert all(gradients(loss, agent.network.percept))


def test_the_manager_s_gradient_is_that_of_finite_differences_through_its_lstm():
    """Advantages and transitions are constants of equation 7, so they are held where they were."""
    agent, trajectory = collected(value_coefficient=0.0, whiten_advantages=False)
    agent.network.double()
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in trajectory.tensors().items()}
    trajectory = type(trajectory)(**doubled)
    seen, after = (
        torch.nn.functional.one_hot(doubled[name], 4).double() for name in ("observations", "next_observations")
    )
    trajectory = trajectory.with_fields(observations=seen, next_observations=after)
    loss, _, metrics = feudal_losses(agent.policy, agent.network, trajectory, agent.config)
    weight = agent.network.manager["core"].weight_hh
    (found,) = torch.autograd.grad(loss, weight)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    # What equation 7 holds fixed, taken once at these weights.
    from plaudit.core import hierarchy_losses
    from plaudit.core.returns import lambda_returns

    with torch.no_grad():
        outputs, following = agent.policy.unroll(trajectory)
        arrivals = agent.network.latent_states(trajectory.next_observations)
    ends = (trajectory.continues == 0) | trajectory.truncated
    moved = hierarchy_losses.horizon_transitions(outputs.states, arrivals, ends, horizon=3)
    returns = lambda_returns(
        trajectory.rewards,
        following.manager_values,
        trajectory.continues,
        trajectory.truncated,
        trajectory.mask,
        discount=agent.config.manager_discount,
        return_lambda=agent.config.gae_lambda,
    )
    advantages = returns - outputs.manager_values

    def objective(shift):
        with torch.no_grad():
            weight.add_(shift * direction)
            goals = agent.policy.unroll(trajectory).outputs.goals
            weight.sub_(shift * direction)
        return float(-(advantages * cosine(moved, goals)).mean())

    assert objective(0.0) == pytest.approx(metrics["manager/loss"].item(), abs=1e-12)
    numeric = (objective(1e-5) - objective(-1e-5)) / 2e-5
    assert float((found * direction).sum()) == pytest.approx(numeric, rel=1e-6)


def test_both_losses_are_the_sums_written_out():
    """Returns backwards and transitions step by step, each level with its own reward, value, discount and weight."""
    from plaudit.algorithms.feudal import _intrinsic

    options = {"intrinsic_weight": 0.3, "discount": 0.8, "manager_discount": 0.9, "gae_lambda": 0.6}
    weights = {"manager_coefficient": 0.7, "value_coefficient": 0.4, "entropy_coefficient": 0.05}
    agent, trajectory = collected(**options, **weights, whiten_advantages=False)
    rewards = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    truncated = trajectory.truncated.clone()
    truncated[1, 5] = True
    trajectory = trajectory.with_fields(rewards=rewards, truncated=truncated)
    manager, worker, metrics = feudal_losses(agent.policy, agent.network, trajectory, agent.config)
    with torch.no_grad():
        outputs, following = agent.policy.unroll(trajectory)
        arrivals = agent.network.latent_states(observation_vectors(trajectory.next_observations, 4))
    ends = (trajectory.continues == 0) | truncated
    paid = rewards + 0.3 * _intrinsic(agent.network, trajectory, outputs, arrivals, ends)
    totals = dict.fromkeys(("direction", "manager value", "policy", "value", "entropy"), 0.0)
    for row in range(3):
        later = {"manager": 0.0, "worker": 0.0}
        for step in reversed(range(12)):
            cut, goes_on = step == 11 or bool(truncated[row, step]), float(trajectory.continues[row, step])
            levels = (("manager", rewards, 0.9, following.manager_values), ("worker", paid, 0.8, following.values))
            for level, earned, discount, values in levels:
                behind = float(values[row, step])
                behind = behind if cut else 0.4 * behind + 0.6 * later[level]
                later[level] = float(earned[row, step]) + discount * goes_on * behind
            reach = next(place for place in range(step, 12) if ends[row, place] or place in (step + 2, 11))
            direction = cosine(arrivals[row, reach] - outputs.states[row, step], outputs.goals[row, step])
            surprise = later["manager"] - float(outputs.manager_values[row, step])
            totals["direction"] -= surprise * float(direction)
            totals["manager value"] += surprise**2
            chances = outputs.logits[row, step].softmax(-1)
            surprise = later["worker"] - float(outputs.values[row, step])
            totals["policy"] -= surprise * float(chances[trajectory.actions[row, step]].log())
            totals["value"] += surprise**2
            totals["entropy"] -= float((chances * chances.log()).sum())
    mean = {name: total / 36 for name, total in totals.items()}
    assert manager.item() == pytest.approx(0.7 * mean["direction"] + 0.4 * mean["manager value"], abs=1e-5)
    wanted = mean["policy"] + 0.4 * mean["value"] - 0.05 * mean["entropy"]
    assert worker.item() == pytest.approx(wanted, abs=1e-5)
    assert metrics["policy/entropy"].item() == pytest.approx(mean["entropy"], abs=1e-6)


def test_whitened_advantages_have_mean_nothing_and_deviation_one(monkeypatch):
    from plaudit.algorithms import feudal

    seen = []
    plain = feudal.policy_gradient_loss
    monkeypatch.setattr(
        feudal, "policy_gradient_loss", lambda *parts, **kw: (seen.append(parts[1]), plain(*parts, **kw))[1]
    )
    agent, trajectory = collected(whiten_advantages=True)
    trajectory = trajectory.with_fields(rewards=5 * torch.rand(3, 12, generator=torch.Generator().manual_seed(0)))
    feudal_losses(agent.policy, agent.network, trajectory, agent.config)
    assert seen[0].mean().item() == pytest.approx(0, abs=1e-6)
    assert seen[0].std(correction=0).item() == pytest.approx(1, abs=0.03)


def test_cores_take_turns_and_all_speak():
    """Shared weights: core i sees the states of steps i, i + r, …, as an LSTM of its own would."""
    network = FeudalNetwork(4, 2, horizon=3, percept_size=6, manager_size=5)
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(1, 8, 4, generator=generator)
    memory, core = torch.zeros(1, network.memory_size), network.manager["core"]
    states = network.latent_states(seen)
    own = [(torch.zeros(1, 5), torch.zeros(1, 5)) for _ in range(3)]
    for step in range(8):
        found, memory = network(seen[:, step], memory)
        own[step % 3] = core(states[:, step], own[step % 3])
        pooled = sum(hidden for hidden, _ in own)
        assert torch.allclose(found.goals, torch.nn.functional.normalize(pooled, dim=1), atol=1e-6)
        assert found.goals.norm().item() == pytest.approx(1, abs=1e-6)
    assert network.unpack(memory).age.item() == 8


def test_the_worker_reads_the_mean_of_the_goals_that_there_are():
    """Before the horizon is full there are fewer, and they count in full: an episode's first steps are as bold."""
    network = FeudalNetwork(4, 2, horizon=2, percept_size=6, manager_size=5)
    seen = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(0))
    memory, goals, worker = torch.zeros(1, network.memory_size), [], (torch.zeros(1, 6), torch.zeros(1, 6))
    for step in range(5):
        found, memory = network(seen[:, step], memory)
        goals.append(found.goals)
        worker = network.worker["core"](torch.tanh(network.percept(seen[:, step])), worker)
        directions = network.worker["goal"](torch.stack(goals[-3:]).mean(0))
        actions = network.worker["actions"](worker[0]).reshape(2, -1)
        assert torch.allclose(found.logits[0], actions @ directions[0], atol=1e-6)


@pytest.mark.parametrize("horizon", [1, 3])
def test_unrolling_says_what_was_said_while_acting(horizon):
    agent, trajectory = collected() if horizon == 3 else (None, None)
    if agent is None:
        agent = Feudal(FeudalConfig(horizon=1, num_environments=3), TaskSizes(4, 2), total_steps=1000)
        collector = Collector(make_environments(corridor, 3), seed=0)
        collector.collect(agent.policy, 7)
        trajectory = collector.collect(agent.policy, 12)
    assert (trajectory.truncated | (trajectory.continues == 0)).any()
    outputs, following = agent.policy.unroll(trajectory)
    assert torch.allclose(agent.policy.evaluate(trajectory).logprobs, trajectory.behaviour_logprobs, atol=1e-6)
    assert torch.allclose(outputs.goals, trajectory.goals, atol=1e-6)
    assert torch.allclose(outputs.values, trajectory.values, atol=1e-6)
    # Two halves one after the other say the same, with what the first half remembers.
    first = type(trajectory)(
        **{k: v if k == "state" else v[:, :5] for k, v in trajectory.tensors().items() if k != "policy_version"}
    )
    found = agent.policy.unroll(first)
    assert torch.allclose(found.outputs.values, outputs.values[:, :5])
    ends = (trajectory.continues == 0) | trajectory.truncated
    keep = ~ends[:, 4]
    assert torch.allclose(found.following.values[keep, 4], outputs.values[keep, 5], atol=1e-6)
    assert torch.equal(following.values[:, :-1][~ends[:, :-1]], outputs.values[:, 1:][~ends[:, :-1]])


@pytest.mark.parametrize("first", [3, 6])
def test_a_goal_from_before_the_data_still_pays(first):
    """Intrinsic rewards of a segment cut in two are those of the whole, near an episode's begin and far from it."""
    from plaudit.algorithms.feudal import _intrinsic

    agent, whole = collected()
    ends = (whole.continues == 0) | whole.truncated
    arrivals = agent.network.latent_states(observation_vectors(whole.next_observations, 4))
    outputs = agent.policy.unroll(whole).outputs
    expected = _intrinsic(agent.network, whole, outputs, arrivals, ends)
    memory = whole.state
    for step in range(first):
        _, memory = agent.network(observation_vectors(whole.observations[:, step], 4), memory)
        memory = memory.masked_fill(ends[:, step : step + 1], 0.0)
    fields = {k: v[:, first:] for k, v in whole.tensors().items() if k != "state"}
    assert (agent.network.unpack(memory).age == {3: 2, 6: 5}[first]).all()
    second = type(whole)(**fields, state=memory.detach())
    cut = agent.policy.unroll(second).outputs
    found = _intrinsic(agent.network, second, cut, arrivals[:, first:], ends[:, first:])
    assert torch.allclose(found, expected[:, first:], atol=1e-5)


def test_the_agent_goes_on_from_its_state():
    agent, trajectory = collected()
    agent.update(trajectory)
    other = Feudal(agent.config, TaskSizes(4, 2), total_steps=1000, seed=9)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert agent.update(trajectory) == other.update(trajectory)
    for one, two in zip(agent.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_corridor_pays_for_the_key_and_then_the_door():
    environment = KeyDoorCorridor(6, max_steps=30)
    environment.reset(seed=0)
    for _ in range(3):
        assert environment.step(np.int64(1))[1:4] == (0.0, False, False)
    steps = [environment.step(np.int64(action)) for action in [0] * 5 + [1] * 5]
    assert [int(step[0]) for step in steps] == [4, 3, 2, 1, 6, 7, 8, 9, 10, 11]
    assert steps[-1][1:4] == (1.0, True, False)
    assert environment.shortest == 7
    generator, reached = np.random.default_rng(0), 0
    for _ in range(600):
        environment.reset()
        while True:
            _, _, terminated, truncated, _ = environment.step(generator.integers(2))
            if terminated or truncated:
                reached += terminated
                break
    assert reached / 600 == pytest.approx(environment.success_of_random_walk(), abs=0.07)


def test_text_of_which_the_last_token_is_seen():
    environment = LastTokenEnvironment(TokenMDP(vocabulary=4, max_length=3, num_prompts=2, reward="key_and_door"))
    observation, _ = environment.reset(options={"prompt": 1})
    seen = [observation, *(environment.step(np.int64(token)) for token in (2, 3, 2))]
    assert seen[0] == 5
    assert [int(step[0]) for step in seen[1:]] == [2, 3, 2]
    assert seen[-1][1:3] == (1.0, True)


def test_the_plain_recurrent_policy_evaluates_what_it_did():
    policy = RecurrentPolicy(LSTMActorCritic(4, 2, hidden_size=5))
    collector = Collector(make_environments(corridor, 3), seed=0)
    collector.collect(policy, 4)
    trajectory = collector.collect(policy, 10)
    assert torch.allclose(policy.evaluate(trajectory).logprobs, trajectory.behaviour_logprobs, atol=1e-6)
