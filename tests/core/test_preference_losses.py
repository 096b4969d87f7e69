"""All losses against hand numbers, slow float64 references over pairs and permutations, identities and extremes."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from plaudit.core import plackett_luce
from plaudit.core.preference_losses import (
    best_of_k_loss,
    classification_loss,
    judged_pairs,
    pairwise_ranking_loss,
    plackett_luce_loss,
    regression_loss,
    reward_centring_loss,
    usable_best_prompts,
    usable_ranking_prompts,
    usable_votes_prompts,
    votes_loss,
)

LOG2 = math.log(2)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def ranking_problem(num_completions, num_prompts=6, seed=0, ties=True):
    """Random scores, tiers with ties and masks with holes; the first prompt is whole, the last says nothing."""
    generator = torch.Generator().manual_seed(seed * 100 + num_completions)
    shape = (num_prompts, num_completions)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    if ties:
        tiers = torch.randint(max(2, num_completions - 2), shape, generator=generator)
    else:
        tiers = torch.stack([torch.randperm(num_completions, generator=generator) for _ in range(num_prompts)])
    mask = torch.rand(shape, generator=generator) < 0.8
    mask[0] = True
    mask[-1] = False
    mask[-1, 0] = True
    return scores, tiers, mask


def tie_logprob(ties, parameter, difference):
    """Davidson and Rao-Kupper as their papers write them, in strengths π."""
    first, second = math.exp(difference), 1.0
    if ties == "davidson":
        nu = math.exp(parameter)
        total = first + second + nu * math.sqrt(first * second)
        return math.log(first / total), math.log(nu * math.sqrt(first * second) / total)
    theta = math.exp(math.log1p(math.exp(parameter)))
    tie = (theta**2 - 1) * first * second / ((first + theta * second) * (second + theta * first))
    return math.log(first / (first + theta * second)), math.log(tie)


def slow_pairwise(scores, tiers, mask, weights, *, margin=None, smoothing=0.0, ties="ignore", parameter=None):
    """A loop over prompts and pairs in Python floats."""
    total = weight_sum = 0.0
    for row, tier, counts, weight in zip(scores.tolist(), tiers.tolist(), mask.tolist(), weights.tolist(), strict=True):
        terms = []
        for i, j in itertools.permutations([k for k, c in enumerate(counts) if c], 2):
            difference = row[i] - row[j]
            if tier[i] < tier[j] and ties == "ignore":
                z = difference - (margin[i][j] if margin else 0.0)
                terms.append(-(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z))
            elif tier[i] < tier[j]:
                terms.append(-tie_logprob(ties, parameter, difference)[0])
            elif tier[i] == tier[j] and i < j and ties != "ignore":
                terms.append(-tie_logprob(ties, parameter, difference)[1])
        if terms:
            total += weight * sum(terms) / len(terms)
            weight_sum += weight
    return total / weight_sum


# ---- by hand


def test_best_of_k_by_hand():
    scores = torch.tensor([[math.log(1), math.log(2), math.log(5)], [0.0, 0.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    loss, metrics = best_of_k_loss(scores, torch.tensor([2, 0]), mask)
    assert loss.item() == pytest.approx((math.log(8 / 5) + LOG2) / 2, abs=1e-12)
    assert metrics["accuracy"].item() == pytest.approx(0.75)  # the second row's maximum is shared by two
    assert metrics["num_prompts"].item() == 2


def test_votes_by_hand():
    scores = torch.tensor([[0.0, math.log(3), 7.0]], dtype=torch.float64)
    loss, _ = votes_loss(scores, torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[True, True, False]]))
    # shares 1/4, 3/4 of a model that says exactly that: the loss is the entropy of the votes
    assert loss.item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3), abs=1e-12)


def test_pairwise_by_hand():
    # 2 above {0, 1}: two untied pairs with differences ln 3 and 0
    scores = torch.tensor([[0.0, math.log(3), math.log(3)]], dtype=torch.float64)
    tiers, mask = torch.tensor([[1, 1, 0]]), torch.ones(1, 3, dtype=torch.bool)
    loss, metrics = pairwise_ranking_loss(scores, tiers, mask)
    assert loss.item() == pytest.approx((math.log(4 / 3) + LOG2) / 2, abs=1e-12)
    assert metrics["accuracy"].item() == 0.75
    assert metrics["margin"].item() == pytest.approx(math.log(3) / 2)
    assert metrics["num_pairs"].item() == 2
    with_margin, _ = pairwise_ranking_loss(scores, tiers, mask, margin=math.log(3))
    assert with_margin.item() == pytest.approx((LOG2 + math.log(4)) / 2, abs=1e-12)
    smoothed, _ = pairwise_ranking_loss(scores, tiers, mask, label_smoothing=0.1)
    expected = (0.9 * math.log(4 / 3) + 0.1 * math.log(4) + LOG2) / 2
    assert smoothed.item() == pytest.approx(expected, abs=1e-12)


def test_plackett_luce_by_hand():
    scores = torch.tensor([[math.log(5), math.log(3), math.log(2)]], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = plackett_luce_loss(scores, torch.tensor([[0, 1, 2]]), mask)
    assert loss.item() == pytest.approx(-math.log(5 / 10 * 3 / 5), abs=1e-12)
    # the first two tied: 5/10 · 3/5 + 3/10 · 5/7
    loss, _ = plackett_luce_loss(scores, torch.tensor([[0, 0, 1]]), mask)
    assert loss.item() == pytest.approx(-math.log(0.3 + 1.5 / 7), abs=1e-12)
    # Efron: 2! · 5 · 3 / (10 · (10 - 8/2))
    loss, _ = plackett_luce_loss(scores, torch.tensor([[0, 0, 1]]), mask, ties="efron")
    assert loss.item() == pytest.approx(-math.log(2 * 15 / 60), abs=1e-12)


def test_pointwise_by_hand():
    scores = torch.tensor([[1.0, 4.0, 9.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([[2.0, 1.0, float("nan")], [0.5, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    loss, metrics = regression_loss(scores, targets, mask)
    assert loss.item() == pytest.approx(((1 + 9) / 2 + 0.25) / 2)
    assert metrics["mean_absolute_error"].item() == pytest.approx((1 + 3 + 0.5) / 3)
    huber, _ = regression_loss(scores, targets, mask, huber_delta=1.0)
    assert huber.item() == pytest.approx(((1 + 5) / 2 + 0.25) / 2)
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    loss, metrics = classification_loss(logits, torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bool))
    assert loss.item() == pytest.approx((LOG2 + math.log(4)) / 2)
    assert metrics["accuracy"].item() == 0.25


def test_attributes_are_averaged_over_what_was_rated():
    scores = torch.tensor([[[1.0, 2.0], [3.0, 50.0]]], dtype=torch.float64)
    targets = torch.zeros_like(scores)
    mask = torch.tensor([[[True, True], [True, False]]])
    assert regression_loss(scores, targets, mask)[0].item() == pytest.approx((1 + 4 + 9) / 3)
    whole, _ = regression_loss(scores, targets, torch.tensor([[True, True]]))
    assert whole.item() == pytest.approx((1 + 4 + 9 + 2500) / 4)


def test_centring_by_hand():
    scores = torch.tensor([[1.0, 2.0, 6.0, 9.0], [4.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert reward_centring_loss(scores, mask)[0].item() == pytest.approx((36 + 64) / 2)


# ---- slow references


@pytest.mark.parametrize("num_completions", range(2, 10))
@pytest.mark.parametrize("ties", ["ignore", "davidson", "rao_kupper"])
def test_pairwise_equals_brute_force(num_completions, ties):
    scores, tiers, mask = ranking_problem(num_completions)
    weights = torch.rand(6, dtype=torch.float64) + 0.1
    options = {} if ties == "ignore" else {"ties": ties, "tie_parameter": -0.4}
    ours, metrics = pairwise_ranking_loss(scores, tiers, mask, weights=weights, **options)
    slow = slow_pairwise(scores, tiers, mask, weights, ties=ties, parameter=-0.4)
    assert ours.item() == pytest.approx(slow, abs=1e-12)
    assert metrics["num_pairs"] == judged_pairs(tiers, mask)[0].sum()


@pytest.mark.parametrize("num_completions", [2, 5, 9])
def test_margin_and_smoothing_equal_brute_force(num_completions):
    scores, tiers, mask = ranking_problem(num_completions)
    table = torch.rand(num_completions, num_completions, dtype=torch.float64)
    weights = torch.ones(6, dtype=torch.float64)
    margin = table.expand(6, -1, -1).clone()
    margin[~judged_pairs(tiers, mask)[0]] = float("nan")  # never read where no pair was judged
    ours, _ = pairwise_ranking_loss(scores, tiers, mask, margin=margin, label_smoothing=0.2)
    slow = slow_pairwise(scores, tiers, mask, weights, margin=table.tolist(), smoothing=0.2)
    assert ours.item() == pytest.approx(slow, abs=1e-12)
    per_prompt, _ = pairwise_ranking_loss(scores, tiers, mask, margin=torch.full((6,), 0.7, dtype=torch.float64))
    assert per_prompt.item() == pytest.approx(pairwise_ranking_loss(scores, tiers, mask, margin=0.7)[0].item())


def test_soft_labels_equal_brute_force_and_hard_ones_equal_tiers():
    scores, tiers, mask = ranking_problem(5, ties=False)
    soft = torch.rand(6, 5, 5, dtype=torch.float64)
    soft[0, 1, 3] = float("nan")
    total, prompts = 0.0, 0
    for p in range(6):
        terms = [
            -soft[p, i, j].item() * log_sigmoid((scores[p, i] - scores[p, j]).item())
            - (1 - soft[p, i, j].item()) * log_sigmoid((scores[p, j] - scores[p, i]).item())
            for i, j in itertools.combinations(range(5), 2)
            if mask[p, i] and mask[p, j] and not soft[p, i, j].isnan()
        ]
        total += sum(terms) / max(1, len(terms))
        prompts += bool(terms)
    ours, _ = pairwise_ranking_loss(scores, None, mask, pair_probabilities=soft)
    assert ours.item() == pytest.approx(total / prompts, abs=1e-12)
    hard = (tiers[:, :, None] < tiers[:, None, :]).double()
    for smoothing in (0.0, 0.1):
        from_labels, label_metrics = pairwise_ranking_loss(
            scores, None, mask, pair_probabilities=hard, label_smoothing=smoothing
        )
        from_tiers, tier_metrics = pairwise_ranking_loss(scores, tiers, mask, label_smoothing=smoothing)
        assert from_labels.item() == pytest.approx(from_tiers.item(), abs=1e-12)
        for name in tier_metrics:
            assert label_metrics[name].item() == pytest.approx(tier_metrics[name].item())


def log_permutation(row, order):
    return sum(row[i] - math.log(sum(math.exp(row[j]) for j in order[k:])) for k, i in enumerate(order))


def slow_plackett_luce(row, tier, counts, top=None):
    """Sum over every strict order that agrees with the tiers; with `top`, over those that agree up to there."""
    items = [k for k, c in enumerate(counts) if c]

    def seen(i):
        return top is None or sum(tier[j] < tier[i] for j in items) < top

    total = 0.0
    for order in itertools.permutations(items):
        places = {item: place for place, item in enumerate(order)}
        if all(places[i] < places[j] for i in items for j in items if tier[i] < tier[j] and seen(i)):
            total += math.exp(log_permutation(row, order))
    return math.log(total)


@pytest.mark.parametrize("num_completions", range(2, 7))
@pytest.mark.parametrize("top", [None, 1, 2, 3])
def test_exact_plackett_luce_equals_enumeration(num_completions, top):
    scores, tiers, mask = ranking_problem(num_completions)
    losses = [
        -slow_plackett_luce(row, tier, counts, top)
        for row, tier, counts in zip(scores.tolist(), tiers.tolist(), mask.tolist(), strict=True)
    ]
    usable = usable_ranking_prompts(tiers, mask)
    expected = sum(loss for loss, use in zip(losses, usable.tolist(), strict=True) if use) / usable.sum().item()
    loss, metrics = plackett_luce_loss(scores, tiers, mask, top=top)
    assert loss.item() == pytest.approx(expected, abs=1e-10)
    assert metrics["num_prompts"] == usable.sum()


@pytest.mark.parametrize("ties", ["exact", "efron"])
def test_plackett_luce_sums_to_1_over_all_permutations(ties):
    orders = torch.tensor(list(itertools.permutations(range(5))))
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, -0.4], dtype=torch.float64).expand(120, -1)
    mask = torch.ones(120, 5, dtype=torch.bool)
    total = sum(
        math.exp(-plackett_luce_loss(scores[k : k + 1], orders[k : k + 1], mask[k : k + 1], ties=ties)[0].item())
        for k in range(120)
    )
    assert total == pytest.approx(1, abs=1e-12)
    # and so do all the sets that can share the first place of a fixed size
    pairs = [[0 if k in pair else 1 for k in range(5)] for pair in itertools.combinations(range(5), 2)]
    total = sum(math.exp(-plackett_luce_loss(scores[:1], torch.tensor([pair]), mask[:1])[0].item()) for pair in pairs)
    assert total == pytest.approx(1, abs=1e-12)


def test_plackett_luce_exact_and_efron_agree_on_strict_rankings_and_on_equal_ties():
    scores, tiers, mask = ranking_problem(9, ties=False)
    for top in (None, 1, 4):
        exact, _ = plackett_luce_loss(scores, tiers, mask, top=top)
        efron, _ = plackett_luce_loss(scores, tiers, mask, top=top, ties="efron")
        torch.testing.assert_close(exact, efron, rtol=1e-12, atol=1e-12)
    scores = torch.tensor([[1.0, 1.0, 1.0, -2.0, -2.0, 0.5]], dtype=torch.float64)
    tiers, mask = torch.tensor([[0, 0, 0, 1, 1, 2]]), torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(
        plackett_luce_loss(scores, tiers, mask)[0], plackett_luce_loss(scores, tiers, mask, ties="efron")[0]
    )


@pytest.mark.parametrize("top", [None, 2])
def test_plackett_luce_tier_by_tier_equals_all_sets(top):
    """The way of the CPU against that of other devices, gradients too, with ties among nine and scores far apart."""
    for spread in (1.0, 1e3):
        scores, tiers, mask = ranking_problem(9)
        gradients, values = [], []
        for way in (plackett_luce._exact_by_tier, plackett_luce._exact):
            leaf = (spread * scores).masked_fill(~mask, 0.0).requires_grad_()
            value = way(leaf, tiers, mask, top)
            value.sum().backward()
            values.append(value.detach())
            gradients.append(leaf.grad)
        torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_plackett_luce_top_1_is_best_of_k_and_a_last_tier_is_a_top_m_ranking():
    scores, tiers, _ = ranking_problem(6, ties=False)
    mask = torch.ones_like(tiers, dtype=torch.bool)
    best = (tiers == 0).int().argmax(1)
    torch.testing.assert_close(plackett_luce_loss(scores, tiers, mask, top=1)[0], best_of_k_loss(scores, best, mask)[0])
    for ties in ("exact", "efron"):
        torch.testing.assert_close(
            plackett_luce_loss(scores, tiers.clamp_max(2), mask, ties=ties)[0],
            plackett_luce_loss(scores, tiers, mask, top=2, ties=ties)[0],
        )


# ---- gradients

COMPARATIVE = {
    "best": lambda s, t, m, **o: best_of_k_loss(s, t.masked_fill(~m, 99).argmin(1), m, **o),
    "votes": lambda s, t, m, **o: votes_loss(s, (t + 1).double(), m, **o),
    "pairwise": pairwise_ranking_loss,
    "margin": lambda s, t, m, **o: pairwise_ranking_loss(s, t, m, margin=0.5, label_smoothing=0.1, **o),
    "soft": lambda s, t, m, **o: pairwise_ranking_loss(
        s, None, m, pair_probabilities=torch.sigmoid((t[:, None, :] - t[:, :, None]).double() / 3), **o
    ),
    "davidson": lambda s, t, m, **o: pairwise_ranking_loss(s, t, m, ties="davidson", tie_parameter=0.3, **o),
    "rao_kupper": lambda s, t, m, **o: pairwise_ranking_loss(s, t, m, ties="rao_kupper", tie_parameter=0.3, **o),
    "plackett_luce": plackett_luce_loss,
    "plackett_luce_top": lambda s, t, m, **o: plackett_luce_loss(s, t, m, top=2, **o),
    "efron": lambda s, t, m, **o: plackett_luce_loss(s, t, m, ties="efron", **o),
}
ABSOLUTE = {
    "regression": lambda s, t, m, **o: regression_loss(s, t.double(), m, **o),
    "huber": lambda s, t, m, **o: regression_loss(s, t.double(), m, huber_delta=0.8, **o),
    "classification": lambda s, t, m, **o: classification_loss(s, t > 1, m, label_smoothing=0.05, **o),
    "centring": lambda s, t, m, **o: reward_centring_loss(s, m, **o),
}
LOSSES = COMPARATIVE | ABSOLUTE


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    scores, tiers, mask = ranking_problem(4, num_prompts=4)
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: LOSSES[name](s, tiers, mask, weights=weights)[0], (scores.requires_grad_(),)
    )


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
@pytest.mark.parametrize("start", [-20.0, -0.5, 2.0])
def test_gradcheck_of_the_tie_parameter(ties, start):
    scores, tiers, mask = ranking_problem(4)
    parameter = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s, p: pairwise_ranking_loss(s, tiers, mask, ties=ties, tie_parameter=p)[0],
        (scores.requires_grad_(), parameter),
    )


def test_published_gradient_of_best_of_k():
    """`∇ℓ = -(∇r_b - Σ_i P_i ∇r_i)` for a linear reward `r_i = φ_i · θ`, so `∇r_i = φ_i`."""
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    best, mask = torch.tensor([4, 0, 2]), torch.ones(3, 5, dtype=torch.bool)
    (ours,) = torch.autograd.grad(best_of_k_loss(features @ theta, best, mask)[0], theta)
    probabilities = (features @ theta).detach().exp()
    probabilities /= probabilities.sum(1, keepdim=True)
    published = -(features[torch.arange(3), best] - torch.einsum("pk,pkf->pf", probabilities, features)).mean(0)
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-10)


def test_published_gradient_of_pairs():
    """`∇ℓ = -(1/n) Σ_{w≻l} σ(r_l - r_w) (∇r_w - ∇r_l)` for a linear reward."""
    generator = torch.Generator().manual_seed(8)
    features = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    tiers = torch.tensor([[0, 1, 2, 3, 4], [1, 1, 0, 2, 2], [0, 0, 0, 0, 1]])
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[0, 2] = False
    (ours,) = torch.autograd.grad(pairwise_ranking_loss(features @ theta, tiers, mask)[0], theta)
    rewards, published = (features @ theta).detach(), torch.zeros(4, dtype=torch.float64)
    for p in range(3):
        pairs = [
            (w, v)
            for w, v in itertools.permutations(range(5), 2)
            if tiers[p, w] < tiers[p, v] and mask[p, w] and mask[p, v]
        ]
        for w, v in pairs:
            share = 1 / (1 + math.exp(rewards[p, w] - rewards[p, v]))
            published -= share * (features[p, w] - features[p, v]) / len(pairs) / 3
    torch.testing.assert_close(ours, published, rtol=0, atol=1e-10)


def test_gradient_of_votes():
    scores, _, mask = ranking_problem(5, num_prompts=3)
    votes = torch.rand(3, 5, dtype=torch.float64)
    loss, _ = votes_loss(scores.requires_grad_(), votes, mask, normaliser=1.0)
    (ours,) = torch.autograd.grad(loss, scores)
    for p in range(2):
        kept = mask[p]
        expected = scores[p][kept].softmax(0) - votes[p][kept] / votes[p][kept].sum()
        torch.testing.assert_close(ours[p][kept], expected, rtol=0, atol=1e-10)
    assert ours[2].abs().sum() == 0


# ---- identities


@pytest.mark.parametrize("name", COMPARATIVE)
def test_comparative_losses_ignore_a_shift_per_prompt(name):
    scores, tiers, mask = ranking_problem(6)
    shift = torch.randn(6, 1, dtype=torch.float64) * 10
    torch.testing.assert_close(
        COMPARATIVE[name](scores, tiers, mask)[0], COMPARATIVE[name](scores + shift, tiers, mask)[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", ABSOLUTE)
def test_absolute_losses_do_not(name):
    scores, tiers, mask = ranking_problem(6)
    before, after = ABSOLUTE[name](scores, tiers, mask)[0], ABSOLUTE[name](scores + 1, tiers, mask)[0]
    assert (before - after).abs() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_completions_and_masked_columns_do_not_matter(name):
    scores, tiers, mask = ranking_problem(5, ties=name != "best")  # the pick among ties goes by place
    loss, metrics = LOSSES[name](scores, tiers, mask)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        LOSSES[name](scores[:, order], tiers[:, order], mask[:, order])[0], loss, rtol=1e-12, atol=1e-12
    )
    wide = torch.cat([scores, torch.full((6, 2), float("nan"), dtype=torch.float64)], 1).requires_grad_()
    padded_mask = torch.cat([mask, torch.zeros(6, 2, dtype=torch.bool)], 1)
    padded, padded_metrics = LOSSES[name](wide, torch.cat([tiers, tiers[:, :2] - 9], 1), padded_mask)
    torch.testing.assert_close(padded, loss, rtol=1e-12, atol=1e-12)
    for key, value in metrics.items():
        torch.testing.assert_close(padded_metrics[key], value)
    (gradient,) = torch.autograd.grad(padded, wide)
    assert torch.isfinite(gradient).all()
    assert (gradient[~padded_mask] == 0).all()


@pytest.mark.parametrize("name", ["pairwise", "margin", "davidson", "rao_kupper", "plackett_luce"])
def test_swapping_a_pair_is_antisymmetric(name):
    """The same label on swapped completions is the same loss, and what raises one score lowers the other as much."""
    scores = torch.tensor([[0.7, -0.4]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = COMPARATIVE[name](scores, torch.tensor([[0, 1]]), mask)
    swapped, _ = COMPARATIVE[name](scores.flip(1), torch.tensor([[1, 0]]), mask)
    assert loss.item() == pytest.approx(swapped.item(), abs=1e-14)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[0, 0].item() == pytest.approx(-gradient[0, 1].item(), abs=1e-14)
    assert gradient[0, 0] < 0
    other, _ = COMPARATIVE[name](scores, torch.tensor([[1, 0]]), mask)
    if name in ("pairwise", "plackett_luce"):
        assert math.exp(-loss.item()) + math.exp(-other.item()) == pytest.approx(1, abs=1e-14)


def test_two_completions_are_bradley_terry():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(50, 2, generator=generator, dtype=torch.float64) * 3
    tiers = torch.stack([torch.randperm(2, generator=generator) for _ in range(50)])
    mask = torch.ones(50, 2, dtype=torch.bool)
    winner = tiers.argmin(1)
    chosen = scores.gather(1, winner[:, None]).squeeze(1)
    rejected = scores.gather(1, 1 - winner[:, None]).squeeze(1)
    expected = -torch.log(chosen.exp() / (chosen.exp() + rejected.exp())).mean()
    for loss in (
        pairwise_ranking_loss(scores, tiers, mask),
        plackett_luce_loss(scores, tiers, mask),
        best_of_k_loss(scores, winner, mask),
        votes_loss(scores, 1 - tiers, mask),
        pairwise_ranking_loss(scores, tiers, mask, ties="davidson", tie_parameter=-800.0),
        pairwise_ranking_loss(scores, tiers, mask, ties="rao_kupper", tie_parameter=-800.0),
    ):
        torch.testing.assert_close(loss[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [None, "given"])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_equals_the_loss_of_trl(margin, centring):
    """TRL's own `RewardTrainer.compute_loss`, run on a model that returns given scores."""
    reward_trainer = pytest.importorskip("trl.trainer.reward_trainer")
    generator = torch.Generator().manual_seed(5)
    pairs = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    pairs.requires_grad_()
    margins = torch.rand(8, generator=generator, dtype=torch.float64)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centring),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    inputs = {"attention_mask": torch.ones(16, 1)} | ({"margin": margins} if margin else {})
    theirs = reward_trainer.RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=pairs.T.reshape(-1, 1)), inputs
    )
    mask, tiers = torch.ones(8, 2, dtype=torch.bool), torch.tensor([[0, 1]]).expand(8, 2)
    ours, metrics = pairwise_ranking_loss(pairs, tiers, mask, margin=margins if margin else None)
    if centring is not None:
        ours = ours + centring * reward_centring_loss(pairs, mask)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, pairs)[0] for loss in (ours, theirs)), rtol=0, atol=1e-12)
    for name, values in trainer._metrics["eval"].items():
        if name in metrics:
            assert metrics[name].item() == pytest.approx(values[0], abs=1e-6)
    assert {"accuracy", "margin", "mean_reward"} <= set(trainer._metrics["eval"])


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name):
    scores, tiers, mask = ranking_problem(5, num_prompts=9)
    weights = torch.rand(9, dtype=torch.float64) + 0.2
    scores.requires_grad_()
    whole, metrics = LOSSES[name](scores, tiers, mask, weights=weights)
    parts, counted = torch.zeros((), dtype=torch.float64), 0
    for part in (slice(0, 4), slice(4, 5), slice(5, 9)):
        loss, part_metrics = LOSSES[name](
            scores[part], tiers[part], mask[part], weights=weights[part], normaliser=metrics["weight_sum"]
        )
        parts, counted = parts + loss, counted + part_metrics["num_prompts"]
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, scores)[0] for loss in (parts, whole)), rtol=1e-12, atol=1e-12
    )
    assert counted == metrics["num_prompts"]


