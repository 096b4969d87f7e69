"""What one step of each algorithm expects, from all groups of strings: `∇J` where it must be, and fixed points."""

import pytest
import torch

from plaudit.algorithms.build import build_algorithm
from plaudit.configs.algorithm import AlgorithmConfig
from plaudit.core.kl import KL_ESTIMATORS
from plaudit.rollout import exact
from plaudit.rollout.token_mdp import TokenMDP
from studies.algorithms import greedy_returns
from tests.algorithms.problems import SMALL, TINY, expected_step, random_logits

TIGHT = {"rtol": 0, "atol": 1e-10}
SUM = {"reduction": "sequence_sum"}
VALUE = {"baseline": "value", **SUM}


def gradient(mdp, logits, **options):
    leaf = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(mdp.objective(leaf.log_softmax(-1), **options), leaf)
    return found[0]


@pytest.mark.parametrize(
    ("options", "samples", "share"),
    [
        ({"name": "reinforce", "baseline": "none"}, 1, 1.0),
        ({"name": "reinforce", "baseline": "none", "view": "answer"}, 1, 1.0),
        ({"name": "reinforce", "baseline": "greedy"}, 1, 1.0),
        ({"name": "reinforce", "baseline": "value", "gae_lambda": 1.0}, 1, 1.0),
        ({"name": "reinforce", "baseline": "value", "view": "answer"}, 1, 1.0),
        ({"name": "a2c", **SUM}, 1, 1.0),
        ({"name": "ppo", "whiten_advantages": False, "epochs": 1, "gae_lambda": 1.0, **SUM}, 1, 1.0),
        ({"name": "ppo", "whiten_advantages": False, "epochs": 1, "gae_lambda": 1.0, "surrogate": "both", **SUM}, 1, 1),
        ({"name": "rloo"}, 2, 1.0),
        ({"name": "rloo", "view": "token"}, 2, 1.0),
        # A mean that has the sample in it shrinks the gradient by 1 - 1/K.
        ({"name": "reinforce", "baseline": "prompt_mean"}, 2, 0.5),
        ({"name": "grpo", "baseline": "prompt_mean", "kl_placement": "reward", "view": "answer", **SUM}, 2, 0.5),
    ],
)
def test_a_step_expects_the_gradient_of_the_objective(options, samples, share):
    mdp = TokenMDP(**TINY, seed=1)
    logits = random_logits(mdp)
    values = torch.randn(mdp.num_prefixes, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    baselines = greedy_returns(mdp, logits) if options.get("baseline") == "greedy" else None
    found = expected_step(mdp, logits, options, samples=samples, baselines=baselines, values=values)
    torch.testing.assert_close(found, share * gradient(mdp, logits), **TIGHT)
    assert found.norm() > 0.01


@pytest.mark.parametrize("options", [{"gae_lambda": 0.3}, {"num_steps": 1}])
def test_shorter_traces_are_unbiased_with_the_right_values_alone(options):
    mdp = TokenMDP(**TINY, seed=1)
    logits = random_logits(mdp)
    truth = gradient(mdp, logits)
    values = mdp.evaluate(logits.log_softmax(-1)).values[0]
    options = {"name": "a2c", **SUM, **options}
    torch.testing.assert_close(expected_step(mdp, logits, options, values=values), truth, **TIGHT)
    wrong = expected_step(mdp, logits, options, values=0 * values)
    assert (wrong - truth).norm() > 0.05 * truth.norm()


def test_a_critic_at_zero_unlearns_the_end_and_one_at_the_mean_return_does_not():
    """Every answer earns about -3, short ones a little more. With λ = .5 and V = 0 the step makes them *longer*."""

    def problem(raised):
        return TokenMDP(**SMALL, seed=1, reward=lambda prompt, string: raised - 2.5 - 0.2 * len(string))

    mdp = problem(0.0)
    logits = mdp.reference_logprobs.clone()
    leaf = logits.clone().requires_grad_()
    strings = mdp.string_logprobs(leaf.log_softmax(-1)).exp()[0]
    (longer,) = torch.autograd.grad((strings * mdp.string_mask.sum(1).double()).sum(), leaf)
    mean = float((strings.detach() * mdp.string_rewards[0]).sum())
    truth = gradient(mdp, logits)

    def cosine(one, other):
        return float((one * other).sum() / one.norm() / other.norm())

    options = {"name": "ppo", "whiten_advantages": False, "epochs": 1, "gae_lambda": 0.5, **SUM}
    zero = expected_step(mdp, logits, options)
    level = expected_step(mdp, logits, options, values=torch.full((mdp.num_prefixes,), mean, dtype=torch.float64))
    assert cosine(truth, longer[0]) < -0.9
    assert cosine(zero, longer[0]) > 0.9
    assert cosine(level, truth) > 0.9
    # A value that is right on average takes the mean away and no more.
    torch.testing.assert_close(level, expected_step(problem(-mean), logits, options), **TIGHT)


def test_discounted_answers_expect_the_gradient_of_the_discounted_objective():
    """One action per answer: `Σ_t γ^t r_t` of the whole; rewards and penalties along the way are discounted alike."""
    extra = torch.randn((1, 3, 3), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mdp = TokenMDP(**TINY, transition_rewards=extra, seed=1)
    logits = random_logits(mdp)
    options = {"name": "reinforce", "baseline": "none", "view": "answer", "discount": 0.7}
    truth = gradient(mdp, logits, discount=0.7)
    torch.testing.assert_close(expected_step(mdp, logits, options), truth, **TIGHT)
    # The usual gradient of single tokens leaves out γ^t: another gradient, with the same optimum.
    tokens = expected_step(mdp, logits, options | {"view": "token"})
    assert (tokens - truth).norm() > 0.01
    optimum = mdp.optimal_solution(discount=0.7).logprobs
    torch.testing.assert_close(expected_step(mdp, optimum, options | {"view": "token"}), 0 * truth, **TIGHT)


def test_the_running_mean_of_earlier_batches_changes_no_expectation():
    mdp = TokenMDP(**TINY, seed=1)
    logits = random_logits(mdp)
    weights = mdp.string_logprobs(logits.log_softmax(-1))[0].exp()
    policy, total, other = mdp.policy(), torch.zeros_like(logits[0]), None
    for row in range(mdp.num_strings):
        with torch.no_grad():
            policy.logits.copy_(logits[0])
        algorithm = build_algorithm(
            AlgorithmConfig(name="reinforce", kl_coefficient=0.5),
            policy,
            torch.optim.SGD(policy.parameters(), lr=1.0),
        )
        state = algorithm.state_dict() | {"running_total": 7.0, "running_weight": 2.0}
        algorithm.load_state_dict(state)
        algorithm.update(mdp.enumerate(policy).select(torch.tensor([row])))
        change = policy.logits.detach() - logits[0]
        total += weights[row] * change
        other = change
        assert algorithm.running_mean.weight == pytest.approx(0.9 * 2 + int(mdp.string_mask[row].sum()))
    torch.testing.assert_close(total, gradient(mdp, logits), **TIGHT)
    assert (other - total).norm() > 0.1


@pytest.mark.parametrize("placement", [{}, {"kl_placement": "loss", "kl_estimator": "k2"}])
def test_samples_of_another_policy_are_corrected_by_their_weights(placement):
    """Sampled by the reference, weighed by π_old/μ of whole answers: `∇J` at π_old. A cap makes it another gradient.

    So does a penalty as a loss (k2 of whole answers, whose gradient is that of the divergence) that is not weighed.
    """
    mdp = TokenMDP(**TINY, seed=1)
    logits = random_logits(mdp)
    weights = mdp.string_logprobs(mdp.reference_logprobs)[0].exp()
    truth, found = gradient(mdp, logits), {}
    for cap in (None, 1.0, 1e9):
        policy, total = mdp.policy(), torch.zeros_like(logits[0])
        for row in range(mdp.num_strings):
            with torch.no_grad():
                policy.logits.copy_(logits[0])
            config = AlgorithmConfig(
                name="reinforce", baseline="none", view="answer", kl_coefficient=0.5, importance_cap=cap, **placement
            )
            algorithm = build_algorithm(config, policy, torch.optim.SGD(policy.parameters(), lr=1.0))
            batch = mdp.enumerate(policy).select(torch.tensor([row]))
            metrics = algorithm.update(batch.with_fields(behaviour_logprobs=batch.reference_logprobs))
            ratio = float(mdp.string_logprobs(logits.log_softmax(-1))[0, row].exp() / weights[row])
            if cap is not None:
                assert metrics["policy/importance_mean"] == pytest.approx(ratio)
                assert metrics["policy/importance_capped"] == float(ratio > cap)
            total += weights[row] * (policy.logits.detach() - logits[0])
        found[cap] = total
    torch.testing.assert_close(found[1e9], truth, **TIGHT)
    assert (found[1.0] - truth).norm() > 0.01
    assert (found[None] - truth).norm() > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"name": "rloo"},
        {"name": "grpo", "kl_placement": "reward", "view": "answer"},
        {"name": "reinforce", "baseline": "prompt_mean", "view": "answer"},
        {"name": "ppo"},
        {"name": "ppo", "surrogate": "kl", "gae_lambda": 0.3, "minibatches": 3},
        {"name": "actor_critic"},
        {"name": "a2c", "num_steps": 2, "reduction": "per_sequence"},
    ],
)
def test_at_the_optimum_no_step_moves_anything_whatever_was_sampled(options):
    """Path consistency: at `(π*, V*)` every advantage of every string is 0, whitened or not, so nothing moves."""
    mdp = TokenMDP(**TINY, seed=1)
    solution = mdp.optimal_solution()
    policy = mdp.policy()
    with torch.no_grad():
        policy.logits.copy_(solution.logprobs[0])
        policy.critic.copy_(solution.values[0])
    config = AlgorithmConfig(kl_coefficient=0.5, **options)
    algorithm = build_algorithm(config, policy, torch.optim.SGD(policy.parameters(), lr=1.0))
    algorithm.update(mdp.enumerate(policy), generator=torch.Generator().manual_seed(0))
    assert (policy.logits - solution.logprobs[0]).abs().max() < 1e-9
    if algorithm.needs_critic:
        assert (policy.critic - solution.values[0]).abs().max() < 1e-9


