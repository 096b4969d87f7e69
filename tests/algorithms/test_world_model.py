"""Learning a world and a controller in it; the pole in the dream is in `studies/world_model.py`."""

import copy
import itertools

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from plaudit.algorithms import world_controllers, world_model
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.world_controllers import evolve_controller, improve_controller
from plaudit.algorithms.world_learning import fit_dynamics, fit_encoder, segments
from plaudit.algorithms.world_model import WorldModel
from plaudit.configs.world_model import WorldModelConfig
from plaudit.core.finite import NonFiniteError
from plaudit.core.world_losses import mixture_log_density
from plaudit.models.world import RecurrentDynamics, VariationalEncoder
from plaudit.rollout.environments import Collector, evaluate_policy, make_environments
from plaudit.rollout.imagination import WorldPolicy, dream
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


def test_one_step_of_the_dynamics_is_the_gradient_of_all_that_they_foretell():
    """Rewards of 50 and more count in their own unit; ends are foretold; masked steps say nothing."""
    generator = torch.Generator().manual_seed(0)
    rows = play(rows=4, steps=6)
    mask, continues = rows.mask.clone(), rows.continues.clone()
    mask[1, 4:] = False
    continues[1, 3] = continues[3, 5] = 0
    rows = rows.with_fields(rewards=50 * rows.rewards, mask=mask, continues=continues)
    dynamics = RecurrentDynamics(1, 2, hidden_size=4, components=2, head_size=8, seed=0)
    other = copy.deepcopy(dynamics)
    seen, after = rows.observations, rows.next_observations
    metrics = fit_dynamics(dynamics, seen, after, rows, epochs=1, learning_rate=0.01, generator=generator)
    scale = rows.rewards[mask].square().mean().sqrt()
    other.change.copy_((after - seen)[mask].square().mean(0).sqrt())
    other.reward_scale.copy_(scale)
    found, _ = other(seen, rows.actions, other.initial(4))
    density = mixture_log_density(after, found.log_weights, found.means, found.log_scales)[mask]
    surprise = (found.rewards - rows.rewards)[mask] / scale
    chance, ended = found.continuation_logits.sigmoid()[mask], continues[mask] == 0
    loss = -density.mean() + 0.5 * surprise.square().mean() - torch.where(ended, 1 - chance, chance).log().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 100.0)
    torch.optim.Adam(other.parameters(), lr=0.01).step()
    for mine, its in zip(dynamics.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)
    lost = rows.with_fields(rewards=rows.rewards * torch.nan)
    with pytest.raises(NonFiniteError, match="learning a RecurrentDynamics: the loss is nan"):
        fit_dynamics(other, seen, after, lost, epochs=1, learning_rate=0.01, generator=generator)
    assert dynamics.reward_range.tolist() == [rows.rewards[mask].min().item(), rows.rewards[mask].max().item()]
    assert metrics["dynamics/density_loss"] == pytest.approx(-density.mean().item(), rel=1e-4)
    assert metrics["dynamics/reward_error"] == pytest.approx(surprise.square().mean().sqrt().item(), rel=1e-4)


