"""The exact optimum that reinforcement learning aims at, estimated from answers of the starting model alone.

`E[r] − β KL(π‖π_ref)` is highest at the *tilt* `π*(y) = π_ref(y) exp(r(y)/β) / Z`. No policy gains more of the proxy at
the same divergence, so its curve over β is the frontier that runs and best of n are seen against. With N answers
`y_i ~ π_ref` to a prompt its expectations are weighted means, `w_i ∝ exp(r_i/β)`: self-normalised importance sampling.
Finite N biases both down: under a Gaussian reward the estimated points lie 6 to 9 % below the true frontier with N = 16
and 2 to 5 % with 32, up to one nat (`tests/evaluation/test_tilt.py`).
"""

from collections.abc import Sequence

import numpy as np

from plaudit.evaluation.metrics import FloatArray

TARGETS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5)
"""Nats at which the tilt is looked at, as far as the answers reach."""
FEWEST = 4.0
"""Answers that must carry the weights (`1/Σw²`, on average) for an estimate to be worth drawing."""


def tilt_weights(proxy: FloatArray, coefficient: float) -> FloatArray:
    """`w_i = exp(r_i/β) / Σ_j exp(r_j/β)` for each prompt.

    Args:
        proxy: `[P, N]` rewards; nan where an answer has none.
        coefficient: scalar `β`, positive.

    Returns:
        `[P, N]`, rows that add up to 1, 0 where there is no reward; a prompt without any has nan.

    Raises:
        ValueError: for another shape, or a `β` that is not positive.
    """
    if proxy.ndim != 2:
        raise ValueError(f"proxy must be [P, N], got {proxy.shape}")
    if not coefficient > 0:
        raise ValueError(f"the coefficient of a tilt must be positive, got {coefficient}")
    known = ~np.isnan(proxy)
    highest = np.where(known, proxy, -np.inf).max(1, initial=-np.inf, keepdims=True)
    raised = np.where(known, np.exp((proxy - np.where(np.isfinite(highest), highest, 0.0)) / coefficient), 0.0)
    total = raised.sum(1, keepdims=True)
    return np.asarray(raised / np.where(total > 0, total, np.nan))


def tilted_means(proxy: FloatArray, values: FloatArray, coefficient: float) -> FloatArray:
    """`E_π*[g]` of each prompt, estimated by `Σ_i w_i g_i`; biased by a term of order 1/N.

    Args:
        proxy: `[P, N]` what the tilt goes by; nan where an answer has none.
        values: `[P, N]` what is measured, known wherever the proxy is (see `best_of_n.joint`).
        coefficient: scalar `β`, in the units of the proxy.

    Returns:
        `[P]`; nan for prompts without a rewarded answer.

    Raises:
        ValueError: if the shapes differ, or as `tilt_weights`.
    """
    if proxy.shape != values.shape:
        raise ValueError(f"proxy {proxy.shape} and values {values.shape} must have one shape")
    return np.asarray((tilt_weights(proxy, coefficient) * np.where(np.isnan(proxy), 0.0, values)).sum(1))


def tilt_kl(proxy: FloatArray, coefficient: float) -> FloatArray:
    """`KL(π*‖π_ref) = E_π*[r]/β − log Z` of each prompt in nats, estimated by `Σ_i w_i log(N w_i)`.

    At most `log N`, however far away the tilt really is: see `effective_answers`.

    Args:
        proxy: `[P, N]`; nan where an answer has no reward.
        coefficient: scalar `β`.

    Returns:
        `[P]`, nan for prompts without a rewarded answer.
    """
    weights = tilt_weights(proxy, coefficient)
    counts = (~np.isnan(proxy)).sum(1, keepdims=True)
    ratios = np.where(weights > 0, weights * counts, 1.0)
    return np.asarray((weights * np.log(ratios)).sum(1))


def effective_answers(proxy: FloatArray, coefficient: float) -> float:
    """`1/Σ_i w_i²`, averaged over prompts: how many answers carry the estimate (Kong 1992)."""
    return float(np.nanmean(1 / np.square(tilt_weights(proxy, coefficient)).sum(1)))


def tilt_coefficients(
    proxy: FloatArray, targets: Sequence[float] = TARGETS, *, fewest: float = FEWEST
) -> dict[float, float]:
    """The `β` at which the mean divergence is each target, for the targets that so many answers can reach.

    Args:
        proxy: `[P, N]` rewards of the starting model's answers.
        targets: nats per answer, ascending.
        fewest: `effective_answers` below which an estimate is left out.

    Returns:
        `β` by target; empty where all answers to each prompt earn the same.
    """
    known = proxy[~np.isnan(proxy).all(1)]
    spread = float(np.nanstd(known, axis=1).mean()) if known.size else 0.0
    found: dict[float, float] = {}
    if spread == 0.0:
        return found
    for target in targets:
        low, high = 1e-3 * spread, 1e3 * spread
        if float(tilt_kl(known, low).mean()) < target:
            break
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if float(tilt_kl(known, middle).mean()) > target else (low, middle)
        if effective_answers(known, high) < fewest:
            break
        found[target] = high
    return found