def test_k3_of_the_answer_as_a_loss_has_its_own_optimum():
    """`π(y) = β π_ref(y) / (λ - r(y))`, λ such that it sums to 1: there a step expects nothing; at π* it does."""
    mdp = TokenMDP(**TINY, seed=1)
    reference = mdp.string_logprobs(mdp.reference_logprobs).exp()
    rewards, beta = mdp.string_rewards, mdp.coefficient
    low, high = rewards.max() + 1e-12, rewards.max() + 10
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (beta * reference / (middle - rewards)).sum() > 1 else (low, middle)
    own = exact.policy_of_strings(mdp, (beta * reference / (low - rewards)).log())
    options = {"name": "reinforce", "baseline": "none", "view": "answer", "kl_placement": "loss"}
    k3 = options | {"kl_estimator": "k3"}
    torch.testing.assert_close(expected_step(mdp, own, k3), torch.zeros_like(own[0]), **TIGHT)
    assert mdp.gap(own) > 0.005
    optimum = mdp.optimal_solution().logprobs
    assert expected_step(mdp, optimum, k3).norm() > 0.01
    # k2 of the answer as a loss has the tilted optimum.
    k2 = options | {"kl_estimator": "k2"}
    torch.testing.assert_close(expected_step(mdp, optimum, k2), torch.zeros_like(own[0]), **TIGHT)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_hold_nothing(estimator):
    """To a policy gradient a reward is a number: what is rarer than in the reference is fined and made rarer still.

    At the reference they do not pull (k1 does), and in the end one answer is left.
    """
    mdp = TokenMDP(**TINY, seed=1)
    reference = mdp.reference_logprobs[0][mdp.string_prefixes, mdp.string_tokens]

    def slope(logits, kind, rewards):
        """`Σ_y ∇π(y) (r(y) - β Σ_t k_t)` over all strings, the penalty held constant."""
        leaf = logits.clone().requires_grad_()
        logprobs = leaf.log_softmax(-1)
        own = logprobs[0][mdp.string_prefixes, mdp.string_tokens]
        penalty = (KL_ESTIMATORS[kind](own, reference) * mdp.string_mask).sum(1).detach()
        paid = rewards - mdp.coefficient * penalty
        (found,) = torch.autograd.grad((mdp.string_logprobs(logprobs)[0].exp() * paid).sum(), leaf)
        return found

    options = {"name": "reinforce", "baseline": "none", "view": "answer", "kl_estimator": estimator}
    somewhere = random_logits(mdp)
    expected = expected_step(mdp, somewhere, options)
    torch.testing.assert_close(expected, slope(somewhere, estimator, mdp.string_rewards[0])[0], **TIGHT)
    nearby, nothing = mdp.reference_logprobs + 1e-3 * somewhere, 0 * mdp.string_rewards[0]
    assert slope(nearby, estimator, nothing).norm() < 0.01 * slope(nearby, "k1", nothing).norm()
    ends = {}
    for kind in ("k1", estimator):
        logits = mdp.reference_logprobs.clone()
        for _ in range(200):
            logits += slope(logits, kind, mdp.string_rewards[0])
        ends[kind] = logits.log_softmax(-1)
    assert mdp.gap(ends["k1"]) < 0.001
    assert mdp.gap(ends[estimator]) > 1  # worse than the reference, where it began
    assert mdp.string_logprobs(ends[estimator])[0].exp().max() > 0.95
    assert mdp.string_logprobs(ends["k1"])[0].exp().max() < 0.5


