"""The two curves of over-optimisation: by hand, against scipy, and the coverage of their intervals."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, minimize_scalar

from plaudit.evaluation.overoptimisation import curve, distance_of, fit_curve, least_squares, peak

KINDS = ("best_of_n", "reinforcement")
FORMULAS = {
    "best_of_n": lambda d, a, b: d * (a - b * d),
    "reinforcement": lambda d, a, b: d * (a - b * np.log(d)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_points_on_the_curve_give_the_coefficients_back(kind):
    d = np.array([0.0, 0.3, 1.0, 1.7, 2.5])
    gain = np.concatenate([[0.0], FORMULAS[kind](d[1:], 0.8, 0.25)])
    found = fit_curve(kind, d, gain)
    assert (found.alpha.value, found.beta.value) == pytest.approx((0.8, 0.25))
    assert found.error == pytest.approx(0, abs=1e-12)
    assert found.points == 4
    assert curve(kind, d, 0.8, 0.25) == pytest.approx(gain)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_scipy(kind):
    generator = np.random.default_rng(0)
    d = generator.uniform(0.1, 4, 12)
    gain = FORMULAS[kind](d, 1.1, 0.2) + generator.normal(size=12)
    wanted, _ = curve_fit(FORMULAS[kind], d, gain, p0=(1, 0.1))
    found = fit_curve(kind, d, gain)
    assert (found.alpha.value, found.beta.value) == pytest.approx(tuple(wanted), rel=1e-5)
    residual = FORMULAS[kind](d, *wanted) - gain
    assert found.error == pytest.approx(math.sqrt(np.mean(residual**2)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_where_the_curve_is_highest(kind):
    top = peak(kind, 1.3, 0.4)
    found = minimize_scalar(lambda d: -FORMULAS[kind](d, 1.3, 0.4), bounds=(0.01, 30), method="bounded")
    assert top == pytest.approx(found.x, rel=1e-4)
    assert peak(kind, 1.0, -0.1) == math.inf
    assert peak(kind, 1.0, 0.0) == math.inf
    assert math.isnan(peak(kind, math.nan, 1.0))
    assert peak("best_of_n", -1.0, 0.5) == 0.0


def test_many_sets_at_once_equal_one_at_a_time():
    generator = np.random.default_rng(1)
    d, gain = generator.uniform(0, 3, (5, 6)), generator.normal(size=(5, 6))
    gain[2, 3] = np.nan
    d[3] = 1.5
    alphas, betas = least_squares("reinforcement", d, gain)
    for row in (0, 1, 4):
        alpha, beta = least_squares("reinforcement", d[row], gain[row])
        assert (alphas[row], betas[row]) == pytest.approx((float(alpha), float(beta)))
    kept = ~np.isnan(gain[2])
    alpha, beta = least_squares("reinforcement", d[2, kept], gain[2, kept])
    assert (alphas[2], betas[2]) == pytest.approx((float(alpha), float(beta)))
    assert np.isnan(alphas[3])
    assert np.isnan(betas[3])


def test_intervals_cover_the_truth():
    """400 repetitions of 60 prompts whose gains scatter around the curve: 95 % intervals of both coefficients hold
    the truth between 91 and 98 times in 100 (standard error 1.1), by percentile bootstrap over prompts."""
    generator = np.random.default_rng(7)
    d = np.sqrt([0.2, 0.6, 1.2, 2.0])
    truth = FORMULAS["best_of_n"](d, 1.0, 0.3)
    hits = np.zeros(2)
    for _ in range(400):
        level = generator.normal(size=(60, 1))
        gains = truth + 0.4 * level + 0.3 * generator.normal(size=(60, 4))
        redrawn = generator.integers(0, 60, (300, 60))
        found = fit_curve("best_of_n", d, gains.mean(0), gain_draws=gains[redrawn].mean(1))
        hits += [
            found.alpha.low <= 1.0 <= found.alpha.high,
            found.beta.low <= 0.3 <= found.beta.high,
        ]
    assert ((hits / 400 > 0.91) & (hits / 400 < 0.98)).all()


def test_too_few_points_give_no_fit():
    assert fit_curve("best_of_n", np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.5])) is None
    assert fit_curve("best_of_n", np.array([1.0, 1.0, 2.0, 2.0]), np.ones(4)) is None
    assert fit_curve("best_of_n", np.array([0.0, 0.5, 1.0, np.nan]), np.ones(4)) is None
    found = fit_curve("best_of_n", np.array([0.5, 1.0, 2.0]), np.array([0.4, 0.7, 1.0]))
    assert math.isnan(found.alpha.low)


def test_distances_and_faults():
    assert distance_of(np.array([4.0, -0.1, 0.0])).tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="a distance is negative"):
        least_squares("best_of_n", np.array([-1.0, 1.0]), np.ones(2))
    with pytest.raises(ValueError, match="must have one shape"):
        least_squares("best_of_n", np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match="use 'best_of_n' or 'reinforcement'"):
        curve("ppo", np.ones(2), 1.0, 1.0)
