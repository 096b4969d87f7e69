"""How an agent tries what it does not believe in: ε-greedy and Boltzmann choices, and schedules."""

import math

import torch
from torch import Tensor


def linear_schedule(step: int, *, start: float, end: float, over: float) -> float:
    """`start + (end - start) · min(1, step / over)`: a straight line over the first `over` steps, then flat.

    Raises:
        ValueError: if the step is negative or `over` not positive.
    """
    if step < 0 or not over > 0:
        raise ValueError(f"step must not be negative and over be positive, got {step} and {over}")
    return start + (end - start) * min(1.0, step / over)


def epsilon_greedy_logprobs(action_values: Tensor, epsilon: float) -> Tensor:
    """`log π(a|s)` with `π = ε/A + (1 - ε) 1[a = argmax Q]`; the first of equally good actions is the greedy one.

    Args:
        action_values: `[..., A]`.
        epsilon: in `[0, 1]`.

    Returns:
        `[..., A]`; -∞ where ε is 0 and the action is not the greedy one.

    Raises:
        ValueError: if ε is no probability.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon is a probability, got {epsilon}")
    actions = action_values.shape[-1]
    probabilities = torch.full_like(action_values, epsilon / actions)
    best = action_values.argmax(-1, keepdim=True)
    return probabilities.scatter(-1, best, 1 - epsilon + epsilon / actions).log()


def boltzmann_logprobs(action_values: Tensor, temperature: float) -> Tensor:
    """`log π(a|s)` with `π ∝ exp(Q(s, a) / T)`: what is nearly as good is tried nearly as often.

    Args:
        action_values: `[..., A]`.
        temperature: `T`, positive; in units of the return.

    Returns:
        `[..., A]`.

    Raises:
        ValueError: if the temperature is not positive and finite.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"a temperature must be positive, got {temperature}")
    return torch.log_softmax(action_values / temperature, -1)
