"""Targets and values of Q-learning: the hard, the double and the soft backup. Targets are constants."""

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape


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
    another way to write `Q`. Source: Nachum et al. (arXiv:1702.08892), theorem 1 and section 4, with a reference policy.

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
