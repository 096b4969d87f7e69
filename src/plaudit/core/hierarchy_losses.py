"""Options and goals: values upon arrival, terminations, options summed out of a sequence, goals as directions.

Letters beside the usual ones: `W` options, `D` dimensions of a manager's latent states and goals, `c` its horizon.
Option-critic: Bacon, Harb, Precup, "The option-critic architecture" (arXiv:1609.05140). Feudal networks: Vezhnevets
et al., "FeUdal networks for hierarchical reinforcement learning" (arXiv:1703.01161).
"""

import math

import torch
from torch import Tensor

from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics, Reduction, expect_shape, reduce_steps


def option_state_values(option_values: Tensor, *, exploration: float = 0.0) -> Tensor:
    """`V_Ω(s) = (1 - ε) max_ω Q_Ω(s, ω) + ε mean_ω Q_Ω(s, ω)`: of the ε-greedy policy over options.

    With `ε = 0` it is the greedy value that Bacon et al. use (section "Algorithms and architecture").

    Args:
        option_values: `[..., W]`, `Q_Ω(s, ω)`.
        exploration: `ε`, the probability of a random option.

    Returns:
        `[...]`.

    Raises:
        ValueError: if `ε` is not within 0 and 1.
    """
    if not 0 <= exploration <= 1:
        raise ValueError(f"exploration is a probability, got {exploration}")
    return (1 - exploration) * option_values.max(-1).values + exploration * option_values.mean(-1)


def arrival_values(
    option_values: Tensor, terminations: Tensor, state_values: Tensor, *, deliberation_cost: float = 0.0
) -> Tensor:
    """Value of arriving in s with ω in force: `U(ω, s) = (1 - β_ω(s)) Q_Ω(s, ω) + β_ω(s) (V_Ω(s) - η)`.

    Source: Bacon et al., equation 3; with a cost η of every termination, Harb et al., "When waiting is not an option"
    (arXiv:1709.04571), equation 8.

    Args:
        option_values: `[..., W]`, `Q_Ω(s, ω)`.
        terminations: `[..., W]`, `β_ω(s)`.
        state_values: `[...]`, `V_Ω(s)`, see `option_state_values`.
        deliberation_cost: `η`, in units of the return.

    Returns:
        `[..., W]`, one for each option that may be in force. `β = 1` and `η = 0` give `V_Ω` everywhere.

    Raises:
        ValueError: for shapes that do not fit.
    """
    expect_shape("terminations", terminations, tuple(option_values.shape))
    expect_shape("state_values", state_values, tuple(option_values.shape[:-1]))
    return option_values + terminations * (state_values.unsqueeze(-1) - deliberation_cost - option_values)


