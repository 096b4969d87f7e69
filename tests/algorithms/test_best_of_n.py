import pytest
import torch

from plaudit.algorithms.best_of_n import best_of_n
from plaudit.rollout.token_mdp import TokenMDP


def test_by_hand():
    rewards = torch.tensor([1.0, 5.0, float("nan"), 3.0, 5.0, 0.0])
    groups = torch.tensor([7, 2, 7, 2, 2, 4])
    valid = torch.tensor([True, True, False, True, True, False])
    # Group 2: rows 1 and 4 are equal, the first counts; group 4 has no valid row; group 7 keeps row 0.
    assert best_of_n(rewards, groups, valid).tolist() == [1, 0]
    assert best_of_n(torch.tensor([0.0, 2.0, 1.0]), torch.tensor([0, 0, 1])).tolist() == [1, 2]
    assert best_of_n(rewards, groups, torch.zeros_like(valid)).tolist() == []
    with pytest.raises(ValueError, match="not finite"):
        best_of_n(rewards, groups)
    with pytest.raises(ValueError, match="group_ids must have shape"):
        best_of_n(rewards, groups[:2], valid)


def test_draws_the_exact_distribution_of_the_best_of_n():
    mdp = TokenMDP(vocabulary=3, max_length=2, seed=1)
    groups = torch.arange(20_000) // 4
    found = mdp.sample(mdp.policy(), torch.zeros_like(groups), generator=torch.Generator().manual_seed(0))
    rewards = found.rewards.sum(1)
    chosen = rewards[best_of_n(rewards, groups)]
    exact = mdp.best_of_n(4)[0]
    expected = (exact * mdp.string_rewards[0]).sum()
    spread = (exact * (mdp.string_rewards[0] - expected).square()).sum().sqrt()
    assert abs(chosen.mean() - expected) < 4 * spread / 5000**0.5
    assert chosen.mean() > rewards.mean() + 10 * spread / 5000**0.5
