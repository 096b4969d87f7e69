"""Option-critic: its losses, its memory, its state, and that it learns what a table can hold."""

import copy

import pytest
import torch

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.option_critic import OptionCritic, option_critic_loss
from plaudit.algorithms.option_critic_table import TabularOptionCritic
from plaudit.configs.option_critic import OptionCriticConfig
from plaudit.core.hierarchy_losses import arrival_values, option_state_values
from plaudit.core.returns import gae
from plaudit.models.options import OptionNetwork
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.gridworlds import Grid, GridWalks, GridWorld, dyna_maze
from plaudit.rollout.options import OptionPolicy, of_option


def maze():
    return GridWorld(dyna_maze())


STATES = maze().observation_space.n


def collected(**options):
    config = OptionCriticConfig(num_environments=3, rollout_steps=9, hidden=(), initial_termination=0.4, **options)
    agent = OptionCritic(config, TaskSizes(STATES, 4), total_steps=2000, seed=1)
    collector = Collector(make_environments(maze, 3), seed=0)
    collector.collect(agent.policy, 5)
    return agent, collector.collect(agent.policy, 9)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6])
def test_the_loss_is_the_sum_of_its_parts_written_out(gae_lambda):
    """Every number by loops, returns backwards along the options that were followed."""
    weights = {"value_coefficient": 0.4, "termination_coefficient": 0.7, "entropy_coefficient": 0.05}
    agent, trajectory = collected(gae_lambda=gae_lambda, deliberation_cost=0.2, discount=0.9, **weights)
    # Nobody has reached the goal: some steps end here, behind which nothing follows, ends or is charged; one is cut.
    continues, truncated = trajectory.continues.clone(), trajectory.truncated.clone()
    continues[0, 4] = continues[2, 8] = 0
    truncated[1, 3] = True
    rewards = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    trajectory = trajectory.with_fields(continues=continues, truncated=truncated, rewards=rewards)
    config, policy = agent.config, agent.policy
    loss, metrics = option_critic_loss(policy, trajectory, config)
    policy.network.requires_grad_(False)
    totals = {"policy": 0.0, "value": 0.0, "ending": 0.0, "entropy": 0.0}
    steps, going = 0, 0
    for row in range(3):
        later = 0.0
        for step in reversed(range(9)):
            option, action = int(trajectory.options[row, step]), int(trajectory.actions[row, step])
            here = policy.outputs(trajectory.observations[row, step])
            there = policy.outputs(trajectory.next_observations[row, step])
            goes_on = float(trajectory.continues[row, step])
            epsilon = policy.exploration
            best = (1 - epsilon) * there.values.max() + epsilon * there.values.mean()
            beta = there.terminations[option]
            arrival = (1 - beta) * there.values[option] + beta * best
            if step < 8 and not truncated[row, step]:
                arrival = (1 - gae_lambda) * arrival + gae_lambda * later
            later = float(rewards[row, step] + 0.9 * goes_on * (arrival - 0.2 * beta))
            advantage = later - float(here.values[option])
            chances = here.logits[option].softmax(-1)
            totals["policy"] -= advantage * chances[action].log()
            totals["value"] += advantage**2
            totals["ending"] += goes_on * beta * float(there.values[option] - best + 0.2)
            totals["entropy"] -= (chances * chances.log()).sum()
            steps, going = steps + 1, going + goes_on
    assert metrics["policy/loss"].item() == pytest.approx(float(totals["policy"]) / steps, abs=1e-5)
    assert metrics["value/loss"].item() == pytest.approx(float(totals["value"]) / steps, abs=1e-5)
    wanted = totals["policy"] / steps + 0.4 * totals["value"] / steps + 0.7 * totals["ending"] / going
    assert loss.item() == pytest.approx(float(wanted - 0.05 * totals["entropy"] / steps), abs=1e-5)


