"""Targets and values of Q-learning: the hard, the double and the soft backup. Targets are constants."""

import torch
from torch import Tensor

from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics, Reduction, expect_shape, reduce_steps


def greedy_values(action_values: Tensor) -> Tensor:
    """`V(s) = max_a Q(s, a)`: the backup of Q-learning, biased upwards where `Q` is noisy.

    Source: Watkins and Dayan (1992); Mnih et al., "Human-level control through deep reinforcement learning" (2015).

    Args:
        action_values: `[..., A]`.

    Returns:
        `[...]`.
    """
    return action_values.amax(-1)


def double_q_values(action_values: Tensor, other_values: Tensor) -> Tensor:
    """`V(s) = Q'(s, argmax_a Q(s, a))`: one estimate chooses the action, another one says what it is worth.

    Where the errors of the two are independent, the choice no longer favours what is overestimated. Source: van
    Hasselt, "Double Q-learning" (2010); van Hasselt, Guez and Silver (arXiv:1509.06461), equation 4, where the learning
    network chooses and the target network values.

    Args:
        action_values: `[..., A]`, of `Q`, which chooses.
        other_values: `[..., A]`, of `Q'`.

    Returns:
        `[...]`.

    Raises:
        ValueError: if the shapes differ.
    """
    expect_shape("other_values", other_values, tuple(action_values.shape))
    chosen = action_values.argmax(-1, keepdim=True)
    return other_values.gather(-1, chosen).squeeze(-1)


def soft_values(action_values: Tensor, reference_logprobs: Tensor, *, coefficient: float) -> Tensor:
    """`V(s) = β log Σ_a π_ref(a|s) exp(Q(s, a) / β)`: the backup whose greedy policy is `π_ref exp((Q - V) / β)`.

    It is `max_π Σ_a π(a) (Q(a) - β log π(a)/π_ref(a))`; `β → 0` gives the hard maximum over what `π_ref` allows,
    `β → ∞` the mean under `π_ref`. Source: Haarnoja et al. (arXiv:1702.08165), equations 5 and 6, with a reference
    policy in the place of the uniform one.

    Args:
        action_values: `[..., A]`.
        reference_logprobs: `[..., A]`, `log π_ref`.
        coefficient: `β`, positive.

    Returns:
        `[...]`.

    Raises:
        ValueError: if the shapes differ, or β is not positive.
    """
    expect_shape("reference_logprobs", reference_logprobs, tuple(action_values.shape))
    if not coefficient > 0:
        raise ValueError(f"the coefficient of a soft backup must be positive, got {coefficient}")
    return coefficient * torch.logsumexp(reference_logprobs + action_values / coefficient, -1)


def bootstrapped_targets(rewards: Tensor, next_values: Tensor, discounts: Tensor) -> Tensor:
    """`y = R + Γ V(s')`, where `R` may be the sum of n rewards and `Γ` is `γⁿ`, or 0 after a true end.

    Args:
        rewards: `[...]`.
        next_values: `[...]`; at a time limit, of the final observation.
        discounts: `[...]`.

    Returns:
        `[...]`, without gradient.

    Raises:
        ValueError: if the shapes differ.
    """
    expect_shape("next_values", next_values, tuple(rewards.shape))
    expect_shape("discounts", discounts, tuple(rewards.shape))
    # A value after an end does not exist and must not matter, not even as infinity.
    return (rewards + discounts * next_values.masked_fill(discounts == 0, 0.0)).detach()


def boltzmann_action_values(
    values: Tensor, logprobs: Tensor, reference_logprobs: Tensor, *, coefficient: float
) -> Tensor:
    """`Q(s, a) = V(s) + β log π(a|s)/π_ref(a|s)`: the action values whose Boltzmann policy is `π` and soft value `V`.

    `π ∝ π_ref exp(Q/β)` and `β log Σ_a π_ref exp(Q/β) = V` hold for any `π` and `V`, so these are no constraints but
    another way to write `Q`. Source: Nachum et al. (arXiv:1702.08892), theorem 1 and section 4; here with a reference.

    Args:
        values: `[...]`, `V(s)`.
        logprobs, reference_logprobs: `[...]`, of the action, under `π` and `π_ref`.
        coefficient: `β`, positive.

    Returns:
        `[...]`.

    Raises:
        ValueError: if the shapes differ, or β is not positive.
    """
    if not coefficient > 0:
        raise ValueError(f"the coefficient of a Boltzmann policy must be positive, got {coefficient}")
    expect_shape("logprobs", logprobs, tuple(values.shape))
    expect_shape("reference_logprobs", reference_logprobs, tuple(values.shape))
    return values + coefficient * (logprobs - reference_logprobs)


def expectile_loss(
    values: Tensor, targets: Tensor, mask: Tensor, *, expectile: float, reduction: Reduction = "per_token"
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = |τ - 1[u_t < 0]| u_t²`, `u_t = target_t - V_t`: the τ-expectile of what a state's actions are worth.

    `τ = ½` is half the squared error, whose minimum is the mean over the actions in the data; `τ → 1` tends to the
    largest of them, without ever asking for the value of an action that is not there. Source: Kostrikov et al.,
    "Implicit Q-learning" (arXiv:2110.06169), equation 5.

    Args:
        values: `[B, T]`, `V(s_t)`.
        targets: `[B, T]`, `Q(s_t, a_t)`; gradients into them are cut.
        mask: `[B, T]` bool.
        expectile: `τ`, in `(0, 1)`.
        reduction: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics `mean_value` and `mean_advantage`, the mean of `u`.

    Raises:
        ValueError: for shapes that do not fit, or an expectile out of range.
    """
    if not 0 < expectile < 1:
        raise ValueError(f"an expectile must lie in (0, 1), got {expectile}")
    expect_shape("targets", targets, tuple(values.shape))
    expect_shape("mask", mask, tuple(values.shape))
    errors = (targets.detach() - values).masked_fill(~mask, 0.0)
    sides = torch.full_like(errors, expectile).masked_fill(errors.detach() < 0, 1 - expectile)
    loss = reduce_steps(sides * errors.square(), mask, reduction)
    known = values.detach().masked_fill(~mask, 0.0)
    return loss, {"mean_value": masked_mean(known, mask), "mean_advantage": masked_mean(errors.detach(), mask)}


def advantage_weighted_logprobs(reference_logprobs: Tensor, action_values: Tensor, *, scale: float) -> Tensor:
    """`log π(a|s)`, `π ∝ π_b exp(κ (Q - V))`: the behaviour, tilted towards what is better than usual.

    `V` is the same for every action and cancels. With soft `Q` and `κ = 1/β` this is the optimum of the penalised
    reward, with hard ones it is not. Source: Snell et al., "Offline RL for natural language generation with implicit
    language Q-learning" (arXiv:2206.11871), section 4.3.

    Args:
        reference_logprobs: `[..., A]`, `log π_b`, or its logits.
        action_values: `[..., A]`.
        scale: `κ`, not negative; 0 is the behaviour itself.

    Returns:
        `[..., A]`.

    Raises:
        ValueError: if the shapes differ, or the scale is negative.
    """
    expect_shape("action_values", action_values, tuple(reference_logprobs.shape))
    if scale < 0:
        raise ValueError(f"the scale of advantages must not be negative, got {scale}")
    return torch.log_softmax(reference_logprobs + scale * action_values, -1)
