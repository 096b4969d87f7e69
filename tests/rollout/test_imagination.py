"""Dreams in a world whose every step is known, and real acting with the world's memory."""

import math

import pytest
import torch

from plaudit.core.returns import discounted_returns
from plaudit.models.world import PlainEncoder, Prediction, RecurrentDynamics
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.imagination import (
    LinearController,
    ObservationShape,
    World,
    WorldPolicy,
    dream,
    dreamed_returns,
)
from plaudit.rollout.mixed_play import MixedPlay


class Stairs:
    """Code and memory are numbers: action 1 goes up, 0 down; a step pays where it leads; 3 and -3 are the end."""

    code_size, num_actions, feature_size = 1, 2, 2
    reward_range = (-math.inf, math.inf)

    def initial(self, num_rows):
        return torch.zeros(num_rows, 1)

    def features(self, codes, memory):
        return torch.cat([codes, memory], 1)

    def step(self, codes, actions, memory):
        there = codes + 2 * actions.unsqueeze(1) - 1
        logits = 2.5 - there.abs().squeeze(1)
        sure = torch.zeros(len(codes), 1)
        return Prediction(sure, there.unsqueeze(1), sure.unsqueeze(2) - 20, there.squeeze(1), logits), memory + 1


UP = LinearController(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
DOWN_AFTER_ONE = LinearController(torch.tensor([[0.0, 1.0, -0.5], [0.0, 0.0, 0.0]]))


def test_a_dream_by_hand():
    found = dream(Stairs(), UP, torch.tensor([[0.0], [1.0]]), horizon=5)
    assert found.rewards.tolist() == [[1, 2, 3], [2, 3, 0]]
    assert found.mask.tolist() == [[True, True, True], [True, True, False]]
    assert found.continues.tolist()[0] == [1, 1, 0]
    assert found.continues.tolist()[1][:2] == [1, 0]
    assert not found.truncated.any()
    assert found.observations.tolist()[0] == [[0, 0], [1, 1], [2, 2]]
    assert found.next_observations.tolist()[0] == [[1, 1], [2, 2], [3, 3]]


def test_a_dream_pays_no_more_than_was_ever_seen():
    world = Stairs()
    world.reward_range = (-1.0, 2.0)
    assert dream(world, UP, torch.tensor([[0.0]]), horizon=5).rewards.tolist() == [[1, 2, 2]]
    returns = dreamed_returns(world, torch.stack([UP.weights, -UP.weights]), torch.tensor([[0.0]]), horizon=5)
    assert returns.tolist() == [[5], [-3]]


def test_a_dream_that_reaches_its_horizon_is_cut_off():
    found = dream(Stairs(), DOWN_AFTER_ONE, torch.tensor([[0.0], [2.0]]), horizon=3)
    assert found.actions[0].tolist() == [1, 0, 0]
    assert found.truncated.tolist() == [[False, False, True], [False, False, False]]
    assert found.mask[1].tolist() == [True, False, False]
    with pytest.raises(ValueError, match="at least 1"):
        dream(Stairs(), UP, torch.zeros(1, 1), horizon=0)


def test_many_controllers_dream_what_each_would_alone():
    dynamics = RecurrentDynamics(2, 3, hidden_size=4, seed=0)
    starts = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 3, 7, generator=torch.Generator().manual_seed(1))

    def draws():
        return torch.Generator().manual_seed(2)

    together = dreamed_returns(dynamics, weights, starts, horizon=6, generator=draws())
    for number in range(4):
        alone = dreamed_returns(dynamics, weights[number : number + 1], starts, horizon=6, generator=draws())
        torch.testing.assert_close(together[number], alone[0])
        row = dream(dynamics, LinearController(weights[number]), starts, horizon=6, generator=draws())
        torch.testing.assert_close(row.rewards.sum(1), alone[0])


def test_what_follows_the_end_of_a_dream_never_matters():
    found = dream(Stairs(), UP, torch.tensor([[0.0], [1.0]]), horizon=5)
    steps = found.rewards, found.next_values, found.continues, found.truncated, found.mask
    returns = discounted_returns(*steps, discount=0.5)
    assert returns[1].tolist()[:2] == [3.5, 3.0]