def test_one_step_of_the_encoder_is_the_bound_s_gradient_at_a_drawn_code():
    encoder = VariationalEncoder((5,), 2, width=2, seed=0)
    other, seen = copy.deepcopy(encoder), torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    fit_encoder(encoder, seen, epochs=1, learning_rate=0.01, noise=0.3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    seen = seen[torch.randperm(7, generator=generator)]
    means, log_variances = other.distribution(seen)
    codes = means + log_variances.exp().sqrt() * torch.randn(7, 2, generator=generator)
    errors = (other.decode(codes) - seen).square().sum(1) / (2 * 0.3**2)
    divergence = 0.5 * (means.square() + log_variances.exp() - 1 - log_variances).sum(1)
    (errors + divergence).mean().backward()
    torch.nn.utils.clip_grad_norm_(other.parameters(), 100.0)
    torch.optim.Adam(other.parameters(), lr=0.01).step()
    for mine, its in zip(encoder.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("controller", ["cma", "policy_gradient"])
def test_controllers_dream_as_they_are_told(controller, monkeypatch):
    """Temperature, horizon, discount, first spread, and where the strategy begins."""
    pytest.importorskip("cma")
    heard = []

    def listening(name):
        plain = getattr(world_controllers, name)
        monkeypatch.setattr(
            world_controllers, name, lambda *parts, **kw: heard.append((parts, kw)) or plain(*parts, **kw)
        )

    for name in ("dreamed_returns", "dream", "evolve", "build_algorithm"):
        listening(name)
    told = {"temperature": 0.25, "horizon": 4, "generations": 1, "population": 4, "dreams": 3}
    own = {"initial_spread": 0.7} if controller == "cma" else {"discount": 0.6}
    config = WorldModelConfig(controller=controller, **told, **own)
    dynamics, starts = RecurrentDynamics(2, 2, hidden_size=2, seed=0), torch.zeros(5, 2)
    if controller == "cma":
        evolve_controller(dynamics, starts, config, seed=0, initial=torch.full((2, 5), 3.0))
    else:
        improve_controller(dynamics, starts, config, seed=0)
    options = {name: value for _, given in heard for name, value in given.items()}
    assert (options["temperature"], options["horizon"]) == (0.25, 4)
    if controller == "cma":
        (begin, *_), given = heard[0]
        assert torch.equal(begin, torch.full((2, 5), 3.0))
        assert (given["spread"], given["population"], given["generations"]) == (0.7, 4, 1)
        assert heard[1][0][2].shape == (3, 2)  # dreams of each
    else:
        assert heard[0][0][0].discount == 0.6
        assert heard[1][0][2].shape == (12, 2)


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


def test_rounds_alternate_play_and_learn_again(monkeypatch):
    pytest.importorskip("cma")
    begun, plain = [], world_model.evolve_controller
    monkeypatch.setattr(
        world_model, "evolve_controller", lambda *a, **kw: begun.append(kw["initial"]) or plain(*a, **kw)
    )
    config = WorldModelConfig(rounds=2, environments=2, epochs=1, generations=1, population=4, dreams=2, horizon=3)
    agent = WorldModel(config, TaskSizes(4, 2), total_steps=200, seed=0)
    collector, learned = Collector(make_environments("CartPole-v1", 2), seed=0), []
    mixed = agent.policy
    players, controllers = [], []
    while collector.num_steps_taken < 200:
        acting = agent.policy
        players.append((agent.rounds_done, isinstance(acting, WorldPolicy)))
        if "dream/mean_return" in agent.update(collector.collect(acting, agent.num_steps)):
            learned.append(collector.num_steps_taken)
            controllers.append(agent.controller.weights)
    assert not any(own for done, own in players if not done)
    later = [own for done, own in players if done]
    assert later.count(True) >= 1
    assert all(one != other for one, other in itertools.pairwise(later))
    assert not begun[0].any()
    assert torch.equal(begun[1], controllers[0])  # the second round goes on from the first
    assert len(learned) == agent.rounds_done == 2
    assert 100 <= learned[0] < 200 <= learned[1]
    assert isinstance(mixed, type(agent._mixed))
    # Every episode's first observation is a place where dreams begin.
    assert len(agent.starts()) == len(collector.episode_lengths) + 2 - sum(collector._lengths == 0)
    # A run that was stopped goes on in new episodes: no segment leads from the last step into one.
    again = WorldModel(config, TaskSizes(4, 2), total_steps=200, seed=0)
    again.load_state_dict(copy.deepcopy(agent.state_dict()))
    fresh = Collector(make_environments("CartPole-v1", 2), seed=1).collect(mixed, 3)
    for each in (agent, again):
        each.update(fresh)
    assert len(again.starts()) == len(agent.starts()) + sum(collector._lengths > 0)
    assert len(segments(again.play, 1000).mask) == len(segments(agent.play, 1000).mask) + sum(collector._lengths > 0)


def test_a_player_whose_turn_comes_again_knows_nothing_of_episodes_that_ended_meanwhile():
    pytest.importorskip("cma")
    config = WorldModelConfig(rounds=2, environments=2, epochs=1, generations=1, population=4, dreams=2, horizon=3)
    agent = WorldModel(config, TaskSizes(4, 2), total_steps=40, seed=0)
    collector = Collector(make_environments("CartPole-v1", 2), seed=0)
    agent.update(collector.collect(agent.policy, 10))
    assert agent.rounds_done == 1
    agent.update(collector.collect(agent._mixed, 1))
    drawn = agent._mixed.memory(2).clone()
    assert agent.policy is agent._acting
    batch = collector.collect(agent.policy, 3)
    batch = batch.with_fields(continues=torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]))
    assert agent._acting.memory(2).abs().sum() > 0
    agent.update(batch)
    assert agent._acting.memory(2).abs().sum() == 0
    assert agent._mixed.memory(2)[0, 0] == -1  # another controller plays the next episode
    assert torch.equal(agent._mixed.memory(2)[1], drawn[1])  # the episode under way keeps its own
    agent.update(collector.collect(agent.policy, 1))
    assert agent._mixed.memory(2)[:, 0].min() >= 0


def test_what_is_refused():
    with pytest.raises(ValueError, match="use encoder: variational"):
        WorldModelConfig(picture=(2, 2, 1))
    with pytest.raises(ValueError, match=r"discount: 0\.9 is for controller: policy_gradient"):
        WorldModelConfig(discount=0.9)
    with pytest.raises(ValueError, match="an observation has 9"):
        WorldModel(WorldModelConfig(**SMALL), TaskSizes(9, 2), total_steps=10, seed=0)
