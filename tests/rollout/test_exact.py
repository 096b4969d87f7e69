"""The enumerated tests: what each estimator expects, where each option has its optimum, and why every sign is right."""

import itertools

import pytest
import torch

from plaudit.core.advantages import group_mean_advantages, leave_one_out_advantages, over_steps
from plaudit.core.kl import kl_k1, kl_k2, kl_k3
from plaudit.core.masked import masked_whiten
from plaudit.core.policy_losses import answer_logprobs, clipped_surrogate_loss, policy_gradient_loss
from plaudit.core.returns import gae, retrace, shift_to_next, vtrace
from plaudit.core.value_losses import squared_value_loss
from plaudit.rollout import exact
from plaudit.rollout.token_mdp import TokenMDP

TIGHT = {"rtol": 0, "atol": 1e-10}
SMALL = {"vocabulary": 3, "max_length": 3}


def random_logits(mdp, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(mdp.reference_logprobs.shape, generator=generator, dtype=torch.float64)


def expected_loss_gradient(mdp, logits, step_advantages):
    """`-E[∇]` through the library's loss, each string weighted by its probability; advantages `[Y, L]`."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(-1)
    own = logprobs[0][mdp.string_prefixes, mdp.string_tokens]
    weights = mdp.string_logprobs(logprobs.detach())[0].exp().unsqueeze(1).expand(own.shape)
    loss, _ = policy_gradient_loss(
        own, step_advantages, mdp.string_mask, importance_weights=weights, reduction="sequence_sum", normaliser=1.0
    )
    return -torch.autograd.grad(loss, logits)[0][0]


@pytest.mark.parametrize("seed", [0, 1])
def test_unbiased_estimators_expect_exactly_the_gradient(seed):
    mdp = TokenMDP(**SMALL, seed=seed)
    logits = random_logits(mdp, seed)
    logprobs = logits.log_softmax(-1)
    truth = exact.exact_gradient(mdp, logprobs)
    assert truth.norm() > 0.01
    for num_samples in (2, 3):
        rows = {row.name: row for row in exact.estimator_table(mdp, logprobs, num_samples=num_samples)}
        for name in (
            "no baseline",
            "expected reward",
            "greedy roll-out (ReMax)",
            "leave one out (RLOO)",
            "GAE, λ = 1, V = V^π",
            "GAE, λ = 0.95, V = V^π",
            "GAE, λ = 0, V = V^π",
            "GAE, λ = 1, V = 0",
        ):
            assert rows[name].bias < 1e-10, name
        # A mean that includes the sample shrinks the gradient by exactly 1 - 1/K, without turning it.
        assert rows["group mean"].bias == pytest.approx(1 / num_samples, abs=1e-10)
        assert rows["group mean"].cosine == pytest.approx(1, abs=1e-10)
        for name in ("mean and deviation (GRPO)", "GAE, λ = 0.95, V = 0", "GAE, λ = 0, V = 0"):
            assert rows[name].bias > 1e-3, name
            assert rows[name].cosine < 1 - 1e-6, name
    # Any value function at λ = 1; at λ < 1 only V^π.
    values = torch.randn(mdp.num_prefixes, dtype=torch.float64)
    for gae_lambda, unbiased in ((1.0, True), (0.9, False)):
        advantages = exact.gae_of_strings(mdp, logprobs, values, gae_lambda=gae_lambda)
        found = expected_loss_gradient(mdp, logits, advantages)
        assert bool((found - truth).abs().max() < 1e-10) is unbiased
        torch.testing.assert_close(
            exact.step_moments(mdp, logprobs, advantages, num_samples=1).expectation, found, **TIGHT
        )


@pytest.mark.parametrize("estimator", [leave_one_out_advantages, group_mean_advantages])
def test_moments_equal_groups_put_through_the_loss_one_by_one(estimator):
    mdp = TokenMDP(**SMALL)
    logits = random_logits(mdp)
    logprobs = logits.log_softmax(-1).requires_grad_()
    rewards = exact.penalised_rewards(mdp, logprobs)
    weights = mdp.string_logprobs(logprobs)[0].exp().detach()
    moments = exact.answer_moments(mdp, logprobs, lambda *group: estimator(*group)[0], num_samples=2)
    leaf = logits.clone().requires_grad_()
    expectation, second = torch.zeros_like(logits[0]), 0.0
    for group in itertools.product(range(mdp.num_strings), repeat=2):
        rows = torch.tensor(group)
        advantages, _ = estimator(rewards[rows], torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool))
        mask = mdp.string_mask[rows]
        own = leaf.log_softmax(-1)[0][mdp.string_prefixes[rows], mdp.string_tokens[rows]]
        loss, _ = policy_gradient_loss(own, over_steps(advantages, mask), mask, reduction="sequence_sum")
        gradient = -torch.autograd.grad(loss, leaf)[0][0]
        expectation += weights[rows].prod() * gradient
        second += float(weights[rows].prod() * gradient.square().sum())
    torch.testing.assert_close(moments.expectation, expectation, **TIGHT)
    assert moments.variance == pytest.approx(second - float(expectation.square().sum()), abs=1e-10)


def test_standardised_groups_of_two_follow_the_sign_of_the_difference():
    """With K = 2 and no epsilon, `A = ± 1/√2`: the gradient of a probability of winning, not of the reward."""
    mdp = TokenMDP(**SMALL)
    logits = random_logits(mdp).requires_grad_()
    logprobs = logits.log_softmax(-1)
    rewards = exact.penalised_rewards(mdp, logprobs)
    own = mdp.string_logprobs(logprobs)[0]
    signs = (rewards.unsqueeze(1) - rewards.unsqueeze(0)).sign()
    wins = (own.exp().unsqueeze(1) * own.exp().detach().unsqueeze(0) * signs).sum() / 2**0.5
    (expected,) = torch.autograd.grad(wins, logits)

    def estimator(rewards, ids, valid):
        return exact.group_standardised_advantages(rewards, ids, valid, eps=1e-14)[0]

    found = exact.answer_moments(mdp, logprobs, estimator, num_samples=2)
    torch.testing.assert_close(found.expectation, expected[0], rtol=0, atol=1e-9)


def test_the_table_shows_that_leave_one_out_can_raise_the_variance():
    mdp = TokenMDP(**SMALL)
    rows = {row.name: row.variance for row in exact.estimator_table(mdp, mdp.reference_logprobs, num_samples=2)}
    assert rows["leave one out (RLOO)"] > rows["no baseline"]
    # Leaving one out is the group mean scaled by K/(K-1) = 2.
    assert rows["leave one out (RLOO)"] == pytest.approx(4 * rows["group mean"])
    assert rows["GAE, λ = 0, V = V^π"] < rows["GAE, λ = 1, V = V^π"] < rows["GAE, λ = 1, V = 0"]
    text = exact.format_estimator_table(
        exact.estimator_table(
            mdp, mdp.reference_logprobs, num_samples=2, own={"half": lambda rewards, ids, valid: rewards / 2}
        )
    )
    assert "| half | 50.0% | 1.0000 |" in text
    with pytest.raises(ValueError, match="one prompt, got 2"):
        exact.exact_gradient(TokenMDP(num_prompts=2), TokenMDP(num_prompts=2).reference_logprobs)


def test_a_baseline_takes_away_the_noise_of_what_all_answers_earn_alike():
    """10 more for every answer changes no gradient; without a baseline it is noise, with one nothing at all."""
    mdp = TokenMDP(**SMALL)
    paid = 10.0 * (mdp.next_prefix < 0).double().expand(1, -1, -1)
    more = TokenMDP(**SMALL, transition_rewards=paid)
    rows, others = (
        {row.name: row for row in exact.estimator_table(each, each.reference_logprobs, num_samples=2)}
        for each in (mdp, more)
    )
    assert others["no baseline"].variance > 50 * rows["no baseline"].variance
    for name in ("expected reward", "greedy roll-out (ReMax)", "leave one out (RLOO)", "GAE, λ = 1, V = V^π"):
        assert others[name].variance == pytest.approx(rows[name].variance, rel=1e-9), name
        assert abs(others[name].bias) < 1e-9, name


def test_whole_answers_off_policy_are_corrected_exactly_and_single_tokens_are_not():
    """Under `π_old`, `E[ρ A]` has the gradient of J where ρ is the ratio of the whole answer."""
    mdp = TokenMDP(**SMALL)
    logits = random_logits(mdp).requires_grad_()
    old = random_logits(mdp, 1).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    truth = exact.exact_gradient(mdp, logprobs.detach())
    rewards = exact.penalised_rewards(mdp, logprobs)
    chosen = [table[0][mdp.string_prefixes, mdp.string_tokens] for table in (logprobs, old)]
    weights = mdp.string_logprobs(old)[0].exp().unsqueeze(1)
    never = float("inf")
    options = {"clip_low": never, "reduction": "sequence_sum", "normaliser": 1.0}
    (new, rows), (was, _) = (answer_logprobs(table, mdp.string_mask) for table in chosen)
    loss, _ = clipped_surrogate_loss(new, was, rewards.unsqueeze(1), rows, importance_weights=weights, **options)
    found = -torch.autograd.grad(loss, logits, retain_graph=True)[0][0]
    torch.testing.assert_close(found, truth, **TIGHT)
    loss, _ = clipped_surrogate_loss(
        *chosen, over_steps(rewards, mdp.string_mask), mdp.string_mask,
        importance_weights=weights.expand(chosen[0].shape), **options,
    )  # fmt: skip
    biased = -torch.autograd.grad(loss, logits)[0][0]
    assert (biased - truth).norm() / truth.norm() > 0.05


@pytest.mark.parametrize("options", [{}, {"num_prompts": 3, "reward_scales": [1.0, 4.0, 0.25]}])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95, 1.0])
def test_path_consistency(options, gae_lambda):
    """At `(π*, V*)` every TD error of every string is 0, whoever wrote it: nothing is left to learn anywhere."""
    mdp = TokenMDP(**options)
    optimum = mdp.optimal_solution()
    policy = mdp.policy()
    with torch.no_grad():
        policy.logits.copy_(optimum.logprobs.flatten(0, 1))
        policy.critic.copy_(optimum.values.flatten())
    behaviour = mdp.policy()  # samples come from somewhere else
    found = mdp.sample(behaviour, torch.arange(300) % mdp.num_prompts, generator=torch.Generator().manual_seed(1))
    evaluated = policy.evaluate(found)
    values = evaluated.values.detach()
    # The critic's raw values, whatever they are behind the end: nothing of them may matter.
    following = shift_to_next(values, found.mask, last=123.0)
    rewards = found.rewards - mdp.coefficient * kl_k1(evaluated.logprobs.detach(), found.reference_logprobs)
    data = (rewards, values, following, found.continues, found.truncated, found.mask)
    advantages, returns = gae(*data, discount=1.0, gae_lambda=gae_lambda)
    assert advantages.abs().max() < 1e-12
    whitened = masked_whiten(advantages, found.mask)
    for used in (advantages, whitened):
        loss, _ = policy_gradient_loss(evaluated.logprobs, used, found.mask, reduction="sequence_sum")
        gradient = torch.autograd.grad(loss, policy.logits, retain_graph=True)[0]
        assert gradient.abs().max() < 1e-7
    loss, _ = squared_value_loss(evaluated.values, returns, found.mask)
    assert loss < 1e-24
    ratios = evaluated.logprobs.detach() - found.behaviour_logprobs
    targets, corrected = vtrace(*data, log_ratios=ratios, discount=1.0, trace_lambda=gae_lambda)
    assert corrected.abs().max() < 1e-12
    torch.testing.assert_close(targets[found.mask], values[found.mask], **TIGHT)


def test_k1_inside_the_reward_has_the_tilted_optimum():
    mdp = TokenMDP()
    optimum = mdp.optimal_solution().logprobs
    assert exact.exact_gradient(mdp, optimum).abs().max() < 1e-12
    rewards = exact.penalised_rewards(mdp, optimum)
    found = expected_loss_gradient(mdp, optimum, over_steps(rewards, mdp.string_mask))
    assert found.abs().max() < 1e-12
    # At π* the penalised reward is the same for every string: J* = β log Z.
    assert rewards.max() - rewards.min() < 1e-10


def kl_loss_gradient(mdp, logprobs_of, estimator, *, per_token):
    """`E[∇ estimator]` as a loss on samples of the policy itself, `[S, V]`; logits are `logprobs_of`."""
    logits = logprobs_of.clone().requires_grad_()
    own = logits.log_softmax(-1)[0][mdp.string_prefixes, mdp.string_tokens]
    reference = mdp.reference_logprobs[0][mdp.string_prefixes, mdp.string_tokens]
    mask = mdp.string_mask
    weights = mdp.string_logprobs(logits.detach().log_softmax(-1))[0].exp()
    if per_token:
        loss = (weights.unsqueeze(1) * estimator(own, reference).masked_fill(~mask, 0.0)).sum()
    else:
        new, _ = answer_logprobs(own, mask)
        was, _ = answer_logprobs(reference, mask)
        loss = (weights * estimator(new, was).squeeze(1)).sum()
    return torch.autograd.grad(loss, logits)[0][0]


def test_k1_as_a_loss_controls_nothing():
    mdp = TokenMDP()
    for per_token in (True, False):
        assert kl_loss_gradient(mdp, random_logits(mdp), kl_k1, per_token=per_token).abs().max() < 1e-12


def reward_gradient(mdp, logits):
    return expected_loss_gradient(mdp, logits, over_steps(mdp.string_rewards[0], mdp.string_mask))


def test_k2_of_the_whole_answer_as_a_loss_has_the_tilted_optimum():
    mdp = TokenMDP()
    optimum = mdp.optimal_solution().logprobs
    total = reward_gradient(mdp, optimum) - mdp.coefficient * kl_loss_gradient(mdp, optimum, kl_k2, per_token=False)
    assert total.abs().max() < 1e-12


def test_k3_of_the_whole_answer_as_a_loss_has_its_own_optimum():
    """`∇KL(π_ref‖π)`: the optimum is `π = β π_ref / (λ - r)`, with λ above every reward such that π adds up to 1."""
    mdp = TokenMDP()
    policy = exact.whole_answer_k3_optimum(mdp)
    strings = mdp.string_logprobs(policy)[0].exp()
    assert strings.sum().item() == pytest.approx(1, abs=1e-10)
    # λ = r + β π_ref / π is the same number for every string.
    level = mdp.string_rewards[0] + mdp.coefficient * mdp.string_logprobs(mdp.reference_logprobs)[0].exp() / strings
    assert float(level.max() - level.min()) < 1e-9
    total = reward_gradient(mdp, policy) - mdp.coefficient * kl_loss_gradient(mdp, policy, kl_k3, per_token=False)
    assert total.abs().max() < 1e-9
    # Visibly below the optimum of the objective itself, which in turn is no optimum of this one.
    best, before = mdp.optimal_solution(), mdp.objective(mdp.reference_logprobs)
    assert (best.values[0, 0] - mdp.objective(policy)) / (best.values[0, 0] - before) > 0.05
    there = reward_gradient(mdp, best.logprobs)
    there -= mdp.coefficient * kl_loss_gradient(mdp, best.logprobs, kl_k3, per_token=False)
    assert there.abs().max() > 1e-3


def test_standardised_rewards_with_a_k3_loss_have_another_optimum():
    mdp = TokenMDP()
    policy = exact.standardised_k3_optimum(mdp)
    assert exact.standardised_k3_gradient(mdp, policy).abs().max() < 1e-9
    best, before = mdp.optimal_solution(), mdp.objective(mdp.reference_logprobs)
    assert (best.values[0, 0] - mdp.objective(policy)) / (best.values[0, 0] - before) > 0.05
    plain = exact.whole_answer_k3_optimum(mdp)
    assert mdp.total_variation(policy, plain) > 1e-3
    for other in (best.logprobs, plain):
        assert exact.standardised_k3_gradient(mdp, other).abs().max() > 1e-3
    # A reward of another size: the same policy, as if nothing had changed, where π* would be another one.
    larger = TokenMDP(reward_scales=[10.0])
    torch.testing.assert_close(exact.standardised_k3_optimum(larger), policy, rtol=0, atol=1e-6)
    assert mdp.total_variation(larger.optimal_solution().logprobs, best.logprobs) > 0.3


def near_reference(mdp):
    """A policy that is not the reference, the same at every call."""
    noise = torch.randn(mdp.reference_logprobs.shape, generator=torch.Generator().manual_seed(0))
    return torch.log_softmax(mdp.reference_logprobs + 0.3 * noise.double(), -1)


def test_few_samples_standardised_expect_something_else_again():
    """With K = 2 a group's own deviation leaves only who won: rewards of any shape, the same expected gradient."""
    mdp, cubed = (TokenMDP(vocabulary=3, max_length=2) for _ in range(2))
    cubed.string_rewards = mdp.string_rewards.pow(3)
    policy = near_reference(mdp)
    found = exact.standardised_k3_gradient(cubed, policy, num_samples=2)
    torch.testing.assert_close(found, exact.standardised_k3_gradient(mdp, policy, num_samples=2), rtol=0, atol=2e-3)
    limits = [exact.standardised_k3_gradient(each, policy) for each in (mdp, cubed)]
    assert (limits[0] - limits[1]).norm() > 1e-2


def test_many_samples_standardised_come_to_the_limit():
    """The bias of dividing by a group's own deviation falls as one over the size of the group."""
    mdp = TokenMDP(vocabulary=3, max_length=1)
    policy = near_reference(mdp)
    limit = exact.standardised_k3_gradient(mdp, policy)
    errors = [float((exact.standardised_k3_gradient(mdp, policy, num_samples=k) - limit).norm()) for k in (2, 4, 8)]
    assert errors[0] > 0.3
    assert errors[1] < 0.75 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_k2_per_token_as_a_loss_has_its_own_optimum():
    """States are held fixed, so `π(a|s) ∝ π_ref(a|s) exp(Q^π(s, a) / β)` with values of the reward alone."""
    mdp = TokenMDP()
    policy = mdp.reference_logprobs
    for _ in range(mdp.max_length):  # exact from the last token backwards
        action_values = mdp.evaluate(policy, coefficient=0.0).action_values
        policy = (mdp.reference_logprobs + action_values / mdp.coefficient).log_softmax(-1)
    total = reward_gradient(mdp, policy) - mdp.coefficient * kl_loss_gradient(mdp, policy, kl_k2, per_token=True)
    assert total.abs().max() < 1e-12
    best = mdp.optimal_solution()
    assert best.values[0, 0] - mdp.objective(policy) > 1e-3
    there = reward_gradient(mdp, best.logprobs)
    there -= mdp.coefficient * kl_loss_gradient(mdp, best.logprobs, kl_k2, per_token=True)
    assert there.abs().max() > 1e-3


def conditional_mean(mdp, behaviour, targets, *, of_actions):
    """`E_μ[target | s]` (`[S]`) or `E_μ[target | s, a]` (`[S, V]`) from all strings, `targets [Y, L]`."""
    weights = mdp.string_logprobs(behaviour)[0].exp().unsqueeze(1).expand(targets.shape)[mdp.string_mask]
    place = mdp.string_prefixes[mdp.string_mask]
    size = mdp.num_prefixes
    if of_actions:
        place, size = place * mdp.vocabulary + mdp.string_tokens[mdp.string_mask], size * mdp.vocabulary
    zeros = torch.zeros(size, dtype=torch.float64)
    total = zeros.index_add(0, place, weights * targets[mdp.string_mask])
    return total / zeros.index_add(0, place, weights)


@pytest.mark.parametrize("retrace_lambda", [0.0, 0.7, 1.0])
def test_retrace_reaches_the_action_values_exactly_in_as_many_sweeps_as_there_are_steps(retrace_lambda):
    mdp = TokenMDP(vocabulary=4)
    behaviour, target = (random_logits(mdp, seed).log_softmax(-1) for seed in (1, 2))
    truth = mdp.evaluate(target, coefficient=0.0, discount=0.9).action_values[0]
    listed = mdp.enumerate()
    places = (mdp.string_prefixes, mdp.string_tokens)
    ratios = (target - behaviour)[0][places]
    found = random_logits(mdp, 3)[0]
    for sweep in range(mdp.max_length):
        assert (found - truth).abs().max() > 0.01, sweep
        next_values = shift_to_next((target[0].exp() * found).sum(-1)[mdp.string_prefixes], listed.mask)
        targets = retrace(
            listed.rewards, found[places], next_values, listed.continues, listed.truncated, listed.mask,
            log_ratios=ratios, discount=0.9, retrace_lambda=retrace_lambda,
        )  # fmt: skip
        found = conditional_mean(mdp, behaviour, targets, of_actions=True).view(found.shape)
    torch.testing.assert_close(found, truth, **TIGHT)


@pytest.mark.parametrize("clip", [0.5, 1.0, float("inf")])
def test_vtrace_has_the_published_fixed_point(clip):
    """`V` of the policy `∝ min(ρ̄ μ, π)` (Espeholt et al., section 4.1), which is π itself without a clip."""
    mdp = TokenMDP(vocabulary=4)
    behaviour, target = (random_logits(mdp, seed).log_softmax(-1) for seed in (1, 2))
    meant = target if clip == float("inf") else torch.minimum(behaviour + torch.tensor(clip).log(), target)
    truth = mdp.evaluate(meant.log_softmax(-1), coefficient=0.0).values[0]
    listed = mdp.enumerate()
    ratios = (target - behaviour)[0][mdp.string_prefixes, mdp.string_tokens]
    found = torch.randn(mdp.num_prefixes, dtype=torch.float64)
    for _ in range(200):
        values = found[mdp.string_prefixes]
        targets, _ = vtrace(
            listed.rewards, values, shift_to_next(values, listed.mask), listed.continues, listed.truncated,
            listed.mask, log_ratios=ratios, discount=1.0, clip_error=clip,
        )  # fmt: skip
        found = conditional_mean(mdp, behaviour, targets, of_actions=False)
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-8)


def test_retrace_on_policy_is_the_lambda_return_on_average_over_the_next_action():
    mdp = TokenMDP(vocabulary=3)
    policy = random_logits(mdp).log_softmax(-1)
    action_values = random_logits(mdp, 4)[0]
    values = (policy[0].exp() * action_values).sum(-1)
    listed = mdp.enumerate()
    critic = values[mdp.string_prefixes]
    data = (listed.continues, listed.truncated, listed.mask)
    following = shift_to_next(critic, listed.mask)
    own = action_values[mdp.string_prefixes, mdp.string_tokens]
    options = {"discount": 0.9, "retrace_lambda": 0.6, "log_ratios": torch.zeros_like(critic)}
    targets = retrace(listed.rewards, own, following, *data, **options)
    _, returns = gae(listed.rewards, critic, following, *data, discount=0.9, gae_lambda=0.6)
    found, expected = (conditional_mean(mdp, policy, each, of_actions=True) for each in (targets, returns))
    torch.testing.assert_close(found, expected, **TIGHT)
    assert (targets - returns)[listed.mask].abs().max() > 0.01