def test_one_option_is_an_actor_critic_whose_ends_do_not_matter():
    agent, trajectory = collected(num_options=1, gae_lambda=0.7, discount=0.9)
    rewards = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    trajectory = trajectory.with_fields(rewards=rewards)
    loss, metrics = option_critic_loss(agent.policy, trajectory, agent.config)
    ends = torch.autograd.grad(loss, list(agent.network.endings.parameters()), retain_graph=True)
    assert all(gradient.abs().max() == 0 for gradient in ends)
    assert metrics["options/collapsed"] == 0
    values = agent.policy.outputs(trajectory.observations).values.squeeze(-1)
    following = agent.policy.outputs(trajectory.next_observations).values.squeeze(-1).detach()
    parts = (trajectory.continues, trajectory.truncated, trajectory.mask)
    advantages, _ = gae(rewards, values.detach(), following, *parts, discount=0.9, gae_lambda=0.7)
    wanted = -(agent.policy.evaluate(trajectory).logprobs * advantages).mean()
    assert metrics["policy/loss"].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_exploration_and_rate_fall_along_their_schedules():
    options = {"exploration": 0.1, "exploration_share": 0.5, "learning_rate": 0.01}
    config = OptionCriticConfig(num_environments=3, rollout_steps=9, hidden=(), **options)
    agent = OptionCritic(config, TaskSizes(STATES, 4), total_steps=270, seed=1)
    trajectory = Collector(make_environments(maze, 3), seed=0).collect(agent.policy, 9)
    found = []
    for _ in range(10):
        found.append((agent.policy.exploration, agent.optimizer.param_groups[0]["lr"]))
        agent.update(trajectory)
    assert [each[0] for each in found] == pytest.approx([1, 0.82, 0.64, 0.46, 0.28] + [0.1] * 5)
    assert [each[1] for each in found] == pytest.approx([0.01 * (1 - done / 10) for done in range(10)])


def test_the_option_in_force_ends_by_its_own_probability():
    network = OptionNetwork(2, 2, 3, hidden=(), termination=0.25)
    policy = OptionPolicy(network, exploration=1.0)
    seen = torch.eye(2)[torch.zeros(4000, dtype=torch.int64)]
    generator = torch.Generator().manual_seed(0)
    assert (policy.memory(4000) == -1).all()
    first = policy.sample(seen, generator=generator).columns["options"]
    assert torch.bincount(first, minlength=3).min() > 1200
    second = policy.sample(seen, generator=generator).columns["options"]
    # A random next option is another one in two of three cases.
    assert (first != second).double().mean().item() == pytest.approx(0.25 * 2 / 3, abs=0.03)
    policy.end_episodes(torch.arange(4000) < 1000)
    assert (policy.memory(4000)[:1000] == -1).all()
    assert torch.equal(policy.memory(4000)[1000:], second[1000:])
    chosen = OptionPolicy(network, exploration=1.0, greedy=True).sample(seen, generator=generator).columns["options"]
    assert chosen.unique().tolist() == [int(network(seen[0]).values.argmax())]  # judged without chance


def test_evaluation_is_what_was_drawn_and_the_agent_goes_on_from_its_state():
    agent, trajectory = collected()
    assert torch.allclose(agent.policy.evaluate(trajectory).logprobs, trajectory.behaviour_logprobs, atol=1e-6)
    assert torch.allclose(agent.policy.evaluate(trajectory).values, trajectory.values, atol=1e-6)
    agent.update(trajectory)
    other = OptionCritic(agent.config, TaskSizes(STATES, 4), total_steps=2000, seed=5)
    other.load_state_dict(copy.deepcopy(agent.state_dict()))
    assert (other.policy.memory(3) == -1).all()
    assert agent.update(trajectory) == other.update(trajectory)
    for one, two in zip(agent.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match=r"\.options"):
        option_critic_loss(agent.policy, trajectory.with_fields(options=None), agent.config)


