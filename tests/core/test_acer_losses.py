"""Truncated weights with their correction, and the trust region: by hand, by enumeration, by a general solver."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from plaudit.core.acer_losses import (
    action_utilities,
    corrected_score_weights,
    trust_region_policy_loss,
    trust_region_step,
)
from plaudit.core.kl import categorical_entropy, exact_kl
from plaudit.core.reduction import reduce_steps
from plaudit.rollout.token_mdp import TokenMDP

TRUNCATIONS = (0.0, 0.5, 1.0, 10.0, math.inf)
TIGHT = {"rtol": 0, "atol": 1e-12}


def random_logprobs(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)


def expected_weights(logprobs, behaviour, advantages, truncation):
    """`E_{a_t~μ}` of the weights at each state `[S, A]`, action by action."""
    total = torch.zeros_like(logprobs)
    for action in range(logprobs.shape[-1]):
        actions = torch.full(logprobs.shape[:-1], action)
        found = corrected_score_weights(
            logprobs, behaviour, actions, advantages[..., action], advantages, truncation=truncation
        )
        total += behaviour[..., action].exp().unsqueeze(-1) * found
    return total


def test_weights_by_hand():
    logprobs = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log()
    behaviour = torch.tensor([[0.1, 0.3, 0.6]], dtype=torch.float64).log()  # ρ = 5, 1, 1/3
    advantages = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
    found = corrected_score_weights(logprobs, behaviour, torch.tensor([0]), torch.tensor([4.0]).double(), advantages,
                                    truncation=2.0)  # fmt: skip
    # min(2, 5) · 4 and [1 - 2/5] · .5 · 1 at the sampled action; the ratios of the others are below 2.
    torch.testing.assert_close(found, torch.tensor([[8.3, 0.0, 0.0]], dtype=torch.float64), **TIGHT)
    other = corrected_score_weights(logprobs, behaviour, torch.tensor([2]), torch.tensor([4.0]).double(), advantages,
                                    truncation=0.5)  # fmt: skip
    # [1 - .5/5] · .5 · 1, [1 - .5/1] · .3 · -2, and min(.5, 1/3) · 4.
    torch.testing.assert_close(other, torch.tensor([[0.45, -0.3, 4 / 3]], dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_truncated_and_corrected_is_the_gradient_at_every_state(truncation):
    """For every c, at each of the 85 prefixes of the full problem, with `Q = Q^π` in both terms."""
    mdp = TokenMDP(seed=3)
    logits = torch.randn(mdp.reference_logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)
    values = mdp.evaluate(logprobs.detach(), coefficient=0.0).action_values
    utilities = action_utilities(logprobs.detach(), values)
    weights = expected_weights(logprobs, mdp.reference_logprobs, utilities.utilities - utilities.values.unsqueeze(-1),
                               truncation)  # fmt: skip
    (found,) = torch.autograd.grad((weights * logprobs).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((logprobs.exp() * values).sum(), logits)
    torch.testing.assert_close(found, wanted, **TIGHT)
    assert wanted.abs().max() > 0.1


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_with_a_penalty_it_is_the_gradient_of_the_penalised_objective(truncation):
    """Weighed by how often the current policy comes by, the sum over states is `∇J` of the KL-regularised problem."""
    mdp = TokenMDP(vocabulary=3, max_length=3, seed=3)
    logits = torch.randn(mdp.reference_logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits.requires_grad_()
    logprobs = logits.log_softmax(-1)
    solution = mdp.evaluate(logprobs.detach())
    found = action_utilities(logprobs.detach(), solution.action_values, mdp.reference_logprobs,
                             coefficient=mdp.coefficient)  # fmt: skip
    torch.testing.assert_close(found.values, solution.values, **TIGHT)
    weights = expected_weights(logprobs, mdp.reference_logprobs, found.utilities - found.values.unsqueeze(-1),
                               truncation)  # fmt: skip
    visits = torch.zeros_like(found.values)
    chances = mdp.string_logprobs(logprobs.detach()).exp()
    for step in range(mdp.max_length):
        rows = mdp.string_mask[:, step]
        visits.index_add_(1, mdp.string_prefixes[rows, step], chances[:, rows])
    (gradient,) = torch.autograd.grad((visits.unsqueeze(-1) * weights * logprobs).sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(mdp.objective(logprobs), logits)
    torch.testing.assert_close(gradient, wanted, **TIGHT)


def test_actions_whose_behaviour_was_not_kept_get_no_correction_and_the_others_lose_nothing():
    logprobs, behaviour = random_logprobs(4, 6), random_logprobs(4, 6, seed=1)
    advantages = random_logprobs(4, 6, seed=2)
    kept = behaviour.argsort(-1, descending=True)[:, :3]
    known = torch.full_like(behaviour, math.inf).scatter(1, kept, behaviour.gather(1, kept))
    actions, sampled = kept[:, 0], advantages[:, 0]
    for truncation in (0.0, 0.5, 2.0):
        whole = corrected_score_weights(logprobs, behaviour, actions, sampled, advantages, truncation=truncation)
        part = corrected_score_weights(logprobs, known, actions, sampled, advantages, truncation=truncation)
        torch.testing.assert_close(part, whole.masked_fill(known == math.inf, 0.0), **TIGHT)


def test_extremes_of_weights():
    logprobs = torch.tensor([[0.0, -math.inf], [-200.0, 0.0]], dtype=torch.float64)
    behaviour = torch.tensor([[-400.0, 0.0], [0.0, -800.0]], dtype=torch.float64)  # ratios e^400, 0, e^-200, e^800
    advantages = torch.tensor([[1e4, -1e4], [1e4, -1e4]], dtype=torch.float64)
    for truncation in (0.0, 1.0, 10.0):
        found = corrected_score_weights(logprobs, behaviour, torch.tensor([0, 1]), torch.tensor([1e4, -1e4]).double(),
                                        advantages, truncation=truncation)  # fmt: skip
        wanted = torch.tensor([[(1 + truncation) * 1e4, 0.0], [0.0, -(1 + truncation) * 1e4]], dtype=torch.float64)
        torch.testing.assert_close(found, wanted)
    with pytest.raises(ValueError, match="truncation must not be negative, got -1"):
        corrected_score_weights(logprobs, behaviour, torch.tensor([0, 1]), advantages[:, 0], advantages, truncation=-1)
    with pytest.raises(ValueError, match=r"sampled_advantages must have shape \(2,\), got \(2, 1\)"):
        corrected_score_weights(logprobs, behaviour, torch.tensor([0, 1]), advantages[:, :1], advantages, truncation=1)
    with pytest.raises(ValueError, match=r"a penalty with coefficient 0\.5 needs reference_logprobs"):
        action_utilities(logprobs, advantages, coefficient=0.5)
    # An action that is not allowed has no utility, whatever the critic says of it.
    utilities = action_utilities(logprobs[:1], torch.tensor([[2.0, math.nan]]).double(), logprobs[:1], coefficient=0.5)
    assert utilities.utilities.tolist() == [[2.0, 0.0]]
    assert utilities.values.tolist() == [2.0]


def test_the_step_is_the_nearest_one_within_the_limit():
    generator = np.random.default_rng(0)
    for limit in (0.0, 0.3, 1.0):
        gradient, divergence = generator.normal(size=(2, 4))
        gradient += 2 * divergence
        found = trust_region_step(torch.tensor(gradient), torch.tensor(divergence), limit=limit).numpy()
        constraint = {"type": "ineq", "fun": lambda z, k=divergence, most=limit: most - k @ z}
        solved = minimize(lambda z, g=gradient: ((z - g) ** 2).sum(), np.zeros(4), constraints=[constraint],
                          options={"ftol": 1e-14})  # fmt: skip
        np.testing.assert_allclose(found, solved.x, atol=1e-6)
        assert divergence @ found == pytest.approx(limit, abs=1e-12)
    gradient, divergence = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])  # k·g = 1
    torch.testing.assert_close(trust_region_step(gradient, divergence, limit=0.0), torch.tensor([0.7, -2.1]))
    assert torch.equal(trust_region_step(gradient, divergence, limit=1.0), gradient)
    assert torch.equal(trust_region_step(gradient, 0 * divergence, limit=0.0), gradient)
    with pytest.raises(ValueError, match="limit of a trust region must not be negative"):
        trust_region_step(gradient, divergence, limit=-0.1)


@pytest.mark.parametrize("statistics", ["probabilities", "logits"])
@pytest.mark.parametrize("limit", [0.0, 0.2, 5.0, math.inf])
def test_gradient_of_the_loss_against_autograd_by_the_statistics(statistics, limit):
    """`g` and `k` by autograd of the objective and of the divergence as functions of φ, one state at a time."""
    logits = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    logprobs = logits.log_softmax(-1)
    average, weights = random_logprobs(2, 3, 4, seed=1), 3 * random_logprobs(2, 3, 4, seed=2)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    loss, metrics = trust_region_policy_loss(
        logprobs, weights, mask, average_logprobs=average, limit=limit, statistics=statistics
    )
    (found,) = torch.autograd.grad(loss, logits)
    wanted, changed = torch.zeros_like(found), 0
    for row, step in mask.nonzero().tolist():
        own = logits[row, step].detach()
        described = (own.softmax(-1) if statistics == "probabilities" else own).requires_grad_()
        logarithms = described.log() if statistics == "probabilities" else described.log_softmax(-1)
        (gradient,) = torch.autograd.grad((weights[row, step] * logarithms).sum(), described, retain_graph=True)
        theirs = average[row, step]
        (divergence,) = torch.autograd.grad((theirs.exp() * (theirs - logarithms)).sum(), described)
        allowed = trust_region_step(gradient, divergence, limit=limit)
        changed += int(divergence @ gradient > limit)
        leaf = logits[row, step].detach().requires_grad_()
        through = leaf.softmax(-1) if statistics == "probabilities" else leaf
        (wanted[row, step],) = torch.autograd.grad(-(allowed * through).sum() / mask.sum(), leaf)
    torch.testing.assert_close(found, wanted, **TIGHT)
    assert metrics["entropy"].item() == pytest.approx(categorical_entropy(logprobs)[mask].mean().item())
    if limit < math.inf:
        assert float(metrics["projected_fraction"]) == changed / 4
        assert metrics["average_kl"].item() == pytest.approx(exact_kl(average, logprobs)[mask].mean().item())
        assert changed or limit == 5.0


def test_without_a_limit_statistics_do_not_matter_and_the_bonus_is_the_entropy():
    logits = torch.randn((1, 2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = random_logprobs(1, 2, 5, seed=1)

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    plain = -(weights * logits.log_softmax(-1)).sum(-1) - 0.3 * categorical_entropy(logits)
    wanted = gradient(reduce_steps(plain, mask, "per_token"))
    for statistics in ("probabilities", "logits"):
        for limit in (1e6, math.inf):
            loss, _ = trust_region_policy_loss(
                logits.log_softmax(-1), weights, mask, average_logprobs=weights.log_softmax(-1), limit=limit,
                statistics=statistics, entropy_coefficient=0.3,
            )  # fmt: skip
            torch.testing.assert_close(gradient(loss), wanted, **TIGHT)


def test_masked_steps_and_forbidden_actions_never_matter():
    logits = torch.tensor([[[0.3, -math.inf, 0.1], [1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    average = torch.tensor([[[0.1, -math.inf, 0.4], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    weights = torch.tensor([[[1.0, math.nan, -2.0], [1e4, 1e4, 1e4], [math.nan] * 3]], dtype=torch.float64)
    for statistics in ("probabilities", "logits"):
        leaf = logits.clone().requires_grad_()
        loss, metrics = trust_region_policy_loss(
            leaf.log_softmax(-1), weights, mask, average_logprobs=average.log_softmax(-1), limit=0.5,
            statistics=statistics, entropy_coefficient=0.1,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert torch.isfinite(gradient).all()
        assert not gradient[0, 2].any()
        assert gradient[0, 0, 1] == 0
        assert all(torch.isfinite(value) for value in metrics.values())
    with pytest.raises(ValueError, match=r"a trust region with limit 0\.5 needs average_logprobs"):
        trust_region_policy_loss(logits, weights, mask, limit=0.5)
