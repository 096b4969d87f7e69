import math

import pytest
import torch

from plaudit.core.dpo import dpo_loss, group_dpo_loss, implicit_rewards, pairs_within_groups
from plaudit.core.preference_losses import pairwise_ranking_loss
from plaudit.rollout.token_mdp import TokenMDP


def pairs(seed=0, size=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(4)]


def test_by_hand():
    # r̂ = .5 (log-ratio): 1 and -.5, margin 1.5; and 0 against 1, margin -1.
    first, second = torch.tensor([0.0, -1.0]), torch.tensor([-3.0, 1.0])
    reference_first, reference_second = torch.tensor([-2.0, -1.0]), torch.tensor([-2.0, -1.0])
    loss, metrics = dpo_loss(first, second, reference_first, reference_second, coefficient=0.5)
    wanted = [math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.0))]
    assert loss.item() == pytest.approx(sum(wanted) / 2)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": 0.25, "reward_first": 0.5, "reward_second": 0.25}
    )
    weighted, _ = dpo_loss(
        first, second, reference_first, reference_second, coefficient=0.5, weights=torch.tensor([3.0, 1.0])
    )
    assert weighted.item() == pytest.approx((3 * wanted[0] + wanted[1]) / 4)


def test_is_the_pairwise_loss_of_implicit_rewards_and_symmetric():
    first, second, one, two = pairs()
    loss, _ = dpo_loss(first, second, one, two, coefficient=0.7)
    scores = torch.stack([implicit_rewards(a, b, coefficient=0.7) for a, b in ((first, one), (second, two))], 1)
    tiers = torch.tensor([[0, 1]]).expand(5, 2)
    pairwise, _ = pairwise_ranking_loss(scores, tiers, torch.ones_like(tiers, dtype=torch.bool))
    torch.testing.assert_close(loss, pairwise)
    chance = torch.rand(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one_way, _ = dpo_loss(first, second, one, two, coefficient=0.7, preference=chance)
    other_way, _ = dpo_loss(second, first, two, one, coefficient=0.7, preference=1 - chance)
    torch.testing.assert_close(one_way, other_way)
    swapped, _ = dpo_loss(first, second, one, two, coefficient=0.7, preference=torch.zeros_like(chance))
    torch.testing.assert_close(swapped, dpo_loss(second, first, two, one, coefficient=0.7)[0])


def test_gradcheck_and_constants():
    first, second, one, two = (tensor.requires_grad_() for tensor in pairs(2))
    assert torch.autograd.gradcheck(lambda a, b: dpo_loss(a, b, one, two, coefficient=0.3)[0], [first, second])
    loss, _ = dpo_loss(first, second, one, two, coefficient=0.3)
    assert torch.autograd.grad(loss, [one, two], allow_unused=True) == (None, None)
    extreme, _ = dpo_loss(first * 1e4, second * 1e4, one, two, coefficient=1.0)
    assert torch.isfinite(extreme)


def test_exact_bradley_terry_labels_over_all_pairs_lead_to_the_tilted_optimum():
    """Every pair of strings with its true probability: the minimum is π*, and the loss there is the labels' entropy."""
    mdp = TokenMDP(vocabulary=3, max_length=3, coefficient=0.5, seed=3)
    i, j = torch.triu_indices(mdp.num_strings, mdp.num_strings, offset=1)
    rewards = mdp.string_rewards[0]
    chance = torch.sigmoid(rewards[i] - rewards[j])
    reference = mdp.string_logprobs(mdp.reference_logprobs)[0]
    logits = mdp.reference_logprobs.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, tolerance_change=0, history_size=50,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        optimizer.zero_grad()
        own = mdp.string_logprobs(logits.log_softmax(-1))[0]
        loss, _ = dpo_loss(own[i], own[j], reference[i], reference[j], coefficient=0.5, preference=chance)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert mdp.gap(mdp.reference_logprobs) == pytest.approx(1)
    for _ in range(3):
        loss = optimizer.step(closure)
    found = logits.detach().log_softmax(-1)
    assert mdp.gap(found) < 1e-8
    entropy = -(chance.xlogy(chance) + (1 - chance).xlogy(1 - chance)).mean()
    assert loss.item() == pytest.approx(entropy.item(), abs=1e-9)


def test_faults_are_named():
    first, second, one, two = pairs()
    with pytest.raises(ValueError, match="must be positive, got 0"):
        dpo_loss(first, second, one, two, coefficient=0)
    with pytest.raises(ValueError, match="second_logprobs must have shape"):
        dpo_loss(first, second[:1], one, two, coefficient=1.0)
    with pytest.raises(ValueError, match=r"must be \[P\]"):
        dpo_loss(first[:, None], second[:, None], one, two, coefficient=1.0)
    with pytest.raises(ValueError, match="probabilities of the first"):
        dpo_loss(first, second, one, two, coefficient=1.0, preference=torch.full_like(first, 1.5))


def test_pairs_within_groups_by_hand():
    first, second = pairs_within_groups(torch.tensor([7, 2, 7, 7, 2, 5]))
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 2), (0, 3), (1, 4), (2, 3)]
    with pytest.raises(ValueError, match=r"\[B\]"):
        pairs_within_groups(torch.zeros(2, 2, dtype=torch.int64))


def groups_of_answers():
    generator = torch.Generator().manual_seed(4)
    own, reference, rewards, weights = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(4))
    return own, reference, rewards, torch.tensor([0, 1, 0, 1, 0, 2, 1]), weights.abs()


def test_groups_equal_a_loop_over_their_pairs():
    own, reference, rewards, groups, weights = groups_of_answers()
    loss, metrics = group_dpo_loss(own, reference, rewards, groups, weights, coefficient=0.4)
    wanted, agree, total = 0.0, 0.0, 0
    for i in range(7):
        for j in range(i):
            if groups[i] != groups[j]:
                continue
            margin = 0.4 * ((own[i] - reference[i]) - (own[j] - reference[j])).item()
            chance = 1 / (1 + math.exp(-(rewards[i] - rewards[j]).item()))
            size = int((groups == groups[i]).sum())
            weight = (weights[i] + weights[j]).item() / (size - 1)
            wanted -= weight * (chance * -math.log1p(math.exp(-margin)) + (1 - chance) * -math.log1p(math.exp(margin)))
            agree, total = agree + ((rewards[i] > rewards[j]).item() == (margin > 0)), total + 1
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(agree / total)


def test_groups_add_up_over_parts_ignore_shifts_and_know_a_lonely_answer():
    own, reference, rewards, groups, weights = groups_of_answers()
    whole, _ = group_dpo_loss(own, reference, rewards, groups, weights, coefficient=0.4)
    parts = [groups == group for group in range(3)]
    found = [
        group_dpo_loss(*(t[p] for t in (own, reference, rewards, groups, weights)), coefficient=0.4) for p in parts
    ]
    torch.testing.assert_close(sum(loss for loss, _ in found), whole, rtol=1e-12, atol=0)
    assert found[2][0] == 0
    assert set(found[2][1]) == set(found[0][1])
    shifted, _ = group_dpo_loss(own, reference, rewards + 3.0 * groups, groups, weights, coefficient=0.4)
    torch.testing.assert_close(shifted, whole, rtol=1e-12, atol=0)
    own.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda table: group_dpo_loss(table, reference, rewards, groups, weights, coefficient=0.4)[0], [own]
    )
    extreme, _ = group_dpo_loss(own * 1e4, reference, rewards * 1e4, groups, weights, coefficient=1.0)
    assert torch.isfinite(extreme)