def test_usable_prompts_know_the_normaliser_before_the_scores():
    scores, tiers, mask = ranking_problem(3, num_prompts=40)
    tiers[1] = 2  # all tied
    weights = torch.rand(40, dtype=torch.float64)
    _, metrics = pairwise_ranking_loss(scores, tiers, mask, weights=weights)
    usable = usable_ranking_prompts(tiers, mask)
    assert not usable[1]
    assert not usable[-1]
    torch.testing.assert_close(metrics["weight_sum"], weights[usable].sum())
    _, metrics = pairwise_ranking_loss(scores, tiers, mask, weights=weights, ties="davidson", tie_parameter=0.0)
    aware = usable_ranking_prompts(tiers, mask, ties="davidson")
    assert aware[1]
    torch.testing.assert_close(metrics["weight_sum"], weights[aware].sum())
    best = torch.tensor([-1, 0, 1, 2, 5] * 8)
    assert best_of_k_loss(scores, best, mask)[1]["num_prompts"] == usable_best_prompts(best, mask).sum() < 33
    votes = torch.ones(40, 3) * (torch.arange(40) % 2)[:, None]
    assert votes_loss(scores, votes, mask)[1]["num_prompts"] == usable_votes_prompts(votes, mask).sum() <= 20


def test_a_pick_without_a_rival_is_no_pick():
    """One completion alone: its loss would be 0, and would thin out the mean of the others."""
    scores = torch.zeros(2, 2, dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    best, votes = torch.tensor([0, 0]), torch.ones(2, 2)
    assert usable_best_prompts(best, mask).tolist() == usable_votes_prompts(votes, mask).tolist() == [True, False]
    assert best_of_k_loss(scores, best, mask)[0].item() == pytest.approx(LOG2, abs=1e-12)
    assert votes_loss(scores, votes, mask)[0].item() == pytest.approx(LOG2, abs=1e-12)


def test_a_prompt_weighs_the_same_whatever_its_number_of_pairs():
    """One prompt with 36 pairs beside one with a single pair: the loss is the mean of the two, not of the 37."""
    scores = torch.zeros(2, 9, dtype=torch.float64)
    scores[1, 0] = 2.0
    tiers = torch.arange(9).expand(2, 9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 2:] = False
    loss, _ = pairwise_ranking_loss(scores, tiers, mask)
    assert loss.item() == pytest.approx((LOG2 - log_sigmoid(2.0)) / 2, abs=1e-12)


# ---- extremes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_have_finite_losses_and_gradients(name, dtype):
    _, tiers, mask = ranking_problem(9)
    signs = torch.where(torch.arange(54).reshape(6, 9) % 3 == 0, 1.0, -1.0)
    scores = (signs * 1e4).to(dtype).requires_grad_()
    loss, _ = LOSSES[name](scores, tiers, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_extreme_pairs_have_the_limit_value():
    mask = torch.ones(1, 2, dtype=torch.bool)
    wrong = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss, _ = pairwise_ranking_loss(wrong, torch.tensor([[0, 1]]), mask)
    loss.backward()
    assert loss.item() == 2e4
    assert wrong.grad.tolist() == [[-1, 1]]
    for other in (
        plackett_luce_loss(wrong, torch.tensor([[0, 1]]), mask),
        best_of_k_loss(wrong, torch.tensor([0]), mask),
    ):
        assert other[0].item() == 2e4
    assert pairwise_ranking_loss(-wrong, torch.tensor([[0, 1]]), mask)[0].item() == 0


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_judged_is_a_zero_with_zero_gradient(name):
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 4, dtype=torch.bool)
    loss, metrics = LOSSES[name](scores, torch.zeros(3, 4, dtype=torch.int64), mask)
    loss.backward()
    assert loss.item() == 0
    assert metrics["num_prompts"] == 0
    assert scores.grad.abs().sum() == 0
    assert all(torch.isfinite(value) for value in metrics.values())


class CountOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", LOSSES)
def test_no_loop_over_prompts_and_no_host_synchronisation(name):
    counts = []
    for copies in (1, 100, 1):
        # Copies, since tiers of other sizes may cost other operations.
        scores, tiers, mask = (table.repeat(copies, 1) for table in ranking_problem(5, num_prompts=2))
        with CountOperations() as mode:
            LOSSES[name](scores, tiers, mask)
        counts.append(mode.count)
    assert counts[1] == counts[2]
    # A tensor on the meta device has no values, so anything that needs one on the host raises.
    meta = (tensor.to("meta") for tensor in ranking_problem(5))
    loss, metrics = LOSSES[name](*meta)
    assert loss.shape == ()
    assert all(value.shape == () for value in metrics.values())


# ---- refusals


def test_refuses_shapes_that_would_broadcast():
    scores, tiers, mask = ranking_problem(4)
    with pytest.raises(ValueError, match="weights"):
        pairwise_ranking_loss(scores, tiers, mask, weights=torch.ones(6, 1))
    with pytest.raises(ValueError, match="mask"):
        pairwise_ranking_loss(scores, tiers, mask[:, :1])
    with pytest.raises(ValueError, match="tiers"):
        pairwise_ranking_loss(scores, tiers[:, :1], mask)
    with pytest.raises(ValueError, match="margin"):
        pairwise_ranking_loss(scores, tiers, mask, margin=torch.ones(4))
    with pytest.raises(ValueError, match="boolean"):
        pairwise_ranking_loss(scores, tiers, mask.double())
    with pytest.raises(ValueError, match="best"):
        best_of_k_loss(scores, torch.zeros(6, 1, dtype=torch.int64), mask)
    with pytest.raises(ValueError, match="targets"):
        regression_loss(scores, torch.zeros(6, 1), mask)


def test_refuses_options_that_contradict_each_other():
    scores, tiers, mask = ranking_problem(4)
    for options, message in (
        ({"ties": "davidson", "tie_parameter": 0.0, "margin": 1.0}, "takes no margin"),
        ({"ties": "davidson"}, "tie_parameter"),
        ({"ties": "coin"}, "coin"),
        ({"label_smoothing": 0.5}, "0.5"),
        ({"margin": 1.0, "pair_probabilities": torch.rand(6, 4, 4)}, "winner"),
    ):
        with pytest.raises(ValueError, match=message):
            pairwise_ranking_loss(scores, tiers, mask, **options)
    with pytest.raises(ValueError, match="tiers"):
        pairwise_ranking_loss(scores, None, mask)
    with pytest.raises(ValueError, match="12"):
        plackett_luce_loss(torch.zeros(1, 13), torch.zeros(1, 13, dtype=torch.int64), torch.ones(1, 13) > 0)
    with pytest.raises(ValueError, match="top"):
        plackett_luce_loss(scores, tiers, mask, top=0)
