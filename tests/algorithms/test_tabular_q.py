"""Q-learning with tables: one step by hand, the book's example of maximisation bias, the hard optimum on strings."""

import pytest
import torch

from plaudit.algorithms.tabular_q import TabularQ
from plaudit.rollout.token_mdp import TokenMDP
from studies.maximisation_bias import share_of_left

MEASURED = {False: (0.827, 0.459, 0.113), True: (0.134, 0.095, 0.069)}
"""Share of left at episodes 50, 100 and 300 over 10,000 runs, by Q-learning and by Double Q-learning."""


def test_one_step_by_hand():
    allowed = torch.tensor([[True, True, False], [True, True, True]])
    learner = TabularQ(2, allowed, step_size=0.5, discount=0.9)
    learner.tables[0, :, 1] = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    state, action, following = torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([1, 1])
    reward = torch.tensor([2.0, 2.0], dtype=torch.float64)
    learner.learn(state, action, reward, following, torch.tensor([False, True]), torch.tensor([True, True]))
    assert learner.tables[0, :, 0, 1].tolist() == [0.5 * (2 + 0.9 * 4), 0.5 * 2]
    learner.learn(state, action, reward, following, torch.tensor([False, True]), torch.tensor([False, False]))
    assert learner.tables[0, :, 0, 1].tolist() == [0.5 * (2 + 0.9 * 4), 0.5 * 2]
    double = TabularQ(400, allowed, double=True, step_size=1.0)
    double.tables[0, :, 1] = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64)
    double.tables[1, :, 1] = torch.tensor([7.0, 5.0, 6.0], dtype=torch.float64)
    zeros = torch.zeros(400, dtype=torch.int64)
    never, ever = torch.zeros(400, dtype=torch.bool), torch.ones(400, dtype=torch.bool)
    double.learn(zeros, zeros, zeros.double(), zeros + 1, never, ever)
    # The table that chooses is the one that moves; the other one values: 5 where the first moves, 1 where the second.
    assert double.tables[0, :, 0, 0].unique().tolist() == [0, 5]
    assert double.tables[1, :, 0, 0].unique().tolist() == [0, 1]
    assert bool(((double.tables[0, :, 0, 0] > 0) ^ (double.tables[1, :, 0, 0] > 0)).all())
    # Of equally good actions each is chosen: all of the first table are 4, and the second values them at 5, 7 and 6.
    tied = TabularQ(3000, allowed, double=True, step_size=1.0)
    tied.tables[0, :, 1] = 4.0
    tied.tables[1, :, 1] = torch.tensor([5.0, 7.0, 6.0], dtype=torch.float64)
    some = torch.zeros(3000, dtype=torch.int64)
    tied.learn(some, some, some.double(), some + 1, some > 0, some == 0)
    found, counts = tied.tables[0, :, 0, 0].unique(return_counts=True)
    assert found.tolist() == [0, 5, 6, 7]  # 0 where the second table moved
    assert counts[1:].tolist() == pytest.approx([500] * 3, abs=100)
    acted = TabularQ(2000, allowed, epsilon=0.5).act(torch.zeros(2000, dtype=torch.int64))
    assert acted.unique().tolist() == [0, 1]  # never the one that is not allowed; ties are drawn alike
    assert acted.double().mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("double", [False, True])
def test_maximisation_bias_at_reduced_size(double):
    shares = share_of_left(400, 100, double=double, seed=3)
    for place, episode in enumerate((50, 100)):
        wanted = MEASURED[double][place]
        assert shares[episode - 1].item() == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 400) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("double", [False, True])
def test_maximisation_bias_as_in_the_table(double):
    shares = share_of_left(10_000, double=double, seed=0)
    for place, episode in enumerate((50, 100, 300)):
        wanted = MEASURED[double][place]
        # Both figures are draws of 10,000 runs.
        assert shares[episode - 1].item() == pytest.approx(wanted, abs=4 * (2 * wanted * (1 - wanted) / 1e4) ** 0.5)


@pytest.mark.parametrize("double", [False, True])
def test_the_hard_optimum_of_strings_is_reached(double):
    mdp = TokenMDP(vocabulary=3, max_length=3)
    allowed = torch.ones(mdp.num_states, mdp.vocabulary, dtype=torch.bool)
    learner = TabularQ(16, allowed, double=double, step_size=1.0, epsilon=1.0)  # nothing is random in these steps
    states = torch.zeros(16, dtype=torch.int64)
    everyone = torch.ones(16, dtype=torch.bool)
    for _ in range(2000 if double else 1000):
        actions = learner.act(states)
        following = mdp.next_prefix[states, actions]
        ended = following < 0
        rewards = mdp.rewards[0, states, actions].double()
        learner.learn(states, actions, rewards, following.clamp(min=0), ended, everyone)
        states = following.clamp(min=0)  # state 0 is the empty prefix
    best = mdp.string_rewards[0].max().item()
    found = learner.tables[:, :, 0].amax(-1)
    assert found.mean().item() == pytest.approx(best, rel=1e-12)
