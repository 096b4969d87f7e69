import pytest
import torch

from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.environments import Collector, make_environments
from plaudit.rollout.trajectory import new_trajectory


def test_what_was_sampled_is_what_is_evaluated():
    policy = ControlPolicy(ActorCriticNetwork(4, 2, seed=3))
    with torch.no_grad():
        policy.network.actor[-1].weight.mul_(100)
    collector = Collector(make_environments("CartPole-v1", 3), seed=1)
    found = collector.collect(policy, 40)
    collector.environments.close()
    evaluated = policy.evaluate(found)
    torch.testing.assert_close(evaluated.logprobs, found.behaviour_logprobs)
    torch.testing.assert_close(evaluated.values, found.values)
    torch.testing.assert_close(evaluated.values[:, 1:][found.continues[:, :-1] == 1],
                               found.next_values[:, :-1][found.continues[:, :-1] == 1])  # fmt: skip
    chances = policy.network.logits(found.observations).softmax(-1)
    torch.testing.assert_close(evaluated.entropy, -torch.xlogy(chances, chances).sum(-1))
    assert (found.continues == 0).any()
    assert evaluated.logprobs.requires_grad
    assert evaluated.values.requires_grad


def test_greedy_takes_the_likeliest_and_drawing_follows_the_probabilities():
    policy = ControlPolicy(ActorCriticNetwork(3, 4, seed=0))
    with torch.no_grad():
        policy.network.actor[-1].weight.mul_(100)
    states = torch.tensor([0, 1, 2]).repeat(4000)  # discrete observations are one-hot vectors
    chances = policy.network.logits(torch.eye(3)).softmax(-1).detach()
    drawn = policy.sample(states, generator=torch.Generator().manual_seed(0)).actions
    shares = torch.stack([torch.bincount(drawn[states == state], minlength=4) / 4000 for state in range(3)])
    assert (shares - chances).abs().max() < 4 * 0.5 / 4000**0.5
    greedy = ControlPolicy(policy.network, greedy=True).sample(torch.tensor([2, 0, 1]))
    assert greedy.actions.tolist() == chances[[2, 0, 1]].argmax(-1).tolist()
    torch.testing.assert_close(greedy.logprobs, chances[[2, 0, 1]].max(-1).values.log())
    torch.testing.assert_close(policy.values(states[:3]), policy.network.values(torch.eye(3)))


def test_needs_observations():
    zeros = torch.zeros(1, 1)
    blind = new_trajectory(actions=zeros.long(), behaviour_logprobs=zeros, rewards=zeros, continues=zeros,
                           mask=zeros == 0)  # fmt: skip
    with pytest.raises(ValueError, match=r"trajectory.observations, which is None"):
        ControlPolicy(ActorCriticNetwork(3, 2)).evaluate(blind)
