"""Learning a world and a controller in it; the pole in the dream is in `studies/world_model.py`."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.world_controllers import evolve_controller, improve_controller
from plaudit.algorithms.world_learning import fit_dynamics, segments
from plaudit.algorithms.world_model import WorldModel
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.world import RecurrentDynamics
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.imagination import dream
from plaudit.rollout.trajectory import new_trajectory


def play(rows=24, steps=20, seed=0):
    """A number anywhere; a coin decides whether it goes up or down, the action (0 or 1) whether by one or two."""
    generator = torch.Generator().manual_seed(seed)
    actions = torch.randint(2, (rows, steps), generator=generator)
    side = 2 * torch.randint(2, (rows, steps), generator=generator) - 1
    seen = torch.randn(rows, steps, 1, generator=generator)
    following = seen + ((1 + actions) * side).unsqueeze(2)
    return new_trajectory(
        actions=actions,
        behaviour_logprobs=torch.zeros(rows, steps),
        rewards=following[:, :, 0].clone(),
        continues=torch.ones(rows, steps),
        mask=torch.ones(rows, steps, dtype=torch.bool),
        observations=seen,
        next_observations=following,
    )


def test_segments_end_where_episodes_do():
    whole = play(rows=2, steps=10)
    continues, truncated = whole.continues.clone(), whole.truncated.clone()
    continues[0, 3] = 0
    truncated[1, 7] = True
    rows = segments([whole.with_fields(continues=continues, truncated=truncated)], 4)
    assert rows.mask.sum(1).tolist() == [4, 4, 2, 4, 4, 2]
    torch.testing.assert_close(rows.observations[rows.mask], whole.observations.flatten(0, 1))
    assert rows.continues[0, 3] == 0
    assert rows.truncated[4, 3]
    with pytest.raises(ValueError, match="no play"):
        segments([], 4)


def test_segments_go_on_from_one_batch_into_the_next():
    whole = play(rows=2, steps=10)
    continues = whole.continues.clone()
    continues[1, 4] = 0
    whole = whole.with_fields(continues=continues)
    pieces = [
        whole.with_fields(**{name: tensor[:, start:end] for name, tensor in whole.tensors().items()})
        for start, end in ((0, 3), (3, 6), (6, 10))
    ]
    parts, at_once = segments(pieces, 8), segments([whole], 8)
    assert parts.mask.sum(1).tolist() == [8, 2, 5, 5]
    for name, tensor in at_once.tensors().items():
        torch.testing.assert_close(parts.tensors()[name], tensor)
    with pytest.raises(ValueError, match=r"same environments, got \[1, 2\]"):
        segments([whole, whole.select(torch.tensor([0]))], 8)


def test_the_dynamics_learn_both_ways_a_coin_can_send_them():
    """The change is ±1 or ±2 by the action: two sharp modes, which one Gaussian cannot have."""
    rows, found = play(rows=96, steps=5), {}
    for components in (1, 3):
        dynamics = RecurrentDynamics(1, 2, hidden_size=4, components=components, head_size=32, seed=0)
        metrics = fit_dynamics(
            dynamics,
            rows.observations,
            rows.next_observations,
            rows,
            epochs=67,
            learning_rate=2e-2,
            generator=torch.Generator().manual_seed(0),
        )
        found[components] = metrics["dynamics/density_loss"]
    assert found[3] < found[1] - 0.7
    prediction, _ = dynamics.step(torch.zeros(2, 1), torch.tensor([0, 1]), dynamics.initial(2))
    chances = prediction.log_weights.softmax(-1)
    up = (prediction.means.squeeze(-1) > 0).float()
    assert (chances * up).sum(-1).tolist() == pytest.approx([0.5, 0.5], abs=0.15)
    size = (chances * prediction.means.squeeze(-1).abs()).sum(-1)
    assert size.tolist() == pytest.approx([1, 2], abs=0.3)


class Up(RecurrentDynamics):
    """Action 1 pays 1, action 0 nothing; nothing else happens."""

    def step(self, codes, actions, memory):
        found, memory = super().step(codes, actions, memory)
        still = found.means * 0 + codes.unsqueeze(1)
        return found._replace(means=still, rewards=actions.float(), continuation_logits=actions * 0 + 1.0), memory


@pytest.mark.parametrize("learn", [evolve_controller, improve_controller])
def test_both_ways_of_learning_find_the_action_that_pays(learn):
    pytest.importorskip("cma")
    dynamics = Up(2, 2, hidden_size=2, seed=0)
    config = WorldModelConfig(generations=20, population=8, dreams=4, horizon=5)
    starts = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    policy, metrics = learn(dynamics, starts, config, seed=0)
    assert metrics["dream/mean_return"] > 4
    dreamed = dream(dynamics, policy, starts, horizon=5, generator=torch.Generator().manual_seed(0))
    assert dreamed.actions.float().mean() > 0.8


class Spot(gymnasium.Env):
    """A picture of eight cells with one bright: 0 moves it left, 1 right; the two at the right end pay. Ten steps."""

    observation_space = spaces.Box(0, 255, (1, 8, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.taken = int(self.np_random.integers(8)), 0
        return self.picture(), {}

    def step(self, action):
        self.place, self.taken = min(7, max(0, self.place + 2 * int(action) - 1)), self.taken + 1
        return self.picture(), float(self.place >= 6), self.taken == 10, False, {}

    def picture(self):
        seen = np.zeros((1, 8, 1), np.uint8)
        seen[0, self.place, 0] = 255
        return seen


SMALL = {
    "encoder": "variational",
    "picture": (1, 8, 1),
    "code_size": 3,
    "encoder_epochs": 12,
    "learning_rate": 1e-2,
    "hidden_size": 8,
    "epochs": 30,
    "segment": 10,
    "generations": 20,
    "population": 16,
    "dreams": 12,
    "horizon": 10,
    "environments": 4,
}


def test_pictures_are_encoded_dreamed_of_and_acted_on():
    """From 1600 steps of pictures; going right gives 8.75, chance 2.5, an untrained one 0.1."""
    pytest.importorskip("cma")
    agent = WorldModel(WorldModelConfig(**SMALL), TaskSizes(8, 2), total_steps=1600, seed=0)
    collector = Collector(make_environments(Spot, agent.num_environments), seed=0)
    before = evaluate_policy(Spot, agent.greedy_policy(), num_episodes=16, seed=5)
    while collector.num_steps_taken < 1600:
        metrics = agent.update(collector.collect(agent.policy, agent.num_steps))
    assert agent.rounds_done == 1
    assert {"encoder/reconstruction", "dynamics/density_loss", "dream/mean_return"} <= set(metrics)
    after = evaluate_policy(Spot, agent.greedy_policy(), num_episodes=16, seed=5)
    assert np.mean(before) < 1
    assert np.mean(after) > 5.5
    again = WorldModel(WorldModelConfig(**SMALL), TaskSizes(8, 2), total_steps=1, seed=7)
    again.load_state_dict(agent.state_dict())
    assert evaluate_policy(Spot, again.greedy_policy(), num_episodes=16, seed=5) == after
    torch.testing.assert_close(again.starts(), agent.starts())
    loaded = WorldModel(WorldModelConfig(**SMALL), TaskSizes(8, 2), total_steps=1, seed=8).greedy_policy()
    loaded.load_state_dict(agent.greedy_policy().state_dict())
    assert evaluate_policy(Spot, loaded, num_episodes=16, seed=5) == after


def test_rounds_alternate_play_and_learn_again():
    pytest.importorskip("cma")
    config = WorldModelConfig(rounds=2, environments=2, epochs=1, generations=1, population=4, dreams=2, horizon=3)
    agent = WorldModel(config, TaskSizes(4, 2), total_steps=200, seed=0)
    collector, learned = Collector(make_environments("CartPole-v1", 2), seed=0), []
    mixed = agent.policy
    while collector.num_steps_taken < 200:
        acting = agent.policy
        if "dream/mean_return" in agent.update(collector.collect(acting, agent.num_steps)):
            learned.append(collector.num_steps_taken)
    assert len(learned) == agent.rounds_done == 2
    assert 100 <= learned[0] < 200 <= learned[1]
    assert isinstance(mixed, type(agent._mixed))
    # Every episode's first observation is a place where dreams begin.
    assert len(agent.starts()) == len(collector.episode_lengths) + 2 - sum(collector._lengths == 0)


def test_what_is_refused():
    with pytest.raises(ValueError, match="use encoder: variational"):
        WorldModelConfig(picture=(2, 2, 1))
    with pytest.raises(ValueError, match="an observation has 9"):
        WorldModel(WorldModelConfig(**SMALL), TaskSizes(9, 2), total_steps=10, seed=0)
