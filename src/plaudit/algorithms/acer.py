"""ACER: an actor-critic that learns from every segment several times (Wang et al. 2016, arXiv:1611.01224).

At each step of a segment that a policy μ played, with the policy π as it is now,

    `Q^ret_t = r_t + γ [V(s_{t+1}) + min(1, ρ_{t+1}) (Q^ret_{t+1} - Q(s_{t+1}, a_{t+1}))]`
    `g_t = min(c, ρ_t) (Q^ret_t - V) ∇ log π(a_t) + Σ_a [1 - c/ρ_t(a)]₊ π(a) (Q(a) - V) ∇ log π(a)`
    `z_t = g_t - max(0, (k·g_t - δ)/‖k‖²) k`,  `k = ∇ KL(π_average‖π)`

(equations 5, 9 and 12) the policy moves along `z_t`, the critic along `(Q^ret_t - Q(s_t, a_t)) ∇Q`, and
`V = Σ_a π(a) Q(a)`. One update on fresh experience is followed by Poisson-many on replayed segments (algorithm 1).

Departures: a time limit bootstraps from the environment's final observation and cuts the trace; segments of all
environments are drawn alike instead of one for each environment; environments side by side and one learner instead of
asynchronous ones; actor and critic are two networks; the entropy bonus is within the trust region; the penalty towards
a reference is recomputed under the current policy (`plaudit.core.acer_losses`). Continuous actions (the paper's section
5) are left out, since nothing here has them.
"""

import math

import torch
from torch import Tensor

from plaudit.configs.acer import AcerOptions
from plaudit.core.acer_losses import action_utilities, corrected_score_weights, trust_region_policy_loss
from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics
from plaudit.core.returns import retrace, shift_to_next
from plaudit.core.value_losses import squared_value_loss
from plaudit.rollout.action_values import ActionTables
from plaudit.rollout.trajectory import Trajectory


def acer_loss(
    tables: ActionTables,
    trajectory: Trajectory,
    options: AcerOptions,
    *,
    next_values: Tensor | None = None,
    kl_coefficient: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The loss of one update on fresh or replayed segments: minus `z · φ`, plus `c₁ ½ (Q^ret - Q)²`, means over steps.

    Args:
        tables: what policy, critic, average and reference say of each action.
        trajectory: `[B, T]`; `rewards` without a penalty, `behaviour_logprobs` of the actions that were taken,
            `behaviour_logits` of all, or of those in `behaviour_actions`.
        options: c, λ, δ and the coefficients.
        next_values: `[B, T]`, `V(s_{t+1})` by the current networks; None where every row is whole and the value of the
            next counted step is meant.
        kl_coefficient: `β` of the penalty towards the reference.

    Returns:
        the scalar loss, and metrics by the names under which they are logged.
    """
    mask = trajectory.mask
    truncation = math.inf if options.truncation is None else options.truncation
    actions = trajectory.actions[mask]
    targets, weights, ratios = targets_and_weights(
        tables, trajectory, options, next_values=next_values, kl_coefficient=kl_coefficient
    )
    counted = torch.ones_like(actions, dtype=torch.bool).unsqueeze(0)
    policy_loss, found = trust_region_policy_loss(
        tables.logprobs.unsqueeze(0),
        weights.unsqueeze(0),
        counted,
        average_logprobs=None if tables.average_logprobs is None else tables.average_logprobs.unsqueeze(0),
        limit=math.inf if options.trust_region is None else options.trust_region,
        statistics=options.trust_region_statistics,
        entropy_coefficient=options.entropy_coefficient,
    )
    chosen = tables.action_values.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    value_loss, errors = squared_value_loss(chosen.unsqueeze(0), targets.unsqueeze(0), counted)
    loss = policy_loss + 0.5 * options.value_coefficient * value_loss
    metrics = {f"policy/{name}": value for name, value in found.items() if name != "num_steps"}
    return loss, metrics | {
        "policy/loss": policy_loss.detach(),
        "value/loss": value_loss.detach(),
        "value/explained_variance": errors["explained_variance"],
        "replay/ratio_mean": ratios.mean(),
        "replay/ratio_max": ratios.max(),
        "replay/truncated_fraction": (ratios > truncation).to(ratios.dtype).mean(),
        "replay/correction": correction_share(weights, actions),
    }


@torch.no_grad()
def targets_and_weights(
    tables: ActionTables,
    trajectory: Trajectory,
    options: AcerOptions,
    *,
    next_values: Tensor | None,
    kl_coefficient: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`Q^ret [N]`, the weight `[N, A]` of each `∇ log π(a)`, and `ρ [N]` of the `N` counted steps: see `acer_loss`."""
    mask, actions = trajectory.mask, trajectory.actions[trajectory.mask]
    place = actions.unsqueeze(-1)
    utilities, values = action_utilities(
        tables.logprobs, tables.action_values, tables.reference_logprobs, coefficient=kl_coefficient
    )
    chosen = tables.action_values.gather(-1, place).squeeze(-1)
    log_ratios = tables.logprobs.gather(-1, place).squeeze(-1) - trajectory.behaviour_logprobs[mask]

    def table(entries: Tensor) -> Tensor:
        return entries.new_zeros(mask.shape).masked_scatter(mask, entries)

    targets = retrace(
        trajectory.rewards.to(chosen.dtype),
        table(chosen),
        shift_to_next(table(values), mask) if next_values is None else next_values,
        trajectory.continues,
        trajectory.truncated,
        mask,
        log_ratios=table(log_ratios),
        discount=options.discount,
        retrace_lambda=options.retrace_lambda,
    )[mask]
    # The penalty of the action itself is in its utility and not in Q.
    penalties = chosen - utilities.gather(-1, place).squeeze(-1)
    weights = corrected_score_weights(
        tables.logprobs,
        behaviour_table(trajectory, tables.logprobs.shape[-1]).to(tables.logprobs.dtype),
        actions,
        targets - penalties - values,
        utilities - values.unsqueeze(-1),
        truncation=math.inf if options.truncation is None else options.truncation,
    )
    return targets, weights, log_ratios.exp()


def behaviour_table(trajectory: Trajectory, num_actions: int) -> Tensor:
    """`log μ` of every action at the counted steps, `[N, A]`; +inf where it was not kept.

    Raises:
        ValueError: if the trajectory has no `behaviour_logits`.
    """
    if trajectory.behaviour_logits is None:
        raise ValueError("the behaviour's whole distributions are needed: trajectory.behaviour_logits is None")
    mask = trajectory.mask
    kept = trajectory.behaviour_logits[mask]
    if trajectory.behaviour_actions is None:
        return torch.log_softmax(kept, -1)
    table = kept.new_full((len(kept), num_actions), float("inf"))
    table.scatter_(-1, trajectory.behaviour_actions[mask], kept)
    # The action itself is always known, among the likeliest or not.
    return table.scatter_(-1, trajectory.actions[mask].unsqueeze(-1), trajectory.behaviour_logprobs[mask].unsqueeze(-1))


def correction_share(weights: Tensor, actions: Tensor) -> Tensor:
    """The share of the absolute weights `[N, A]` that stands at actions `[N]` that were not sampled; 0 without any."""
    sizes = weights.abs()
    sampled = sizes.gather(-1, actions.unsqueeze(-1)).sum()
    total = sizes.sum()
    share = 1 - sampled / total.clamp_min(torch.finfo(total.dtype).tiny)
    return masked_mean(share.clamp_min(0.0), total > 0)
