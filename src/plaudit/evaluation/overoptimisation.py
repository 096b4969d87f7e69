"""Over-optimisation: the gain in reward over the distance `d = √KL`, and the two published curves through it.

| kind | curve | turns down at |
|---|---|---|
| `best_of_n` | `R(d) = d (α − β d)` | `d = α / 2β` |
| `reinforcement` | `R(d) = d (α − β log d)` | `d = exp(α/β − 1)` |

`R` is the reward minus that of the starting model, so that `R(0) = 0`. Both are linear in `(α, β)`: the fit is plain
least squares with one solution. Source: Gao, Schulman, Hilton 2022, "Scaling laws for reward model overoptimization",
arXiv:2210.10760 (there `d` is the square root of the divergence from the starting policy, in nats).
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from plaudit.evaluation.intervals import Estimate, percentile_interval
from plaudit.evaluation.metrics import FloatArray

CurveKind = Literal["best_of_n", "reinforcement"]


@dataclass(frozen=True)
class CurveFit:
    """A fitted curve.

    Attributes:
        kind: which of the two.
        alpha: the slope at the start (of the first curve; the second is steeper than any line there).
        beta: how fast the gain wears off; negative where it does not.
        peak: the distance at which the curve turns down; infinite where it never does, 0 where it only falls.
        error: root mean squared distance of the points from the curve, in units of the reward.
        points: how many points it went through.
    """

    kind: CurveKind
    alpha: Estimate
    beta: Estimate
    peak: Estimate
    error: float
    points: int


def curve(kind: CurveKind, distance: FloatArray, alpha: FloatArray | float, beta: FloatArray | float) -> FloatArray:
    """`R(d)` of shape `[...]` for distances `[...]`, 0 at 0; the coefficients broadcast."""
    first, second = _columns(kind, distance)
    return np.asarray(alpha * first + beta * second)


def peak(kind: CurveKind, alpha: float, beta: float) -> float:
    """The distance at which the curve is highest: infinite where it never turns down, 0 where it never rises."""
    if math.isnan(alpha) or math.isnan(beta):
        return math.nan
    if beta <= 0:
        return math.inf if alpha > 0 or beta < 0 else 0.0
    if kind == "best_of_n":
        return max(alpha, 0.0) / (2 * beta)
    return math.exp(min(alpha / beta - 1, 700.0))


def least_squares(kind: CurveKind, distance: FloatArray, gain: FloatArray) -> tuple[FloatArray, FloatArray]:
    """`(α, β)` that minimise `Σ_i (R(d_i) − gain_i)²`, for many sets of points at once.

    Args:
        kind: which curve.
        distance: `[..., m]`, not negative.
        gain: `[..., m]`; nan for points that a set does not have.

    Returns:
        two arrays `[...]`; nan where fewer than two different distances above 0 are left.

    Raises:
        ValueError: if shapes differ or a distance is negative.
    """
    if distance.shape != gain.shape:
        raise ValueError(f"distances {distance.shape} and gains {gain.shape} must have one shape")
    if (distance < 0).any():
        raise ValueError(f"a distance is negative: {np.nanmin(distance)}")
    missing = np.isnan(distance) | np.isnan(gain)
    d, y = np.where(missing, 0.0, distance), np.where(missing, 0.0, gain)
    # At distance 0 both columns are 0: such a point says nothing, like one that is missing.
    x, z = _columns(kind, d)
    xx, xz, zz, xy, zy = ((a * b).sum(-1) for a, b in ((x, x), (x, z), (z, z), (x, y), (z, y)))
    determinant = xx * zz - xz * xz
    singular = determinant <= 1e-12 * xx * zz
    safe = np.where(singular, 1.0, determinant)
    alpha = np.where(singular, np.nan, (xy * zz - zy * xz) / safe)
    beta = np.where(singular, np.nan, (zy * xx - xy * xz) / safe)
    return alpha, beta


def fit_curve(
    kind: CurveKind,
    distance: FloatArray,
    gain: FloatArray,
    *,
    distance_draws: FloatArray | None = None,
    gain_draws: FloatArray | None = None,
    confidence: float = 0.95,
) -> CurveFit | None:
    """Fit one curve, with intervals from points that were redrawn together.

    Args:
        kind: which curve.
        distance: `[m]` of the points.
        gain: `[m]` reward minus that of the starting model.
        distance_draws: `[R, m]` the same on resampled prompts; None where distances are known exactly.
        gain_draws: `[R, m]`; None gives no intervals.
        confidence: of the intervals.

    Returns:
        The fit; None with fewer than three points at different distances above 0, through which every such curve
        would go.
    """
    known = ~(np.isnan(distance) | np.isnan(gain))
    if len(np.unique(distance[known & (distance > 0)])) < 3:
        return None
    alpha, beta = least_squares(kind, distance, gain)
    if math.isnan(float(alpha)):
        return None
    residual = (curve(kind, distance, alpha, beta) - gain)[known & (distance > 0)]
    count = int(residual.size)
    nothing = np.full(1, np.nan)
    alphas, betas = nothing, nothing
    if gain_draws is not None:
        distances = np.broadcast_to(distance, gain_draws.shape) if distance_draws is None else distance_draws
        alphas, betas = least_squares(kind, distances, gain_draws)
    peaks = np.array([peak(kind, a, b) for a, b in zip(alphas.tolist(), betas.tolist(), strict=True)])
    found = [(float(alpha), alphas), (float(beta), betas), (peak(kind, float(alpha), float(beta)), peaks)]
    estimates = [Estimate(value, *percentile_interval(draws, confidence), count) for value, draws in found]
    return CurveFit(kind, estimates[0], estimates[1], estimates[2], float(np.sqrt(np.mean(residual**2))), count)


def distance_of(kl: FloatArray) -> FloatArray:
    """`d = √max(KL, 0)`, `[...]`: an estimated divergence may fall below 0, the divergence itself does not."""
    return np.sqrt(np.maximum(kl, 0.0))


def _columns(kind: CurveKind, distance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What `α` and `β` stand before."""
    if kind == "best_of_n":
        return distance, -np.square(distance)
    if kind == "reinforcement":
        positive = distance > 0
        return distance, -np.where(positive, distance * np.log(np.where(positive, distance, 1.0)), 0.0)
    raise ValueError(f"kind is {kind!r}; use 'best_of_n' or 'reinforcement'")