def termination_loss(
    terminations: Tensor,
    option_values: Tensor,
    state_values: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction,
    deliberation_cost: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = β_ω(s') (Q_Ω(s', ω) - V_Ω(s') + η)`: an option ends where another one promises more.

    Its gradient is minus the termination gradient: weighted by the discounted occupancy of arrivals `(s', ω)`,
    `-Σ μ(s', ω) ∇β_ω(s') A_Ω(s', ω) = ∇U(ω₀, s₁)`. A cost η makes every option advantageous by that much, so that it
    is kept unless another one is better by more.

    Source: Bacon et al., theorem 2; Harb et al. (arXiv:1709.04571), section 3.3.

    Args:
        terminations: `[B, T]`, `β_ω(s')` of the option in force upon arrival, with gradient.
        option_values: `[B, T]`, `Q_Ω(s', ω)` of that option; gradients into values are cut.
        state_values: `[B, T]`, `V_Ω(s')`.
        mask: `[B, T]` bool, arrivals where the episode goes on.
        reduction: see `plaudit.core.reduction.reduce_steps`.
        deliberation_cost: `η`.

    Returns:
        the scalar loss, and the metrics `termination_rate` (mean of β) and `option_advantage` (mean of A).

    Raises:
        ValueError: for shapes that do not fit.
    """
    for name, tensor in (("option_values", option_values), ("state_values", state_values), ("mask", mask)):
        expect_shape(name, tensor, tuple(terminations.shape))
    advantages = (option_values - state_values).detach().masked_fill(~mask, 0.0)
    kept = terminations.masked_fill(~mask, 0.0)
    loss = reduce_steps(kept * (advantages + deliberation_cost), mask, reduction)
    return loss, {
        "termination_rate": masked_mean(kept.detach(), mask),
        "option_advantage": masked_mean(advantages, mask),
    }


def marginal_option_logprobs(
    action_logprobs: Tensor, choice_logprobs: Tensor, terminations: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of actions with the options summed out, by the forward algorithm.

    With `b_t(ω) = P(ω_t = ω | a_<t)`, `b_0 = μ(·|s_0)`:
    `p(a_t|a_<t) = Σ_ω b_t(ω) π_ω(a_t|s_t)`, `b'_t(ω) = b_t(ω) π_ω(a_t|s_t) / p(a_t|a_<t)` and
    `b_{t+1}(ω) = (1 - β_ω(s_{t+1})) b'_t(ω) + μ(ω|s_{t+1}) Σ_v β_v(s_{t+1}) b'_t(v)`.
    Their sum over a row is `log Σ_{ω_0…ω_T} P(a, ω)`, the likelihood of a hidden Markov model with inputs.

    Source: Rabiner, "A tutorial on hidden Markov models" (1989), equations 19 to 21; for options, Daniel et al.,
    "Probabilistic inference for determining options in reinforcement learning" (2016).

    Args:
        action_logprobs: `[B, T, W]`, `log π_ω(a_t|s_t)`.
        choice_logprobs: `[B, T, W]`, `log μ(ω|s_t)`, the policy over options.
        terminations: `[B, T, W]`, `β_ω(s_t)`; at a row's first counted step nothing is in force and they are not read.
        mask: `[B, T]` bool; the recursion passes through masked steps.

    Returns:
        `[B, T]` log-probabilities of the actions given those before, 0 at masked steps; and `[B, T, W]`, the
        log-beliefs `log b_t` with which each step was taken.

    Raises:
        ValueError: for shapes that do not fit.
    """
    shape = tuple(action_logprobs.shape)
    if len(shape) != 3:
        raise ValueError(f"action_logprobs must be [B, T, W], got {shape}")
    expect_shape("choice_logprobs", choice_logprobs, shape)
    expect_shape("terminations", terminations, shape)
    expect_shape("mask", mask, shape[:2])
    belief, begun = choice_logprobs[:, 0], torch.zeros_like(mask[:, 0])
    found, beliefs = [], []
    for step in range(shape[1]):
        counts = mask[:, step]
        arrived = next_belief(belief, choice_logprobs[:, step], terminations[:, step])
        arrived = torch.where(begun.unsqueeze(1), arrived, choice_logprobs[:, step])
        joint = arrived + action_logprobs[:, step].masked_fill(~counts.unsqueeze(1), 0.0)
        total = torch.logsumexp(joint, 1)
        found.append(total.masked_fill(~counts, 0.0))
        beliefs.append(arrived)
        belief = torch.where(counts.unsqueeze(1), joint - total.unsqueeze(1), belief)
        begun = begun | counts
    return torch.stack(found, 1), torch.stack(beliefs, 1)


def next_belief(belief: Tensor, choice_logprobs: Tensor, terminations: Tensor) -> Tensor:
    """Which option is in force upon arrival: `log [(1 - β_ω) b(ω) + μ(ω) Σ_v β_v b(v)]`.

    Args:
        belief: `[..., W]`, `log b`, of the option that took the last step.
        choice_logprobs: `[..., W]`, `log μ(ω|s)` where one arrives.
        terminations: `[..., W]`, `β_ω(s)` there.

    Returns:
        `[..., W]`.
    """
    tiny = torch.finfo(belief.dtype).tiny
    # The smallest number in place of 0 keeps the logarithm's gradient finite; its share of a belief is nothing.
    stays = belief + (1 - terminations).clamp_min(tiny).log()
    ends = torch.logsumexp(belief + terminations.clamp_min(tiny).log(), -1, keepdim=True)
    return torch.logaddexp(stays, choice_logprobs + ends)


def ending_probabilities(
    beliefs: Tensor, action_logprobs: Tensor, logprobs: Tensor, terminations: Tensor, mask: Tensor
) -> Tensor:
    """How likely the option in force ends upon arrival: `Σ_ω b'_s(ω) β_ω(s_t)`, s being the counted step before t.

    `b'_s(ω) = b_s(ω) π_ω(a_s|s_s) / p(a_s|a_<s)` is what is known of the option once its action has been seen. One over
    their mean is how long options last.

    Args:
        beliefs, logprobs: `[B, T, W]` and `[B, T]`, what `marginal_option_logprobs` has found.
        action_logprobs, terminations: `[B, T, W]`, as they were given to it.
        mask: `[B, T]` bool.

    Returns:
        `[B, T]`; 0 at masked steps and at the first counted step of a row, where nothing is in force.

    Raises:
        ValueError: for shapes that do not fit.
    """
    for name, tensor in (("action_logprobs", action_logprobs), ("terminations", terminations)):
        expect_shape(name, tensor, tuple(beliefs.shape))
    for name, tensor in (("logprobs", logprobs), ("mask", mask)):
        expect_shape(name, tensor, tuple(beliefs.shape[:2]))
    places = torch.arange(mask.shape[1], device=mask.device)
    latest = torch.where(mask, places, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    known = (beliefs + action_logprobs - logprobs.unsqueeze(-1)).exp()
    in_force = known.gather(1, before.clamp_min(0).unsqueeze(-1).expand_as(known))
    return (in_force * terminations).sum(-1).masked_fill(~mask | (before < 0), 0.0)


def option_metrics(options: Tensor, terminations: Tensor, mask: Tensor, *, num_options: int) -> Metrics:
    """How options are used: `usage_entropy` in shares of `log W`, `most_used`, `duration`, and whether they collapsed.

    `duration = 1 / mean β`, the steps between two terminations. `collapsed` is 1 where one option takes more than
    95 % of the steps, or where options last less than 1.05 steps; both leave nothing that options could add.

    Args:
        options: `[B, T]` int64, the option in force at each step.
        terminations: `[B, T]`, `β_ω(s')` of that option where the step leads; not read at masked steps.
        mask: `[B, T]` bool.
        num_options: `W`.

    Returns:
        scalars without gradient: the four above and `share_0` … `share_{W-1}`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    expect_shape("terminations", terminations, tuple(options.shape))
    expect_shape("mask", mask, tuple(options.shape))
    counts = torch.bincount(options[mask], minlength=num_options).to(terminations.dtype)
    shares = counts / counts.sum().clamp_min(1)
    entropy = torch.special.entr(shares).sum() / math.log(num_options) if num_options > 1 else shares.new_zeros(())
    duration = 1 / masked_mean(terminations.detach(), mask).clamp_min(1e-6)
    collapsed = ((shares.max() > 0.95) & (num_options > 1)) | (duration < 1.05)
    found = {f"share_{option}": share for option, share in enumerate(shares)}
    return found | {
        "usage_entropy": entropy,
        "most_used": shares.max(),
        "duration": duration,
        "collapsed": collapsed.to(shares.dtype),
    }


def cosine(first: Tensor, second: Tensor, *, epsilon: float = 1e-8) -> Tensor:
    """`d_cos(a, b) = aᵀb / (|a| |b|)`, 0 where one of them is 0.

    Args:
        first, second: `[..., D]`.
        epsilon: least length that is divided by.

    Returns:
        `[...]`, within -1 and 1.
    """
    return torch.nn.functional.cosine_similarity(first, second, -1, epsilon)


def goal_direction_loss(
    transitions: Tensor, goals: Tensor, advantages: Tensor, mask: Tensor, *, reduction: Reduction
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = -A^M_t d_cos(s_{t+c} - s_t, g_t(θ))`: the transition policy gradient of a manager.

    It is the policy gradient where the direction of a transition is von Mises-Fisher distributed around the goal,
    `p(s_{t+c} | s_t, g_t) ∝ exp(d_cos(s_{t+c} - s_t, g_t))`.

    Source: Vezhnevets et al., equations 7 and 10. As there, the states' dependence on θ is ignored, since a manager
    could otherwise move its own latent space in place of the worker.

    Args:
        transitions: `[B, T, D]`, `s_{t+c} - s_t`; gradients into them are cut.
        goals: `[B, T, D]`, with gradient; their length does not matter.
        advantages: `[B, T]`, `A^M_t = R_t - V^M(s_t)`, constants.
        mask: `[B, T]` bool.
        reduction: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metric `goal_cosine`, how well goals foretold the transitions.

    Raises:
        ValueError: for shapes that do not fit.
    """
    expect_shape("transitions", transitions, tuple(goals.shape))
    expect_shape("advantages", advantages, tuple(goals.shape[:-1]))
    expect_shape("mask", mask, tuple(goals.shape[:-1]))
    apart = ~mask.unsqueeze(-1)
    followed = cosine(transitions.detach().masked_fill(apart, 0.0), goals.masked_fill(apart, 0.0))
    loss = reduce_steps(-advantages.detach().masked_fill(~mask, 0.0) * followed, mask, reduction)
    return loss, {"goal_cosine": masked_mean(followed.detach(), mask)}


def horizon_transitions(states: Tensor, arrivals: Tensor, ends: Tensor, *, horizon: int) -> Tensor:
    """`s_{t+c} - s_t`, with the last state of the episode or of the data where those end sooner.

    Args:
        states: `[B, T, D]`, `s_t`.
        arrivals: `[B, T, D]`, `s_{t+1}`; where an episode ended, its final state.
        ends: `[B, T]` bool, steps after which another episode begins.
        horizon: `c`.

    Returns:
        `[B, T, D]`.

    Raises:
        ValueError: for shapes that do not fit, or a horizon below 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    expect_shape("arrivals", arrivals, tuple(states.shape))
    expect_shape("ends", ends, tuple(states.shape[:-1]))
    steps = states.shape[1]
    places = torch.arange(steps, device=states.device)
    nearest = torch.where(ends, places, steps - 1).flip(1).cummin(1).values.flip(1)
    last = nearest.minimum((places + horizon - 1).clamp_max(steps - 1))
    return arrivals.gather(1, last.unsqueeze(-1).expand_as(arrivals)) - states


def intrinsic_rewards(arrivals: Tensor, states: Tensor, goals: Tensor, episodes: Tensor, *, horizon: int) -> Tensor:
    """`r^I_t = (1/c) Σ_{i=1}^c d_cos(s_{t+1} - s_{t+1-i}, g_{t+1-i})`: how far a worker went where it was sent.

    Source: Vezhnevets et al., equation 8, written for the step that leads to `s_{t+1}`. Goals from before the episode
    are left out, and the divisor stays c.

    Args:
        arrivals: `[B, T, D]`, `s_{t+1}`; where an episode ended, its final state.
        states: `[B, c-1+T, D]`, `s`, with the c-1 steps before the first in front.
        goals: `[B, c-1+T, D]`, the goals of the same steps.
        episodes: `[B, c-1+T]` int64, which episode each of those steps belongs to; any other number where there is
            none.
        horizon: `c`.

    Returns:
        `[B, T]` without gradient, within -1 and 1.

    Raises:
        ValueError: for shapes that do not fit, or a horizon below 1.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    rows, steps, size = arrivals.shape
    expect_shape("states", states, (rows, horizon - 1 + steps, size))
    expect_shape("goals", goals, tuple(states.shape))
    expect_shape("episodes", episodes, tuple(states.shape[:-1]))
    total = torch.zeros_like(arrivals[..., 0])
    current = episodes[:, horizon - 1 :]
    for back in range(horizon):
        window = slice(horizon - 1 - back, horizon - 1 - back + steps)
        followed = cosine(arrivals.detach() - states[:, window].detach(), goals[:, window].detach())
        total = total + followed.masked_fill(episodes[:, window] != current, 0.0)
    return total / horizon