def test_grpo_as_published_has_its_own_optimum():
    """Standardised groups, k3 per token as a loss, means per answer: where its exact expectation vanishes."""
    mdp = TokenMDP(**TINY, seed=1)
    options = {"name": "grpo", "kl_coefficient": 0.5}
    rewards, mask, lengths = mdp.string_rewards[0], mdp.string_mask, mdp.string_mask.sum(1)
    difference = rewards.unsqueeze(1) - rewards
    standardised = difference / 2 / (difference.abs() / 2**0.5 + 1e-4)
    reference = mdp.reference_logprobs[0][mdp.string_prefixes, mdp.string_tokens]
    logits = mdp.reference_logprobs.clone().requires_grad_()
    for _ in range(3000):
        logprobs = logits.log_softmax(-1)
        chances = mdp.string_logprobs(logprobs.detach())[0].exp()
        own = logprobs[0][mdp.string_prefixes, mdp.string_tokens]
        k3 = (reference - own).exp() - 1 - (reference - own)
        gains = (standardised @ chances).unsqueeze(1) * own - 0.5 * k3
        (slope,) = torch.autograd.grad((chances / lengths * (gains * mask).sum(1)).sum(), logits)
        with torch.no_grad():
            logits += 2 * slope
        if slope.abs().max() < 1e-12:
            break
    found = logits.detach().log_softmax(-1)
    torch.testing.assert_close(
        expected_step(mdp, found, options, samples=2), torch.zeros_like(found[0]), rtol=0, atol=1e-8
    )
    assert mdp.gap(found) > 0.005
    assert expected_step(mdp, mdp.optimal_solution().logprobs, options, samples=2).norm() > 0.01
