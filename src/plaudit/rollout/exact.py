"""What a policy-gradient estimator does, exactly: its expectation and its variance on a `TokenMDP`, by enumeration.

For an estimator that draws K answers and uses `ĝ = (1/K) Σ_i Σ_t A_it ∇ log π(a_it | s_it)`, all groups of K
strings are listed, each with its probability. No sampling noise is left: a bias is a bias.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.advantages import (
    group_mean_advantages,
    group_standardised_advantages,
    leave_one_out_advantages,
)
from plaudit.core.returns import gae, shift_to_next
from plaudit.rollout.token_mdp import TokenMDP

AnswerAdvantages = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(rewards [B], group_ids [B], valid [B]) -> advantages [B]`: an estimator that gives a whole answer one advantage."""


class Moments(NamedTuple):
    """Of one group's gradient: its expectation `[S, V]`, and the trace of its covariance."""

    expectation: Tensor
    variance: float


class EstimatorRow(NamedTuple):
    """One line of the table: relative bias `|E[ĝ] - ∇J| / |∇J|`, cosine of `E[ĝ]` and `∇J`, variance over `|∇J|²`."""

    name: str
    bias: float
    cosine: float
    variance: float


def exact_gradient(mdp: TokenMDP, logprobs: Tensor) -> Tensor:
    """`∇J` with respect to the logits of a tabular softmax policy `[1, S, V]`, by autograd; `[S, V]`.

    Raises:
        ValueError: if the problem has more than one prompt: take them one at a time.
    """
    _one_prompt(mdp)
    logits = logprobs.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mdp.objective(torch.log_softmax(logits, -1)), logits)
    return gradient[0]


def penalised_rewards(mdp: TokenMDP, logprobs: Tensor) -> Tensor:
    """`R(y) = r(y) - β log π(y) / π_ref(y)`, `[Y]`: the penalty as k1 inside the reward, of a policy `[1, S, V]`."""
    ratios = mdp.string_logprobs(logprobs) - mdp.string_logprobs(mdp.reference_logprobs)
    return (mdp.string_rewards - mdp.coefficient * ratios)[0].detach()


def whole_answer_k3_optimum(mdp: TokenMDP, *, coefficient: float | None = None) -> Tensor:
    """Where `E[r]` with β times k3 of the whole answer as a loss ends: `π(y) = β π_ref(y) / (λ - r(y))`, `[1, S, V]`.

    The loss has the gradient `∇KL(π_ref‖π)`; `λ`, above every reward, makes `π` add up to 1.

    Raises:
        ValueError: if the problem has more than one prompt, or β is not positive.
    """
    _one_prompt(mdp)
    beta = mdp.coefficient if coefficient is None else coefficient
    if beta <= 0:
        raise ValueError(f"coefficient must be positive, got {beta}")
    reference, rewards = mdp.string_logprobs(mdp.reference_logprobs).exp(), mdp.string_rewards
    low, high = rewards.max(), rewards.max() + beta
    for _ in range(200):
        middle = (low + high) / 2
        above = bool((beta * reference / (middle - rewards)).sum() > 1)
        low, high = (middle, high) if above else (low, middle)
    return policy_of_strings(mdp, torch.log(beta * reference / (high - rewards)))


def standardised_k3_optimum(mdp: TokenMDP, *, coefficient: float | None = None) -> Tensor:
    """Where rewards over their standard deviation end, with β times k3 of the whole answer as a loss; `[1, S, V]`.

    With many samples of a prompt the estimator climbs `∇E[r] / σ(π) - β ∇KL(π_ref‖π)`, `σ` the standard deviation of
    the reward under the policy. It rests where `π(y) = β σ(π) π_ref(y) / (λ - r(y))`: `whole_answer_k3_optimum` at a
    coefficient that the policy itself sets. Where rewards differ little it is pulled less, where much, more.

    Raises:
        ValueError: if the problem has more than one prompt, or β is not positive.
    """
    beta = mdp.coefficient if coefficient is None else coefficient

    def surplus(scale: float) -> float:
        return scale - _reward_deviation(mdp, whole_answer_k3_optimum(mdp, coefficient=beta * scale))

    # At a scale of the whole range of rewards the deviation is smaller; towards 0 it is larger, or 0 is the answer.
    low, high = 1e-6, float(mdp.string_rewards.max() - mdp.string_rewards.min()) + 1e-6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return whole_answer_k3_optimum(mdp, coefficient=beta * high)