def test_tables_take_the_step_of_the_algorithm():
    """Every line of algorithm 1 written out for one run."""
    learner = TabularOptionCritic(1, 3, 2, num_options=2, discount=0.9, temperature=0.5, deliberation_cost=0.1)
    generator = torch.Generator().manual_seed(0)
    for table in (learner.values, learner.action_values, learner.preferences, learner.endings):
        table.copy_(torch.randn(table.shape, generator=generator, dtype=table.dtype))
    before = copy.deepcopy(learner)
    learner.options = before.options = torch.tensor([1])
    one = torch.tensor([1])
    learner.learn(torch.tensor([0]), one, torch.tensor([0.7]), torch.tensor([2]), torch.tensor([False]))
    values, ends = before.values[0, 2], before.endings[0, 2].sigmoid()
    arrival = arrival_values(values, ends, option_state_values(values), deliberation_cost=0.1)[1]
    target = 0.7 + 0.9 * arrival
    new_value = before.values[0, 0, 1] + 0.5 * (target - before.values[0, 0, 1])
    new_action_value = before.action_values[0, 0, 1, 1] + 0.5 * (target - before.action_values[0, 0, 1, 1])
    assert learner.values[0, 0, 1] == pytest.approx(float(new_value))
    assert learner.action_values[0, 0, 1, 1] == pytest.approx(float(new_action_value))
    preferences = before.preferences[0, 0, 1].clone().requires_grad_()
    ((preferences / 0.5).log_softmax(0)[1] * 0.5).backward()
    wanted = before.preferences[0, 0, 1] + 0.25 * (new_action_value - new_value) * preferences.grad
    assert torch.allclose(learner.preferences[0, 0, 1], wanted)
    step = 0.25 * ends[1] * (1 - ends[1]) * (values[1] - values.max() + 0.1)
    assert learner.endings[0, 2, 1] == pytest.approx(float(before.endings[0, 2, 1] - step))
    assert int((learner.endings != before.endings).sum()) == 1


def test_options_of_tables_end_and_are_chosen_by_their_probabilities():
    learner = TabularOptionCritic(8000, 2, 2, num_options=4, exploration=0.4)
    learner.values[:, 1] = torch.arange(4.0, dtype=torch.float64)
    learner.endings[:, 1] = torch.logit(torch.tensor(0.25, dtype=torch.float64))
    states, nobody = torch.ones(8000, dtype=torch.int64), torch.zeros(8000, dtype=torch.bool)
    learner.begin(states, ~nobody)
    shares = torch.bincount(learner.options, minlength=4) / 8000
    assert shares.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.02)
    learner.options = torch.zeros(8000, dtype=torch.int64)
    learner.begin(states, nobody)
    assert (learner.options != 0).double().mean().item() == pytest.approx(0.25 * 0.9, abs=0.02)
    # Two arrivals, at each of which a quarter of the options ended; the share forgets a thousandth a step.
    assert (1 / learner.durations).mean().item() == pytest.approx(0.999**2 + 0.001999 * 0.25, abs=3e-5)


def test_picking_options_out_of_tables():
    table = torch.arange(24).view(2, 3, 4)
    options = torch.tensor([2, 0])
    assert of_option(table, options).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert of_option(table[..., 0], options).tolist() == [8, 12]


def test_it_finds_the_way_through_a_room():
    """Five steps are the shortest way; a random walk takes some fifty."""
    grid, runs = Grid(("....",) * 3, starts=((0, 0),), goals=((2, 3),)), 6
    walks, learner = GridWalks(grid, runs, seed=0), TabularOptionCritic(runs, len(grid.cells()), 4, discount=0.9)
    lengths, last, done = torch.zeros(runs), torch.zeros(runs), torch.zeros(runs)
    states = torch.as_tensor(walks.states)
    learner.begin(states, torch.ones(runs, dtype=torch.bool))
    for _ in range(1200):
        actions = learner.act(states)
        _, reached = walks.step(actions.numpy())
        arrived, over = torch.as_tensor(walks.states), torch.as_tensor(reached)
        learner.learn(states, actions, over.double(), arrived, over)
        lengths += 1
        last, done, lengths = torch.where(over, lengths, last), done + over, lengths.masked_fill(over, 0)
        walks.restart(reached)
        states = torch.as_tensor(walks.states)
        learner.begin(states, over)
    assert done.min() > 20
    assert last.median() <= 7
