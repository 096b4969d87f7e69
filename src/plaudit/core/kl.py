"""Kullback-Leibler divergences: per-token estimators from log-probabilities, exact sums, an adaptive coefficient.

The estimators see samples of the **first** distribution: with `x ~ p` each estimates `KL(p‖q)` from `log p(x)` and
`log q(x)`. So the divergence of a policy from its reference takes `(logprobs, reference_logprobs)` on samples of the
policy, and `KL(π_old‖π_θ)` takes `(old_logprobs, logprobs)` on samples of the old one.

Where the estimator stands decides what it does. As a number to look at, k1 and k3 are unbiased, k2 is not. **Inside the
reward** it is a constant to the policy gradient, which is right for k1 alone, whose own gradient has expectation 0. k2
and k3 are least at the reference and grow on both sides of it: as a fine they make what has become rarer than there
rarer still, and do not pull at all at the reference (`tests/algorithms/test_expectation.py`). As a loss its gradient
matters, and the gradient of an unbiased estimator need not be an unbiased gradient:

| as a loss on samples of the policy `π_θ` itself | expected gradient |
|---|---|
| k1 `log π_θ - log π_ref` | 0: no control at all |
| k2 `½ (log π_θ - log π_ref)²` | `∇KL(π_θ‖π_ref)` of the distribution that was sampled |
| k3 | `∇KL(π_ref‖π_θ)`, the other direction |

"Of the distribution that was sampled" means the whole answer when the log-probabilities of its tokens are summed
first; per token it is the divergence at each state with the states held fixed, which has another optimum.
For `KL(π_old‖π_θ)`, whose samples come from the fixed `π_old`, k1 and k3 both have the right gradient.

Source: Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
"""

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape


def kl_k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`k1 = log p(x) - log q(x)`: unbiased, of either sign.

    Args:
        logprobs: any shape, `log p(x)` in nats; samples `x` come from `p`.
        reference_logprobs: the same shape, `log q(x)`.

    Returns:
        the same shape, in nats.

    Raises:
        ValueError: if shapes differ (`[B]` against `[B, 1]` too).
    """
    expect_shape("reference_logprobs", reference_logprobs, tuple(logprobs.shape))
    return logprobs - reference_logprobs


def kl_k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`k2 = ½ (log p(x) - log q(x))²`: biased, never negative, of low variance. Arguments and shapes as `kl_k1`."""
    return 0.5 * kl_k1(logprobs, reference_logprobs).square()


def kl_k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """`k3 = exp(d) - 1 - d` with `d = log q(x) - log p(x)`: unbiased and never negative.

    Infinite where `q(x)` is more than e^88 times `p(x)` in float32: it is not clamped, since a clamp is a bias.
    Arguments and shapes as `kl_k1`.
    """
    difference = -kl_k1(logprobs, reference_logprobs)
    return torch.expm1(difference) - difference


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}
"""The estimators by their names in configurations."""


def exact_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """`KL(p‖q) = Σ_a p_a (log p_a - log q_a)` of two categorical distributions.

    Args:
        logits_p: `[..., A]`, logits or log-probabilities; -inf for actions that are not allowed.
        logits_q: `[..., A]`.

    Returns:
        `[...]` in nats; infinite where `p` allows an action that `q` forbids.

    Raises:
        ValueError: if shapes differ.
    """
    expect_shape("logits_q", logits_q, tuple(logits_p.shape))
    logprobs_p = torch.log_softmax(logits_p, -1)
    logprobs_q = torch.log_softmax(logits_q, -1)
    impossible = logprobs_p == float("-inf")
    difference = logprobs_p.masked_fill(impossible, 0.0) - logprobs_q.masked_fill(impossible, 0.0)
    return (logprobs_p.exp() * difference).sum(-1)


def categorical_entropy(logits: Tensor) -> Tensor:
    """`H(p) = -Σ_a p_a log p_a`.

    Args:
        logits: `[..., A]`, logits or log-probabilities; -inf for actions that are not allowed.

    Returns:
        `[...]` in nats, differentiable.
    """
    logprobs = torch.log_softmax(logits, -1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == float("-inf"), 0.0)).sum(-1)


def adaptive_kl_coefficient(
    coefficient: float, measured_kl: float, *, target: float, gain: float = 0.1, clip: float = 0.2
) -> float:
    """`β ← β (1 + K_β clip(KL / target - 1, -0.2, 0.2))`.

    Source: Ziegler et al., "Fine-tuning language models from human preferences" (arXiv:1909.08593), section 2.2.

    Args:
        coefficient: scalar `β`, not negative.
        measured_kl: scalar, the divergence of the last batch, in the unit of `target` (per sequence or per token).
        target: scalar above 0.
        gain: `K_β`.
        clip: the largest relative error that counts.

    Returns:
        the next `β`.

    Raises:
        ValueError: if `target` or `clip` is not positive, `gain * clip` is 1 or more (the coefficient could turn
            negative), `coefficient` is negative, or `measured_kl` is not finite.
    """
    if target <= 0 or clip <= 0:
        raise ValueError(f"target and clip must be positive, got target {target} and clip {clip}")
    if not 0 <= gain * clip < 1:
        raise ValueError(f"gain times clip must lie in [0, 1), got {gain} times {clip}")
    if coefficient < 0:
        raise ValueError(f"a KL coefficient must not be negative, got {coefficient}")
    if measured_kl != measured_kl or abs(measured_kl) == float("inf"):
        raise ValueError(f"the measured KL must be finite, got {measured_kl}")
    error = min(max(measured_kl / target - 1, -clip), clip)
    return coefficient * (1 + gain * error)