def test_temperature_zero_is_certain_and_heat_spreads():
    dynamics = RecurrentDynamics(1, 2, seed=0)
    starts = torch.zeros(256, 1)
    spread = {}
    for temperature in (0.0, 0.5, 2.0):
        found = dream(
            dynamics,
            LinearController(torch.zeros(2, dynamics.feature_size + 1)),
            starts,
            horizon=1,
            temperature=temperature,
            generator=torch.Generator().manual_seed(0),
        )
        spread[temperature] = found.next_observations[:, 0, 0].std().item()
    assert spread[0.0] == pytest.approx(0, abs=1e-6)
    assert spread[2.0] > 1.5 * spread[0.5] > 0


def test_the_controller_by_hand():
    controller = LinearController(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.5]]))
    seen = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert controller.sample(seen).actions.tolist() == [0, 1]
    rows = dream(Stairs(), UP, torch.zeros(1, 1), horizon=2)
    assert UP.evaluate(rows).logprobs.tolist() == [[0, 0]]
    assert DOWN_AFTER_ONE.evaluate(rows).logprobs.tolist() == [[0, float("-inf")]]


def test_real_play_carries_the_world_s_memory_and_forgets_it_at_an_end():
    dynamics = RecurrentDynamics(4, 2, hidden_size=3, seed=0)
    prepare = ObservationShape(4)
    policy = WorldPolicy(World(PlainEncoder(4), dynamics), LinearController(torch.randn(2, 8)), prepare)
    collector = Collector(make_environments("CartPole-v1", 3), seed=0)
    found = collector.collect(policy, 40)
    ended = (found.continues == 0) | found.truncated
    assert ended.any()
    assert found.state.shape == (3, 6)
    for row in range(3):
        memory = dynamics.initial(1)
        for step in range(40):
            seen = found.observations[row, step : step + 1].clone()
            action = policy.controller.sample(dynamics.features(seen, memory)).actions
            assert action.item() == found.actions[row, step].item()
            _, memory = dynamics.step(seen, action, memory)
            memory = torch.zeros_like(memory) if ended[row, step] else memory
    torch.testing.assert_close(policy.memory(3)[2:], memory)
    assert policy.memory(2).abs().sum() == 0


def test_mixed_play_draws_a_controller_for_every_episode():
    play = MixedPlay(ObservationShape(4), 2)
    play.end_episodes(torch.tensor([False, True, False]))  # also before anything was played
    assert play.memory(3)[:, 0].tolist() == [-1.0, -1.0, -1.0]
    collector = Collector(make_environments("CartPole-v1", 8), seed=0)
    found = collector.collect(play, 200)
    lengths = torch.tensor(collector.episode_lengths)
    assert len(lengths) > 20
    # Chance alone lasts 22 steps and hardly ever 100.
    assert lengths.max() > 100
    assert (found.behaviour_logprobs <= 0).all()
    memory = play.memory(8).clone()
    assert ((memory[:, 0] >= 0) & (memory[:, 0] <= 1)).sum() >= 6
    play.end_episodes(torch.tensor([True] + [False] * 7))
    assert play.memory(8)[0, 0] == -1
    assert torch.equal(play.memory(8)[1:], memory[1:])


def test_the_recorded_probabilities_of_mixed_play_are_how_often_it_does_so():
    play = MixedPlay(ObservationShape(1), 3)
    play._memory = torch.tensor([[0.6, 0.0, 5.0, 0.0]]).repeat(9000, 1)
    drawn = play.sample(torch.ones(9000, 1), generator=torch.Generator().manual_seed(0))
    best = drawn.actions == 1
    assert best.float().mean().item() == pytest.approx(0.4 + 0.2, abs=0.02)
    assert drawn.logprobs[best].exp().mean().item() == pytest.approx(0.6)
    assert drawn.logprobs[~best].exp().mean().item() == pytest.approx(0.2)


def test_observations_of_every_kind():
    assert ObservationShape(3)(torch.tensor([[1, 2]])).tolist() == [[[0, 1, 0], [0, 0, 1]]]
    assert ObservationShape(2)(torch.tensor([[0.5, 1.0]])).tolist() == [[0.5, 1.0]]
    prepare = ObservationShape(12, (2, 3, 2))
    seen = prepare(torch.arange(12.0).unsqueeze(0) * 255)
    assert seen.shape == (1, 2, 2, 3) == (1, *prepare.shape)
    assert seen[0, 0].tolist() == [[0, 2, 4], [6, 8, 10]]
    with pytest.raises(ValueError, match="has 12 numbers, an observation has 11"):
        ObservationShape(11, (2, 3, 2))
    with pytest.raises(ValueError, match="codes of size 2"):
        World(PlainEncoder(2), RecurrentDynamics(3, 2))
