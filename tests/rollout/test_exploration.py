import math

import pytest
import torch

from plaudit.models.q_network import QNetwork
from plaudit.rollout.exploration import boltzmann_logprobs, epsilon_greedy_logprobs, linear_schedule
from plaudit.rollout.q_policy import QPolicy


def test_schedules_and_choices_by_hand():
    line = [linear_schedule(step, start=1.0, end=0.2, over=4) for step in (0, 1, 4, 9)]
    assert line == pytest.approx([1.0, 0.8, 0.2, 0.2])
    values = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert epsilon_greedy_logprobs(values, 0.4).exp().tolist() == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert epsilon_greedy_logprobs(values, 0.0).exp().tolist() == [0, 1, 0, 0]
    assert epsilon_greedy_logprobs(values, 1.0).exp().tolist() == pytest.approx([0.25] * 4)
    wanted = [math.exp(each / 2) for each in (1, 3, 2, 3)]
    assert boltzmann_logprobs(values, 2.0).exp().tolist() == pytest.approx([each / sum(wanted) for each in wanted])
    assert boltzmann_logprobs(values + 1e4, 0.01).isfinite().all()
    for bad in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            epsilon_greedy_logprobs(values, bad)
    with pytest.raises(ValueError, match="positive"):
        boltzmann_logprobs(values, 0.0)
    with pytest.raises(ValueError, match="negative"):
        linear_schedule(-1, start=1, end=0, over=1)


@pytest.mark.parametrize("exploration", ["epsilon", "boltzmann"])
def test_a_policy_draws_as_it_says_and_moves_along_its_schedule(exploration):
    network = QNetwork(3, 4, hidden=(8,), seed=1)
    policy = QPolicy(network, exploration=exploration, start=0.9, end=0.1, over=100, random_steps=10)
    seen = torch.zeros(10, dtype=torch.int64)
    first = policy.sample(seen, generator=torch.Generator().manual_seed(0))
    assert first.logprobs.exp().tolist() == pytest.approx([0.25] * 10)  # uniform at first
    assert policy.steps == 10
    assert policy.amount == pytest.approx(0.82)
    many = torch.zeros(20_000, dtype=torch.int64)
    with torch.no_grad():
        wanted = policy.logprobs(policy.action_values(many[:1]))[0]
    found = policy.sample(many, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(found.actions, minlength=4) / len(many)
    torch.testing.assert_close(shares, wanted.exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(found.logprobs, wanted[found.actions])
    assert policy.amount == pytest.approx(0.1)
    greedy = QPolicy(network).sample(many[:5])
    assert greedy.actions.tolist() == [int(wanted.argmax())] * 5
    assert greedy.logprobs.tolist() == [0] * 5


def test_a_dueling_network_is_a_value_and_advantages_of_mean_zero():
    network = QNetwork(3, 4, hidden=(8, 8), dueling=True, seed=0)
    seen = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    states = network.trunk(seen)
    torch.testing.assert_close(network(seen).mean(-1), network.value(states).squeeze(-1))
    with torch.no_grad():
        network.advantages.bias += 5.0  # the same for every action: no change
    torch.testing.assert_close(network(seen).mean(-1), network.value(states).squeeze(-1))
    plain = QNetwork(3, 4, hidden=(8,), seed=0)
    assert plain(seen).shape == (6, 4)
    assert torch.equal(plain.trunk[0].weight, QNetwork(3, 4, hidden=(8,), seed=0).trunk[0].weight)
    with pytest.raises(ValueError, match="sizes"):
        QNetwork(3, 4, hidden=())