def standardised_k3_gradient(mdp: TokenMDP, logprobs: Tensor, *, num_samples: int | None = None) -> Tensor:
    """Expected gradient `[S, V]` of standardised rewards with β times k3 of the whole answer as a loss.

    Args:
        mdp: one prompt.
        logprobs: the policy, `[1, S, V]`.
        num_samples: `K`, the samples of a group, whose own deviation divides, enumerated as in `answer_moments`; None
            for the limit of many samples, `∇E[r] / σ(π)`.
    """
    logits = logprobs.detach().clone().requires_grad_()
    policy = torch.log_softmax(logits, -1)
    (towards,) = torch.autograd.grad(mdp.kl(mdp.reference_logprobs, policy).sum(), logits)
    if num_samples is None:
        policy = torch.log_softmax(logits, -1)
        (climb,) = torch.autograd.grad(mdp.expected_reward(policy).sum() / _reward_deviation(mdp, logprobs), logits)
        return climb[0] - mdp.coefficient * towards[0]
    moments = answer_moments(
        mdp,
        logprobs,
        lambda *group: group_standardised_advantages(*group)[0],
        num_samples=num_samples,
        rewards=mdp.string_rewards[0],
    )
    return moments.expectation - mdp.coefficient * towards[0]


def answer_moments(
    mdp: TokenMDP,
    logprobs: Tensor,
    advantages: AnswerAdvantages,
    *,
    num_samples: int,
    rewards: Tensor | None = None,
) -> Moments:
    """Moments of `ĝ` for advantages of whole answers, from all `Y^K` groups.

    Args:
        mdp: one prompt; `Y^K` groups have to fit into memory, so keep it small for `K > 2`.
        logprobs: the policy, `[1, S, V]`.
        advantages: the estimator; it sees `R(y)` of `penalised_rewards`, groups one after the other.
        num_samples: `K`.
        rewards: `[Y]`, what the estimator sees instead of `penalised_rewards`.

    Returns:
        expectation `[S, V]` and variance.

    Raises:
        ValueError: if the problem has more than one prompt.
    """
    _one_prompt(mdp)
    choices = torch.cartesian_prod(*[torch.arange(mdp.num_strings)] * num_samples).view(-1, num_samples)
    weights = mdp.string_logprobs(logprobs.detach())[0][choices].sum(1).exp()
    seen = (penalised_rewards(mdp, logprobs) if rewards is None else rewards)[choices]
    ids = torch.arange(len(choices)).repeat_interleave(num_samples)
    found = advantages(seen.flatten(), ids, torch.ones_like(ids, dtype=torch.bool)).view(choices.shape) / num_samples
    scores = _scores(mdp, logprobs).sum(1)
    per_string = torch.zeros(mdp.num_strings, dtype=found.dtype).index_add(
        0, choices.flatten(), (weights.unsqueeze(1) * found).flatten()
    )
    expectation = per_string @ scores
    products = scores @ scores.T
    squares = torch.zeros_like(weights)
    for first, second in itertools.product(range(num_samples), repeat=2):
        squares += found[:, first] * found[:, second] * products[choices[:, first], choices[:, second]]
    return _moments(mdp, expectation, (weights * squares).sum())


def step_moments(mdp: TokenMDP, logprobs: Tensor, advantages: Tensor, *, num_samples: int) -> Moments:
    """Moments of `ĝ` for advantages of single steps that depend on the own string alone, `[Y, L]` as in `strings`.

    The K samples are independent, so the variance of one is divided by K. Raises `ValueError` for several prompts.
    """
    _one_prompt(mdp)
    weights = mdp.string_logprobs(logprobs.detach())[0].exp()
    per_string = (_scores(mdp, logprobs) * advantages.detach().unsqueeze(-1)).sum(1)
    expectation = weights @ per_string
    spread = (weights * per_string.square().sum(1)).sum() - expectation.square().sum()
    return Moments(expectation.view(mdp.num_prefixes, mdp.vocabulary), float(spread) / num_samples)


def gae_of_strings(mdp: TokenMDP, logprobs: Tensor, values: Tensor, *, gae_lambda: float) -> Tensor:
    """GAE at every step of every string, `[Y, L]`, with `-β log π/π_ref` in the reward of each token and γ = 1.

    Args:
        mdp: one prompt.
        logprobs: the policy, `[1, S, V]`.
        values: `[S]`, the critic.
        gae_lambda: `λ`.
    """
    trajectory = mdp.enumerate()
    own = logprobs.detach()[0][mdp.string_prefixes, mdp.string_tokens]
    rewards = trajectory.rewards - mdp.coefficient * (own - trajectory.reference_logprobs)
    critic = values[mdp.string_prefixes]
    following = shift_to_next(critic, trajectory.mask)
    advantages, _ = gae(
        rewards,
        critic,
        following,
        trajectory.continues,
        trajectory.truncated,
        trajectory.mask,
        discount=1.0,
        gae_lambda=gae_lambda,
    )
    return advantages


def estimator_table(
    mdp: TokenMDP, logprobs: Tensor, *, num_samples: int, own: Mapping[str, AnswerAdvantages] | None = None
) -> list[EstimatorRow]:
    """Bias and variance of the usual estimators, and of your own, at one policy.

    Args:
        mdp: one prompt, small enough for `Y^K` groups.
        logprobs: the policy, `[1, S, V]`.
        num_samples: `K`, at least 2.
        own: further estimators by name.

    Returns:
        one row per estimator.

    Raises:
        ValueError: if the problem has more than one prompt.
    """
    gradient = exact_gradient(mdp, logprobs)
    mean = (mdp.string_logprobs(logprobs)[0].exp() * penalised_rewards(mdp, logprobs)).sum().item()
    greedy = penalised_rewards(mdp, logprobs)[_greedy_string(mdp, logprobs)].item()
    whole: dict[str, AnswerAdvantages] = {
        "no baseline": lambda rewards, ids, valid: rewards,
        "expected reward": lambda rewards, ids, valid: rewards - mean,
        "greedy roll-out (ReMax)": lambda rewards, ids, valid: rewards - greedy,
        "group mean": lambda rewards, ids, valid: group_mean_advantages(rewards, ids, valid)[0],
        "leave one out (RLOO)": lambda rewards, ids, valid: leave_one_out_advantages(rewards, ids, valid)[0],
        "mean and deviation (GRPO)": lambda *group: group_standardised_advantages(*group)[0],
        **(own or {}),
    }
    exact_values = mdp.evaluate(logprobs).values[0].detach()
    wrong_values = torch.zeros_like(exact_values)
    found = {name: answer_moments(mdp, logprobs, it, num_samples=num_samples) for name, it in whole.items()}
    for label, values in (("V = V^π", exact_values), ("V = 0", wrong_values)):
        for gae_lambda in (1.0, 0.95, 0.0):
            advantages = gae_of_strings(mdp, logprobs, values, gae_lambda=gae_lambda)
            moments = step_moments(mdp, logprobs, advantages, num_samples=num_samples)
            found[f"GAE, λ = {gae_lambda:g}, {label}"] = moments
    size = gradient.norm()
    return [
        EstimatorRow(
            name,
            float((moments.expectation - gradient).norm() / size),
            float((moments.expectation * gradient).sum() / (moments.expectation.norm() * size)),
            moments.variance / float(size) ** 2,
        )
        for name, moments in found.items()
    ]


def format_estimator_table(rows: list[EstimatorRow]) -> str:
    """The table as Markdown, to be printed."""
    lines = ["| estimator | bias | cosine | variance |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {abs(row.bias):.1%} | {row.cosine:.4f} | {row.variance:.2f} |" for row in rows]
    return "\n".join(lines)


def policy_of_strings(mdp: TokenMDP, string_logprobs: Tensor) -> Tensor:
    """The token policy `[P, S, V]` whose distribution over strings is `[P, Y]`: `π(a|s) = P(s a …) / P(s …)`.

    Every prefix needs a positive probability.
    """
    mass = torch.zeros(mdp.num_prompts, mdp.num_prefixes, mdp.vocabulary, dtype=string_logprobs.dtype)
    probabilities = string_logprobs.exp()
    for step in range(mdp.max_length):
        rows = mdp.string_mask[:, step]
        place = mdp.string_prefixes[rows, step] * mdp.vocabulary + mdp.string_tokens[rows, step]
        mass = mass.flatten(1).index_add(1, place, probabilities[:, rows]).view(mass.shape)
    return mass.log() - mass.sum(-1, keepdim=True).log()


def _scores(mdp: TokenMDP, logprobs: Tensor) -> Tensor:
    """`∇ log π(a_t|s_t)` with respect to all logits, for each step of each string: `[Y, L, S · V]`."""
    steps = torch.arange(mdp.num_strings).unsqueeze(1), torch.arange(mdp.max_length)
    scores = torch.zeros(mdp.num_strings, mdp.max_length, mdp.num_prefixes, mdp.vocabulary, dtype=torch.float64)
    scores[*steps, mdp.string_prefixes] = -logprobs.detach()[0].exp()[mdp.string_prefixes]
    scores[*steps, mdp.string_prefixes, mdp.string_tokens] += 1
    return (scores * mdp.string_mask[:, :, None, None]).flatten(2)


def _reward_deviation(mdp: TokenMDP, logprobs: Tensor) -> float:
    """`σ(π)`, the standard deviation of the reward under a policy `[1, S, V]`."""
    chances = mdp.string_logprobs(logprobs.detach()).exp()
    mean = (chances * mdp.string_rewards).sum()
    return float((chances * (mdp.string_rewards - mean).square()).sum().sqrt())


def _moments(mdp: TokenMDP, expectation: Tensor, second: Tensor) -> Moments:
    variance = float(second - expectation.square().sum())
    return Moments(expectation.view(mdp.num_prefixes, mdp.vocabulary), variance)


def _greedy_string(mdp: TokenMDP, logprobs: Tensor) -> int:
    """Place in `strings` of the answer that takes the likeliest token at every step."""
    best = logprobs[0].argmax(-1)
    follows = (best[mdp.string_prefixes] == mdp.string_tokens) | ~mdp.string_mask
    return int(follows.all(1).nonzero()[0])


def _one_prompt(mdp: TokenMDP) -> None:
    if mdp.num_prompts != 1:
        raise ValueError(f"exact moments need a problem with one prompt, got {mdp.num_prompts}")
